"""One agent with two tools, made by LangChain's `create_agent`: it calculates by calling them.

An ordinary LangGraph app around an API model. Run it as it is with OPENAI_API_KEY set.
"""

import os

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model=os.environ.get("OPENAI_MODEL", "gpt-4o-mini"),
    api_key=os.environ.get("OPENAI_API_KEY", "not-set"),
)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def sub(a: int, b: int) -> int:
    """Subtract b from a."""
    return a - b


graph = create_agent(model, [add, sub], system_prompt="Use a tool.")
