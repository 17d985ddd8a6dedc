"""Long prompts: memory that grows with their length, not its square, and the same gradients."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from marft_graph.episode import Call, Episode
from marft_graph.errors import OutOfMemoryError
from marft_graph.learn.memory import update_within_memory
from marft_graph.learn.sizing import HostMemory
from marft_graph.learn.update import Learner
from marft_graph.policy import segments
from marft_graph.policy.adapters import Policy
from marft_graph.policy.rows import lay_out
from tests.learn.test_update import AGENTS, learner, sampled_episodes
from tests.support import make_agents, save_random_model

SCRIPT = """
import resource, sys
from pathlib import Path
from tests.learn.test_long_prompts import long_update

long_update(Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


BLOCKS = """
import sys
import torch
from marft_graph.policy.host_memory import give_back_large_blocks

def left():
    torch.zeros(4 * 2**20)  # 16 MiB: freed, it raises the size from which blocks go back
    blocks = [torch.zeros(3 * 2**20) for _ in range(40)]
    last = torch.zeros(2**20)  # stands above them
    before = resident()
    del blocks
    return 1 - (before - resident()) / (40 * 12)

def resident():
    with open("/proc/self/status") as file:
        return next(int(s.split()[1]) for s in file if s.startswith("VmRSS")) / 1024

if sys.argv[1] == "gives back":
    assert give_back_large_blocks()
print(left())
"""


def gradients(policy: Policy, sequences: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Of the sum of squared logits after the last two tokens of each sequence."""
    rows = lay_out(sequences, 1000)
    places = [
        (place, column)
        for place, row in enumerate(rows)
        for path in row.paths
        for column in path[-2:].tolist()
    ]
    row_N, column_N = (torch.tensor(part) for part in zip(*places, strict=True))
    with policy.using("a"):
        policy.logits(policy.states_of(rows, row_N, column_N)).square().sum().backward()
    found = [parameter.grad for parameter in policy.adapter_parameters["a"]]
    for parameter in policy.adapter_parameters["a"]:
        parameter.grad = None
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("masked", [0, 2**20], ids=["alone", "masked"])
def test_gradients_are_those_of_transformers_and_peft(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, recomputes: bool, masked: int
) -> None:
    from peft import LoraConfig, get_peft_model

    from marft_graph.policy.adapters import quietly

    monkeypatch.setattr(segments, "_MASKED", masked)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(3, 200, (n,), generator=generator).tolist())  # noqa: E731
    prompt = draw(40)
    sequences = [prompt + draw(20), prompt + draw(9), prompt[:25] + draw(30), draw(17)]
    policy = Policy.load(str(tiny_model), make_agents(["a"], tiny_model), device="cpu")
    with torch.no_grad():
        for parameter in policy.adapter_parameters["a"]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    policy._kept_tokens = 0 if recomputes else 10_000
    ours = gradients(policy, sequences)

    agent = make_agents(["a"], tiny_model)[0]
    lora = LoraConfig(r=agent.rank, lora_alpha=agent.alpha, target_modules="all-linear")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    plain = quietly(get_peft_model, base, lora)
    theirs = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for own, parameter in zip(policy.adapter_parameters["a"], theirs, strict=True):
            parameter.copy_(own)
    for ids in sequences:
        plain(torch.tensor([ids])).logits[0, -2:].square().sum().backward()
    assert len(ours) == len(theirs)
    for gradient, parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-2, rtol=1e-3)


def test_passes_of_many_tokens_alone_compute_activations_again(tiny_model: Path) -> None:
    policy = Policy.load(str(tiny_model), make_agents(["a"], tiny_model), device="cpu")
    assert policy.kept_tokens > 4096  # of a tiny base all are kept
    assert policy.pass_bytes(100) == 100 * policy.kept_bytes > 0
    kept = policy._bytes_kept(100)
    policy._kept_tokens = 99
    assert policy._bytes_kept(100) < kept / 2
    assert policy._bytes_kept(99) > kept / 2


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_blocks_that_a_long_prompt_frees_go_back_to_the_system() -> None:
    def share_left(way: str) -> float:
        command = [sys.executable, "-c", BLOCKS, way]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return float(done.stdout)

    assert share_left("gives back") < 0.2 < share_left("keeps")


def test_an_update_in_parts_that_compute_again_is_the_same(tiny_model: Path) -> None:
    policy, plain = learner(tiny_model)
    episodes = sampled_episodes(policy, 8)
    expected = plain.update(episodes, iteration=1)
    short, other = learner(tiny_model)
    short._kept_tokens = 20
    stats = other.update(episodes, iteration=1)
    for agent in AGENTS:
        for name in ("loss_policy", "grad_norm", "entropy"):
            assert stats[agent][name] == pytest.approx(expected[agent][name], rel=1e-3, abs=1e-5)


def test_a_call_that_memory_cannot_hold_is_refused_before_the_update(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, own = learner(tiny_model)
    episodes = sampled_episodes(policy, 4)
    started: list[int] = []
    monkeypatch.setattr(HostMemory, "free", lambda self: 1000)
    monkeypatch.setattr(Learner, "update", lambda *given: started.append(1))
    with pytest.raises(
        OutOfMemoryError, match=r"node '\w+' has a call of \d+ tokens, .*Nothing was"
    ):
        update_within_memory(own, own._team, episodes, 1)
    assert not started


def long_update(folder: Path) -> None:
    """Four calls of 6,000 tokens, two of them to one prompt, through SmolLM2-135M's shape."""
    from marft_graph.config import TrainConfig
    from marft_graph.policy.team import Team

    save_random_model(folder, context=8192)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    settings = TrainConfig(base_model=str(folder), device="cpu", advantage="group")
    team = Team.load(make_agents(["a"], folder), settings)
    prompts = [torch.randint(3, 40_000, (5_936,)).tolist() for _ in range(3)]
    answers = [tuple(torch.randint(3, 40_000, (64,)).tolist()) for _ in range(4)]
    episodes = [
        Episode(
            {},
            (Call("a", "a", 0, (), tuple(prompts[i % 3]), ids, (-10.8,) * 64, "stop", 0),),
            outcome_reward=float(i % 2),
        )
        for i, ids in enumerate(answers)
    ]
    stats = update_within_memory(Learner(team, settings), team, episodes, 1)
    assert stats["a"]["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_four_calls_of_six_thousand_tokens_train_within_six_gib(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "model"],
        capture_output=True,
        text=True,
        timeout=2900,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert int(done.stdout.split()[-1]) / 2**20 < 6
