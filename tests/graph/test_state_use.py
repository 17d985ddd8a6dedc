"""What is read from a node's source: the channels that it may read, must read, and passes on."""

import functools
import json
import logging
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from marft_graph.graph.state_use import ALL, state_use
from tests.apps import model

log = logging.getLogger(__name__)
KEY = "b"
FIELDS = frozenset("abcd")


class Team:
    def node(self, state):
        return {"c": model.invoke(state["a"]).text}

    def __call__(self, state):
        return {"c": model.invoke(state["b"]).text}

    @staticmethod
    def join(state):
        return state["a"] + state["d"]


def ask(text):
    return model.invoke(text).text


def glue(given, other):
    return given["a"] + other


def plain(state):
    return {"c": model.invoke(state["a"] + state.get("b", "")).text}


def by_attribute(state):
    return {"c": model.invoke(state.a).text}


def by_method(state):
    return {"c": model.invoke(state.shown()).text}


def by_name(state, key="a"):
    return {"c": model.invoke(state[key] + state[KEY]).text}


def by_helper(state):
    return {"c": model.invoke(glue(state, state["d"])).text}


def by_static_method(state):
    return {"c": model.invoke(Team.join(state)).text}


def by_prompt(state):
    prompt = ChatPromptTemplate.from_messages([("user", "{a}")])
    log.info("asks")
    return {"c": (prompt | model).invoke({"a": state["a"]}).text}


def on_one_way(state):
    text = state["a"] if state["b"] else state["c"]
    return {"d": ask(text)}


def on_both_ways(state):
    if state["b"]:
        text = state["a"] + state["c"]
    else:
        text = state["a"]
        text += "!"
    return {"d": ask(text)}


def leaves_early(state):
    if not state["b"]:
        return {}
    return {"c": ask(state["a"])}


def after_the_call(state):
    text = ask(state["a"])
    return {"c": text + state["b"]}


def in_a_loop(state):
    found = ""
    for item in state["a"]:
        found += item + state["b"]
    return {"c": ask(found)}


def only_names(state):
    return {"c": ask(str("a" in state) + str(len(state)))}


def whole(state):
    return {"c": ask(f"{state}")}


def handed_on(state):
    kept = [state]
    return {"c": ask(json.dumps(kept))}


def rebound(state):
    state = dict(state)
    return {"c": ask(state["a"])}


def by_locals(state):
    return {"c": ask(str(locals()))}


def in_a_lambda(state):
    return {"c": ask((lambda: state["a"])())}


def shadowed(state):
    pick = lambda state: state["x"]  # noqa: E731
    return {"c": ask(pick({"x": "1"}) + state["a"])}


def tries(state):
    try:
        return {"c": model.invoke(state["a"]).text}
    except ValueError:
        return {"c": ""}


def added(state):
    state["a"] += "!"
    return {"c": ask(state["a"])}


def with_message(state):
    return {"c": model.invoke([HumanMessage(content=state["a"])]).text}


chain = ChatPromptTemplate.from_messages([("user", "{a} {b}")]) | model | RunnableLambda(str)


@pytest.mark.parametrize(
    ("node", "may", "must"),
    [
        (plain, "ab", "ab"),
        (by_attribute, "a", "a"),
        (by_method, None, ""),
        (by_name, "ab", "ab"),
        (by_helper, "ad", "ad"),
        (by_static_method, "ad", "ad"),
        (by_prompt, "a", "a"),
        (on_one_way, "abc", "b"),
        (on_both_ways, "abc", "ab"),
        (leaves_early, "ab", "ab"),
        (after_the_call, "ab", "a"),
        (in_a_loop, "ab", "a"),
        (only_names, "", ""),
        (whole, None, ALL),
        (handed_on, None, ""),
        (rebound, None, ""),
        (by_locals, None, ""),
        (in_a_lambda, "a", ""),
        (shadowed, "a", ""),
        (tries, "a", "a"),
        (added, "a", "a"),
        (with_message, "a", "a"),
        (Team().node, "a", "a"),
        (Team(), "b", "b"),
        (functools.partial(glue, other="x"), "a", "a"),
        (chain, "ab", "ab"),
        (RunnableLambda(plain), "ab", "ab"),
        (len, None, ""),
    ],
)
def test_what_is_read(node: Any, may: str | None, must: str) -> None:
    use = state_use(node, FIELDS)
    assert use.may_read == (None if may is None else frozenset(may))
    assert use.must_read == frozenset(must)


def moves(state):
    return {"c": ask(state["a"]), "d": state["b"]}


def writes_on(state):
    history = state["a"]
    answer = ask(history)
    history = f"{history}\n{answer}"
    return {"a": history, "b": answer}


def collects(state):
    said = [state["a"]]
    said.append(state["b"])
    return {"c": said, "d": len(state["a"]) > 1}


def spreads(state):
    return {**state, "c": ask("x")}


def repeats(text):
    return text + model.invoke(text).text


def by_repeating(state):
    return {"c": repeats(state["a"])}


@pytest.mark.parametrize(
    ("node", "carries"),
    [
        (plain, {"c": ""}),
        (moves, {"c": "", "d": "b"}),
        (writes_on, {"a": "a", "b": ""}),
        (collects, {"c": "ab", "d": ""}),
        (by_repeating, {"c": "a"}),
        (spreads, None),
    ],
)
def test_what_is_passed_on(node: Any, carries: dict[str, str] | None) -> None:
    found = state_use(node, FIELDS).carries
    assert found == (carries and {name: frozenset(made_of) for name, made_of in carries.items()})
