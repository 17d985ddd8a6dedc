"""math_duo with its trained adapters, as a graph that LangGraph's server runs.

Set MARFT_EXPORT to an export folder, and MARFT_BASE_URL where vLLM serves its adapters (without it
they are loaded here). Then, in this folder: `langgraph dev`.
"""

import os
from pathlib import Path

from marft_graph import bind
from marft_graph.workflow import load_target

app = load_target(str(Path(__file__).parents[2] / "workflows" / "math_duo")).graph
share = float(os.environ.get("MARFT_SHARE", "1"))
bound = bind(
    app, os.environ["MARFT_EXPORT"], base_url=os.environ.get("MARFT_BASE_URL"), share=share
)
graph = bound.compiled
