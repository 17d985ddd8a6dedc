"""What is shipped: the public names, the wheel, and how fast the package is at hand."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import marft_graph
from tests.versions import oldest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "datasets", "langgraph", "matplotlib", "networkx")


def test_every_public_name_exists_and_there_are_few():
    names = marft_graph.__all__
    missing = [name for name in names if not hasattr(marft_graph, name)]
    assert missing == []
    assert len(names) == len(set(names))
    assert 0 < len(names) <= 16


def test_public_names_are_in_the_readme_or_the_docs():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    undocumented = [name for name in marft_graph.__all__ if name not in text]
    assert undocumented == []


def test_dir_lists_the_public_names():
    assert set(marft_graph.__all__) <= set(dir(marft_graph))


def test_every_room_is_a_package_of_its_own():
    folders = {path.parent for path in (ROOT / "marft_graph").rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_command_line_starts_without_heavy_imports():
    code = f"import sys, marft_graph.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "[]"


def test_constraints_satisfy_the_ranges_that_pip_would_accept():
    requirements = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    for text in importlib.metadata.requires("marft-graph") or []:
        requirement = requirements.Requirement(text)
        if requirement.name == "marft-graph":
            continue
        pin = pins[requirement.name.lower()]
        assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = out.glob("*.whl")
    return path


def test_wheel_has_only_the_typed_package_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"marft_graph"}
    assert "marft_graph/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "marft_graph").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    """Import and command line in a new environment; only the dependencies are borrowed."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / "lib" / version / "site-packages"
    # A path file names the dependencies; the path files in that folder (the checkout) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    zipfile.ZipFile(wheel).extractall(site)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def output(*args: str) -> str:
        command = [str(python), *args]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    where = output("-c", "import marft_graph; print(marft_graph.__file__)")
    assert where.strip() == str(site / "marft_graph" / "__init__.py")
    entry = "import sys; from marft_graph.cli import main; sys.argv[0] = 'marft-graph'; main()"
    assert importlib.metadata.version("marft-graph") in output("-c", entry, "--version")
    assert "inspect" in output("-c", entry, "--help")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder where set-up is done and the command line only says what it was told."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    program = tmp_path / ".venv" / "bin" / "marft-graph"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "told: $@"\n', encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def make(checkout: Path, *args: str) -> str:
    # A make above this one (`make test`) would pass its own flags and variables on.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "RUN_DIR"}
    done = subprocess.run(
        ["make", *args],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_make_demo_never_takes_a_folder_that_exists(checkout):
    told = "told: train workflows/math_duo --run-dir "
    assert told + "runs/demo\n" in make(checkout, "demo")
    (checkout / "runs" / "demo").mkdir(parents=True)
    assert told + "runs/demo-2\n" in make(checkout, "demo")
    (checkout / "runs" / "demo-2").mkdir()
    assert told + "runs/demo-3\n" in make(checkout, "demo")


def test_make_demo_passes_a_named_folder_on(checkout):
    assert "--run-dir my runs/one\n" in make(checkout, "demo", "RUN_DIR=my runs/one")


def test_make_without_a_target_explains_the_targets(checkout):
    shown = make(checkout)
    assert all(target in shown for target in ("setup", "demo", "test", "check", "format"))


def test_the_oldest_versions_are_the_lower_bounds_of_what_the_package_and_its_tests_need():
    pins = dict(pin.split("==") for pin in oldest())
    needed = importlib.metadata.requires("marft-graph") or []
    named = {re.match(r"[\w-]+", line)[0] for line in needed if "extra" not in line}
    assert named <= pins.keys()
    assert {"langchain", "langchain-openai", "pytest", "trl"} <= pins.keys()
    assert pins["langgraph"].startswith("1.2.")
    assert "marft-graph" not in pins


def test_an_index_that_does_not_answer_is_not_waited_for(tmp_path):
    """Set-up asks the index of CPU builds only where it answers; pip alone waits for minutes."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    (tmp_path / "constraints-vllm.txt").write_text("torch==1\n")
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # pip finds no CPU build; the probe of the index fails; everything else succeeds and is told.
    python.write_text(
        '#!/bin/sh\necho "$@" >> told\ncase "$*" in *+cpu*) exit 1;; -c*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    make(tmp_path, "setup")
    told = (tmp_path / "told").read_text()
    installs = [line for line in told.splitlines() if "torch==1" in line and "+cpu" not in line]
    assert installs
    assert not any("download.pytorch.org" in line for line in installs)
    assert "timeout=5" in told


def test_another_python_that_is_not_there_is_said_not_to_be_tried(checkout):
    assert "Python 9.9 is not on this machine: not tried" in make(checkout, "test-python9.9")
