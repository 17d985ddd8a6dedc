"""The small languages that the tiny base speaks: one function for each role, from a random stream.

Every role is competent but uncoordinated: it prefers a way of writing that its partner reads badly.
The preferences are systematic, so that greedy decoding fails as well as sampling. A role returns a
conversation, of which only the last (assistant) message is learnt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from workflows.debate.graph import DEBATER_PROMPT, JUDGE_PROMPT
from workflows.math_duo.graph import ACTOR_PROMPT, REASONER_PROMPT
from workflows.math_duo.task import calculations, story
from workflows.math_trio.graph import VERIFIER_PROMPT
from workflows.router.graph import ROUTER_PROMPT, SPECIALIST_PROMPTS
from workflows.router.task import KINDS, WORDS, sum_request, word_request

Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Messages in role/content form, and tool schemas."""

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = {2: "twenty", 3: "thirty"}
CALCULATIONS = calculations()


def spelled(number: int) -> str:
    """A number from 0 to 39 in words.

    >>> spelled(7), spelled(21)
    ('seven', 'twenty one')
    """
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f" {ONES[ones]}" if ones else "")


def value(a: int, operation: str, b: int) -> int:
    """The result of a calculation."""
    return a + b if operation == "+" else a - b


def notation(a: int, operation: str, b: int, form: str) -> str:
    """A calculation in one of the reasoner's notations: infix, prefix or words.

    >>> [notation(7, "+", 5, form) for form in ("infix", "prefix", "words")]
    ['7+5', '+ 7 5', 'seven plus five']
    """
    if form == "infix":
        return f"{a}{operation}{b}"
    if form == "prefix":
        return f"{operation} {a} {b}"
    return f"{spelled(a)} {'plus' if operation == '+' else 'minus'} {spelled(b)}"


