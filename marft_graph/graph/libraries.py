"""Whose code a function or an object is: the user's, LangChain's, another library's, Python's.

Only the user's code, and that of packages which know chat models, is followed.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

LANGCHAIN = ("langchain", "langchain_core", "langgraph")
_FAMILY = (*LANGCHAIN, "langchain_classic", "langchain_community", "langchain_text_splitters")
_PROVIDERS = frozenset(
    {"openai", "anthropic", "litellm", "mistralai", "groq", "cohere", "ollama", "together"}
    | {"replicate", "ai21", "dashscope", "zhipuai", "vertexai", "instructor", "dspy", "xai_sdk"}
    | {"fireworks", "cerebras", "aisuite", "portkey_ai", "llama_cpp", "vllm", "botocore", "boto3"}
)
_PROVIDER_MODULES = ("google.genai", "google.generativeai", "huggingface_hub", "azure.ai.inference")
_LEAVES = frozenset(
    {"langsmith", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp", "pydantic"}
    | {"torch", "transformers", "datasets", "numpy", "pandas", "trl", "peft", "tenacity", "idna"}
    | {"tiktoken", "marft_graph", "sqlalchemy", "fastapi", "starlette", "typing_extensions"}
)
"""Packages that call no chat model of their own accord."""
_FOLLOWED = frozenset({"langgraph_supervisor", "langgraph_swarm", "langgraph_reflection"})


def package(module: str | None) -> str:
    """The first part of a module's name."""
    return (module or "").partition(".")[0]


def is_langchain(module: str | None) -> bool:
    """Whether a module belongs to LangChain, LangGraph or one of their provider packages."""
    name = package(module)
    if name in _FOLLOWED:
        return False
    return name in _FAMILY or name.startswith("langchain_")


def is_python(module: str | None) -> bool:
    """Whether a module is part of Python itself."""
    name = package(module)
    return name != "__main__" and (name in sys.stdlib_module_names or name == "builtins")


def is_provider(module: str | None) -> bool:
    """Whether a module belongs to the SDK of a model provider."""
    name = module or ""
    return package(name) in _PROVIDERS or any(
        name == known or name.startswith(f"{known}.") for known in _PROVIDER_MODULES
    )


def is_followed(module: str | None) -> bool:
    """Whether code of this module is read: the user's, and packages that know chat models."""
    if is_langchain(module) or is_python(module) or is_provider(module):
        return False
    return package(module) not in _LEAVES and _knows_models(package(module))


@functools.lru_cache(maxsize=256)
def _knows_models(name: str) -> bool:
    """Whether a package is the user's own, or refers to LangChain or a provider's SDK."""
    modules = [
        module
        for key, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and (key == name or key.startswith(f"{name}."))
    ]
    files = [getattr(module, "__file__", None) or "" for module in modules]
    if not any("site-packages" in file or "dist-packages" in file for file in files):
        return True
    return any(_refers(value) for module in modules for value in list(vars(module).values()))


def _refers(value: Any) -> bool:
    kind = type(value)  # not isinstance: some objects warn when they are asked what they are
    if kind is types.ModuleType:
        name: Any = value.__name__
    elif kind is types.FunctionType or issubclass(kind, type):
        name = value.__module__
    else:
        name = kind.__module__
    return isinstance(name, str) and (is_langchain(name) or is_provider(name))


def client_name(kind: type) -> str:
    """A client's class as a user writes it: `openai.OpenAI`."""
    module = kind.__module__
    top = package(module)
    known = next((m for m in _PROVIDER_MODULES if module.startswith(m)), top)
    return f"{known}.{kind.__qualname__}"
