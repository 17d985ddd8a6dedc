"""Apps in the styles that public LangGraph repositories have; none imports marft_graph.

What a prompt holds of an earlier answer, it holds word for word: a test can see which answers a
prompt was made from.
"""

from __future__ import annotations

import asyncio
import operator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypedDict

from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain.chat_models import init_chat_model
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel, Field

from tests.apps import model


@tool
def search(query: str) -> str:
    """Search the web."""
    return f"found: {query}"


# A research team whose model is chosen per call, with sub-agents that a tool node runs side by side

llms = SimpleNamespace(
    configurable=init_chat_model(
        configurable_fields=("model", "max_tokens", "api_key"), model_provider="openai"
    )
)
CHOSEN = {"model": "gpt-4o", "max_tokens": 512, "api_key": "not-set"}


class Brief(BaseModel):
    """What is to be found out."""

    research_brief: str


class ResearchState(TypedDict, total=False):
    """State of the outer graph."""

    question: str
    brief: str
    topics: list[str]
    notes: Annotated[list[str], operator.add]
    report: str


class ResearcherState(TypedDict, total=False):
    """State of one researcher."""

    topic: str
    findings: Annotated[list[str], operator.add]
    summary: str


def research_team() -> Any:
    """In the style of open_deep_research: everything asks a configurable model."""

    async def write_brief(state: ResearchState) -> Any:
        asked = llms.configurable.with_structured_output(Brief).with_config(CHOSEN)
        made = await asked.ainvoke([HumanMessage(state["question"])])
        return {"brief": made.research_brief}

    async def researcher(state: ResearcherState) -> Any:
        said = await llms.configurable.with_config(CHOSEN).ainvoke(state["topic"])
        return {"findings": [said.text]}

    async def compress(state: ResearcherState) -> Any:
        said = await llms.configurable.with_config(CHOSEN).ainvoke(str(state["findings"]))
        return {"summary": said.text}

    inner = StateGraph(ResearcherState)
    inner.add_node(researcher).add_node(compress)
    inner.add_edge(START, "researcher").add_edge("researcher", "compress")
    one_researcher = inner.compile()

    async def supervisor(state: ResearchState) -> Any:
        said = await llms.configurable.with_config(CHOSEN).ainvoke(state["brief"])
        return {"topics": [f"part {part}: {said.text}" for part in (1, 2)]}

    async def supervisor_tools(state: ResearchState) -> Any:
        runs = (one_researcher.ainvoke({"topic": topic}) for topic in state["topics"])
        return {"notes": [each["summary"] for each in await asyncio.gather(*runs)]}

    async def final_report(state: ResearchState) -> Any:
        said = await llms.configurable.with_config(CHOSEN).ainvoke(str(state["notes"]))
        return {"report": said.text}

    builder = StateGraph(ResearchState)
    for node in (write_brief, supervisor, supervisor_tools, final_report):
        builder.add_node(node)
    builder.add_edge(START, "write_brief").add_edge("write_brief", "supervisor")
    builder.add_edge("supervisor", "supervisor_tools")
    builder.add_edge("supervisor_tools", "final_report").add_edge("final_report", END)
    return builder.compile()


# An email assistant that triages, drafts, asks a person, and sends


class Triage(BaseModel):
    """What to do with an email."""

    reasoning: str
    classification: Literal["respond", "ignore"]


class EmailState(MessagesState):
    """State of the email assistant."""

    email: str
    reasoning: str


