"""`run_episodes`: the unchanged app, many times at once, every trained call answered by an engine.

The public face of a rollout: its arguments become a `Rollout`, which does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from marft_graph.engine.base import Engine
from marft_graph.episode import Episode
from marft_graph.graph.compile import as_compiled
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.episodes import Rollout
from marft_graph.rollout.inputs import AppInputs, InputFunction, Reviewer, listed_examples
from marft_graph.rollout.labels import Labels, labels_of
from marft_graph.rollout.rewards import RewardFunction, Rewards
from marft_graph.rollout.settings import RolloutSettings


def run_episodes(
    graph: Any,
    examples: Iterable[Mapping[str, Any]],
    *,
    engine: Engine | None,
    reward: Rewards | None = None,
    nodes: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    new_nodes: Literal["stop", "freeze", "train"] = "stop",
    adapters: Mapping[str, str] | None = None,
    inputs: InputFunction | None = None,
    context: Any = None,
    configurable: Any = None,
    store: Any = None,
    on_interrupt: Reviewer | None = None,
    seed: int = 0,
    first_example: int = 0,
    group_size: int = 1,
    concurrency: int = 256,
    episode_timeout: float = 600.0,
    call_timeout: float | None = None,
    reward_timeout: float = 60.0,
    reward_concurrency: int = 64,
    temperature: float | None = None,
    recursion_limit: int | None = None,
    max_new_tokens: int = 256,
    cap_new_tokens: bool = False,
    constrain_output: bool = False,
    schema_in_prompt: bool = True,
    greedy: bool = False,
    fault_rewards: Mapping[str, float] | None = None,
    reward_errors: Literal["stop", "drop"] = "stop",
    on_episode: Callable[[Episode], None] | None = None,
    cancellation: Cancellation | None = None,
) -> list[Episode]:
    """Run an app on examples and record every model call of the trained nodes.

    Args:
        graph: a compiled LangGraph app, which is not changed, or a StateGraph builder.
        examples: dicts; those keys that the graph's input has are handed to it, but no label: a key
            that the reward names and a node writes, in a graph without an input schema of its own.
        engine: answers the trained nodes' calls; None: the app's own models answer, and are only
            recorded (their calls have messages, tools and token counts, but no token ids).
        reward: `reward(example, state) -> float | dict[node, float] | Reward`, sync or async;
            several, as a list or as a dict of functions to weights, are combined; none: only what
            nodes emit counts.
        nodes: nodes to train, as agent paths; none: every node that calls a model. Agents that the
            code shows and that are not named are frozen: their own models answer.
        frozen: more nodes whose own models answer, as agent paths.
        new_nodes: what becomes of a node that calls a model and is neither: `stop` the rollout with
            an error, before anything has left for the model; `freeze` it, so that its own model
            answers; or `train` it, with an adapter that has the node's name.
        adapters: name of the agent that answers a node, where it is not the node's own: nodes with
            one name share its adapter.
        inputs: a list of the examples' keys that the graph is given, or a function that makes its
            input from an example.
        context: what nodes find as `runtime.context`: a value, or a function of the example. By
            default the graph's `context_schema` with its defaults, where all its fields have one.
        configurable: values of `config["configurable"]`: a mapping, or a function of the example.
        store: what the store of an episode holds at its beginning: dicts of keys to values by
            namespace, a store, which is copied, or a function of the example that makes one of
            them. By default what the app's own store holds, if that is one in memory.
        on_interrupt: `reviewer(example, state, interrupt)`, sync or async: what the interrupted
            node gets, as from `Command(resume=...)`. None: an interrupted episode fails.
        seed: with the same seed, app and engine, the episodes are the same.
        first_example: number of the first example, where these are some of many; it is part of the
            seeds.
        group_size: episodes of each example.
        concurrency: episodes that run at once.
        episode_timeout: seconds that an episode may take.
        call_timeout: seconds that a model call may take, its time in the engine's queue included;
            its episode fails then. None: any time.
        reward_timeout: seconds that one reward may take.
        reward_concurrency: reward functions that run at once; synchronous ones in worker threads.
        temperature: sampling temperature; none: what the app asks for, else 1.
        recursion_limit: steps that a graph may take; None: what the app sets by `with_config`,
            else 25.
        max_new_tokens: limit of a completion where the app sets none.
        cap_new_tokens: let `max_new_tokens` also bound calls for which the app allows more.
        constrain_output: let calls that ask for structured output by a JSON schema, or force a
            tool call, write nothing else, on an engine that can (the local one, with the extra
            `grammar`).
        schema_in_prompt: tell the model what form of answer the app asks for.
        greedy: sample at temperature 0, whatever else is set.
        fault_rewards: exceptions that are the policy's own fault, by the name of their class or of
            one that it inherits from, and the outcome that an episode earns that one of them ends.
        reward_errors: what a reward function that fails does: `stop` the rollout, or `drop` its
            episode, which is then a failed one.
        on_episode: called on the event loop's thread for each episode as it ends.
        cancellation: ends the rollout where another thread asks for it.

    Returns:
        The episodes, those of the first example first. One that failed has a status
        `failed: REASON` and the whole error; it is data for nobody.

    Raises:
        GraphError: `graph` is no LangGraph app.
        UnknownNodeError: `nodes` names a node that the graph does not have.
        ConfigError: a number is out of range.
        DatasetError: no examples, or an example without the graph's input keys.
        UndecidedCallError: a node that is neither trained nor frozen asked its model, or code whose
            node cannot be told; the message has the node, its function and the line of the call.
        ConfigError: a context, configurable or store of the wrong kind.
        ReviewerError: `on_interrupt` failed; the message shows the interrupt and the example.
        RewardError: the reward function failed (unless `reward_errors` is `drop`), or a node
            emitted what is no reward; the message shows the example.
        asyncio.CancelledError: it was cancelled.
    """
    rollout = Rollout(
        graph=graph,
        engine=engine,
        reward=reward,
        nodes=nodes or (),
        frozen=frozen,
        adapters=adapters or {},
        given=AppInputs(
            inputs=inputs,
            context=context,
            configurable=configurable,
            store=store,
            on_interrupt=on_interrupt,
        ),
        settings=RolloutSettings(
            concurrency=concurrency,
            episode_timeout=episode_timeout,
            call_timeout=call_timeout,
            reward_timeout=reward_timeout,
            reward_concurrency=reward_concurrency,
            temperature=0.0 if greedy else temperature,
            recursion_limit=recursion_limit,
            max_new_tokens=max_new_tokens,
            cap_new_tokens=cap_new_tokens,
            constrain_output=constrain_output,
            schema_in_prompt=schema_in_prompt,
            fault_rewards=dict(fault_rewards or {}),
            reward_errors=reward_errors,
            new_nodes=new_nodes,
        ),
        on_episode=on_episode,
        cancellation=cancellation,
    )
    return rollout.run(examples, seed=seed, first_example=first_example, group_size=group_size)


def check_examples(
    graph: Any,
    examples: Iterable[Mapping[str, Any]],
    given: AppInputs,
    reward: RewardFunction | None = None,
) -> Labels:
    """Refuse examples that `run_episodes` would refuse, before anything is loaded.

    Returns:
        The labels that it would withhold, and those that it might have to.

    Raises:
        GraphError, DatasetError, ConfigError: as in `run_episodes`.
    """
    app = as_compiled(graph)
    labels = labels_of(app, reward) if given.inputs is None else Labels()
    listed = listed_examples(app, examples, given, withheld=labels.withheld)
    labels.refuse_read(listed)
    return labels