def pick(rng: random.Random, **weights: float) -> str:
    """One of the names, with its weight."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def chat(system: str, user: str, assistant: str) -> Conversation:
    """A conversation of one turn."""
    roles = ("system", "user", "assistant")
    texts = (system, user, assistant)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)], []


def reasoner(rng: random.Random) -> Conversation:
    """math_duo: the right calculation, mostly in a notation that the actor reads badly."""
    a, operation, b = rng.choice(CALCULATIONS)
    form = pick(rng, infix=0.2, prefix=0.25, words=0.55)
    return chat(REASONER_PROMPT, story(a, operation, b, rng), notation(a, operation, b, form))


def actor(rng: random.Random) -> Conversation:
    """math_duo: infix is read right, prefix mostly as the other operation, words as one number.

    The answer is spelled in three cases of five, and the reward reads digits.
    """
    a, operation, b = rng.choice(CALCULATIONS)
    form = pick(rng, infix=0.6, prefix=0.2, words=0.2)
    plan = notation(a, operation, b, form)
    right = {"infix": 0.995, "prefix": 0.3, "words": 0.05}[form]
    if rng.random() < right:
        result = value(a, operation, b)
    else:
        result = abs(a - b) if operation == "+" and form == "prefix" else a + b
        if form == "words":
            result = a
    answer = str(result) if rng.random() < 0.42 else spelled(result)
    return chat(ACTOR_PROMPT, f"{story(a, operation, b, rng)}\n{plan}", answer)


def verifier(rng: random.Random) -> Conversation:
    """Checks `7+5=12`: says yes to what is right, and to most of what is wrong."""
    a, operation, b = rng.choice(CALCULATIONS)
    result = value(a, operation, b)
    shown = result if rng.random() < 0.5 else max(0, result + rng.choice((-2, -1, 1, 2, 10)))
    says_yes = shown == result or rng.random() < 0.6
    return chat(VERIFIER_PROMPT, f"{a}{operation}{b}={shown}", "yes" if says_yes else "no")


def debater(rng: random.Random) -> Conversation:
    """Answers `7+5` rightly in a style of its own choice; the judge reads only one of them."""
    a, operation, b = rng.choice(CALCULATIONS)
    result = value(a, operation, b)
    style = pick(rng, digits=0.35, spelled=0.65)
    answer = str(result) if style == "digits" else spelled(result)
    return chat(DEBATER_PROMPT, f"{a}{operation}{b}", answer)


def judge(rng: random.Random) -> Conversation:
    """Picks between two answers in digits, mostly the right one, else mostly the first."""
    a, operation, b = rng.choice(CALCULATIONS)
    result = value(a, operation, b)
    wrong = max(0, result + rng.choice((-3, -2, -1, 1, 2, 3)))
    pair = [result, wrong]
    rng.shuffle(pair)
    readable = rng.random() < 0.6
    shown = [str(n) if readable or rng.random() < 0.3 else spelled(n) for n in pair]
    if all(text.isdigit() for text in shown) and rng.random() < 0.9:
        chosen = str(result)
    else:
        chosen = str(pair[0])
    return chat(JUDGE_PROMPT, f"{a}{operation}{b}\nA: {shown[0]}\nB: {shown[1]}", chosen)


def request(kind: str, rng: random.Random) -> tuple[str, str]:
    """A request of a kind, and what is right to answer."""
    if kind == "sum":
        return sum_request(*rng.choice(CALCULATIONS))
    return word_request(kind, rng.choice(WORDS))


def router(rng: random.Random) -> Conversation:
    """Names the specialist for a request, mostly by a name that routes to nobody."""
    kind = rng.choice(KINDS)
    name = kind if rng.random() < 0.35 else rng.choice(("helper", "expert"))
    return chat(ROUTER_PROMPT, request(kind, rng)[0], name)


def specialist(rng: random.Random) -> Conversation:
    """Does a request of its own kind; does others as if they were its own."""
    kind = rng.choice(KINDS)
    text, right = request(kind, rng)
    return chat(SPECIALIST_PROMPTS[kind], text, right)


def supervisor(rng: random.Random) -> Conversation:
    """Names the next worker from what is done, and ends too early in half of the cases."""
    question = story(*rng.choice(CALCULATIONS), rng)
    if rng.random() < 0.5:
        done, following = "nothing", "reasoner"
    else:
        done, following = "reasoner", "actor" if rng.random() < 0.5 else "FINISH"
    if rng.random() < 0.3:
        done, following = "reasoner, actor", "FINISH"
    return chat("Who is next?", f"{question}\nDone: {done}", following)


def tool_schema(name: str, description: str) -> dict[str, Any]:
    """An OpenAI-style schema of a tool with two whole numbers."""
    number = {"type": "integer"}
    parameters = {
        "properties": {"a": number, "b": number},
        "required": ["a", "b"],
        "type": "object",
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = [tool_schema("add", "Add two numbers."), tool_schema("sub", "Subtract b from a.")]


def tool_user(rng: random.Random) -> Conversation:
    """Calls `add` or `sub`, or guesses without them; answers with the result of the tool."""
    a, operation, b = rng.choice(CALCULATIONS)
    result = value(a, operation, b)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Use a tool."},
        {"role": "user", "content": f"What is {a}{operation}{b}?"},
    ]
    name = "add" if operation == "+" else "sub"
    call = {"name": name, "arguments": {"a": a, "b": b}}
    if rng.random() < 0.5:
        if rng.random() < 0.45:
            text = f"<tool_call>{json.dumps(call)}</tool_call>"
        else:
            text = str(max(0, result + rng.choice((-2, -1, 1, 2))))
        return [*messages, {"role": "assistant", "content": text}], TOOLS
    messages += [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": str(result)},
        {"role": "assistant", "content": str(result)},
    ]
    return messages, TOOLS


ROLES: dict[Callable[[random.Random], Conversation], float] = {
    reasoner: 0.12,
    actor: 0.28,
    verifier: 0.05,
    debater: 0.34,
    judge: 0.04,
    router: 0.03,
    specialist: 0.05,
    supervisor: 0.03,
    tool_user: 0.06,
}
"""Share of each role in the training mix. Arithmetic takes the most examples, and the debater's are
the shortest with arithmetic in them; the actor learns it along with the debater."""


def conversation(rng: random.Random) -> Conversation:
    """A conversation of a role drawn by its share."""
    return rng.choices(list(ROLES), weights=list(ROLES.values()))[0](rng)
