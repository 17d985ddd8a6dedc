"""A model's class that needs no arguments, in a module of its own, as apps have one."""

from __future__ import annotations

from typing import Any

from langchain_openai import ChatOpenAI
from pydantic import SecretStr


class ToolModel(ChatOpenAI):
    """ChatOpenAI with its settings."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"model": "gpt-4o-mini", "api_key": SecretStr("not-set"), **given})
