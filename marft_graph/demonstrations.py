"""Demonstrations: calls of a node that an adapter is to imitate, from wherever they were recorded.

Reads traces (of the app's own models, or of an earlier run), LangSmith exports, and data sets of
messages with a node column. It knows messages, not models: `learn.supervised` makes token ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.utils.function_calling import convert_to_openai_tool

from marft_graph.data import read_rows
from marft_graph.episode import Episode
from marft_graph.errors import CheckpointError, DatasetError
from marft_graph.learn.supervised import Demonstration
from marft_graph.names import agent_path, node_path
from marft_graph.run.trajectories import read_traces

Source = Any
"""A file or folder, episodes, or rows with `node` and `messages`."""


def read_demonstrations(
    source: Source, *, min_return: float | None = None, best: int | None = None
) -> list[Demonstration]:
    """Demonstrations from a file, a folder, episodes or rows.

    Args:
        source: one of
            - a parquet file of traces, or a run folder (all that it was trained on);
            - `Episode`s, as `run_episodes` returns them;
            - a JSON or JSON-lines file that LangSmith exported, one run each;
            - rows, or a parquet, JSON or JSON-lines file of them, with a `node`, `messages` in
              role/content form, and `tools` if there are any. Each answer in them is learnt.
        min_return: episodes only: leave out those with a lower return.
        best: episodes only: at most so many of each example, those with the highest returns; of
            these only ones that are better than some other episode of it, unless it has no other.

    Raises:
        DatasetError: nothing is found, or it is none of these.
    """
    if isinstance(source, str | Path):
        found = _from_path(Path(source), min_return, best)
    else:
        listed = list(source) if isinstance(source, Iterable) else []
        if listed and all(isinstance(item, Demonstration) for item in listed):
            return listed
        if listed and all(isinstance(item, Episode) for item in listed):
            found = list(_from_episodes(chosen_episodes(listed, min_return, best)))
        else:
            found = _from_rows(listed, type(source).__name__)
    if not found:
        raise DatasetError(
            f"no demonstration is left of {_named(source)}"
            + ("" if min_return is None else f" with a return of at least {min_return}")
        )
    return found


def chosen_episodes(
    episodes: Sequence[Episode], min_return: float | None, best: int | None
) -> list[Episode]:
    """Episodes worth imitating; failed ones never are."""
    kept = [e for e in episodes if e.ok and (min_return is None or e.total_reward >= min_return)]
    if best is None:
        return kept
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        if episode.ok:
            key = json.dumps(dict(episode.example), sort_keys=True, default=repr)
            groups.setdefault(key, []).append(episode)
    allowed: set[int] = set()
    for group in groups.values():
        lowest = min(episode.total_reward for episode in group)
        better = [e for e in group if e.total_reward > lowest or len(group) == 1]
        better.sort(key=lambda episode: -episode.total_reward)
        allowed |= {id(episode) for episode in better[:best]}
    return [episode for episode in kept if id(episode) in allowed]


def _from_path(path: Path, min_return: float | None, best: int | None) -> list[Demonstration]:
    if os.path.isdir(path):
        files = sorted((path / "traces").glob("iter_*.parquet"))
        if not files:
            raise DatasetError(
                f"{path} is no run folder: it has no traces/iter_*.parquet (an export or a "
                "checkpoint holds no traces)"
            )
        episodes = [episode for file in files for episode in read_traces(file)]
        return list(_from_episodes(chosen_episodes(episodes, min_return, best)))
    if path.suffix == ".parquet":
        return _from_parquet(path, min_return, best)
    return _from_rows(read_rows(path), str(path))


def _from_parquet(path: Path, min_return: float | None, best: int | None) -> list[Demonstration]:
    rows = read_rows(path)
    if rows and "outcome_reward" not in rows[0]:
        return _from_rows(rows, str(path))
    try:
        episodes = read_traces(path)
    except CheckpointError as error:
        raise DatasetError(str(error)) from error
    return list(_from_episodes(chosen_episodes(episodes, min_return, best)))


def _from_episodes(episodes: Iterable[Episode]) -> Iterator[Demonstration]:
    for episode in episodes:
        for call in episode.calls:
            messages = convert_to_messages([dict(message) for message in call.messages])
            if not messages or not isinstance(messages[-1], AIMessage):
                continue
            if call.finish_reason == "length":
                continue  # an answer that was cut off teaches to be cut off
            yield Demonstration(
                node=agent_path(call.node),
                prompt=tuple(messages[:-1]),
                answer=messages[-1],
                tools=tuple(dict(tool) for tool in call.tools),
                prompt_ids=call.prompt_ids,
                completion_ids=call.completion_ids,
            )


def _from_rows(rows: Sequence[Any], where: str) -> list[Demonstration]:
    found: list[Demonstration] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DatasetError(f"{where}: row {number} is a {type(row).__name__}, no mapping")
        if "run_type" in row:
            found += _from_langsmith(row)
        elif "node" in row and "messages" in row:
            found += _from_row(row, f"{where}: row {number}")
        else:
            raise DatasetError(
                f"{where}: row {number} has the keys {', '.join(map(str, row))}; it needs `node` "
                "and `messages`, or to be a run that LangSmith exported (`run_type`, `inputs`, "
                "`outputs`)"
            )
    return found


def _from_row(row: Mapping[str, Any], where: str) -> Iterator[Demonstration]:
    """Every answer in a conversation, each after what came before it."""
    given, tools = (_decoded(row.get(key), where) for key in ("messages", "tools"))
    messages = _messages(given or [], where)
    if not any(isinstance(message, AIMessage) for message in messages):
        raise DatasetError(f"{where} has no message with the role assistant: nothing to learn")
    for position, message in enumerate(messages):
        if isinstance(message, AIMessage) and position:
            node = agent_path(str(row["node"]))
            yield Demonstration(node, tuple(messages[:position]), message, _schemas(tools))


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DatasetError(f"{where}: neither a list nor JSON: {error}") from error


def _messages(given: Sequence[Any], where: str) -> list[BaseMessage]:
    try:
        return convert_to_messages([_plain_message(message) for message in given])
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise DatasetError(f"{where} holds what is no message: {error}") from error


def _plain_message(message: Any) -> Any:
    """A message in role/content form; LangChain's own serialised form is read, never run."""
    if not isinstance(message, Mapping):
        return message
    if message.get("lc") == 1:
        own = dict(message["kwargs"])
        name = str(message["id"][-1])
    elif isinstance(message.get("data"), Mapping) and "type" in message:
        own, name = dict(message["data"]), str(message["type"])
    else:
        return {key: value for key, value in message.items() if value is not None}
    role = name.lower().removesuffix("chunk").removesuffix("message")
    role = {"human": "user", "ai": "assistant"}.get(role, role)
    kept = {"role": own.get("role", role), "content": own.get("content", "")}
    for key in ("tool_calls", "tool_call_id", "name"):
        if own.get(key):
            kept[key] = own[key]
    return kept