def email_assistant() -> Any:
    """In the style of agents-from-scratch: a router, then an agent whose tool needs approval."""

    @tool
    def write_email(content: str) -> str:
        """Write an email, once a person has agreed."""
        verdict = interrupt({"action": "write_email", "content": content})
        return f"{verdict}: {content}"

    def triage_router(state: EmailState) -> Command[Literal["response_agent", "__end__"]]:
        made = model.with_structured_output(Triage).invoke(state["email"])
        if made.classification == "ignore":
            return Command(goto=END)
        return Command(
            goto="response_agent",
            update={"messages": [("user", f"Answer: {state['email']} ({made.reasoning})")]},
        )

    responder = create_agent(model, [write_email], name="responder")
    builder = StateGraph(EmailState)
    builder.add_node(triage_router).add_node("response_agent", responder)
    builder.add_edge(START, "triage_router").add_edge("response_agent", END)
    return builder.compile(checkpointer=InMemorySaver())


# A chatbot that remembers, with a store and a runtime context


@dataclass
class Person:
    """Who is talked to."""

    user: str = "Ada"


def memory_agent() -> Any:
    """In the style of memory-agent: reads its store, answers, and keeps what it learnt."""

    def call_model(state: MessagesState, runtime: Runtime[Person]) -> Any:
        space = ("memories", runtime.context.user)
        assert runtime.store is not None
        known = [item.value["text"] for item in runtime.store.search(space)]
        system = SystemMessage(f"You talk to {runtime.context.user}, of whom you know {known}.")
        return {"messages": [model.invoke([system, *state["messages"]])]}

    def store_memory(state: MessagesState, runtime: Runtime[Person]) -> Any:
        made = model.invoke([("system", "What is worth keeping?"), *state["messages"]])
        assert runtime.store is not None
        runtime.store.put(("memories", runtime.context.user), "last", {"text": made.text})
        return {}

    from langgraph.store.memory import InMemoryStore

    builder = StateGraph(MessagesState, context_schema=Person)
    builder.add_node(call_model).add_node(store_memory)
    builder.add_edge(START, "call_model").add_edge("call_model", "store_memory")
    return builder.compile(store=InMemoryStore())


# Retrieval


class RagState(TypedDict, total=False):
    """State of the retrieval apps."""

    question: str
    documents: list[str]
    generation: str


def rag() -> Any:
    """Retrieve, then answer."""

    def retrieve(state: RagState) -> Any:
        return {"documents": [f"about {state['question']}"]}

    def generate(state: RagState) -> Any:
        return {"generation": model.invoke(f"{state['documents']} {state['question']}").text}

    builder = StateGraph(RagState).add_node(retrieve).add_node(generate)
    builder.add_edge(START, "retrieve").add_edge("retrieve", "generate")
    return builder.compile()


class Route(BaseModel):
    """Where a question goes."""

    source: Literal["vectorstore", "web"]


class Grade(BaseModel):
    """Whether a document helps."""

    reason: str
    binary_score: Literal["yes", "no"]


def adaptive_rag() -> Any:
    """Routing functions ask the model: at the entry, and after the answer."""

    def route_question(state: RagState) -> Literal["retrieve", "web_search"]:
        made = model.with_structured_output(Route).invoke(state["question"])
        return "retrieve" if made.source == "vectorstore" else "web_search"

    def retrieve(state: RagState) -> Any:
        return {"documents": [f"about {state['question']}"]}

    def web_search(state: RagState) -> Any:
        return {"documents": [f"web: {state['question']}"]}

    def generate(state: RagState) -> Any:
        return {"generation": model.invoke(f"{state['documents']} {state['question']}").text}

    def check_answer(state: RagState) -> Literal["generate", "__end__"]:
        made = model.with_structured_output(Grade).invoke(state["generation"])
        return END if made.binary_score == "yes" else "generate"

    builder = StateGraph(RagState)
    builder.add_node(retrieve).add_node(web_search).add_node(generate)
    builder.add_conditional_edges(START, route_question)
    builder.add_edge("retrieve", "generate").add_edge("web_search", "generate")
    builder.add_conditional_edges("generate", check_answer)
    return builder.compile()


