"""Constrained output: which tokens a schema or a form allows next, by xgrammar (extra `grammar`).

Engine and learner both ask here, so that the distribution that was sampled is the one that is
trained. It knows schemas, tokenizers and bits, but no models, requests or episodes.

Answers are JSON on one line, `{"a": 1, "b": [2, 3]}`, with the properties that the schema names, in
its order. Keywords that xgrammar does not know (`not`, `uniqueItems`, `multipleOf` of a number) are
not enforced, and a string may escape half a surrogate pair, which pydantic refuses. JSON begins
with the first token, or after the thoughts of a model whose prompts end inside them; thinking that
a model may begin by itself is not allowed.

A forced tool call has a form (`policy.forms`): the text of the model's own tool format around the
JSON of the tool's parameters. Tokens that mark a call there may be special ones.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from marft_graph.errors import ConfigError, ModelError
from marft_graph.policy.forms import Part, choices_in

if TYPE_CHECKING:
    import xgrammar

_CACHE_BYTES = 2**28
_SHOWN_CHARACTERS = 80
_LETTERS = "aekrsxz"


def require_grammar_library() -> None:
    """Refuse constrained output where its library is missing.

    Raises:
        ConfigError: xgrammar is not installed.
    """
    if importlib.util.find_spec("xgrammar") is None:
        raise ConfigError("constrain_output needs xgrammar: pip install 'marft-graph[grammar]'")


class Grammars:
    """Compiles JSON schemas for one tokenizer; thread-safe.

    Args:
        tokenizer: of the model that writes.
        vocabulary: number of the model's logits.
        end_ids: tokens that end a completion, where a schema is fulfilled.

    Raises:
        ConfigError: xgrammar is not installed.
        ModelError: xgrammar cannot read the tokenizer, or no token ends a completion.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: frozenset[int]) -> None:
        require_grammar_library()
        import xgrammar

        name = tokenizer.name_or_path or "the base model"
        if not end_ids:
            raise ModelError(f"{name} has no end-of-sequence token; constrain_output needs one")
        try:
            known = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(end_ids)
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"constrain_output cannot read the tokenizer of {name}: {_first_line(error)}"
            ) from error
        self._compiler = xgrammar.GrammarCompiler(known, cache_limit_bytes=_CACHE_BYTES)
        # To xgrammar a special token is the text it is written as; to the codec it is no text.
        added = tokenizer.added_tokens_decoder.items()
        special = {token for token, text in added if text.special} | {*tokenizer.all_special_ids}
        ordinary = set(range(vocabulary)) - (special - end_ids)
        self._writable_W = _packed(ordinary, vocabulary)
        marks = {token for token, text in added if text.special and text.content.strip()}
        self._marks_W = _packed(marks - end_ids, vocabulary)
        known_ids = tokenizer.get_vocab()
        letters = {known_ids[letter] for letter in _LETTERS if letter in known_ids}
        self._letters_W = _packed({token for token in letters if token < vocabulary}, vocabulary)

    @property
    def words(self) -> int:
        """Number of 32-bit words that hold a bit for each token."""
        return len(self._writable_W)

    def compile(self, schema: str) -> xgrammar.CompiledGrammar:
        """The grammar of a JSON schema or a form; cached.

        Raises:
            ConfigError: xgrammar cannot compile it.
        """
        try:
            choices = choices_in(schema)
            if choices is not None:
                return self._compiler.compile_grammar(_form(choices))
            # Without free whitespace a model cannot fill its answer with it.
            return self._compiler.compile_json_schema(schema, any_whitespace=False)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"constrain_output: xgrammar cannot compile the JSON schema {_shown(schema)}: "
                f"{_first_line(error)}"
            ) from error

    def follow(self, schema: str) -> Following:
        """A new completion under a schema.

        Raises:
            ConfigError: xgrammar cannot compile it.
        """
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self.compile(schema))
        if choices_in(schema) is None:
            return Following(matcher, self._writable_W, schema)
        return Following(
            matcher, self._writable_W, schema, marks_W=self._marks_W, letters_W=self._letters_W
        )

    def allowed(self, schema: str, completion_ids: Sequence[int]) -> Tensor:
        """Bits (T, V/32) of the tokens that were allowed where each of a completion was sampled.

        Raises:
            ConfigError: xgrammar cannot compile the schema.
            ModelError: the completion does not follow the schema.
        """
        following = self.follow(schema)
        allowed = []
        for token in completion_ids:
            allowed.append(following.allowed())
            following.accept(token)
        return torch.stack(allowed)


