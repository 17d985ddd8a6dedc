"""Micro-batches sized by memory: the largest that fits, under a limit that is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from marft_graph.config import TrainConfig
from marft_graph.episode import Call, Episode
from marft_graph.errors import ConfigError, OutOfMemoryError
from marft_graph.learn.memory import update_within_memory
from marft_graph.learn.sizing import HostMemory, find_microbatch_tokens, memory_of
from marft_graph.ranks import Ranks
from marft_graph.run.state import RunState
from tests.learn.test_update import AGENTS, learner, same, weights
from tests.support import save_random_model

GIB = 2**30


class Counted:
    """A memory of which every token that is fed to the decoder takes so many bytes."""

    def __init__(self, decoder: torch.nn.Module, per_token: int, before: int, free: int) -> None:
        self._per_token, self._before, self._free = per_token, before, free
        self._tokens = 0
        self.seen: list[int] = []
        decoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: object, args: object, kwargs: dict[str, Any]) -> None:
        self._tokens = max(self._tokens, kwargs["input_ids"].numel())

    def used(self) -> int:
        return self._before

    def free(self) -> int:
        return self._free

    def peak_of(self, work: Callable[[], None]) -> int:
        self._tokens = 0
        work()
        self.seen.append(self._tokens)
        return self._before + self._per_token * self._tokens


def found(model: Path, **limits: int) -> tuple[int, list[int]]:
    """The size found with 1 MiB for each token and 1 GiB used before, and the sizes tried."""
    policy, own = learner(model)
    memory = Counted(policy._decoder, 2**20, GIB, limits.get("free", 0))
    gib = limits.get("gib")
    size = find_microbatch_tokens(own._team, long_episodes(16), memory, Ranks(), memory_gib=gib)
    assert all(p.grad is None for a in AGENTS for p in policy.adapter_parameters[a])
    return size, memory.seen


def test_the_largest_power_of_two_that_fits_is_found(tiny_model: Path) -> None:
    # 0.9 of 2 GiB is 1843 MiB, of which 1024 are taken: 819 tokens.
    size, tried = found(tiny_model, gib=2)
    assert size == 512
    assert max(tried) <= 512  # 1024 was not even tried


def test_without_a_limit_a_part_stays_free(tiny_model: Path) -> None:
    # 1 GiB used and 0.8 of 1 GiB free; 0.9 of that leaves 634 tokens.
    assert found(tiny_model, free=GIB)[0] == 512
    assert found(tiny_model, free=GIB // 2)[0] == 256


def test_a_size_that_runs_out_of_memory_is_not_taken(tiny_model: Path) -> None:
    policy, own = learner(tiny_model)
    memory = Counted(policy._decoder, 1, 0, GIB)  # it looks as if there were room for all

    def full(module: object, args: object, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy._decoder.register_forward_pre_hook(full, with_kwargs=True)
    assert find_microbatch_tokens(own._team, long_episodes(16), memory, Ranks()) == 256


def test_no_larger_size_is_tried_than_there_are_tokens(tiny_model: Path) -> None:
    size, tried = found(tiny_model, gib=1000)
    assert size == 1024  # 16 calls of 64 tokens
    assert len(tried) == 5  # 64 to 1024
    assert max(tried) <= 1024


def test_what_does_not_fit_at_all_is_told_with_what_would(tiny_model: Path) -> None:
    # Which of the two it is depends on what the process holds already.
    too_large = r"into 1\.00 GiB \(memory_gib\).*longest call, of 64"
    none_left = r"a call of 64 tokens, and an update of that call alone needs"
    with pytest.raises(OutOfMemoryError, match=f"{too_large}|{none_left}"):
        found(tiny_model, gib=1)


SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from marft_graph.errors import OutOfMemoryError
from marft_graph.learn.memory import update_within_memory
from tests.learn.test_sizing import long_episodes, resident
from tests.learn.test_update import learner

model, extra = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
limit = resident() / 2**30 + 0.05 + extra  # the weights, and what is to be left for the update
policy, own = learner(model, microbatch_tokens=None, memory_gib=limit, lora_rank=4)
peak, is_over = [0], threading.Event()
def watch():
    while not is_over.wait(0.001):
        peak[0] = max(peak[0], resident())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
said = ""
try:
    update_within_memory(own, own._team, long_episodes(32), 1)
except OutOfMemoryError as error:
    said = str(error)
is_over.set()
thread.join()
print(json.dumps([own.microbatch_tokens, peak[0] / 2**30, limit, said]))
"""