def corrective_rag() -> Any:
    """Documents are graded one by one; a poor lot leads to a better question."""

    def retrieve(state: RagState) -> Any:
        return {"documents": [f"{n}: {state['question']}" for n in range(2)]}

    def grade_documents(state: RagState) -> Any:
        grader = model.with_structured_output(Grade)
        graded = [(document, grader.invoke(document)) for document in state["documents"]]
        return {"documents": [f"{d} ({g.reason})" for d, g in graded if g.binary_score == "yes"]}

    def transform_query(state: RagState) -> Any:
        return {"question": model.invoke(f"Ask better: {state['question']}").text}

    def generate(state: RagState) -> Any:
        return {"generation": model.invoke(f"{state['question']} {state['documents']}").text}

    def decide(state: RagState) -> str:
        return "generate" if state["documents"] else "transform_query"

    builder = StateGraph(RagState)
    for node in (retrieve, grade_documents, transform_query, generate):
        builder.add_node(node)
    builder.add_edge(START, "retrieve").add_edge("retrieve", "grade_documents")
    builder.add_conditional_edges("grade_documents", decide, ["generate", "transform_query"])
    builder.add_edge("transform_query", "retrieve").add_edge("generate", END)
    return builder.compile()


# Code, SQL and plans


class CodeState(TypedDict, total=False):
    """State of the code agent."""

    task: str
    code: str
    error: str
    notes: Annotated[list[str], operator.add]
    tries: int


class Code(BaseModel):
    """A solution."""

    prefix: str
    code: str


class Coder:
    """A code agent written as a class, as many apps are."""

    llm = model

    def __init__(self) -> None:
        self.chain = self.llm.with_structured_output(Code)

    def generate(self, state: CodeState) -> Any:
        """Write code, with what went wrong before."""
        made = self.chain.invoke(f"{state['task']} {state.get('error')} {state.get('notes')}")
        return {"code": made.code}

    def check_code(self, state: CodeState) -> Any:
        """Run it."""
        tries = state.get("tries", 0) + 1
        return {"error": "" if tries > 1 else f"fails: {state['code']}", "tries": tries}

    def reflect(self, state: CodeState) -> Any:
        """Think about the error."""
        return {"notes": [self.llm.invoke(state["error"]).text]}

    def decide(self, state: CodeState) -> str:
        """On or back."""
        return "reflect" if state["error"] else END


def code_agent() -> Any:
    """Write, run, reflect, write again."""
    coder = Coder()
    builder = StateGraph(CodeState)
    for node in (coder.generate, coder.check_code, coder.reflect):
        builder.add_node(node)
    builder.add_edge(START, "generate").add_edge("generate", "check_code")
    builder.add_conditional_edges("check_code", coder.decide, ["reflect", END])
    builder.add_edge("reflect", "generate")
    return builder.compile()


def sql_agent() -> Any:
    """A node that calls a tool by itself, then nodes that must and may call one."""

    @tool
    def run_query(sql: str) -> str:
        """Run a query."""
        return f"rows of {sql}"

    def list_tables(state: MessagesState) -> Any:
        return {"messages": [("user", "tables: a, b")]}

    def generate_query(state: MessagesState) -> Any:
        return {"messages": [model.bind_tools([run_query]).invoke(state["messages"])]}

    def check_query(state: MessagesState) -> Any:
        call = state["messages"][-1].tool_calls[0]
        checker = model.bind_tools([run_query], tool_choice="any")
        said = checker.invoke([("system", "Check."), ("user", str(call["args"]["sql"]))])
        return {"messages": [said]}

    from langgraph.prebuilt import ToolNode

    def should_continue(state: MessagesState) -> Literal["check_query", "__end__"]:
        return "check_query" if state["messages"][-1].tool_calls else END

    builder = StateGraph(MessagesState)
    builder.add_node(list_tables).add_node(generate_query).add_node(check_query)
    builder.add_node("run_query", ToolNode([run_query]))
    builder.add_edge(START, "list_tables").add_edge("list_tables", "generate_query")
    builder.add_conditional_edges("generate_query", should_continue)
    builder.add_edge("check_query", "run_query").add_edge("run_query", "generate_query")
    return builder.compile()


