"""`python -m marft_graph`: the command line."""

from marft_graph.cli import main

main()
