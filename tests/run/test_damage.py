"""Every file of a checkpoint and of an export: damaged in any way it is named, and not used."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from marft_graph import TrainConfig, Trainer, bind
from marft_graph.deploy.manifest import read_manifest
from marft_graph.errors import CheckpointError, ExportError, ModelError
from marft_graph.run.checkpoint import latest_checkpoint, verify
from tests.apps import duo
from tests.training import EXAMPLES, config, reward

ADAPTERS = [
    f"adapters/{agent}/{file}"
    for agent in ("actor", "planner")
    for file in ("adapter_config.json", "adapter_model.safetensors")
]
CHECKPOINT = [*ADAPTERS, "learner.safetensors", "manifest.json", "state.json"]
CARDS = [f"adapters/{agent}/README.md" for agent in ("actor", "planner")]
EXPORT = sorted(
    [*ADAPTERS, *CARDS, "README.md", "chat_template.jinja", "compose.yaml", "manifest.json"]
)


def settings(model: Path) -> TrainConfig:
    return config(model, checkpoint_every=1, eval_every=0, advantage="gae")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of two iterations, with checkpoints of both and an export."""
    run = tmp_path_factory.mktemp("trained") / "run"
    trainer = Trainer(
        duo(),
        train_dataset=EXAMPLES,
        reward=reward,
        config=settings(tiny_model),
        run_dir=run,
    )
    trainer.train(progress=False)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def truncated(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def one_bit_flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def missing(file: Path) -> None:
    file.unlink()


def swapped(file: Path) -> None:
    """Exchanged with the file that comes after it in its checkpoint or export."""
    root = next(p for p in file.parents if p.name in ("step_2", "export"))
    names = files(root)
    other = root / names[(names.index(file.relative_to(root).as_posix()) + 1) % len(names)]
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def of_another_step(file: Path) -> None:
    root = next(p for p in file.parents if p.name in ("step_2", "export"))
    other = root.parent / ("step_1" if root.name == "step_2" else "checkpoints/step_1")
    source = other / file.relative_to(root)
    file.write_bytes(source.read_bytes() if source.exists() else b"of another")


DAMAGES = [truncated, emptied, one_bit_flipped, missing, swapped, of_another_step]
Damage = Callable[[Path], None]


def test_the_lists_here_are_complete(trained: Path) -> None:
    assert files(trained / "checkpoints" / "step_2") == CHECKPOINT
    assert files(trained / "export") == EXPORT


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_damaged_file_of_a_checkpoint_is_named_and_the_one_before_is_used(
    run: Path, name: str, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    step = run / "checkpoints" / "step_2"
    if damage is of_another_step and "adapter_config" in name:
        pytest.skip("the same in every step")
    damage(step / name)
    with pytest.raises(CheckpointError) as raised:
        verify(step)
    # Of two files that do not fit each other, either may be the one that is named.
    is_pair = damage is swapped or (damage is of_another_step and name == "manifest.json")
    named = {name, *files(step)} if is_pair else {name}
    assert any(each in str(raised.value) for each in named)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run) == run / "checkpoints" / "step_1"
    assert "step_2" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", EXPORT)
def test_a_damaged_file_of_an_export_is_named(run: Path, name: str, damage: Damage) -> None:
    if damage is of_another_step and "adapter_config" in name:
        pytest.skip("the same in every step")
    damage(run / "export" / name)
    with pytest.raises(ExportError) as raised:
        bind(duo(), run / "export")
    named = {name, *EXPORT} if damage is swapped else {name}
    assert any(each in str(raised.value) for each in named)


@pytest.mark.parametrize("folder", ["checkpoints/step_2", "export"])
def test_every_single_bit_of_a_manifest_counts(run: Path, folder: str) -> None:
    path = run / folder / "manifest.json"
    content = path.read_bytes()
    check = verify if folder != "export" else read_manifest
    bits = random.Random(0).sample(range(8 * len(content)), 300)
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises((CheckpointError, ExportError)):
            check(run / folder)
    path.write_bytes(content)
    check(run / folder)


def test_an_extra_file_in_an_export_is_named(run: Path) -> None:
    (run / "export" / "adapters" / "actor" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ExportError, match=r"adapter_model\.bin is not in its manifest"):
        read_manifest(run / "export")


def test_resuming_goes_on_from_the_checkpoint_before_a_damaged_one(
    run: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_bit_flipped(run / "checkpoints" / "step_2" / "learner.safetensors")
    trainer = Trainer(
        duo(),
        train_dataset=EXAMPLES,
        reward=reward,
        config=settings(tiny_model),
        run_dir=run,
        resume=True,
    )
    assert trainer.iteration == 1
    assert "the content of learner.safetensors differs" in caplog.text
    trainer.train(progress=False)
    verify(run / "checkpoints" / "step_2")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(
            (name, d)
            for name in ("graph.json", "config.yaml")
            for d in (truncated, emptied, missing)
        ),
        *(("base_models.json", d) for d in (truncated, emptied)),  # a run of 0.1.0 has none
    ],
)
def test_a_run_folder_without_its_description_is_named(
    run: Path, tiny_model: Path, name: str, damage: Damage
) -> None:
    damage(run / name)
    with pytest.raises((CheckpointError, ValueError), match=str(run)):
        Trainer(
            duo(),
            train_dataset=EXAMPLES,
            reward=reward,
            config=settings(tiny_model),
            run_dir=run,
            resume=True,
        )


def test_an_adapter_to_start_from_is_checked_against_its_manifest(
    run: Path, tiny_model: Path
) -> None:
    one_bit_flipped(run / "export" / "adapters" / "actor" / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"actor/adapter_model\.safetensors differs"):
        Trainer(
            duo(),
            train_dataset=EXAMPLES,
            reward=reward,
            config=config(tiny_model, start_from=str(run / "export")),
            run_dir=run.parent / "next",
        )


@pytest.mark.parametrize("damage", [truncated, emptied, missing])
def test_damaged_weights_of_a_base_model_are_named(
    tiny_model: Path, tmp_path: Path, damage: Damage
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    damage(base / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Trainer(
            duo(),
            train_dataset=EXAMPLES,
            reward=reward,
            config=config(base),
            run_dir=tmp_path / "run",
        )
