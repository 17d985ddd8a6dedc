"""Who are the agents of my app, and who observes whom?

python examples/01_inspect.py
"""

from pathlib import Path

from marft_graph import FlexMG, MarftError, compile_graph
from marft_graph.graph.draw import summary, to_mermaid
from marft_graph.workflow import load_target

WORKFLOW = Path(__file__).parents[1] / "workflows" / "math_duo"


def main() -> None:
    """Compile math_duo and print what the compiler found."""
    flex_mg: FlexMG = compile_graph(load_target(str(WORKFLOW)).graph)
    print(summary(flex_mg))
    print(flex_mg.explain("actor", "reasoner"))
    print(flex_mg.explain("reasoner", "actor"))
    print(to_mermaid(flex_mg))
    try:
        compile_graph("not a graph")
    except MarftError as error:  # every error of the package
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
