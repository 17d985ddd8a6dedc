"""One vLLM server as its HTTP interface: what is asked of it, and whether its answer can be used.

Answers are read as if the server were out to deceive: anything but token ids and finite log-probs
of the model that was asked for is a failure of the server. Which server is asked, and what becomes
of a failure, is the pool's business.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from marft_graph.engine.base import SamplingSettings
from marft_graph.episode import FinishReason
from marft_graph.errors import EngineError

_CONNECT_SECONDS = 10.0
# vLLM closes connections that are idle for five seconds; one must not be used at that moment.
_KEEPALIVE_SECONDS = 2.0
# vLLM writes this for a log-prob of minus infinity.
_LOWEST_LOGPROB = -9999.0
_EXCERPT = 200
# Mean distance in nats of the likeliest tokens' log-probs: bfloat16 stays far below, another model
# goes far beyond.
_MODEL_TOLERANCE = 0.5


class ServerFailure(EngineError):
    """A server did not answer, or its answer cannot be used; another one may do better.

    `is_lost` says that no answer came at all.
    """

    def __init__(self, message: str, *, is_lost: bool = False) -> None:
        super().__init__(message)
        self.is_lost = is_lost


class UnknownModel(ServerFailure):
    """The server has no model of that name, as after a restart."""


class ServerRefusal(EngineError):
    """The server will never do what it was asked to, however often it is asked."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an agent's adapter, under the name by which servers know it."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Models:
    """What a server serves: the base's name, its context length where known, its adapters."""

    base: str
    context: int | None
    adapters: frozenset[str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued, without the model's name."""

    ids: tuple[int, ...]
    sampling: SamplingSettings
    seed: int
    end_ids: tuple[int, ...]
    """Tokens that end a completion."""
    vocabulary: int
    """Token ids are below it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt, and what the base that is trained says next: a log-prob for every token."""

    ids: tuple[int, ...]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Answer:
    """Sampled ids, a finite log-prob for each, and why the completion ended."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class Endpoint:
    """Asks one server. Not thread-safe: it belongs to one event loop.

    Args:
        url: root of the server, such as `http://gpu-1:8000`.
        api_key: sent as a bearer token; empty: none is sent.
        timeout: seconds that a completion may take.
        trust_env: follow proxy settings of the environment.
    """

    def __init__(
        self, url: str, *, api_key: str = "", timeout: float = 300.0, trust_env: bool = True
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # Deadlines cover whole requests, see `_send`.
            timeout=httpx.Timeout(None, connect=min(timeout, _CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS),
            trust_env=trust_env,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def check_health(self, timeout: float) -> None:
        """Return if the server says within `timeout` seconds that it is well.

        Raises:
            ServerFailure: it does not.
        """
        response = await self._send("GET", "/health", timeout=timeout)
        self._check_status(response)

    async def models(self, timeout: float) -> Models:
        """What the server serves.

        Raises:
            ServerFailure: it does not say.
            ServerRefusal: it wants another key.
        """
        cards = self._json(await self._send("GET", "/v1/models", timeout=timeout))
        try:
            bases = [card for card in cards["data"] if not card.get("parent")]
            adapters = frozenset(str(card["id"]) for card in cards["data"] if card.get("parent"))
            context = bases[0].get("max_model_len")
            base = str(bases[0]["id"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._bad("a list of models", cards) from error
        return Models(base, context if isinstance(context, int) else None, adapters)

    async def load(self, adapter: Adapter, timeout: float) -> None:
        """Make the server load an adapter from its folder.

        Raises:
            ServerFailure: it could not now.
            ServerRefusal: it does not load adapters at run time, or cannot read the folder.
        """
        body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
        response = await self._send("POST", "/v1/load_lora_adapter", body, timeout=timeout)
        said = _excerpt(response.text)
        if response.status_code == 404 and "Not Found" in said and adapter.name not in said:
            raise ServerRefusal(
                f"{self.url} does not load adapters while it runs; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        if response.status_code in (400, 404) and "already been loaded" not in said:
            raise ServerRefusal(
                f"{self.url} cannot load the adapter in {adapter.folder}: {said}. The run folder "
                "must be at the same path on the server's machine, and --max-lora-rank at least "
                "lora_rank"
            )
        if response.status_code != 400:
            self._check_status(response)

    async def unload(self, name: str, timeout: float) -> None:
        """Make the server forget an adapter; one that it does not have is none of our concern.

        Raises:
            ServerFailure: it did not answer, or failed.
        """
        body = {"lora_name": name}
        response = await self._send("POST", "/v1/unload_lora_adapter", body, timeout=timeout)
        if response.status_code not in (400, 404):
            self._check_status(response)

    async def complete(self, model: str, prompt: Prompt) -> Answer:
        """Let a model continue a prompt.

        Raises:
            ServerFailure: no answer, or one that cannot be used.
            UnknownModel: the server does not have the model.
            ServerRefusal: the server finds the request itself wrong.
        """
        body = completion_body(model, prompt)
        response = await self._send("POST", "/v1/completions", body, timeout=self._timeout)
        if response.status_code == 404:
            raise UnknownModel(f"{self.url} has no model {model!r}: {_excerpt(response.text)}")
        answer = self._json(response)
        try:
            return read_completion(answer, model, prompt)
        except ValueError as error:
            raise self._bad(str(error), answer) from error

    async def probe(self, model: str, probe: Probe) -> bool:
        """Whether the server's log-probs are those at the call's temperature, or always at 1.

        Dividing logits by 2 halves the distances between log-probs.

        Raises:
            ServerFailure: it does not answer as it should.
            ServerRefusal: its model is not the one that is trained.
        """
        first = await self._likeliest(model, probe.ids, temperature=1.0)
        own = [probe.logprobs[token] for token in first if token < len(probe.logprobs)]
        far = [abs(a - b) for a, b in zip(own, first.values(), strict=False)]
        if len(own) < len(first) or sum(far) > _MODEL_TOLERANCE * len(far):
            raise ServerRefusal(
                f"{self.url} serves another model than base_model: after the same "
                f"{len(probe.ids)} tokens the log-probs of {list(first)} are "
                f"{_rounded(first.values())} there and {_rounded(own)} here"
            )
        second = await self._likeliest(model, probe.ids, temperature=2.0)
        distance = max(first.values()) - min(first.values())
        return max(second.values()) - min(second.values()) < 0.75 * distance

    async def _likeliest(
        self, model: str, ids: Sequence[int], *, temperature: float
    ) -> dict[int, float]:
        """The likeliest next tokens with their log-probs."""
        sampling = SamplingSettings(temperature, max_tokens=1)
        body = completion_body(model, Prompt(tuple(ids), sampling, 0, (), 0))
        body |= {"logprobs": 5, "return_tokens_as_token_ids": True}
        response = await self._send("POST", "/v1/completions", body, timeout=self._timeout)
        answer = self._json(response)
        try:
            (tops,) = answer["choices"][0]["logprobs"]["top_logprobs"]
            found = {int(name.removeprefix("token_id:")): float(x) for name, x in tops.items()}
            if len(found) < 2:
                raise ValueError("too few")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._bad("a token and the five likeliest ones", answer) from error
        return found

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float
    ) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout):
                return await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise ServerFailure(
                f"{self.url}{path} did not answer within {timeout:g} seconds", is_lost=True
            ) from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            name = type(error).__name__
            raise ServerFailure(f"{self.url}{path}: {name}: {error}", is_lost=True) from error

    def _check_status(self, response: httpx.Response) -> None:
        if response.status_code in (401, 403):
            raise ServerRefusal(
                f"{self.url} refuses the key (HTTP {response.status_code}); put the server's into "
                "the environment variable VLLM_API_KEY"
            )
        path = response.request.url.path
        said = f"{self.url}{path} answered HTTP {response.status_code}: {_excerpt(response.text)}"
        if response.status_code in (400, 413, 422):
            raise ServerRefusal(said)
        if response.status_code != 200:
            raise ServerFailure(said)

    def _json(self, response: httpx.Response) -> Any:
        self._check_status(response)
        try:
            return response.json()
        except (ValueError, RecursionError) as error:
            raise self._bad("JSON", response.text) from error

    def _bad(self, wanted: str, answer: Any) -> ServerFailure:
        return ServerFailure(f"{self.url} should have answered {wanted}; it was {_excerpt(answer)}")


def completion_body(model: str, prompt: Prompt) -> dict[str, Any]:
    """A request for `/v1/completions` that leaves nothing to the server's defaults."""
    sampling = prompt.sampling
    return {
        "model": model,
        "prompt": list(prompt.ids),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": prompt.seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(prompt.end_ids),
        "n": 1,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": True,
    }


def read_completion(answer: Any, model: str, prompt: Prompt) -> Answer:
    """What was sampled, out of a server's JSON.

    Raises:
        ValueError: the answer is not the completion that was asked for; the text says what a right
            one would be.
    """
    if not isinstance(answer, Mapping) or not isinstance(answer.get("choices"), list):
        raise ValueError("a completion")
    if answer.get("model") != model:
        raise ValueError(f"from model {model!r}, not from {answer.get('model')!r}")
    if len(answer["choices"]) != 1 or not isinstance(choice := answer["choices"][0], Mapping):
        raise ValueError("one choice")
    if choice.get("prompt_token_ids") not in (None, list(prompt.ids)):
        raise ValueError("a completion of the prompt's own token ids")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise ValueError("finish_reason stop or length")
    ids, most = choice.get("token_ids"), prompt.sampling.max_tokens
    if not isinstance(ids, list) or not 0 < len(ids) <= most:
        raise ValueError(f"token_ids, 1 to {most} of them (vLLM from 0.11 on returns them)")
    if not all(type(token) is int and 0 <= token < prompt.vocabulary for token in ids):
        raise ValueError(f"token ids below {prompt.vocabulary}")
    given = choice.get("logprobs")
    logprobs = given.get("token_logprobs") if isinstance(given, Mapping) else None
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise ValueError(f"{len(ids)} log-probs, one for each token")
    if not all(_is_logprob(value) for value in logprobs):
        raise ValueError("finite log-probs")
    return Answer(tuple(ids), tuple(min(0.0, float(value)) for value in logprobs), reason)


def _is_logprob(value: Any) -> bool:
    """Whether it is a number that the log-prob of a sampled token can be, up to rounding."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and _LOWEST_LOGPROB < value < 1e-3


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 2) for value in values]


def _excerpt(answer: Any) -> str:
    text = answer if isinstance(answer, str) else repr(answer)
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]} ... ({len(text)} characters)"