class Plan(BaseModel):
    """Steps to do."""

    steps: list[str]


class PlanState(TypedDict, total=False):
    """State of the planner."""

    goal: str
    plan: list[str]
    past_steps: Annotated[list[str], operator.add]
    response: str


def plan_and_execute() -> Any:
    """A plan, an agent for each step, and a new plan or the end."""
    executor = create_agent(model, [search])

    async def planner(state: PlanState) -> Any:
        made = await model.with_structured_output(Plan).ainvoke(state["goal"])
        return {"plan": made.steps}

    async def execute_step(state: PlanState) -> Any:
        said = await executor.ainvoke({"messages": [("user", state["plan"][0])]})
        return {"past_steps": [said["messages"][-1].text]}

    async def replan(state: PlanState) -> Any:
        asked = f"{state['goal']} {state['past_steps']}"
        if len(state["past_steps"]) > 1:
            return {"response": (await model.ainvoke(asked)).text}
        return {"plan": (await model.with_structured_output(Plan).ainvoke(asked)).steps}

    builder = StateGraph(PlanState)
    builder.add_node("planner", planner).add_node("agent", execute_step)
    builder.add_node("replan", replan)
    builder.add_edge(START, "planner").add_edge("planner", "agent").add_edge("agent", "replan")
    builder.add_conditional_edges(
        "replan", lambda state: END if state.get("response") else "agent", ["agent", END]
    )
    return builder.compile()


# Many at once


class Subjects(BaseModel):
    """What to joke about."""

    subjects: list[str]


class JokesState(TypedDict, total=False):
    """State of the joke writers."""

    topic: str
    subjects: list[str]
    jokes: Annotated[list[str], operator.add]
    best: str


class OneJoke(TypedDict):
    """What one writer is sent."""

    subject: str


def map_reduce() -> Any:
    """Subjects, a joke for each side by side, and the best."""

    def generate_topics(state: JokesState) -> Any:
        made = model.with_structured_output(Subjects).invoke(state["topic"])
        return {"subjects": [f"{subject} {n}" for subject in made.subjects for n in range(2)]}

    def to_jokes(state: JokesState) -> list[Send]:
        return [Send("generate_joke", {"subject": subject}) for subject in state["subjects"]]

    def generate_joke(state: OneJoke) -> Any:
        return {"jokes": [model.invoke(state["subject"]).text]}

    def best_joke(state: JokesState) -> Any:
        return {"best": model.invoke("\n".join(state["jokes"])).text}

    builder = StateGraph(JokesState)
    builder.add_node(generate_topics).add_node(generate_joke).add_node(best_joke)
    builder.add_edge(START, "generate_topics")
    builder.add_conditional_edges("generate_topics", to_jokes, ["generate_joke"])
    builder.add_edge("generate_joke", "best_joke")
    return builder.compile()


class EssayState(TypedDict, total=False):
    """State of the essay writers."""

    topic: str
    sections: list[str]
    essay: str


def thread_pool_essay() -> Any:
    """Sections written side by side in a pool of threads."""

    def write_sections(state: EssayState) -> Any:
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(lambda n: model.invoke(f"{n}: {state['topic']}").text, range(2))
            return {"sections": list(parts)}

    def join(state: EssayState) -> Any:
        return {"essay": model.invoke(" ".join(state["sections"])).text}

    builder = StateGraph(EssayState).add_node(write_sections).add_node(join)
    builder.add_edge(START, "write_sections").add_edge("write_sections", "join")
    return builder.compile()


def functional_essay() -> Any:
    """LangGraph's functional API: tasks, one of them several times at once."""

    @task
    def outline(topic: str) -> str:
        return model.invoke(f"Outline {topic}").text

    @task
    async def section(heading: str) -> str:
        return (await model.ainvoke(heading)).text

    @entrypoint()
    async def essay(topic: str) -> str:
        headings = await outline(topic)
        parts = await asyncio.gather(*(section(f"{n} {headings}") for n in range(2)))
        return (await model.ainvoke(f"Join {parts}")).text

    return essay


