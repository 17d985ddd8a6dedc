"""The names of agents: node paths without task ids, and adapter names made from them.

A node path names a node through its subgraphs (`research_team/writer/agent`). An adapter name is
the same thing in letters that PEFT module names, file systems and vLLM model names all accept.
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[A-Za-z0-9_]")
_PREBUILT_INNER = frozenset({"agent", "model"})
_HANDLER = "__error_handler__"
_SHARED_HANDLER = "__default_error_handler__"
_HANDLES = "error_handler"
_UNNAMED_GRAPHS = frozenset({"", "LangGraph"}) | _PREBUILT_INNER


def node_path(checkpoint_ns: str) -> str:
    """Node path of a LangGraph checkpoint namespace.

    Task ids, and the counters of subgraphs invoked several times in a node, are not part of an
    agent's identity. An error handler runs inside the task that failed.

    >>> node_path("supervisor:1f-a|tools:2b-c|1|researcher:3d-e")
    'supervisor/tools/researcher'
    >>> node_path("team:1f-a|writer:2b-c|__error_handler__writer:3d-e")
    'team/writer/error_handler'
    >>> node_path("team:1f-a|writer:2b-c|__default_error_handler__:3d-e")
    'team/error_handler'
    """
    path: list[str] = []
    for part in checkpoint_ns.split("|"):
        name = part.partition(":")[0]
        if not name or name.isdigit():
            continue
        if name.startswith((_HANDLER, _SHARED_HANDLER)):
            del path[-1:]
        path.append(vertex_name(name))
    return "/".join(path)


def vertex_name(node: str) -> str:
    """A node of a compiled graph as paths name it: error handlers by the node that they handle.

    >>> vertex_name("__error_handler__writer"), vertex_name("__default_error_handler__")
    ('writer/error_handler', 'error_handler')
    """
    if node == _SHARED_HANDLER:
        return _HANDLES
    return f"{node.removeprefix(_HANDLER)}/{_HANDLES}" if node.startswith(_HANDLER) else node


def handles(handler: str, node: str) -> bool:
    """Whether a node of a compiled graph, by LangGraph's name, handles the errors of another.

    >>> handles("__error_handler__writer", "writer"), handles("writer", "writer")
    (True, False)
    """
    return handler in (_SHARED_HANDLER, f"{_HANDLER}{node}")


def inner_path(path: str, *, graph: str = "", tool: str = "") -> str:
    """Where something stands that a node's code runs: the path that its own nodes are added to.

    A graph with a name of its own is named by it, unless the node is; in a tool, other graphs and
    models that are asked directly are named by the tool. A node that *is* a graph is no such case:
    its nodes follow the node's own name.

    Args:
        path: of the node.
        graph: name of the compiled graph that it runs, where it runs one.
        tool: name of the tool that runs it, where a tool does.

    >>> inner_path("tools", graph="math_agent", tool="ask_math"), inner_path("tools", tool="ask")
    ('tools/math_agent', 'tools/ask')
    >>> inner_path("writer", graph="writer"), inner_path("team", graph="LangGraph")
    ('writer', 'team')
    """
    name = graph if has_own_name(graph) else tool
    return path if not name or name == path.rpartition("/")[2] else f"{path}/{name}"


def has_own_name(graph: str) -> bool:
    """Whether somebody chose a graph's name.

    >>> has_own_name("math_agent"), has_own_name("LangGraph")
    (True, False)
    """
    return graph not in _UNNAMED_GRAPHS


def agent_path(path: str) -> str:
    """A node path with the inner node of a prebuilt agent folded into its parent's name.

    >>> agent_path("research_team/writer/agent"), agent_path("model")
    ('research_team/writer', 'model')
    """
    parent, _, last = path.rpartition("/")
    return parent if parent and last in _PREBUILT_INNER else path


def adapter_name(path: str) -> str:
    """An agent path as a name for PEFT, file systems and vLLM; `agent_of_adapter` reverses it.

    Letters, digits and underscores stay; any other byte becomes `-XX`. PEFT refuses names that
    contain its own prefix `lora_`, so that underscore is written `-5F`.

    >>> adapter_name("Bull Researcher"), adapter_name("team/writer"), adapter_name("actor")
    ('Bull-20Researcher', 'team-2Fwriter', 'actor')
    """
    name = "".join(
        char
        if _PLAIN.fullmatch(char)
        else "".join(f"-{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
        for char in path
    )
    return name.replace("lora_", "lora-5F")


def agent_of_adapter(name: str) -> str:
    """The agent path behind an adapter name; of other names, as much as can be read.

    >>> agent_of_adapter("Bull-20Researcher")
    'Bull Researcher'
    """
    plain = name.encode("utf-8", "surrogatepass")
    raw = re.sub(rb"-([0-9A-F]{2})", lambda m: bytes([int(m[1], 16)]), plain)
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace")