# LangSmith


def _from_langsmith(run: Mapping[str, Any]) -> Iterator[Demonstration]:
    """The answer of a model run inside a node; other runs and failed ones hold none."""
    if run.get("run_type") != "llm" or run.get("error"):
        return
    extra = run.get("extra") or {}
    metadata = extra.get("metadata") or {}
    node = node_path(metadata.get("langgraph_checkpoint_ns") or "")
    node = node or metadata.get("langgraph_node") or ""
    answer = _first((run.get("outputs") or {}).get("generations"))
    answer = answer.get("message") if isinstance(answer, Mapping) else None
    answer = answer or _first((run.get("outputs") or {}).get("messages"))
    answer = answer or (run.get("outputs") or {}).get("message")
    asked = (run.get("inputs") or {}).get("messages") or []
    if len(asked) == 1 and isinstance(asked[0], list):
        asked = asked[0]
    if not node or answer is None or not asked:
        return
    where = f"LangSmith run {run.get('id', '')}"
    *prompt, last = _messages([*asked, answer], where)
    tools = (extra.get("invocation_params") or {}).get("tools") or ()
    if isinstance(last, AIMessage):
        yield Demonstration(agent_path(node), tuple(prompt), last, _schemas(tools))


def _schemas(tools: Any) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI form, whichever provider's they were recorded in."""
    return tuple(convert_to_openai_tool(dict(tool)) for tool in tools or ())


def _first(nested: Any) -> Any:
    """The first item of a list of lists, or of a list; None where there is none."""
    while isinstance(nested, list):
        if not nested:
            return None
        nested = nested[0]
    return nested


def _named(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"
