"""What limits training at 8, 64 and 1,000 GPUs: a small simulation fed with figures.

    python benchmarks/simulation.py [--set NAME=VALUE ...] [--json FILE]

The figures are in `simulation_inputs.json`, each with where it comes from: measured on this
project's machine (`simulation_inputs.py` measures them again), computed from a model's shapes, or
assumed, because no GPU was at hand; `--set` changes one.

An episode is a chain of calls. Before each call the app's Python and the tracing take their time on
a driver (one core each, first come first served), then the call joins the running batch of the
server with the fewest calls, then a tool takes its time. A server that runs n calls writes a token
of each in `step + n * step_per_call` seconds; prompts are computed between these steps. The
rollout is over when the last episode is; the update, the exchanges and the files are arithmetic.
The parts of the rollout are differences: an average episode alone; all of them, equal, on servers
with free drivers; with the drivers; with lengths that vary.
"""

from __future__ import annotations

import functools
import heapq
import json
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from side_by_side import parser, publish

INPUTS = Path(__file__).with_name("simulation_inputs.json")
SIZES = (8, 64, 1000)


@dataclass(frozen=True)
class Figures:
    """All figures, in seconds, bytes and tokens; `simulation_inputs.json` says what each is."""

    calls: int
    prompt: float
    prompt_shared: float
    answer: float
    answer_sigma: float
    answer_most: float
    tool: float
    tool_sigma: float
    episodes_per_gpu: int
    group_size: int
    agents: int
    step: float
    step_per_call: float
    prefill: float
    running_most: int
    trained: float
    link: float
    hop: float
    shared_disk: float
    adapter_load: float
    checkpoint_every: int
    adapter_bytes: float
    hidden: int
    driver_call: float
    driver_token: float
    token_bytes: float
    pack_token: float
    unpack_token: float
    credit_call: float
    trace_call: float
    adapter_write: float
    checkpoint_write: float

    @property
    def computed_prompt(self) -> float:
        """Tokens of a prompt that are computed, with a group's shared part once in a group."""
        return self.prompt * (1 - self.prompt_shared * (1 - 1 / self.group_size))


@dataclass(frozen=True)
class Setup:
    """Who does what.

    Together: every GPU samples a share of the episodes and trains a share, each with a driver of
    its own (`accelerate launch`). Else `learners` GPUs train and the others are servers.
    """

    gpus: int
    learners: int = 0
    drivers: int = 1
    is_together: bool = False
    is_asynchronous: bool = False

    @property
    def servers(self) -> int:
        """GPUs that sample."""
        return self.gpus if self.is_together else self.gpus - self.learners


@dataclass(frozen=True)
class Rollout:
    """What sampling an iteration's episodes took."""

    seconds: float
    busy: float
    """Seconds in which a server had a call to run, summed over the servers."""
    tokens: float
    """That were sampled."""


class Server:
    """A batch of running calls that share one GPU: each gets a token in every step."""

    def __init__(self, step: float, per_call: float, most: int) -> None:
        self._step, self._per_call, self._most = step, per_call, most
        self._written = 0.0
        """Tokens that a call which has always been running would have by now."""
        self._now = 0.0
        self._running: list[tuple[float, int]] = []
        self._waiting: deque[tuple[float, int]] = deque()
        self.busy = 0.0
        self.plan = 0
        """Number of the newest plan of what ends next; older ones are void."""

    @property
    def load(self) -> int:
        """Calls that it has."""
        return len(self._running) + len(self._waiting)

    def add(self, now: float, tokens: float, call: int) -> None:
        """A call arrives."""
        self._advance(now)
        if len(self._running) < self._most:
            heapq.heappush(self._running, (self._written + tokens, call))
        else:
            self._waiting.append((tokens, call))

    def finish(self, now: float) -> int:
        """The call that ends now leaves; the first one that waits takes its place."""
        self._advance(now)
        _, call = heapq.heappop(self._running)
        if self._waiting:
            tokens, waited = self._waiting.popleft()
            heapq.heappush(self._running, (self._written + tokens, waited))
        return call

    def next_end(self) -> float | None:
        """When the next call ends if nothing else happens."""
        if not self._running:
            return None
        return self._now + max(0.0, self._running[0][0] - self._written) * self._seconds()

    def _seconds(self) -> float:
        return self._step + self._per_call * len(self._running)

    def _advance(self, now: float) -> None:
        if self._running:
            passed = now - self._now
            self.busy += passed
            if passed > 0:
                self._written += passed / self._seconds()
        self._now = now


