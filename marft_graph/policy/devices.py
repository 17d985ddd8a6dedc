"""Devices of torch by the names that users write, and whether this machine has them."""

from __future__ import annotations

import torch
from accelerate import PartialState

from marft_graph.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device behind a setting; `auto` is what accelerate chooses.

    Raises:
        ConfigError: as `check_device`.
    """
    check_device(name)
    return PartialState().device if name == "auto" else torch.device(name)


def check_device(name: str) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Raises:
        ConfigError: names the device and those that are there.

    >>> check_device("auto"), check_device("cpu")
    (None, None)
    """
    if name == "auto":
        return
    there = available_devices()
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"device is {name!r}, which torch does not know; {_accepted(there)}"
        ) from error
    # torch counts a device without a number as the current one, and knows one CPU.
    numbered = f"{device.type}:{device.index or 0}"
    if numbered not in there:
        raise ConfigError(f"device is {name!r}, which is not here; {_accepted(there)}")


def available_devices() -> tuple[str, ...]:
    """The devices of this machine that this build of torch can use, with their numbers."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    numbered = [f"{accelerator.type}:{i}" for i in range(count)] if accelerator else []
    return ("cpu:0", *numbered)


def _accepted(there: tuple[str, ...]) -> str:
    shown = ", ".join("cpu" if name == "cpu:0" else name for name in there)
    return f"this machine, with torch {torch.__version__}, has {shown} (auto chooses)"