class Following:
    """One completion on its way through a grammar.

    Args:
        matcher: where it is.
        writable_W: bits of the tokens that are text.
        schema: the JSON schema or form.
        marks_W: special tokens that a form may ask for; none are written inside free text, where
            all of `letters_W` may come next.
        letters_W: some letters.
    """

    def __init__(
        self,
        matcher: xgrammar.GrammarMatcher,
        writable_W: Tensor,
        schema: str,
        *,
        marks_W: Tensor | None = None,
        letters_W: Tensor | None = None,
    ) -> None:
        self._matcher = matcher
        self._writable_W = writable_W
        self._schema = schema
        self._marks_W = marks_W
        self._letters_W = letters_W

    def allowed(self) -> Tensor:
        """Bits (V/32,), int32: token i may come next where bit i % 32 of word i // 32 is set.

        Raises:
            ModelError: no token may, as the tokenizer cannot write what the schema asks for.
        """
        allowed_1W = torch.full((1, len(self._writable_W)), -1, dtype=torch.int32)
        self._matcher.fill_next_token_bitmask(allowed_1W)
        allowed_W = allowed_1W[0] & self._writable_W
        if self._marks_W is not None and self._letters_W is not None:
            is_free_text = bool(((allowed_W & self._letters_W) == self._letters_W).all())
            if not is_free_text:
                allowed_W = allowed_W | (allowed_1W[0] & self._marks_W)
        if not allowed_W.any():
            raise ModelError(
                "the base model has no token for what comes next in an answer by the JSON schema "
                f"{_shown(self._schema)}"
            )
        return allowed_W

    def accept(self, token: int) -> None:
        """Go on behind a token.

        Raises:
            ModelError: it is not allowed here.
        """
        if not self._matcher.accept_token(token):
            raise ModelError(
                f"token {token} does not follow the JSON schema {_shown(self._schema)}"
            )


def _form(choices: Sequence[Sequence[Part]]) -> xgrammar.Grammar:
    """The grammar of a form's choices."""
    import xgrammar

    grammars = []
    for parts in choices:
        row = [_part(part) for part in parts] or [_part("")]
        grammars.append(row[0] if len(row) == 1 else xgrammar.Grammar.concat(*row))
    return grammars[0] if len(grammars) == 1 else xgrammar.Grammar.union(*grammars)


def _part(part: Part) -> xgrammar.Grammar:
    import xgrammar

    if isinstance(part, str):
        return xgrammar.Grammar.from_ebnf(f"root ::= {json.dumps(part)}")
    if "regex" in part:
        return xgrammar.Grammar.from_regex(part["regex"])
    if "choices" in part:
        return _form(part["choices"])
    return xgrammar.Grammar.from_json_schema(json.dumps(part), any_whitespace=False)


def _packed(tokens: set[int], vocabulary: int) -> Tensor:
    """Tokens as bits (V/32,) in xgrammar's order.

    >>> _packed({0, 3, 32}, 40)
    tensor([9, 1], dtype=torch.int32)
    """
    bits = np.zeros(-(-vocabulary // 32) * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


def _shown(schema: str) -> str:
    """A schema's title, or how it begins."""
    try:
        title = json.loads(schema).get("title")
    except (ValueError, AttributeError):
        title = None
    if isinstance(title, str):
        return repr(title)
    if choices_in(schema) is not None:
        return "of a tool call"
    return schema if len(schema) <= _SHOWN_CHARACTERS else f"{schema[:_SHOWN_CHARACTERS]}..."


def _first_line(error: Exception) -> str:
    """What xgrammar says, without the time and the place in its source.

    >>> _first_line(RuntimeError("[12:00:00] /cpp/schema.cc:44: Invalid range: 2 > 1"))
    'Invalid range: 2 > 1'
    """
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).strip().partition("\n")[0])
