"""A griffe extension: doctests and literal blocks of docstrings, as Markdown shows them."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^>>> .*\Z", re.MULTILINE | re.DOTALL)


class DocstringExamples(Extension):
    """Puts an object's closing doctests under `Examples:`, which griffe then shows as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite a docstring; MkDocs alone sees it."""
        if obj.docstring is None:
            return
        text = re.sub(r"::\n", ":\n", obj.docstring.value)
        obj.docstring.value = _EXAMPLE.sub(
            lambda found: "Examples:\n" + textwrap.indent(found[0], "    "), text
        )
