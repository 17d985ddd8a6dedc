"""Text that a model or a user wrote, made safe to show to people.

A terminal obeys control characters and a page may be turned round by invisible ones; neither may
come from a model's answer.
"""

from __future__ import annotations


def visible(text: str) -> str:
    r"""The text with every character that is not printable, but line ends and tabs, escaped.

    >>> visible("a\x1b[2J" + chr(0x202e) + "\n")
    'a\\x1b[2J\\u202e\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    code = ord(char)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )
