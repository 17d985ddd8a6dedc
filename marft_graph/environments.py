"""Text environments and MARFT profiles as LangGraph apps, trained like any other app.

An environment has `reset` and `step`, as Gymnasium's do; one that also has `transition` (or
`state_transition`) is one of the MARFT paper's, and is given the actions of all agents. Makes
graphs; trains nothing.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatResult
from langgraph.graph import END, START, StateGraph

from marft_graph.errors import ConfigError, GraphError
from marft_graph.workflow import Workflow

Agents = Mapping[str, str] | Sequence[Mapping[str, Any]] | str | Path
"""Name -> system prompt in the order of their turns; or MARFT profiles; or a file of them."""
ENVIRONMENT = "environment"
_TRANSITIONS = ("transition", "state_transition")
_TURN = re.compile(r"^\s*<\|im_start\|>\s*system:?\s*|<\|im_end\|>\s*$")


class NoModel(BaseChatModel):
    """Stands where an app has its own model; adapters answer in its place."""

    @property
    def _llm_type(self) -> str:
        return "none"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        raise GraphError(
            "this app has no model of its own: train it, bind adapters to it, or give `model=` to "
            "the function that made it"
        )


def workflow_from_env(
    env: Callable[[], Any],
    agents: Agents,
    *,
    model: BaseChatModel | None = None,
    max_steps: int = 20,
    train_episodes: int = 1000,
    held_out_episodes: int = 100,
) -> Workflow:
    """A text environment as a LangGraph loop: agents in order, then the environment, until done.

    Every episode has an environment of its own, so that many run at once. An agent sees its prompt,
    the observation, and what the agents before it said in this turn. The last agent's text is the
    action; an environment of the MARFT paper's kind gets the list of all agents' texts.

    An example is a mapping; its `seed` goes to `reset(seed=...)` and its other keys to
    `reset(options=...)`, where `reset` takes them. The return is the sum of the step rewards.

    Args:
        env: makes one environment: its class, or a function without arguments.
        agents: name -> system prompt in the order of their turns, or MARFT profiles.
        model: the app's own chat model, for use without adapters.
        max_steps: steps after which an episode ends.
        train_episodes: examples (seeds) that the workflow's `load_data` has to train on.
        held_out_episodes: others, to evaluate on.

    Returns:
        A `Workflow` with `graph`, `reward`, `inputs` and `load_data`:
        `Trainer(w.graph, train_dataset=w.load_data()[0], reward=w.reward, inputs=w.inputs, ...)`.

    Raises:
        ConfigError: `env` is no function, `agents` are none, or a number is out of range.
    """
    if not callable(env):
        raise ConfigError(
            f"env is a {type(env).__name__}; give what makes one, as each episode needs its own: "
            "its class, or `lambda: MyEnv(...)`"
        )
    for name, count in (("max_steps", max_steps), ("train_episodes", train_episodes)):
        if count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1")
    prompts = _prompts(agents)
    if ENVIRONMENT in prompts:
        raise ConfigError(f"an agent is called {ENVIRONMENT!r}, which is the environment's name")
    graph = _env_graph(env, prompts, model or NoModel(), max_steps)

    def load_data() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Seeds to train on, and others that are held out."""
        last = train_episodes + held_out_episodes
        seeds = [{"seed": seed} for seed in range(last)]
        return seeds[:train_episodes], seeds[train_episodes:]

    def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """The sum of the environment's rewards."""
        return float(state["total_reward"])

    def inputs(example: Mapping[str, Any]) -> dict[str, Any]:
        """Seed and options of `reset`."""
        options = {key: value for key, value in example.items() if key != "seed"}
        return {"seed": example.get("seed"), "options": options}

    return Workflow(_name_of(env), Path(), graph, load_data, reward, inputs)