def log_normal(rng: random.Random, mean: float, sigma: float) -> float:
    """A draw with this mean; sigma is the deviation of its logarithm."""
    return mean * math.exp(sigma * rng.gauss(0, 1) - sigma * sigma / 2) if mean else 0.0


Episode = Sequence[tuple[float, float]]
"""Its calls: tokens of the answer, and seconds of the tool after it."""


def draw_episodes(figures: Figures, count: int, seed: int) -> list[Episode]:
    """Episodes with a heavy tail, in tokens and in what tools take."""
    rng = random.Random(seed)

    def call() -> tuple[float, float]:
        tokens = log_normal(rng, figures.answer, figures.answer_sigma)
        tool = log_normal(rng, figures.tool, figures.tool_sigma)
        return min(max(1.0, tokens), figures.answer_most), tool

    return [[call() for _ in range(figures.calls)] for _ in range(count)]


def simulate(figures: Figures, setup: Setup, episodes: Sequence[Episode]) -> Rollout:
    """Run all episodes at once, event by event."""
    prompt = figures.computed_prompt / figures.prefill / figures.answer
    servers = [
        Server(figures.step, figures.step_per_call + prompt, figures.running_most)
        for _ in range(setup.servers)
    ]
    drivers = [0.0] * (setup.gpus if setup.is_together else setup.drivers)
    by_load = [(0, number) for number in range(len(servers))]
    done = [0] * len(episodes)  # calls of each episode
    where = [0] * len(episodes)  # the server of its call
    events: list[tuple[float, int, int, int]] = []  # time, kind, episode or server, plan
    to_call, to_serve, to_end = range(3)

    def plan(number: int) -> None:
        server = servers[number]
        server.plan += 1
        if (end := server.next_end()) is not None:
            heapq.heappush(events, (end, to_end, number, server.plan))
        if not setup.is_together:
            heapq.heappush(by_load, (server.load, number))

    def least_loaded(episode: int) -> int:
        if setup.is_together:
            return episode * len(servers) // len(episodes)
        while by_load[0][0] != servers[by_load[0][1]].load:
            heapq.heappop(by_load)
        return by_load[0][1]

    for episode in range(len(episodes)):
        heapq.heappush(events, (0.0, to_call, episode, 0))
    now = 0.0
    while events:
        at, kind, which, number = heapq.heappop(events)
        if kind == to_call:
            now = max(now, at)
            if done[which] == len(episodes[which]):
                continue
            tokens = episodes[which][done[which]][0]
            driver = which * len(drivers) // len(episodes)
            cost = figures.driver_call + figures.driver_token * tokens
            drivers[driver] = max(drivers[driver], at) + cost
            heapq.heappush(events, (drivers[driver], to_serve, which, 0))
        elif kind == to_serve:
            where[which] = least_loaded(which)
            servers[where[which]].add(at, episodes[which][done[which]][0], which)
            plan(where[which])
        elif number == servers[which].plan:
            episode = servers[which].finish(at)
            tool = episodes[episode][done[episode]][1]
            done[episode] += 1
            heapq.heappush(events, (at + tool, to_call, episode, 0))
            plan(which)
    tokens = sum(call[0] for episode in episodes for call in episode)
    return Rollout(now, sum(server.busy for server in servers), tokens)


