"""Devices by name: those that are not there are refused with those that are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marft_graph import Trainer, bind
from marft_graph.errors import ConfigError
from marft_graph.policy.devices import available_devices, check_device, device_of
from tests.training import config

ABSENT = [
    *("cuda:99", "cuda:-1", "nonsense", "", "cuda:x", "CPU", "cpu:3", "meta", "xpu:99", "gpu"),
    *(["cuda", "cuda:0"] if not torch.cuda.is_available() else []),
    *(["mps"] if not torch.backends.mps.is_available() else []),
]


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_there_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"device is '{name}'.* has cpu"):
        check_device(name)


def test_what_is_there_is_accepted() -> None:
    for name in ("auto", "cpu", *available_devices()):
        check_device(name)
    assert device_of("cpu").type == "cpu"


def test_training_refuses_it_before_a_run_is_deleted_or_a_model_loaded(
    make: Callable[..., Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    make(config=config(tiny_model, iterations=0)).close()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text("an earlier run")
    for changes in ({"device": "cuda:99"}, {"base_model": str(tmp_path / "none")}):
        with pytest.raises((ConfigError, OSError)):
            make(config=config(tiny_model, **changes), overwrite=True)
        assert (tmp_path / "run" / "config.yaml").read_text() == "an earlier run"


def test_a_bound_app_refuses_it(make: Callable[..., Trainer], tmp_path: Path) -> None:
    with make() as trainer:
        folder = trainer.export(tmp_path / "out")
        with pytest.raises(ConfigError, match="device is 'cuda:99'"):
            bind(trainer.graph, folder, device="cuda:99")