def workflow_from_profiles(file: str | Path, *, model: BaseChatModel | None = None) -> Workflow:
    """A MARFT profile file as a chain of agents: `role`, `prompt` and `with_answer` of each.

    The graph takes a `question`. Each agent sees its prompt, the question and what the agents
    before it said. The `answer` is the text of the last agent with `with_answer`; `answers` has
    those of all of them.

    Args:
        file: a JSON list of profiles.
        model: the app's own chat model, for use without adapters.

    Raises:
        ConfigError: the file is none of profiles.
    """
    profiles = _read_profiles(Path(file))
    prompts = _prompts(profiles)
    answering = [str(own["role"]) for own in profiles if own.get("with_answer")] or [*prompts][-1:]
    own_model = model or NoModel()
    fields: dict[str, Any] = {"question": str, "answer": str, "answers": list[str]}
    builder = StateGraph(_schema("ProfileState", fields | dict.fromkeys(prompts, str)))
    before: list[str] = []
    for name, prompt in prompts.items():
        node = _agent(name, prompt, tuple(before), own_model, source="question")
        builder.add_node(name, node)
        builder.add_edge(before[-1] if before else START, name)
        before.append(name)

    def collect(state: Any) -> dict[str, Any]:
        """What the answering agents said; no model is called."""
        answers = [state[name] for name in answering]
        return {"answer": answers[-1], "answers": answers}

    builder.add_node("collect", collect)
    builder.add_edge(before[-1], "collect")
    builder.add_edge("collect", END)
    return Workflow(Path(file).stem, Path(file), builder.compile())


# The graph around an environment


def _env_graph(
    make: Callable[[], Any], prompts: Mapping[str, str], model: BaseChatModel, max_steps: int
) -> Any:
    names = tuple(prompts)
    fields: dict[str, Any] = {
        "seed": int | None,
        "options": dict[str, Any],
        "env": Any,
        "observation": Any,
        "steps": int,
        "total_reward": float,
        "done": bool,
    }

    def environment(state: Any) -> dict[str, Any]:
        """Begin the episode, or take the agents' actions; no model is called."""
        if state.get("env") is None:
            made = make()
            seen = _reset(made, state.get("seed"), state.get("options") or {})
            begun = {"steps": 0, "total_reward": 0.0, "done": False}
            return {"env": made, "observation": seen, **begun}
        own = state["env"]
        is_joint = any(callable(getattr(own, name, None)) for name in _TRANSITIONS)
        actions = [state[name] for name in names]
        seen, reward, done = _stepped(own.step(actions if is_joint else actions[-1]))
        steps = state["steps"] + 1
        return {
            "observation": seen,
            "steps": steps,
            "total_reward": state["total_reward"] + reward,
            "done": done or steps >= max_steps,
        }

    def go_on(state: Any) -> str:
        return END if state["done"] else names[0]

    builder = StateGraph(_schema("EnvState", fields | dict.fromkeys(names, str)))
    builder.add_node(ENVIRONMENT, environment)
    builder.add_edge(START, ENVIRONMENT)
    builder.add_conditional_edges(ENVIRONMENT, go_on, [names[0], END])
    for place, name in enumerate(names):
        builder.add_node(name, _agent(name, prompts[name], names[:place], model, place=place))
        builder.add_edge(name, names[place + 1] if place + 1 < len(names) else ENVIRONMENT)
    # A turn is a superstep for each agent and one for the environment.
    limit = (max_steps + 1) * (len(names) + 1) + 5
    return builder.compile().with_config(recursion_limit=limit)


def _agent(
    name: str,
    prompt: str,
    before: Sequence[str],
    model: BaseChatModel,
    *,
    source: str = "observation",
    place: int = 0,
) -> Any:
    """A node that asks the model: its prompt, what there is to see, and what was said before."""

    def node(state: Any) -> dict[str, str]:
        said = [f"{other}: {state[other]}" for other in before]
        task = "\n".join([_text(state[source], place), *said])
        return {name: model.invoke([SystemMessage(prompt), HumanMessage(task)]).text}

    return node