def resident() -> int:
    """Memory of this process, by another file than the one that is tested."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def long_episodes(count: int) -> list[Episode]:
    """One call each, of 64 tokens that no other has."""
    episodes = []
    for e in range(count):
        ids = torch.randint(5, 200, (64,), generator=torch.Generator().manual_seed(e)).tolist()
        call = Call(
            "actor", "actor", 0, (), tuple(ids[:32]), tuple(ids[32:]), (-5.0,) * 32, "stop", 0
        )
        episodes.append(Episode({}, (call,), outcome_reward=float(e % 2), example_index=e // 4))
    return episodes


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose activations are large beside everything else: 0.3 MiB a token."""
    folder = save_random_model(tmp_path_factory.mktemp("model"))
    small = Qwen2Config.from_pretrained(folder)
    wide = Qwen2Config(
        vocab_size=small.vocab_size,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        eos_token_id=small.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(wide).save_pretrained(folder)
    return folder


def measured(model: Path, gib: float) -> tuple[int | None, float, float, str]:
    """Size found, measured peak and limit (GiB) of a process with so much left for its update."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, json.dumps(gib)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    size, peak, limit, said = json.loads(done.stdout.splitlines()[-1])
    return size, peak, limit, said


@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_measured_peak_stays_under_the_limit(wide_model: Path) -> None:
    sizes = []
    for gib in (0.2, 0.4, 0.8):
        size, peak, limit, _ = measured(wide_model, gib)
        told = f"{size} tokens: {peak:.2f} GiB at most, limit {limit:.2f}"
        sys.stdout.write(f"{told}\n")
        assert peak <= limit, told
        sizes.append(size)
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_impossible_limit_says_what_is_needed(wide_model: Path) -> None:
    size, _, limit, said = measured(wide_model, -0.2)
    assert size is None
    assert f"an update does not fit into {limit:.2f} GiB (memory_gib)" in said


def test_the_size_found_gives_the_update_of_any_other(tiny_model: Path) -> None:
    """Weights of an update with the size that memory allows, and with a fixed one of that size."""
    policy, auto = learner(tiny_model, microbatch_tokens=None, advantage="group")
    update_within_memory(auto, auto._team, long_episodes(8), 1)
    other, fixed = learner(tiny_model, microbatch_tokens=auto.microbatch_tokens, advantage="group")
    fixed.update(long_episodes(8), 1)
    assert auto.microbatch_tokens == 512  # all that there is
    assert same(weights(policy, "actor"), weights(other, "actor"))


def test_a_resumed_run_keeps_its_size_unless_it_is_told_another() -> None:
    measured = TrainConfig(base_model="m", microbatch_tokens=None)
    state = RunState()
    state.note_microbatches(measured, 2048)
    assert state.microbatches(measured) == 2048
    assert state.microbatches(measured.replace(memory_gib=3.0)) is None
    assert state.microbatches(measured.replace(microbatch_tokens=512)) == 512
    lowered = TrainConfig(base_model="m")
    state.note_microbatches(lowered, 1024)  # after running out of memory
    assert state.microbatches(lowered) == 1024


def test_a_limit_without_measuring_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory_gib is 2, and microbatch_tokens 4096"):
        TrainConfig(base_model="m", memory_gib=2)


def test_memory_that_cannot_be_measured_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"memory of a mps device cannot be measured"):
        memory_of(torch.device("mps"))


def host(folder: Path, groups: dict[str, tuple[str, str, str]], line: str) -> HostMemory:
    """A machine with 8 GiB free and control groups with limit, use and droppable caches."""
    proc, mount = folder / "proc" / "self", folder / "cgroup"
    proc.mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * 2**20} kB\n")
    (proc / "cgroup").write_text(f"3:cpu:/x\n{line}\n")
    version_2 = ("memory.max", "memory.current", "inactive_file")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for place, (limit, used, cache) in groups.items():
        names = version_1 if place.startswith("memory") else version_2
        (mount / place).mkdir(parents=True, exist_ok=True)
        (mount / place / names[0]).write_text(f"{limit}\n")
        (mount / place / names[1]).write_text(f"{used}\n")
        (mount / place / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")
    return HostMemory(proc, mount)


def test_control_groups_bound_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"pod": (f"{4 * GIB}", f"{3 * GIB}", f"{GIB}"), "pod/box": ("max", "5", "0")}
    assert host(tmp_path / "two", groups, "0::/pod/box").free() == 2 * GIB
    # A container sees its own group as the mount, under a path of the host.
    groups = {"memory": (f"{3 * GIB}", f"{2 * GIB}", "0")}
    assert host(tmp_path / "one", groups, "4:memory:/docker/123").free() == GIB
    assert host(tmp_path / "none", {}, "0::/").free() == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes that share the machine
    assert host(tmp_path / "shared", {}, "0::/").free() == 2 * GIB
