"""The names of agents: node paths without task ids, and adapter names made from them.

A node path names a node through its subgraphs (`research_team/writer/agent`). An adapter name is
the same thing in letters that PEFT module names, file systems and vLLM model names all accept.
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[A-Za-z0-9_]")
_PREBUILT_INNER = frozenset({"agent", "model"})


def node_path(checkpoint_ns: str) -> str:
    """Node path of a LangGraph checkpoint namespace.

    Task ids, and the counters of subgraphs invoked several times in a node, are not part of an
    agent's identity.

    >>> node_path("supervisor:1f-a|tools:2b-c|1|researcher:3d-e")
    'supervisor/tools/researcher'
    """
    parts = (part.partition(":")[0] for part in checkpoint_ns.split("|"))
    return "/".join(part for part in parts if part and not part.isdigit())


def agent_path(path: str) -> str:
    """A node path with the inner node of a prebuilt agent folded into its parent's name.

    >>> agent_path("research_team/writer/agent"), agent_path("model")
    ('research_team/writer', 'model')
    """
    parent, _, last = path.rpartition("/")
    return parent if parent and last in _PREBUILT_INNER else path


def error_handler_path(node: str) -> str:
    """Node path of what handles the errors of a node, as runs name it.

    >>> error_handler_path("writer")
    'writer/__error_handler__'
    """
    return f"{node}/__error_handler__"


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
