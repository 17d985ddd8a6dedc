"""Chat messages to token ids and back, through the model's own tokenizer and chat template.

Rendering happens once, at the call; what was rendered and sampled is stored as ids and never
rebuilt. This module knows LangChain messages and tokenizers, but no models and no graphs.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
)
from transformers import PreTrainedTokenizerBase

from marft_graph.errors import ModelError
from marft_graph.policy.forms import Part, one_of, text_without
from marft_graph.policy.messages import message_to_dict, nine_letters, said, sampled_ids
from marft_graph.policy.paragraph import with_paragraph
from marft_graph.policy.template_habits import TemplateHabits, habits_of
from marft_graph.policy.tool_formats import (
    WrittenCall,
    call_from_json,
    detect_format,
    langchain_calls,
    reasoning_tags,
)

logger = logging.getLogger(__name__)

# For base models whose tokenizer brings no chat template. Plain text only, so that any vocabulary
# can write it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Private-use characters stand in for special tokens inside a message's text while the template is
# rendered, so that text from data can never become a turn of its own.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# So many texts' tokens are remembered: a group's episodes begin with the same.
_REMEMBERED = 256
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_NINE_LETTER_IDS = re.compile(r"length\s*!=\s*9")


class TokenizerCodec:
    """The `ChatCodec` of a Hugging Face tokenizer.

    A parsed message carries the ids it was read from in `response_metadata["completion_ids"]`.
    Where a later conversation's template writes the same text again, those ids are used as they
    are: the new prompt then begins with the tokens already seen, however they were sampled.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        *,
        special_tokens_in_text: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special.update(tokenizer.all_special_tokens)
        self._special = (_OPEN, *sorted(special, key=len, reverse=True))
        self._special_pattern = re.compile("|".join(map(re.escape, self._special)))
        self._shielded_pattern = self._special_pattern
        if special_tokens_in_text:
            self._shielded_pattern = re.compile(_OPEN)
        # Once and for all: encoding special tokens as text changes a tokenizer that threads share.
        self._as_text = [
            tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
            for token in self._special
        ]
        self._encode = lru_cache(_REMEMBERED)(self._encode_text)
        self._encode("")
        self._template: str | None = None
        if not tokenizer.chat_template:
            logger.warning(
                "the tokenizer of %s has no chat template; using plain 'Role: text' lines",
                tokenizer.name_or_path or "the base model",
            )
            self._template = PLAIN_TEMPLATE
        templates = self._template or tokenizer.chat_template
        source = "\n".join(templates.values()) if isinstance(templates, Mapping) else templates
        self._format = detect_format(source, [token.content for token in added])
        self._reasoning = reasoning_tags(source)
        self._wants_short_ids = bool(_NINE_LETTER_IDS.search(source))
        markers = set(self._format.markers)
        if self._reasoning is not None:
            markers |= {self._reasoning.opening, self._reasoning.closing}
        self._markers = frozenset(markers & special)
        vocabulary = tokenizer.get_vocab()
        self._silent_ids = frozenset(
            vocabulary[token] for token in special - markers if token in vocabulary
        )

    def __getstate__(self) -> dict[str, Any]:
        """For rollouts in other processes: without what is remembered, which cannot go there."""
        return {name: value for name, value in vars(self).items() if name != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In the other process: begin to remember anew."""
        vars(self).update(state)
        self._encode = lru_cache(_REMEMBERED)(self._encode_text)

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and completion may have together."""
        return self._context_length

    def render(
        self, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Token ids of the conversation, ending where the assistant's turn begins.

        Special tokens written inside a message's text, a tool call's arguments or a tool's schema
        are encoded as plain text, unless `special_tokens_in_text` was asked for. A sampled
        message that the template cannot write, as its tool calls are malformed or too many, is
        written as the model wrote it. Tools are described in words where the template has no place
        for them.

        Raises:
            ModelError: the template refuses the conversation.
        """
        described = self._with_tools_in_text(messages, tools)
        ids = self._render(described, tools)
        if described is not messages and len(ids) >= self._context_length:
            logger.warning(
                "a prompt of %d tokens that describes its tools in words is longer than the "
                "context of %s, %d tokens: it is not shown the tools",
                len(ids),
                self._tokenizer.name_or_path or "the base model",
                self._context_length,
            )
            return self._render(messages, tools)
        return ids

    def _render(
        self, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        schemas = self._shielded(list(tools))
        turns = [self._turn(message, tools, as_written=True) for message in messages]
        try:
            text = self._apply(turns, schemas)
        except Exception:  # noqa: BLE001 - templates are programs: any jinja error may come out
            turns = [self._turn(message, tools, as_written=False) for message in messages]
            try:
                text = self._apply(turns, schemas)
            except Exception as error:
                raise ModelError(
                    f"the chat template of {self._tokenizer.name_or_path} cannot render a "
                    f"conversation with roles {[turn['role'] for turn in turns]}: {error}"
                ) from error
        ids: list[int] = []
        done = 0
        for start, end, sampled in self._sampled_parts(text, messages, turns, schemas):
            if start < done:
                continue
            ids += [*self._encode(text[done:start]), *sampled]
            done = end
        return (*ids, *self._encode(text[done:]))

    def render_answer(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[dict[str, Any]],
        end_ids: frozenset[int],
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and completion ids of a conversation whose last message a model is to write.

        The completion is what the template writes after the prompt of a rollout, up to the first
        of the ids that end a completion, which is added where the template writes none.

        Raises:
            ModelError: the template refuses the conversation.
            ValueError: it writes the answer's tool calls in another place than after the prompt.
        """
        *before, answer = messages
        prompt_ids = self.render(before, tools)
        schemas = self._shielded(list(tools))
        messages = self._with_tools_in_text(messages, tools)
        turns = [self._turn(message, tools, as_written=True) for message in messages]
        prompt = self._apply(turns[:-1], schemas)
        text = self._apply(turns, schemas, add_generation_prompt=False)
        # Some templates move the system message or the tools when a turn follows: then only the end
        # of the prompt, from its last special token, tells where the answer begins.
        marks = list(self._special_pattern.finditer(prompt))
        opening = prompt[marks[-1].start() :] if marks else prompt
        if text.startswith(prompt):
            ids = self._encode(text[len(prompt) :])
        elif opening in text:
            ids = self._encode(text[text.rindex(opening) + len(opening) :])
        elif isinstance(answer, AIMessage) and answer.tool_calls:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path} does not write an answer "
                "with tool calls right after its generation prompt"
            )
        else:  # templates that open a reasoning block write past turns without it
            ids = self._encode(str(turns[-1]["content"]))
        for position, token in enumerate(ids):
            if token in end_ids:
                return prompt_ids, tuple(ids[: position + 1])
        end = self._tokenizer.eos_token_id
        return prompt_ids, (*ids, end if end in end_ids else min(end_ids))

    def parse(
        self,
        completion_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] = (),
    ) -> AIMessage:
        """The message a completion stands for.

        Reasoning goes to `additional_kwargs["reasoning_content"]`, out of the content. Tool calls
        are read only where tools were given, by the tokenizer's own response template if it has
        one, else in the format that the chat template writes.
        """
        text = self._readable(completion_ids)
        cuts = [position for word in stop if (position := text.find(word)) >= 0]
        declared = None if cuts else self._parse_as_declared(completion_ids, tools)
        if cuts:
            text = text[: min(cuts)]
        reasoning, content, written = declared or self._parse_text(text, tools)
        salt = ",".join(map(str, completion_ids))
        calls, invalid = langchain_calls(written, salt)
        return AIMessage(
            content=content,
            tool_calls=calls,
            invalid_tool_calls=invalid,
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            response_metadata={} if cuts else {"completion_ids": list(completion_ids)},
        )

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template writes the tools' schemas."""
        return self._habits.shows_tools

    def _with_tools_in_text(
        self, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]]
    ) -> Sequence[BaseMessage]:
        """The conversation with its tools described in words, where the template shows none."""
        if not tools or self.shows_tools:
            return messages
        return with_paragraph(messages, self._format.described(tools))

    def tool_call_grammar(self, tools: Sequence[dict[str, Any]]) -> str:
        """The form of one call of one of the tools, in the format that the template writes.

        After a prompt that ends inside the reasoning, the model may end its thoughts first. Empty
        where what the form lets the model write would not be read as a call again.
        """
        if not tools or not self._reads_own_form:
            return ""
        functions = [tool.get("function", tool) for tool in tools]
        return one_of(
            self._thoughts()
            + self._format.form(function["name"], function.get("parameters") or _NO_PARAMETERS)
            for function in functions
        )

    def answer_grammar(self, schema: Mapping[str, Any]) -> str:
        """The JSON schema, or a form of it after thoughts that a prompt has opened."""
        thoughts = self._thoughts()
        return one_of([[*thoughts, dict(schema)]]) if thoughts else json.dumps(schema)

    def _thoughts(self) -> list[Part]:
        """What may come before an answer after a prompt that already ends inside the reasoning."""
        if self._reasoning is None or not self._is_thinking:
            return []
        return [{"regex": text_without(self._reasoning.closing)}, f"{self._reasoning.closing}\n\n"]

    @cached_property
    def _is_thinking(self) -> bool:
        """Whether prompts already end inside the reasoning."""
        opened = self._habits.generation_prompt
        tags = self._reasoning
        return tags is not None and opened.rfind(tags.opening) > opened.rfind(tags.closing)

    @cached_property
    def _reads_own_form(self) -> bool:
        function = {"name": "probe", "parameters": _NO_PARAMETERS}
        parts = self._thoughts() + self._format.form("probe", _NO_PARAMETERS)
        texts = ["" if isinstance(p, dict) and "regex" in p else p for p in parts]
        text = "".join(part if isinstance(part, str) else "{}" for part in texts)
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        read = self.parse(ids, tools=[{"type": "function", "function": function}])
        return [call["name"] for call in read.tool_calls] == ["probe"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _parse_text(
        self, text: str, tools: Sequence[dict[str, Any]]
    ) -> tuple[str, str, list[WrittenCall]]:
        """Reasoning, content and tool calls."""
        reasoning, answer = self._without_reasoning(text)
        return (reasoning, *(self._format.scan(answer, tools) if tools else (answer, [])))

    def _without_reasoning(self, text: str) -> tuple[str, str]:
        if self._reasoning is None:
            return "", text
        return self._reasoning.split(text, is_open=self._is_thinking)

    def _parse_as_declared(
        self, ids: Sequence[int], tools: Sequence[dict[str, Any]]
    ) -> tuple[str, str, list[WrittenCall]] | None:
        """What the tokenizer's response template reads; None where it has none, or reads calls
        though there are no tools.
        """
        if getattr(self._tokenizer, "response_template", None) is None:
            return None
        try:
            answer = self._tokenizer.parse_response(
                self._tokenizer.decode(list(ids), skip_special_tokens=False),
                prefix=self._habits.generation_prompt,
                tools=list(tools) or None,
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reasoning, content, written = self._parse_text(self._readable(ids), tools)
            if tools and not written:
                written, content = [WrittenCall(content, problem=f"{error}")], ""
            return reasoning, content, written
        calls = [
            call_from_json(call.get("function", call), json.dumps(call, ensure_ascii=False))
            for call in answer.get("tool_calls", ())
        ]
        if calls and not tools:
            return None
        reasoning = answer.get("reasoning_content") or answer.get("thinking") or ""
        return str(reasoning), str(answer.get("content") or ""), calls

    def _readable(self, ids: Sequence[int]) -> str:
        """Text of token ids, without the special tokens that mark neither calls nor reasoning."""
        kept = [token for token in ids if token not in self._silent_ids]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def _encode_text(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for part_index, part in enumerate(_SENTINEL.split(text)):
            if part_index % 2:
                ids += self._as_text[int(part)]
            else:
                ids += self._tokenizer.encode(
                    part, add_special_tokens=False, split_special_tokens=False
                )
        return tuple(ids)

    def _apply(
        self, turns: Sequence[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = True
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(turns),
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                chat_template=self._template,
            )
        )

    def _sampled_parts(
        self,
        text: str,
        messages: Sequence[BaseMessage],
        turns: Sequence[dict[str, Any]],
        tools: Any,
    ) -> Iterator[tuple[int, int, list[int]]]:
        """Where the text repeats a completion right after its prompt: begin, end and sampled ids.

        A completion's end token counts only where the template writes the same.
        """
        sampled = {at: ids for at, message in enumerate(messages) if (ids := sampled_ids(message))}
        begins = self._turn_begins(text, turns, tools, list(sampled)) if sampled else {}
        for position, begin in begins.items():
            ids = sampled[position]
            bare = ids[:-1] if ids[-1] in self._silent_ids else ids
            for candidate in (ids, bare):
                written = str(self._tokenizer.decode(candidate, skip_special_tokens=False))
                if text.startswith(written, begin):
                    yield begin, begin + len(written), candidate
                    break

    def _turn_begins(
        self, text: str, turns: Sequence[dict[str, Any]], tools: Any, wanted: Sequence[int]
    ) -> dict[int, int]:
        """Where the text goes on from the prompts of the wanted turns, as far as that is certain.

        A generation prompt with a special token in it can only be the template's own: if there is
        one for each turn of the assistant and one at the end, those are the places. Else the
        wanted turns' prompts are rendered.
        """
        opening = self._habits.generation_prompt
        if self._special_pattern.search(opening):
            ends = [found.end() for found in re.finditer(re.escape(opening), text)]
            spoken = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
            if len(ends) == len(spoken) + 1:
                begins = dict(zip(spoken, ends[:-1], strict=True))
                return {at: begins[at] for at in wanted if at in begins}
        begins = {}
        for at in filter(None, wanted):
            try:
                prompt = self._apply(turns[:at], tools)
            except Exception:  # noqa: BLE001 - the beginning is no conversation of its own
                continue
            if text.startswith(prompt):
                begins[at] = len(prompt)
        return begins

    def _turn(
        self, message: BaseMessage, tools: Sequence[dict[str, Any]], *, as_written: bool
    ) -> dict[str, Any]:
        """A message as the template gets it; `as_written` keeps calls that it could not write."""
        turn = message_to_dict(message)
        content = self._unwritable_text(message, tools) if as_written else None
        if content is not None:
            turn.pop("tool_calls", None)
        turn = dict(self._shielded(turn))
        if content is not None:
            turn["content"] = self._shielded(content, allowed=self._markers)
        for call in turn.get("tool_calls", ()):
            if self._wants_short_ids:
                call["id"] = nine_letters(call["id"])
            if self._habits.arguments_as_text:
                arguments = call["function"]["arguments"]
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
        if self._wants_short_ids and "tool_call_id" in turn:
            turn["tool_call_id"] = nine_letters(turn["tool_call_id"])
        return turn

    def _unwritable_text(self, message: BaseMessage, tools: Sequence[dict[str, Any]]) -> str | None:
        """What the model wrote after its reasoning, where only that can be shown of a message.

        That is so where calls are malformed, or more than the template can write; not where the
        app has changed the message since.
        """
        ids = sampled_ids(message)
        if not ids or not isinstance(message, AIMessage):
            return None
        if not message.invalid_tool_calls and len(message.tool_calls) <= self._habits.most_calls:
            return None
        written = self.parse(ids, tools=tools or ({},))
        if said(written) != said(message):
            return None
        return self._without_reasoning(self._readable(ids))[1]

    @cached_property
    def _habits(self) -> TemplateHabits:
        return habits_of(self._apply)

    def _shielded(self, value: Any, *, allowed: frozenset[str] = frozenset()) -> Any:
        """The value with special tokens in its texts replaced by sentinels, save those allowed."""
        if isinstance(value, str):
            value = _SURROGATE.sub("\ufffd", value)  # no token can stand for it
            return self._shielded_pattern.sub(
                lambda found: (
                    found[0]
                    if found[0] in allowed
                    else f"{_OPEN}{self._special.index(found[0])}{_CLOSE}"
                ),
                value,
            )
        if isinstance(value, Mapping):
            return {self._shielded(key): self._shielded(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._shielded(item) for item in value]
        return value