# Agents that hand over and agents behind tools


def subagents_as_tools() -> Any:
    """LangChain's multi-agent pattern: a lead whose tools run agents of their own."""
    calendar = create_agent(model, [search], system_prompt="Calendar.", name="calendar_agent")
    mail = create_agent(model, [], system_prompt="Mail.", name="mail_agent")

    @tool
    def schedule_event(request: str) -> str:
        """Schedule an event."""
        return calendar.invoke({"messages": [("user", request)]})["messages"][-1].text

    @tool
    async def manage_mail(request: str) -> str:
        """Write a mail."""
        done = await mail.ainvoke({"messages": [("user", request)]})
        return done["messages"][-1].text

    return create_agent(model, [schedule_event, manage_mail], system_prompt="Lead.", name="lead")


def deep_agent() -> Any:
    """In the style of deepagents: one `task` tool that runs the sub-agent it is told."""
    subagents = {
        "researcher": create_agent(model, [search], system_prompt="Find.", name="researcher"),
        "critic": create_agent(model, [], system_prompt="Judge.", name="critic"),
    }

    @tool
    def task(description: str, subagent_type: Literal["researcher", "critic"]) -> str:
        """Give work to a sub-agent."""
        done = subagents[subagent_type].invoke({"messages": [("user", description)]})
        return done["messages"][-1].text

    @tool
    def write_todos(todos: list[str]) -> str:
        """Keep a list."""
        return f"todos: {todos}"

    return create_agent(model, [task, write_todos], system_prompt="Go deep.", name="deep")


def summarizing_chat() -> Any:
    """A middleware asks a second model once the talk grows long."""
    keeper = SummarizationMiddleware(model=model, trigger=("messages", 6), keep=("messages", 1))
    return create_agent(model, [search], middleware=[keeper])


class Desk(MessagesState):
    """State of the customer support desk."""

    active: str


def handoffs() -> Any:
    """Agents as subgraphs that leave for each other by `Command(graph=PARENT)`."""

    def desk(name: str, other: str) -> Any:
        def work(state: Desk) -> Command[Any]:
            said = model.invoke([("system", name), *state["messages"]])
            if len(state["messages"]) > 2:
                return Command(graph=Command.PARENT, goto=END, update={"messages": [said]})
            return Command(graph=Command.PARENT, goto=other, update={"messages": [said]})

        return StateGraph(Desk).add_node("work", work).add_edge(START, "work").compile()

    builder = StateGraph(Desk)
    builder.add_node(
        "sales desk", desk("sales", "support desk"), destinations=("support desk", END)
    )
    builder.add_node(
        "support desk", desk("support", "sales desk"), destinations=("sales desk", END)
    )
    builder.add_edge(START, "sales desk")
    return builder.compile()


class Verdict(BaseModel):
    """A judge's word."""

    passed: bool
    feedback: str = Field(description="What to mend.")


class StoryState(TypedDict, total=False):
    """State of the story writer."""

    idea: str
    story: str
    feedback: str
    passed: bool


def evaluator_optimizer() -> Any:
    """A writer and a judge in a loop, with a shared state that neither reads whole."""

    def write(state: StoryState) -> Any:
        return {"story": model.invoke(f"{state['idea']} {state.get('feedback')}").text}

    def judge(state: StoryState) -> Any:
        made = model.with_structured_output(Verdict).invoke(state["story"])
        return {"passed": made.passed, "feedback": made.feedback}

    builder = StateGraph(StoryState).add_node(write).add_node(judge)
    builder.add_edge(START, "write").add_edge("write", "judge")
    builder.add_conditional_edges(
        "judge", lambda s: END if s["passed"] else "write", ["write", END]
    )
    return builder.compile()
