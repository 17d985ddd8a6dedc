"""Apps in the styles of public tutorials and templates; none imports marft_graph.

Each maker returns the compiled app; `EVERYDAY` says what to run it on, and what is true of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, Send
from pydantic import BaseModel

from tests.apps import model

Texts = Annotated[list[str], operator.add]


@dataclass(frozen=True)
class Everyday:
    """An app and what a person reads off its code."""

    make: Callable[[], Any]
    example: dict[str, Any]
    agents: frozenset[str]
    ends: frozenset[str]
    """Nodes after which a run may be over."""
    loops: frozenset[tuple[str, ...]] = frozenset()


class Question(TypedDict, total=False):
    """State of the apps that answer from documents."""

    question: str
    documents: list[str]
    generation: str
    web: str


class Grade(BaseModel):
    """A yes or a no."""

    binary_score: Literal["yes", "no"]


class Route(BaseModel):
    """Where a question is answered."""

    datasource: Literal["vectorstore", "web_search"]


def _retrieve(state: Question) -> Any:
    return {"documents": [f"about {state['question']}"]}


def _web_search(state: Question) -> Any:
    return {"documents": [*state.get("documents", []), "from the web"]}


def _generate(state: Question) -> Any:
    return {"generation": model.invoke(f"{state['question']} {state['documents']}").text}


def _transform(state: Question) -> Any:
    return {"question": model.invoke(state["question"]).text}


def adaptive_rag() -> Any:
    """A routing function at START that asks a model, graders in conditional edges, a rewriter."""
    router = model.with_structured_output(Route)
    grader = model.with_structured_output(Grade)

    def route_question(state: Question) -> str:
        source = router.invoke(state["question"])
        return "web_search" if source.datasource == "web_search" else "retrieve"

    def grade_documents(state: Question) -> Any:
        kept = []
        for document in state["documents"]:
            if grader.invoke(document).binary_score == "yes":
                kept.append(document)
        return {"documents": kept}

    def decide_to_generate(state: Question) -> str:
        return "generate" if state["documents"] else "transform_query"

    def grade_generation(state: Question) -> str:
        score = grader.invoke(state["generation"]).binary_score
        if score == "yes":
            return "useful"
        return "not useful"

    builder = StateGraph(Question)
    builder.add_node("web_search", _web_search)
    builder.add_node("retrieve", _retrieve)
    builder.add_node("grade_documents", grade_documents)
    builder.add_node("generate", _generate)
    builder.add_node("transform_query", _transform)
    builder.add_conditional_edges(
        START, route_question, {"web_search": "web_search", "retrieve": "retrieve"}
    )
    builder.add_edge("web_search", "generate")
    builder.add_edge("retrieve", "grade_documents")
    builder.add_conditional_edges("grade_documents", decide_to_generate)
    builder.add_edge("transform_query", "retrieve")
    builder.add_conditional_edges(
        "generate", grade_generation, {"useful": END, "not useful": "transform_query"}
    )
    return builder.compile()


def corrective_rag() -> Any:
    """Documents are graded once; where none is good the question is rewritten for the web."""
    grader = model.with_structured_output(Grade)

    def grade(state: Question) -> Any:
        is_good = [grader.invoke(text).binary_score == "yes" for text in state["documents"]]
        return {"web": "no" if all(is_good) else "yes"}

    def decide(state: Question) -> Literal["transform_query", "generate"]:
        return "transform_query" if state["web"] == "yes" else "generate"

    builder = StateGraph(Question)
    builder.add_node("retrieve", _retrieve)
    builder.add_node("grade_documents", grade)
    builder.add_node("transform_query", _transform)
    builder.add_node("web_search_node", _web_search)
    builder.add_node("generate", _generate)
    builder.add_edge(START, "retrieve")
    builder.add_edge("retrieve", "grade_documents")
    builder.add_conditional_edges("grade_documents", decide)
    builder.add_edge("transform_query", "web_search_node")
    builder.add_edge("web_search_node", "generate")
    builder.add_edge("generate", END)
    return builder.compile()


class Mail(MessagesState):
    """State of `email_assistant`."""

    email: str
    classification: str


class Triage(BaseModel):
    """What to do with an email."""

    classification: Literal["ignore", "respond", "notify"]


@tool
def write_email(to: str, content: str) -> str:
    """Send an email."""
    return f"sent to {to}"


@tool
def done(is_done: bool) -> str:
    """Say that the email is dealt with."""
    return "done"


def email_assistant() -> Any:
    """A triage that goes by Command, and a hand-written agent loop with tools in a subgraph."""
    tools = {"write_email": write_email, "done": done}
    judge = model.with_structured_output(Triage)
    writer = model.bind_tools(list(tools.values()))

    def triage_router(state: Mail) -> Command[Literal["response_agent", "__end__"]]:
        result = judge.invoke(state["email"])
        update: dict[str, Any] = {"classification": result.classification}
        if result.classification == "respond":
            goto = "response_agent"
            update["messages"] = [("user", f"Respond to {state['email']}")]
        else:
            goto = END
        return Command(goto=goto, update=update)

    def llm_call(state: Mail) -> Any:
        return {"messages": [writer.invoke(state["messages"])]}

    def tool_handler(state: Mail) -> Any:
        result = []
        for call in state["messages"][-1].tool_calls:
            said = tools[call["name"]].invoke(call["args"])
            result.append(ToolMessage(str(said), tool_call_id=call["id"]))
        return {"messages": result}

    def should_continue(state: Mail) -> Literal["tool_handler", "__end__"]:
        calls = getattr(state["messages"][-1], "tool_calls", [])
        return "tool_handler" if calls and calls[0]["name"] != "done" else END

    inner = StateGraph(Mail)
    inner.add_node("llm_call", llm_call)
    inner.add_node("tool_handler", tool_handler)
    inner.add_edge(START, "llm_call")
    inner.add_conditional_edges("llm_call", should_continue)
    inner.add_edge("tool_handler", "llm_call")
    builder = StateGraph(Mail)
    builder.add_node("triage_router", triage_router)
    builder.add_node("response_agent", inner.compile())
    builder.add_edge(START, "triage_router")
    return builder.compile()


class Next(BaseModel):
    """Who works next."""

    next: Literal["researcher", "coder", "FINISH"]


def supervisor() -> Any:
    """A supervisor that names the next worker; workers are agents called in functions."""
    chooser = model.with_structured_output(Next)

    @tool
    def search(query: str) -> str:
        """Search."""
        return f"about {query}"

    researcher = create_agent(model, [search])
    coder = create_agent(model, [])

    def choose(state: MessagesState) -> Command[Literal["researcher", "coder", "__end__"]]:
        chosen = chooser.invoke(state["messages"]).next
        if chosen == "FINISH" or len(state["messages"]) > 4:
            chosen = END
        return Command(goto=chosen)

    def work(name: str, agent: Any) -> Any:
        def node(state: MessagesState) -> Command[Literal["supervisor"]]:
            said = agent.invoke({"messages": state["messages"]})["messages"][-1].text
            message = HumanMessage(said, name=name)
            return Command(update={"messages": [message]}, goto="supervisor")

        return node

    builder = StateGraph(MessagesState)
    builder.add_node("supervisor", choose)
    builder.add_node("researcher", work("researcher", researcher))
    builder.add_node("coder", work("coder", coder))
    builder.add_edge(START, "supervisor")
    return builder.compile()


def swarm() -> Any:
    """Two agents whose tools hand the talk over to the other one, in the parent graph."""

    def hand_over(name: str) -> Any:
        @tool(f"transfer_to_{name}")
        def transfer() -> Any:
            """Let another agent answer."""
            said = ToolMessage("handed over", tool_call_id="1")
            return Command(goto=name, graph=Command.PARENT, update={"messages": [said]})

        return transfer

    builder = StateGraph(MessagesState)
    builder.add_node("alice", create_agent(model, [hand_over("bob")], name="alice"))
    builder.add_node("bob", create_agent(model, [hand_over("alice")], name="bob"))
    builder.add_edge(START, "alice")
    return builder.compile()


def reflection() -> Any:
    """A writer and a critic that go on until enough was said."""

    def generate(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    def reflect(state: MessagesState) -> Any:
        return {"messages": [HumanMessage(model.invoke(state["messages"]).text)]}

    def should_continue(state: MessagesState) -> Any:
        if len(state["messages"]) > 4:
            return END
        return "reflect"

    builder = StateGraph(MessagesState)
    builder.add_node("generate", generate)
    builder.add_node("reflect", reflect)
    builder.add_edge(START, "generate")
    builder.add_conditional_edges("generate", should_continue)
    builder.add_edge("reflect", "generate")
    return builder.compile()


class Plan(TypedDict, total=False):
    """State of `plan_and_execute`."""

    input: str
    plan: list[str]
    past_steps: Annotated[list[tuple[str, str]], operator.add]
    response: str


class Steps(BaseModel):
    """A plan."""

    steps: list[str]


def plan_and_execute() -> Any:
    """A planner, an executor that is an agent, and a replanner that may answer."""
    planner = model.with_structured_output(Steps)
    executor = create_agent(model, [])

    def plan_step(state: Plan) -> Any:
        return {"plan": [*planner.invoke(state["input"]).steps, "check"]}

    def execute_step(state: Plan) -> Any:
        task = state["plan"][0]
        said = executor.invoke({"messages": [("user", f"{state['plan']}: {task}")]})
        return {"past_steps": [(task, said["messages"][-1].text)]}

    def replan_step(state: Plan) -> Any:
        said = model.invoke(f"{state['input']} {state['plan']} {state['past_steps']}").text
        if len(state["past_steps"]) > 1:
            return {"response": said}
        return {"plan": state["plan"][1:] or [said]}

    def should_end(state: Plan) -> Any:
        if state.get("response"):
            return END
        return "agent"

    builder = StateGraph(Plan)
    builder.add_node("planner", plan_step)
    builder.add_node("agent", execute_step)
    builder.add_node("replan", replan_step)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "agent")
    builder.add_edge("agent", "replan")
    builder.add_conditional_edges("replan", should_end, ["agent", END])
    return builder.compile()


class Jokes(TypedDict, total=False):
    """State of `map_reduce`."""

    topic: str
    subjects: list[str]
    jokes: Texts
    best: str


class Subject(TypedDict):
    """What one `generate_joke` is sent."""

    subject: str


def map_reduce() -> Any:
    """Subjects, a joke for each by `Send`, and the best of them."""
    lister = model.with_structured_output(Steps)

    def generate_topics(state: Jokes) -> Any:
        return {"subjects": [*lister.invoke(state["topic"]).steps, "cats"]}

    def continue_to_jokes(state: Jokes) -> Any:
        sends = []
        for subject in state["subjects"]:
            sends.append(Send("generate_joke", {"subject": subject}))
        return sends

    def generate_joke(state: Subject) -> Any:
        return {"jokes": [model.invoke(state["subject"]).text]}

    def best_joke(state: Jokes) -> Any:
        return {"best": model.invoke("\n".join(state["jokes"])).text}

    builder = StateGraph(Jokes)
    builder.add_node("generate_topics", generate_topics)
    builder.add_node("generate_joke", generate_joke)
    builder.add_node("best_joke", best_joke)
    builder.add_edge(START, "generate_topics")
    builder.add_conditional_edges("generate_topics", continue_to_jokes, ["generate_joke"])
    builder.add_edge("generate_joke", "best_joke")
    builder.add_edge("best_joke", END)
    return builder.compile()


def react_by_hand() -> Any:
    """The first agent of every tutorial: a chatbot, a ToolNode and `tools_condition`."""

    @tool
    def search(query: str) -> str:
        """Search."""
        return f"about {query}"

    bound = model.bind_tools([search])

    def chatbot(state: MessagesState) -> Any:
        return {"messages": [bound.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("chatbot", chatbot)
    builder.add_node("tools", ToolNode([search]))
    builder.add_edge(START, "chatbot")
    builder.add_conditional_edges("chatbot", tools_condition)
    builder.add_edge("tools", "chatbot")
    return builder.compile()


def subagents_as_tools() -> Any:
    """A leader whose tools run agents of their own, and one that asks a model itself."""
    poet = create_agent(model, [], name="poet_agent")
    nameless = create_agent(model, [])

    @tool
    def ask_poet(query: str) -> str:
        """Ask the poet."""
        return str(poet.invoke({"messages": [("user", query)]})["messages"][-1].text)

    @tool
    def ask_nameless(query: str) -> str:
        """Ask somebody."""
        return str(nameless.invoke({"messages": [("user", query)]})["messages"][-1].text)

    @tool
    def summarise(text: str) -> str:
        """Make it short."""
        return str(model.invoke(text).text)

    return create_agent(model, [ask_poet, ask_nameless, summarise], name="lead")


class Work(TypedDict, total=False):
    """State of `routed_workflow`."""

    text: str
    kind: str
    reviews: Texts
    verdict: str


def routed_workflow() -> Any:
    """A router of structured output, parallel reviewers, and an aggregator."""

    def classify(state: Work) -> Any:
        return {"kind": model.with_structured_output(Grade).invoke(state["text"]).binary_score}

    def reviewer(name: str) -> Any:
        def review(state: Work) -> Any:
            return {"reviews": [f"{name}: {model.invoke(state['text']).text}"]}

        return review

    def by_kind(state: Work) -> list[str]:
        if state["kind"] == "no":
            return ["style"]
        return ["style", "facts"]

    def aggregate(state: Work) -> Any:
        return {"verdict": model.invoke(str(state["reviews"])).text}

    builder = StateGraph(Work)
    builder.add_node("classify", classify)
    builder.add_node("style", reviewer("style"))
    builder.add_node("facts", reviewer("facts"))
    builder.add_node("aggregate", aggregate)
    builder.add_edge(START, "classify")
    builder.add_conditional_edges("classify", by_kind)
    builder.add_edge("style", "aggregate")
    builder.add_edge("facts", "aggregate")
    return builder.compile()


def _loops(*loops: str) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(loop.split()) for loop in loops)


_HELLO: dict[str, Any] = {"messages": [("user", "hello")]}

EVERYDAY: dict[str, Everyday] = {
    "adaptive_rag": Everyday(
        adaptive_rag,
        {"question": "why?"},
        frozenset({"route_question", "grade_documents", "generate", "transform_query"}),
        frozenset({"generate"}),
        _loops(
            "retrieve grade_documents transform_query",
            "retrieve grade_documents generate transform_query",
        ),
    ),
    "corrective_rag": Everyday(
        corrective_rag,
        {"question": "why?"},
        frozenset({"grade_documents", "transform_query", "generate"}),
        frozenset({"generate"}),
    ),
    "email_assistant": Everyday(
        email_assistant,
        {"email": "Lunch?"},
        frozenset({"triage_router", "response_agent/llm_call"}),
        frozenset({"triage_router", "response_agent/llm_call"}),
        _loops("response_agent/llm_call response_agent/tool_handler"),
    ),
    "supervisor": Everyday(
        supervisor,
        _HELLO,
        frozenset({"supervisor", "researcher", "coder"}),
        frozenset({"supervisor"}),
        _loops("supervisor researcher", "supervisor coder", "researcher researcher/tools"),
    ),
    "reflection": Everyday(
        reflection,
        _HELLO,
        frozenset({"generate", "reflect"}),
        frozenset({"generate"}),
        _loops("generate reflect"),
    ),
    "plan_and_execute": Everyday(
        plan_and_execute,
        {"input": "build"},
        frozenset({"planner", "agent", "replan"}),
        frozenset({"replan"}),
        _loops("agent replan"),
    ),
    "map_reduce": Everyday(
        map_reduce,
        {"topic": "animals"},
        frozenset({"generate_topics", "generate_joke", "best_joke"}),
        frozenset({"generate_topics", "best_joke"}),
    ),
    "react_by_hand": Everyday(
        react_by_hand,
        _HELLO,
        frozenset({"chatbot"}),
        frozenset({"chatbot"}),
        _loops("chatbot tools"),
    ),
    "routed_workflow": Everyday(
        routed_workflow,
        {"text": "a text"},
        frozenset({"classify", "style", "facts", "aggregate"}),
        frozenset({"aggregate"}),
    ),
    "swarm": Everyday(
        swarm,
        _HELLO,
        frozenset({"alice", "bob"}),
        frozenset({"alice", "bob", "alice/tools", "bob/tools"}),
    ),
    "subagents_as_tools": Everyday(
        subagents_as_tools,
        _HELLO,
        frozenset({"model", "tools/poet_agent", "tools/ask_nameless", "tools/summarise"}),
        frozenset({"model"}),
    ),
}
