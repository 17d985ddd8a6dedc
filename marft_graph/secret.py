"""Secrets of the process's environment, kept out of what a run writes and says.

Apps put API keys into error messages and prompts without meaning to. What looks like a secret by
the name of its variable is replaced by that name wherever a run would store it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping

_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with the environment's secrets replaced by the names of their variables.

    A secret is the value of a variable whose name ends in KEY, TOKEN, SECRET, PASSWORD or
    CREDENTIALS, and that has at least eight characters.

    >>> without_secrets("401: bad key sk-12345678", {"OPENAI_API_KEY": "sk-12345678"})
    '401: bad key [OPENAI_API_KEY]'
    """
    return hiding(environment)(text)


def hiding(environment: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """`without_secrets` for many texts, plain or JSON: the environment is read once."""
    secrets = _secrets(os.environ if environment is None else environment)

    def hide(text: str) -> str:
        for secret, name in secrets:
            if secret in text:
                text = text.replace(secret, f"[{name}]")
        return text

    return hide


def _secrets(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Values, as they are and as JSON writes them, and names; the longest first."""
    found: dict[str, str] = {}
    for name, value in environment.items():
        if len(value) >= _SHORTEST and _NAMES.search(name):
            found[value] = name
            found[json.dumps(value, ensure_ascii=False)[1:-1]] = name
            found[json.dumps(value)[1:-1]] = name
    return sorted(found.items(), key=lambda pair: -len(pair[0]))
