"""An update that runs out of memory: smaller micro-batches, the same update, or a clear stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from marft_graph.errors import CheckpointError, OutOfMemoryError
from marft_graph.learn import memory
from marft_graph.learn.memory import update_within_memory
from marft_graph.learn.update import Learner
from marft_graph.policy.rows import Row
from tests.learn.test_update import AGENTS, learner, sampled_episodes


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most_tokens: int, error: Exception) -> None:
    """Forward passes of the learner over more padded tokens than that raise."""
    forward = Learner._forward

    def limited(self: Learner, agent: str, batch: Any, rows: Sequence[Row], **how: Any) -> Any:
        if len(rows) * max(row.length for row in rows) > most_tokens:
            raise error
        return forward(self, agent, batch, rows, **how)

    monkeypatch.setattr(Learner, "_forward", limited)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("not enough memory: you tried to allocate 123 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_less_memory_gives_the_same_update(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    policy, plain = learner(tiny_model, microbatch_tokens=4096)
    episodes = sampled_episodes(policy, 8)
    expected = plain.update(episodes, iteration=1)

    _, short = learner(tiny_model, microbatch_tokens=4096)
    short_of_memory(monkeypatch, 60, error)
    stats = update_within_memory(short, short._team, episodes, 1)
    assert short.microbatch_tokens == 4096 >> short.out_of_memory < 4096
    assert "trying again with microbatch_tokens=2048" in caplog.text
    for agent in AGENTS:
        assert stats[agent]["optimizer_steps"] == 1
        for name in ("loss_policy", "grad_norm", "entropy", "loss_value"):
            assert stats[agent][name] == pytest.approx(expected[agent][name], rel=1e-3, abs=1e-5)


def test_memory_that_runs_out_after_the_first_steps_undoes_them(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, own = learner(tiny_model)
    episodes = sampled_episodes(policy, 4)
    own.update(episodes, iteration=1)
    before = {a: [p.detach().clone() for p in policy.adapter_parameters[a]] for a in AGENTS}
    moments = {name: value.clone() for name, value in own.state().items()}
    step, steps = Learner._step, []

    def failing(self: Learner, agent: str, batch: Any, indices: Sequence[int]) -> Any:
        if agent == "actor":
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps.append(agent)
        return step(self, agent, batch, indices)

    monkeypatch.setattr(Learner, "_step", failing)
    with pytest.raises(OutOfMemoryError, match=r"one call at a time.*CUDA out of memory"):
        update_within_memory(own, own._team, episodes, 2)
    assert len(steps) > 3  # the reasoner had been updated each time
    for agent in AGENTS:
        for parameter, saved in zip(policy.adapter_parameters[agent], before[agent], strict=True):
            assert torch.equal(parameter, saved)
            assert parameter.grad is None
    assert own.state().keys() == moments.keys()
    assert all(torch.equal(value, moments[name]) for name, value in own.state().items())


def test_an_update_for_which_there_is_memory_writes_no_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, own = learner(tiny_model)
    episodes = sampled_episodes(policy, 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    update_within_memory(own, own._team, episodes, 1)


def test_weights_that_are_large_for_the_memory_go_to_a_file_that_is_deleted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, own = learner(tiny_model, microbatch_tokens=4096)
    episodes = sampled_episodes(policy, 8)
    monkeypatch.setattr(memory, "_free_memory", lambda: 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="cannot write"):
        update_within_memory(own, own._team, episodes, 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    short_of_memory(monkeypatch, 60, MemoryError())
    written: list[Path] = []
    update, put_back = Learner.update, memory._Snapshot.put_back

    def watched(*args: Any) -> Any:
        written.extend(tmp_path.rglob("before.safetensors"))
        return update(*args)

    undone: list[int] = []
    monkeypatch.setattr(Learner, "update", watched)
    monkeypatch.setattr(
        memory._Snapshot, "put_back", lambda *args: undone.append(1) or put_back(*args)
    )
    update_within_memory(own, own._team, episodes, 1)
    assert len(written) == len(undone) + 1 > 1
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_through(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, own = learner(tiny_model)
    episodes = sampled_episodes(policy, 4)
    short_of_memory(monkeypatch, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        update_within_memory(own, own._team, episodes, 1)
