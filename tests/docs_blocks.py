"""The code blocks of the README and the docs, and what can be said of a command unrun."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from accelerate.commands.launch import launch_command_parser

from marft_graph.cli import main
from marft_graph.cli.settings import given_settings
from marft_graph.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_MARK = re.compile(r"<!-- (?:not run: (?P<reason>.+)|(?P<kind>prints|message)) -->")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*\Z")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its first line of text."""
    language: str
    text: str
    reason: str = ""
    """Why it is not run, where it is marked `<!-- not run: REASON -->`."""
    kind: str = ""
    """`prints`: what the page's last Python block prints; `message`: an error of the package."""

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        mark = _MARK.fullmatch(lines[start - 1].strip()) if start else None
        given = {k: v for k, v in mark.groupdict().items() if v} if mark else {}
        text = "\n".join(lines[start + 1 : number]) + "\n"
        language = lines[start].strip().removeprefix("```")
        found.append(Block(page, start + 2, language, text, **given))
        start = None
    assert start is None, f"{name_of(page)}:{start}: a block without an end"
    return found


def marks(page: Path) -> int:
    """How many marks a page has; each stands directly above a block."""
    return len(re.findall(r"<!-- (?:not run|prints|message)", page.read_text(encoding="utf-8")))


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, without comments and variables set for them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                if command or not _ASSIGNMENT.match(word):
                    command.append(word)
                continue
            if command:
                yield command
            command = []


def problem(command: Sequence[str]) -> str | None:
    """What is wrong with a command; None where all that can be checked is right."""
    match command:
        case ["marft-graph", *arguments] | ["python", "-m", "marft_graph", *arguments]:
            return _cli_problem(arguments)
        case ["accelerate", "launch", *arguments]:
            return _launch_problem(arguments)
        case ["make", *words]:
            return _make_problem(words)
        case ["pip", "install", target]:
            return _extras_problem(target)
        case ["python", script, *arguments] if script.endswith(".py"):
            return _script_problem(script, arguments)
    return f"nobody knows how to check {command[0]!r}: mark the block `<!-- not run: REASON -->`"


def synopsis_problem(line: str) -> str | None:
    """What is wrong with a line that shows the form of a command of ours."""
    name = line.split()[1]
    if name not in main.commands:
        return f"no command {name}"
    known = {option for param in main.commands[name].params for option in param.opts}
    unknown = set(re.findall(r"--[a-z-]+", line)) - known
    return f"{name} has no {', '.join(sorted(unknown))}" if unknown else None


def _cli_problem(arguments: Sequence[str]) -> str | None:
    name, *rest = arguments
    if name not in main.commands:
        return f"no command {name}"
    for before, path in itertools.pairwise(rest):
        if before == "--from":  # it must exist: an earlier command wrote it
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
    try:
        # Below the group, whose ways to ask for help a command keeps from its first use on.
        parent = click.Context(main, info_name="marft-graph", **main.context_settings)
        context = main.commands[name].make_context(name, list(rest), parent=parent)
        TrainConfig.from_mapping(given_settings(context.params))
    except (click.ClickException, ValueError) as error:
        return error.format_message() if isinstance(error, click.ClickException) else str(error)
    return None


def _launch_problem(arguments: Sequence[str]) -> str | None:
    try:
        given = launch_command_parser().parse_args(list(arguments))
    except SystemExit:
        return "accelerate launch refuses its options"
    if not given.module or given.training_script != "marft_graph":
        return "accelerate launch must be given -m marft_graph"
    return _cli_problem(given.training_script_args)


def _make_problem(words: Sequence[str]) -> str | None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, re.M))
    variables = set(re.findall(r"\b[A-Z_]+\b", text))
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in (variables if equals else targets):
            return f"the Makefile has no {name}"
    return None


def _extras_problem(target: str) -> str | None:
    found = re.fullmatch(r"(?:\.|marft-graph)(?:\[([a-z,]+)\])?", target)
    if found is None:
        return f"{target} is not this package"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unknown = set(filter(None, (found[1] or "").split(","))) - set(project["optional-dependencies"])
    return f"no extra {', '.join(unknown)}" if unknown else None


def _script_problem(script: str, arguments: Sequence[str]) -> str | None:
    path = ROOT / script
    if not path.is_file():
        return f"there is no {script}"
    texts = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    unknown = [word for word in arguments if word.startswith("--") and word not in texts]
    return f"{script} has no {', '.join(unknown)}" if unknown else None
