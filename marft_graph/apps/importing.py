"""Importing a user's Python file: its own packages found, nothing of theirs shadowed.

A file inside a package is imported by its dotted name, so that relative imports work and the
package is one module however it is reached. A package that has the name of a library in this
environment (an app's own folder `openai`) is imported under another name instead, unless it imports
itself by that name: everybody's `import openai` goes on meaning the library. The folder of a single
file is not put on `sys.path` where it would hide a package of the app. It knows nothing of graphs.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from marft_graph.errors import WorkflowError

_LIBRARIES = tuple(
    Path(sysconfig.get_paths()[name]).resolve()
    for name in ("purelib", "platlib", "stdlib", "platstdlib")
)
_PROJECT_FILES = ("langgraph.json", "pyproject.toml", "setup.py", "requirements.txt", ".git")


def load_module(path: Path, roots: Sequence[Path] | None = None) -> ModuleType:
    """Import a Python file by its path.

    Args:
        path: of the file.
        roots: folders whose packages the app imports, as `langgraph.json` names them; they come
            last on `sys.path`, as `langgraph dev` puts them. None: the file stands alone, and its
            folder comes first, as when Python runs it.

    Raises:
        WorkflowError: the file cannot be imported; the message has its line and the cause.
    """
    path = path.resolve()
    for root in roots or ():
        append_to_path(root)
    try:
        dotted = _dotted_name(path)
        if dotted is not None:
            return importlib.import_module(dotted)
        return _load_single(path, is_alone=roots is None)
    except WorkflowError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception | SystemExit):
            raise
        raise WorkflowError(import_problem(path, error)) from error


def import_by_name(name: str, roots: Sequence[Path], named_in: Path) -> ModuleType:
    """Import a module by its dotted name.

    Raises:
        WorkflowError: there is no such module, or its code raised; with file and line.
    """
    for root in roots:
        append_to_path(root)
    try:
        return importlib.import_module(name)
    except BaseException as error:
        if not isinstance(error, Exception | SystemExit):
            raise
        raise WorkflowError(import_problem(named_in, error)) from error


def append_to_path(folder: Path) -> None:
    """Make a folder's packages importable, after everything that is so already."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _load_single(path: Path, *, is_alone: bool) -> ModuleType:
    name = f"marft_workflow_{path.parent.name}_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise WorkflowError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    hides_a_package = _hides_a_package(path.parent)
    if not hides_a_package and is_alone and str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    elif not hides_a_package:
        append_to_path(path.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _hides_a_package(folder: Path) -> bool:
    """Whether a file of the folder would be taken for the folder, a package without __init__.py."""
    if not (folder / f"{folder.name}.py").is_file() or not folder.name.isidentifier():
        return False
    spec = importlib.util.find_spec(folder.name)
    return spec is not None and _is_at(spec.submodule_search_locations, folder)


def _dotted_name(path: Path) -> str | None:
    """The name of a file inside a package, once it can be imported; None for a single file.

    Raises:
        WorkflowError: another package of that name is imported already.
    """
    if not (path.parent / "__init__.py").is_file() or path.stem == "__init__":
        return None
    package = path.parent
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    root, top = package.parent, package.name
    dotted = ".".join(path.relative_to(root).with_suffix("").parts)
    if not all(part.isidentifier() for part in dotted.split(".")):
        return None
    if _is_library(top) and not _imports_itself(package):
        return _under_another_name(package, dotted)
    imported = sys.modules.get(top)
    if imported is None:
        if str(root) not in sys.path:
            sys.path.append(str(root))
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(top)
        if spec is None or not _is_at(spec.submodule_search_locations, package):
            sys.path.insert(0, str(root))  # something installed has the name; the app's own wins
        append_to_path(path.parent)
    elif not _is_at(getattr(imported, "__path__", ()), package):
        place = getattr(imported, "__file__", None) or "another place"
        raise WorkflowError(
            f"{path} belongs to the package {top!r} of {root}, but a module {top!r} is imported "
            f"already, from {place}. Load the two apps in processes of their own, or rename one"
        )
    return dotted


def _is_library(name: str) -> bool:
    """Whether a library of this environment has the name, and no other package comes before it."""
    imported = sys.modules.get(name)
    spec = getattr(imported, "__spec__", None) if imported else importlib.util.find_spec(name)
    if spec is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    places = [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
    return any(
        Path(place).resolve().is_relative_to(root) for place in places for root in _LIBRARIES
    )


def _imports_itself(package: Path) -> bool:
    """Whether a file of the package imports a module of it by the package's name."""
    for file in package.rglob("*.py"):
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top, *inner = name.split(".")
                if top == package.name and inner and _has_module(package, inner[0]):
                    return True
    return False


def _has_module(package: Path, name: str) -> bool:
    return (package / f"{name}.py").is_file() or (package / name / "__init__.py").is_file()


def _under_another_name(package: Path, dotted: str) -> str:
    """The dotted name of a file once its package, which has a library's name, has another one."""
    top, _, rest = dotted.partition(".")
    name = f"marft_app_{top}_{abs(hash(package))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        if spec is None or spec.loader is None:
            raise WorkflowError(f"{package} is no Python package")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
    append_to_path(package.parent)
    append_to_path(package / Path(*rest.split(".")[:-1]))
    return f"{name}.{rest}"


def _is_at(places: Sequence[str] | None, folder: Path) -> bool:
    return any(Path(place).resolve() == folder for place in places or ())


def import_problem(path: Path, error: BaseException) -> str:
    """File, line and cause of an exception that the user's file raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    in_file = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    line = f", line {in_file[-1].lineno}" if in_file else ""
    text = f"{path}{line}: {type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        text += f" ({_where_it_may_be(error.name, path.resolve())})"
    return text


def _where_it_may_be(name: str, path: Path) -> str:
    """What to do about a module that was not found.

    Names of modules are not names of packages on an index: `pip install NAME` may be somebody
    else's, so no such command is made from a module's name.
    """
    top = name.partition(".")[0]
    project = project_folder(path)
    if _is_importable(top):
        return f"the package {top!r} is installed, but has no module {name!r}: another version?"
    for folder in (path.parent, *path.parent.parents):
        for root in (folder, folder / "src"):
            if (root / top / "__init__.py").is_file() or (root / f"{top}.py").is_file():
                return (
                    f"{top!r} is the app's own, in {root}, where Python does not look: name that "
                    "folder in the `dependencies` of its langgraph.json, or install the app: "
                    f"pip install -e {project}"
                )
        if folder == project:
            break
    if (project / "pyproject.toml").is_file() or (project / "setup.py").is_file():
        return f"is the app installed here, with what it depends on? pip install -e {project}"
    if (project / "requirements.txt").is_file():
        file = project / "requirements.txt"
        return f"is what the app depends on installed here? pip install -r {file}"
    return "install, in this environment, the package that has it"


def project_folder(path: Path) -> Path:
    """The nearest folder around a file that looks like a project's; else the file's own."""
    for folder in path.parents:
        if any((folder / name).exists() for name in _PROJECT_FILES):
            return folder
    return path.parent


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
