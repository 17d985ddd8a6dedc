"""Episodes on disk: parquet with one row for each call, loadable with `datasets`.

Everything of an episode is kept but the graph's final state. The files are for people, for
`datasets.load_dataset("parquet", data_files=...)` and for the report; training never reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from marft_graph.episode import Call, Episode, Failure, SetAside
from marft_graph.errors import CheckpointError
from marft_graph.secret import hiding

Phase = Literal["train", "eval", "own"]
"""Whether episodes were trained on, evaluated, or answered by the app's own models."""

_IDS = pa.list_(pa.int64())
_SCHEMA = pa.schema(
    [
        # The episode, repeated in each of its rows
        ("iteration", pa.int64()),
        ("phase", pa.string()),
        ("episode", pa.int64()),  # position among the episodes that were written together
        ("example_index", pa.int64()),
        ("episode_seed", pa.uint64()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("outcome_reward", pa.float64()),
        ("node_rewards", pa.string()),  # JSON
        ("reward_parts", pa.string()),  # JSON
        ("example", pa.string()),  # JSON
        ("episode_seconds", pa.float64()),
        ("failure", pa.string()),
        ("failed_node", pa.string()),
        ("set_aside", pa.string()),  # JSON
        # The call; an episode without calls has one row with index -1 and nothing here
        ("agent", pa.string()),
        ("node", pa.string()),
        ("index", pa.int64()),
        ("parents", _IDS),
        ("prompt_ids", _IDS),
        ("completion_ids", _IDS),
        ("logprobs", pa.list_(pa.float64())),
        ("finish_reason", pa.string()),
        ("adapter_version", pa.int64()),
        ("temperature", pa.float64()),
        ("reward", pa.float64()),
        ("messages", pa.string()),  # JSON
        ("task_id", pa.string()),
        ("step", pa.int64()),
        ("seed", pa.uint64()),
        ("grammar", pa.string()),
        ("tools", pa.string()),  # JSON
        ("usage", _IDS),
        ("started", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
# 0.1.0 had none of these
_LATER = ("reward_parts", "grammar", "tools", "usage", "failure", "failed_node", "set_aside")
_NEEDED = tuple(name for name in _SCHEMA.names if name not in _LATER)
_CALL_FIELDS = tuple(_SCHEMA.names[_SCHEMA.names.index("agent") :])


def write_traces(
    path: str | Path, episodes: Sequence[Episode], iteration: int, phase: Phase
) -> Path:
    """Write episodes to a parquet file, failed ones included.

    Examples and messages are JSON; a value that JSON does not know is kept as its `repr`. Secrets
    of the environment are replaced by their names, see `marft_graph.secret`. Other text that UTF-8
    cannot hold (lone surrogates in an error message) gets backslash escapes.

    Args:
        path: the file; it is written beside and renamed, so it is never half there.
        episodes: in the order in which `read_traces` will return them.
        iteration: training iterations done when the episodes ran (0: before training).
        phase: whether they were trained on.

    Raises:
        CheckpointError: the file cannot be written.
    """
    target = Path(path)
    staging = target.with_name(target.name + ".tmp")
    rows = [row for number, e in enumerate(episodes) for row in _rows(e, number, iteration, phase)]
    hide = hiding()
    rows = [{k: hide(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("wb") as stream:
            pq.write_table(table, stream, compression="zstd")
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(target)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return target


def read_traces(path: str | Path) -> list[Episode]:
    """The episodes of a file that `write_traces` wrote; their `state` is None.

    Raises:
        CheckpointError: the file is missing, is no parquet file, lacks columns, or its values are
            no episodes.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        missing = [name for name in _NEEDED if name not in table.column_names]
    except (OSError, ValueError, TypeError, LookupError, pa.ArrowException) as error:
        raise CheckpointError(f"cannot read traces from {path}: {error}") from error
    if missing:
        raise CheckpointError(f"{path} holds no traces: it has no column {', '.join(missing)}")
    by_episode: dict[int, list[dict[str, Any]]] = {}
    try:
        for row in table.to_pylist():
            by_episode.setdefault(row["episode"], []).append(row)
        return [_episode(rows) for rows in by_episode.values()]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no traces: {error!r}") from error


def to_json(value: Any) -> str:
    r"""JSON of any value, readable where UTF-8 can hold it, else in ASCII escapes.

    >>> to_json({"q": "é", "n": (1, 2)}), to_json("\ud800")
    ('{"q": "é", "n": [1, 2]}', '"\\ud800"')
    """
    plain = _plain(value)
    text = json.dumps(plain, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(plain)
    return text


def _rows(episode: Episode, number: int, iteration: int, phase: Phase) -> list[dict[str, Any]]:
    own = {
        "iteration": iteration,
        "phase": phase,
        "episode": number,
        "example_index": episode.example_index,
        "episode_seed": episode.seed,
        "status": _utf8(episode.status),
        "error": _utf8(episode.error),
        "outcome_reward": float(episode.outcome_reward),
        "node_rewards": to_json(episode.node_rewards),
        "reward_parts": to_json(episode.reward_parts),
        "example": to_json(episode.example),
        "episode_seconds": episode.seconds,
        "failure": episode.failure,
        "failed_node": _utf8(episode.failed_node),
        "set_aside": to_json(episode.set_aside),
    }
    if not episode.calls:
        return [own | {"index": -1}]
    return [own | _call_row(call) for call in episode.calls]


def _call_row(call: Call) -> dict[str, Any]:
    row = {name: getattr(call, name) for name in _CALL_FIELDS}
    texts = {name: _utf8(row[name]) for name in ("agent", "node", "task_id")}
    json_texts = {"messages": to_json(call.messages), "tools": to_json(call.tools)}
    return row | texts | json_texts


def _episode(rows: Sequence[Mapping[str, Any]]) -> Episode:
    first = rows[0]
    return Episode(
        example=json.loads(first["example"]),
        calls=tuple(_call(row) for row in rows if row["index"] >= 0),
        outcome_reward=first["outcome_reward"],
        node_rewards=json.loads(first["node_rewards"]),
        reward_parts=json.loads(first.get("reward_parts") or "{}"),
        status=first["status"],
        error=first["error"],
        failure=Failure(first["failure"]) if first.get("failure") else None,
        failed_node=first.get("failed_node") or "",
        set_aside=tuple(
            (node, SetAside(why)) for node, why in json.loads(first.get("set_aside") or "[]")
        ),
        seed=first["episode_seed"],
        example_index=first["example_index"],
        seconds=first["episode_seconds"],
    )


def _call(row: Mapping[str, Any]) -> Call:
    fields = {name: row[name] for name in _CALL_FIELDS if name not in _LATER}
    for name in ("parents", "prompt_ids", "completion_ids", "logprobs"):
        fields[name] = tuple(fields[name])
    fields["messages"] = tuple(json.loads(row["messages"]))
    usage = row.get("usage")
    return Call(
        **fields,
        grammar=row.get("grammar") or "",
        tools=tuple(json.loads(row.get("tools") or "[]")),
        usage=(usage[0], usage[1]) if usage else None,
    )


def _plain(value: Any) -> Any:
    """The value as JSON's own types."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
