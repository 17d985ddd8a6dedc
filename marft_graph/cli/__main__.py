"""`python -m marft_graph.cli`."""

from marft_graph.cli import main

main()
