"""Copies of what the user gives, so that no episode changes another one's data or the user's."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Mapping
from typing import Any

from marft_graph.errors import DatasetError


def own_copy(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """An example for one episode or one reward call alone, equal to the user's.

    Raises:
        DatasetError: it holds something that cannot be copied, which episodes would share.

    >>> data = {"notes": ["a"]}
    >>> own_copy(data)["notes"].append("b")
    >>> data
    {'notes': ['a']}
    """
    try:
        return copy.deepcopy(example)
    except Exception as error:  # objects say in many ways that they cannot be copied
        for key, value in example.items():
            if not _can_be_copied(value):
                raise DatasetError(
                    f"{key!r} of an example is {reprlib.repr(value)}, a {type(value).__name__}, "
                    f"which cannot be copied ({type(error).__name__}: {error}). Every episode gets "
                    "its own copy of its example: give plain values there, and make the object of "
                    "them in `inputs=`, in `context=` or in the node; or give its class a "
                    "__deepcopy__"
                ) from error
        raise


def copy_or_same(value: Any) -> Any:
    """A copy; the value itself where it cannot be copied, such as a client that holds a lock."""
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - objects say in many ways that they cannot be copied
        return value


def _can_be_copied(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - as above
        return False
    return True