def _schema(name: str, fields: Mapping[str, Any]) -> Any:
    return TypedDict(name, dict(fields), total=False)  # type: ignore[operator]


# What environments take and return


def _reset(env: Any, seed: int | None, options: Mapping[str, Any]) -> Any:
    """The first observation; `reset` gets of seed and options what it takes."""
    known = inspect.signature(env.reset).parameters
    takes_all = any(own.kind is own.VAR_KEYWORD for own in known.values())
    given: dict[str, Any] = {}
    if seed is not None and ("seed" in known or takes_all):
        given["seed"] = seed
    if options and ("options" in known or takes_all):
        given["options"] = dict(options)
    seen = env.reset(**given)
    is_pair = isinstance(seen, tuple) and len(seen) == 2 and isinstance(seen[1], Mapping)
    return seen[0] if is_pair else seen


def _stepped(result: Any) -> tuple[Any, float, bool]:
    """Observation, reward and whether it is over, of what `step` returned.

    >>> _stepped(("door", 1.0, False, True, {}))
    ('door', 1.0, True)
    >>> _stepped((["a", "b"], [0, 0.5], [True, True], {}))
    (['a', 'b'], 0.5, True)
    """
    if isinstance(result, tuple) and len(result) == 5:
        seen, reward, terminated, truncated, _ = result
        return seen, _sum(reward), _all(terminated) or _all(truncated)
    if isinstance(result, tuple) and len(result) == 4:
        seen, reward, done, _ = result
        return seen, _sum(reward), _all(done)
    raise GraphError(
        f"step returned {result!r}; it must return (observation, reward, terminated, truncated, "
        "info), or (observation, reward, done, info)"
    )


def _is_many(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _sum(reward: Any) -> float:
    return float(sum(float(part) for part in reward) if _is_many(reward) else reward)


def _all(done: Any) -> bool:
    return all(map(bool, done)) if _is_many(done) else bool(done)


def _text(seen: Any, place: int) -> str:
    """An observation as text; where there is one for each agent, the agent's own."""
    if _is_many(seen):
        parts = list(seen)
        return str(parts[place] if place < len(parts) else parts[-1])
    return str(seen)


# Agents


def _prompts(agents: Agents) -> dict[str, str]:
    """Name -> system prompt."""
    if isinstance(agents, str | Path):
        agents = _read_profiles(Path(agents))
    if isinstance(agents, Mapping):
        found = {str(name): str(prompt) for name, prompt in agents.items()}
    else:
        found = {}
        for number, own in enumerate(agents, 1):
            if not isinstance(own, Mapping) or not {"role", "prompt"} <= own.keys():
                raise ConfigError(f"profile {number} is {own!r}; it needs `role` and `prompt`")
            if own["role"] in found:
                raise ConfigError(f"two profiles have the role {own['role']!r}")
            found[str(own["role"])] = _plain_prompt(str(own["prompt"]))
    if not found:
        raise ConfigError("there is no agent; give at least one name with its prompt")
    return found


def _read_profiles(path: Path) -> list[Mapping[str, Any]]:
    try:
        profiles = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read profiles from {path}: {error}") from error
    if not isinstance(profiles, list):
        raise ConfigError(f"{path} must hold a JSON list of {{role, prompt, with_answer}}")
    return profiles


def _plain_prompt(prompt: str) -> str:
    """A prompt without the chat markup that MARFT's profiles write by hand.

    >>> _plain_prompt("<|im_start|>system: Answer in {{}}.<|im_end|> ")
    'Answer in {}.'
    """
    return _TURN.sub("", prompt.strip()).replace("{{", "{").replace("}}", "}").strip()


def _name_of(env: Callable[[], Any]) -> str:
    name = getattr(env, "__name__", type(env).__name__)
    return "environment" if name == "<lambda>" else str(name)
