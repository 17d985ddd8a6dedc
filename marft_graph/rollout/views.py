"""Views of a graph's state that note which channels are read.

A view behaves as the state that it shows: it is a dict, or an instance of the state's own class,
with the same values, and a change of it is a change of what its task sees. Copies of it, and what
pickles and deep copies make, are plain; so what is done with a copy is not seen, and it is noted
that the values went into one. What the task itself has put into a view is no read. Names
(`in`, `len`, `keys()`, iteration) are no values, so asking for them is no read either. Code in C
that reads a dict past its methods (`orjson.dumps(state)`) is not seen. Knows neither LangGraph nor
episodes.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

from pydantic import BaseModel

Note = Callable[[str, bool], None]
"""Told the name of a channel whose value is read, and whether only as one of a copied whole."""


def _nobody(_: str, is_copied: bool) -> None:
    """Nothing is noted: what `type(view)(...)` makes is no view of a task's state."""


class StateView(dict[str, Any]):
    """A dict that notes which of its values are read."""

    __slots__ = ("_changed", "_merging", "_note")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._note: Note = _nobody
        self._changed: set[str] = set()
        self._merging: tuple[Any, int] | None = None

    def _shown_class(self) -> type:
        return dict

    __class__ = property(_shown_class)

    def _read(self, *keys: Any, is_copied: bool = False) -> None:
        for key in keys:
            if key not in self._changed:
                self._note(key, is_copied)

    def _read_all(self) -> None:
        self._read(*dict.keys(self))

    def _copy_all(self) -> None:
        self._read(*dict.keys(self), is_copied=True)

    def keys(self) -> Any:
        """As a dict's; C code that copies the whole asks for them first, then for each value."""
        frame = sys._getframe(1)
        self._merging = frame.f_code, frame.f_lasti
        return super().keys()

    def __getitem__(self, key: str) -> Any:
        if self._merging is not None:
            frame = sys._getframe(1)
            if self._merging == (frame.f_code, frame.f_lasti):  # one instruction asked for both
                self._read(key, is_copied=True)
                return super().__getitem__(key)
            self._merging = None
        self._read(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's."""
        self._read(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """As a dict's."""
        self._read(key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """As a dict's."""
        self._read_all()
        return super().popitem()

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As a dict's."""
        if key in self:
            self._read(key)
        else:
            self._changed.add(key)
        return super().setdefault(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        self._changed.add(key)
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dict's."""
        new = dict(*args, **kwargs)
        self._changed.update(new)
        super().update(new)

    def __ior__(self, other: Any) -> StateView:  # type: ignore[override]
        self.update(other)
        return self

    def __or__(self, other: Any) -> Any:
        return plain_of(self, self._copy_all) | other

    def __ror__(self, other: Any) -> Any:
        return other | plain_of(self, self._copy_all)

    def __iter__(self) -> Any:
        # Overridden so that C code (`**state`, `dict(state)`) asks `keys` and `__getitem__`.
        return super().__iter__()

    def items(self) -> Any:
        """As a dict's; all values count as read."""
        self._read_all()
        return super().items()

    def values(self) -> Any:
        """As a dict's; all values count as read."""
        self._read_all()
        return super().values()

    def copy(self) -> dict[str, Any]:
        """A plain dict."""
        return plain_of(self, self._copy_all)

    def __copy__(self) -> dict[str, Any]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.copy(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)

    def __eq__(self, other: object) -> bool:
        self._read_all()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(plain_of(self, self._read_all))


def plain_of(view: StateView, read: Callable[[], None] | None = None) -> dict[str, Any]:
    """What a view shows, as a plain dict; nothing is noted unless `read` does."""
    if read is not None:
        read()
    return dict(zip(dict.keys(view), dict.values(view), strict=True))


@dataclasses.dataclass(slots=True)
class _Typed:
    """What is noted of one instance of a state class."""

    value: Any
    note: Note
    changed: set[str] = dataclasses.field(default_factory=set)
    is_changing: bool = False


_typed: dict[int, _Typed] = {}
_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def fields_of(value: Any) -> frozenset[str]:
    """Fields of an instance of a pydantic model or a dataclass; none of anything else."""
    if isinstance(value, BaseModel):
        return frozenset(type(value).model_fields)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return frozenset(spec.name for spec in dataclasses.fields(value))
    return frozenset()


def view_of(value: Any, note: Note) -> Any:
    """A view of a state; None where its kind of state cannot be given one."""
    if type(value) is dict:
        view = StateView(value)
        view._note = note
        return view
    fields = fields_of(value)
    if not fields:
        return None
    base = type(value)
    with _lock:
        kind = _classes.get(base)
        if kind is None:
            kind = _classes[base] = _view_class(base, fields)
    shown = copy.copy(value)
    try:
        object.__setattr__(shown, "__class__", kind)
    except TypeError:  # a layout of its own
        return None
    _typed[id(shown)] = _Typed(shown, note)
    return shown


def is_view(value: Any) -> bool:
    """Whether a value is a view that is still watched."""
    return type(value) is StateView or id(value) in _typed


def changed_in(view: Any) -> set[str]:
    """Channels whose value in a view is no longer the state's, because its task has set them."""
    return view._changed if type(view) is StateView else _typed[id(view)].changed


def release(view: Any) -> Any:
    """What a view shows, plain: a dict, or the instance itself in its own class again."""
    if type(view) is StateView:
        return plain_of(view)
    if _typed.pop(id(view), None) is not None:
        object.__setattr__(view, "__class__", type(view).__mro__[1])
    return view


def _view_class(base: type, fields: frozenset[str]) -> type:
    """A subclass whose instances note which fields are read, and say that they are of `base`."""
    read = cast("Callable[[Any, str], Any]", base.__getattribute__)
    write = cast("Callable[[Any, str, Any], None]", base.__setattr__)

    def note(self: Any, names: Iterable[str], *, is_copied: bool = False) -> None:
        known = _typed.get(id(self))
        if known is not None and not known.is_changing:
            for name in names:
                if name not in known.changed:
                    known.note(name, is_copied)

    def get_attribute(self: Any, name: str) -> Any:
        if name in fields:
            note(self, (name,))
        elif name == "__class__":
            return base
        elif name == "__dict__":
            note(self, fields, is_copied=True)
        return read(self, name)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        known = _typed.get(id(self))
        if known is None:
            write(self, name, value)
            return
        known.is_changing = True  # setting one field looks at the others' dict
        try:
            write(self, name, value)
        finally:
            known.is_changing = False
        known.changed.add(name)

    body = _copying(base, lambda view: note(view, fields, is_copied=True)) | {
        "__slots__": (),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__getattribute__": get_attribute,
        "__setattr__": set_attribute,
    }
    meta: Any = type(base)
    # Made without the class's own machinery, which would build a schema and register a subclass.
    maker: Any = abc.ABCMeta if issubclass(meta, abc.ABCMeta) else type
    return cast("type", maker.__new__(meta, base.__name__, (base,), body))


def _copying(base: type, note_all: Callable[[Any], None]) -> dict[str, Any]:
    """Methods of a view by which it is copied and pickled: what comes out is plain."""
    new = cast("Callable[[type], Any]", base.__new__)

    def reduce(self: Any, protocol: Any) -> Any:
        note_all(self)
        plain = copy.copy(self)
        object.__setattr__(plain, "__class__", base)
        return plain.__reduce_ex__(protocol)

    def deep_copy(self: Any, memo: dict[int, Any]) -> Any:
        note_all(self)
        plain = new(base)
        for name, value in _slots(self, base):
            object.__setattr__(plain, name, copy.deepcopy(value, memo))
        return plain

    def shallow_copy(self: Any) -> Any:
        note_all(self)
        plain = new(base)
        for name, value in _slots(self, base):
            object.__setattr__(plain, name, copy.copy(value) if name == "__dict__" else value)
        return plain

    return {"__reduce_ex__": reduce, "__deepcopy__": deep_copy, "__copy__": shallow_copy}


def _slots(value: Any, base: type) -> list[tuple[str, Any]]:
    """Everything that an instance holds: its dict and its slots."""
    names = {"__dict__"} if hasattr(value, "__dict__") else set()
    for kind in base.__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names.update((slots,) if isinstance(slots, str) else slots)
    names.discard("__weakref__")
    held = []
    for name in sorted(names):
        with contextlib.suppress(AttributeError):  # never filled
            held.append((name, object.__getattribute__(value, name)))
    return held
