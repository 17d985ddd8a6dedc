"""Pay a team for the outcome, several things at once, and a node for what it does on its way.

python examples/04_rewards.py
"""

from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from marft_graph import FakeEngine, emit_reward, run_episodes
from marft_graph.rewards import combine, length_penalty, matches

model = ChatOpenAI(model="gpt-4o-mini", api_key="not-set")


class State(TypedDict):
    """What the nodes share."""

    question: str
    plan: str
    answer: str


def planner(state: State) -> dict[str, Any]:
    return {"plan": model.invoke(state["question"]).text}


def calculator(state: State) -> dict[str, Any]:
    """Calls no model: what it emits goes to the planner, whose plan it read."""
    left, _, right = state["plan"].partition("+")
    is_sum = left.isdigit() and right.isdigit()
    emit_reward(0.2 if is_sum else -0.5)
    return {"plan": str(int(left) + int(right)) if is_sum else "nothing"}


def correct(example: dict[str, Any], state: State) -> float:
    return float(example["answer"] in state["answer"])


async def form(example: dict[str, Any], state: State) -> bool:
    return matches(state["answer"], r"It is \d+\.")


def brevity(example: dict[str, Any], state: State) -> float:
    return length_penalty(state["answer"], limit=5, buffer=2)


if __name__ == "__main__":
    writer = ("writer", lambda state: {"answer": model.invoke(state["plan"]).text})
    builder = StateGraph(State).add_sequence([planner, calculator, writer])
    graph = builder.add_edge(START, "planner").compile()
    examples = [{"question": "7 figs and 5 more?", "answer": "12"}]
    engine = FakeEngine({"planner": ["7+5", "seven"], "writer": ["It is 12.", "No, not 12 at all"]})
    reward = combine(correct, (form, 0.5), (brevity, 0.1))  # or [correct, (form, 0.5), ...]
    for episode in run_episodes(graph, examples, engine=engine, reward=reward, group_size=2):
        print(f"outcome {episode.outcome_reward:g} from {dict(episode.reward_parts)}")
        print({call.node: call.reward for call in episode.calls}, episode.total_reward)