@functools.cache
def rollout(figures: Figures, setup: Setup, rounds: int = 1) -> Rollout:
    """The mean rollout over a few draws."""
    count = figures.episodes_per_gpu * setup.gpus
    found = [
        simulate(figures, setup, draw_episodes(figures, count, seed)) for seed in range(rounds)
    ]
    means = [sum(getattr(one, spec.name) for one in found) / rounds for spec in fields(Rollout)]
    return Rollout(*means)


HELP = {
    "an average episode": "a smaller model, shorter answers, faster tools",
    "sampling": "more servers",
    "drivers": "more processes that run episodes",
    "the longest episodes": "a lower max_new_tokens, more episodes per GPU",
    "training": "more GPUs that train",
    "gradients": "a faster network, fewer minibatches",
    "exchange of episodes": "fewer episodes in an iteration",
    "credit": "fewer calls in an iteration",
    "traces and checkpoints": "fewer episodes in an iteration",
    "adapters to servers": "a lower rank, a faster shared disk",
}
"""What an iteration's seconds go to, and what makes each less."""


def sampling_parts(figures: Figures, setup: Setup, rounds: int = 1) -> dict[str, float]:
    """Seconds of the rollout: what an average episode takes alone, and what comes on top of it."""
    alike = replace(figures, answer_sigma=0.0, tool_sigma=0.0)
    undriven = replace(alike, driver_call=0.0, driver_token=0.0)
    alone = figures.calls * (
        figures.answer * (figures.step + figures.step_per_call)
        + figures.computed_prompt / figures.prefill
        + figures.tool
    )
    whole, even, free = (rollout(f, setup, rounds).seconds for f in (figures, alike, undriven))
    return {
        "an average episode": alone,
        "sampling": free - alone,
        "drivers": even - free,
        "the longest episodes": whole - even,
    }


def learning_parts(figures: Figures, setup: Setup, sampled: Rollout) -> dict[str, float]:
    """Seconds of an iteration by what they go to, the rollout apart."""
    calls = figures.episodes_per_gpu * setup.gpus * figures.calls
    trainers = setup.gpus if setup.is_together else setup.learners
    tokens = sampled.tokens + calls * figures.computed_prompt
    stored = sampled.tokens + calls * figures.prompt
    adapters = figures.agents * figures.adapter_bytes
    ring = 2 * (trainers - 1) / trainers * figures.adapter_bytes / figures.link
    hops = 2 * math.ceil(math.log2(trainers)) * figures.hop
    exchanged = stored * (
        figures.pack_token / trainers + figures.token_bytes / figures.link + figures.unpack_token
    )
    to_servers = (
        adapters * figures.adapter_write
        + setup.servers * adapters / figures.shared_disk
        + figures.agents * figures.adapter_load
    )
    return {
        "training": tokens / figures.trained / trainers,
        "gradients": figures.agents * (ring + hops) if trainers > 1 else 0.0,
        "exchange of episodes": exchanged if trainers > 1 else 0.0,
        "credit": calls * figures.credit_call,
        "traces and checkpoints": calls * figures.trace_call
        + 3 * adapters * figures.checkpoint_write / figures.checkpoint_every,
        "adapters to servers": 0.0 if setup.is_together else to_servers,
    }


def iteration(figures: Figures, setup: Setup, rounds: int = 1) -> dict[str, float]:
    """Seconds of an iteration by what they go to.

    Asynchronous: the next rollout runs beside the update, and only the longer of the two counts.
    """
    sampling = sampling_parts(figures, setup, rounds)
    learning = learning_parts(figures, setup, rollout(figures, setup, rounds))
    publication = {"adapters to servers": learning.pop("adapters to servers")}
    if not setup.is_asynchronous:
        return sampling | learning | publication
    longer = max(sampling, learning, key=lambda parts: sum(parts.values()))
    return longer | publication


def describe(name: str, figures: Figures, setup: Setup) -> dict[str, Any]:
    """A line of the table."""
    rounds = max(1, 2048 // (figures.episodes_per_gpu * setup.gpus))
    sampled = rollout(figures, setup, rounds)
    spent = iteration(figures, setup, rounds)
    seconds = sum(spent.values())
    trained = learning_parts(figures, setup, sampled)["training"]
    busy = sampled.busy + trained * (setup.gpus if setup.is_together else setup.learners)
    first, second = sorted(spent, key=lambda part: -spent[part])[:2]
    return {
        "GPUs": setup.gpus,
        "how": name,
        "s an iteration": seconds,
        "episodes/s": figures.episodes_per_gpu * setup.gpus / seconds,
        "GPUs busy": f"{busy / (setup.gpus * seconds):.0%}",
        "most of it": f"{first} ({spent[first] / seconds:.0%})",
        "then": f"{second} ({spent[second] / seconds:.0%})",
        "what helps": HELP[first],
        "GiB of states (gae)": sampled.tokens * figures.hidden * 4 / 2**30,
    }


def setups(figures: Figures, gpus: int) -> dict[str, Setup]:
    """The ways to use so many GPUs."""
    per_call = figures.step / figures.running_most + figures.step_per_call
    sampling = figures.answer * per_call + figures.computed_prompt / figures.prefill
    training = (figures.answer + figures.computed_prompt) / figures.trained
    balanced = min(gpus - 1, max(1, round(gpus * training / (training + sampling))))
    servers = Setup(gpus, learners=1)
    return {
        "accelerate launch, each GPU samples and trains": Setup(gpus, is_together=True),
        "vLLM servers, one learner": servers,
        "the same, staleness 1": replace(servers, is_asynchronous=True),
        f"vLLM servers, {balanced} learners": replace(servers, learners=balanced, drivers=balanced),
    }


def sensitivity(figures: Figures, sources: dict[str, str], gpus: int) -> list[dict[str, Any]]:
    """What an iteration would take if an assumed figure were half or twice as large."""
    name, setup = next(iter(setups(figures, gpus).items()))
    rows = []
    for field in sorted(name for name, source in sources.items() if source == "assumed"):
        row: dict[str, Any] = {"assumed": field, "value": getattr(figures, field)}
        for factor in (0.5, 2):
            value = type(getattr(figures, field))(getattr(figures, field) * factor)
            line = describe(name, replace(figures, **{field: value}), setup)
            row[f"times {factor:g}"] = f"{line['s an iteration']:.0f} s: {line['most of it']}"
        rows.append(row)
    return rows


def load(changes: Sequence[str] = ()) -> tuple[Figures, dict[str, str]]:
    """The figures with changes like "answer=800", and each one's source by its name."""
    stored = json.loads(INPUTS.read_text(encoding="utf-8"))["figures"]
    values = {name: entry["value"] for name, entry in stored.items()}
    for name, _, value in (change.partition("=") for change in changes):
        if name not in values:
            raise SystemExit(f"no figure is called {name!r}; there are {', '.join(values)}")
        values[name] = type(values[name])(value)
    return Figures(**values), {name: entry["source"] for name, entry in stored.items()}


def main() -> None:
    """Print both tables."""
    options = parser(__doc__)
    options.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="figures")
    options.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="numbers of GPUs")
    options.add_argument("--sensitivity", type=int, default=64, help="of how many GPUs; 0: none")
    given = options.parse_args()
    figures, sources = load(given.set)
    rows = [
        describe(name, figures, setup)
        for gpus in given.sizes
        for name, setup in setups(figures, gpus).items()
    ]
    publish(rows, given.json)
    if given.sensitivity:
        print(f"\n{given.sensitivity} GPUs, accelerate launch, one assumed figure changed:\n")
        publish(sensitivity(figures, sources, given.sensitivity), None)


if __name__ == "__main__":
    main()
