"""The update: episodes to advantages to one PPO step sequence per agent.

`Learner` owns the value heads and the optimizers, one for each agent's adapter and one for its
head; it changes the policy's adapters in place. It knows nothing of graphs, engines or files.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from marft_graph.config import MICROBATCH_TOKENS, TrainConfig
from marft_graph.episode import Call, Episode
from marft_graph.errors import TrainingCollapsedError
from marft_graph.learn.batches import microbatches, score, token_offsets
from marft_graph.learn.credit import AgentBatch, assign_advantages
from marft_graph.learn.fate import Place, UpdateFacts
from marft_graph.learn.losses import (
    action_logprobs,
    importance_weights,
    kl_k3,
    policy_loss,
    value_loss,
)
from marft_graph.learn.order import sequential_factors, turns
from marft_graph.learn.schedule import rate_share
from marft_graph.learn.sizing import find_microbatch_tokens, memory_of, refuse_what_cannot_fit
from marft_graph.names import agent_of_adapter
from marft_graph.policy.critic import ValueHead
from marft_graph.policy.rows import Row
from marft_graph.policy.team import Team
from marft_graph.ranks import Ranks

AgentStats = dict[str, float]
_KL_EVERY = 8
"""Where nothing but the statistics needs the KL to the base, one call in so many tells it."""


class Learner:
    """Updates every agent's adapter from an iteration's episodes (MARFT-A, MARFT-T, or groups).

    Raises:
        ConfigError: the size of micro-batches is to be found, and memory cannot be measured.
    """

    def __init__(
        self,
        team: Team,
        settings: TrainConfig,
        learning_rates: Mapping[str, float] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._team = team
        self._settings = settings
        self.ranks = ranks or Ranks()
        """The processes that share each step's calls."""
        self._rates = {
            agent: (learning_rates or {}).get(agent, settings.learning_rate)
            for agent in team.agents
        }
        self.rate_scale = 1.0
        """Multiplies every adapter's learning rate; lowered after a collapse."""
        self.microbatch_tokens = settings.microbatch_tokens
        """Most padded tokens in a forward pass; lowered where memory is short. None: still to be
        found, by `find_microbatch_tokens`."""
        if self.microbatch_tokens is None:
            memory_of(team.policies[0].device)  # refused now rather than after a rollout
        self.facts = UpdateFacts()
        """Of the last update."""
        self.out_of_memory = 0
        """How often an update has been done again, in smaller micro-batches."""
        self.optimizers = {
            agent: _adamw(team.parameters(agent), rate, settings.weight_decay)
            for agent, rate in self._rates.items()
        }
        self.critics: dict[str, ValueHead] = {}
        self.critic_optimizers: dict[str, torch.optim.AdamW] = {}
        if settings.advantage == "gae":
            for offset, agent in enumerate(team.agents):
                policy = team.of(agent)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(settings.seed * 1_000_003 + 500_009 + offset)
                    head = ValueHead(int(policy.config.hidden_size)).to(policy.device)
                self.critics[agent] = head
                self.critic_optimizers[agent] = _adamw(
                    list(head.parameters()), settings.critic_learning_rate, weight_decay=0.0
                )

    def update(self, episodes: Sequence[Episode], iteration: int) -> dict[str, AgentStats]:
        """One iteration's update of all agents; statistics by agent.

        Args:
            episodes: the iteration's episodes; failed ones are ignored.
            iteration: from 1; it seeds the order of minibatches and ends the critic's warm-up.
        """
        settings = self._settings
        kept = [episode for episode in episodes if episode.ok]
        turn = turns(
            self._team.agents,
            iteration,
            order=settings.update_order,
            interval=settings.alternate_every,
            sequence=settings.alternate_order,
            seed=settings.seed,
        )
        is_warm_up = iteration <= (settings.critic_warmup if self.critics else 0)
        if is_warm_up:
            turn = ()
        batches = {
            agent: self._score(agent, places, kept, is_updated=agent in turn)
            for agent in self._team.agents
            if (places := _places(kept, agent))
        }
        assign_advantages(kept, batches, settings)
        self.facts = UpdateFacts(
            updated=frozenset(turn),
            is_warm_up=is_warm_up,
            without_advantage=_union(batch.without_advantage for batch in batches.values()),
            alone=_union(batch.alone for batch in batches.values()),
        )
        stats = {agent: self._describe(batch) for agent, batch in batches.items()}
        if settings.importance_cap is not None:
            for agent in batches.keys() & set(turn):
                stats[agent] |= _importance(batches[agent], settings.importance_cap)
        if self.critics:
            for agent, batch in batches.items():
                stats[agent] |= self._update_critic(agent, batch)
        log_ratios: dict[tuple[int, int], float] = {}
        for agent in turn:
            if agent not in batches:
                continue
            batch = batches[agent]
            if settings.update_order == "sequential":
                _follow(batch, kept, log_ratios)
            stats[agent] |= self._update_adapter(agent, batch, iteration)
            if settings.update_order == "sequential" and agent != turn[-1]:
                log_ratios |= self._log_ratios(agent, batch)
        return stats

    def find_microbatch_tokens(self, episodes: Sequence[Episode]) -> None:
        """Set `microbatch_tokens` to the largest size with which an update keeps `memory_gib`.

        Raises:
            OutOfMemoryError: as in `sizing.find_microbatch_tokens`.
        """
        settings = self._settings
        self.microbatch_tokens = find_microbatch_tokens(
            self._team,
            episodes,
            memory_of(self._team.policies[0].device),
            self.ranks,
            memory_gib=settings.memory_gib,
            is_entropy_learnt=settings.entropy_coef > 0,
            more=self._bytes_to_come(episodes),
        )

    def refuse_what_cannot_fit(self, episodes: Sequence[Episode]) -> None:
        """Refuse episodes with a call that memory cannot hold, before anything changes.

        Raises:
            OutOfMemoryError: as in `sizing.refuse_what_cannot_fit`.
        """
        refuse_what_cannot_fit(self._team, episodes, memory_gib=self._settings.memory_gib)

    def _bytes_to_come(self, episodes: Sequence[Episode]) -> int:
        """What an update holds besides its passes and weights: moments, and the critics' states."""
        total = 0
        for agent, optimizer in self.optimizers.items():
            if not optimizer.state:
                total += sum(8 * weight.numel() for weight in self._team.parameters(agent))
            if agent in self.critics:
                width = int(self._team.of(agent).config.hidden_size)
                calls = (call for e in episodes if e.ok for call in e.calls if call.agent == agent)
                total += sum(4 * width * len(call.completion_ids) for call in calls)
        return total

    def state(self) -> dict[str, Tensor]:
        """Value heads and optimizer moments as flat named tensors, for safetensors."""
        state = {}
        for agent, head in self.critics.items():
            for name, value in head.state_dict().items():
                state[f"critic/{agent}/{name}"] = value.detach().cpu().contiguous()
        for kind, optimizer in self._named_optimizers():
            for index, moments in optimizer.state_dict()["state"].items():
                for name, value in moments.items():
                    state[f"{kind}/{index}/{name}"] = torch.as_tensor(value).cpu().contiguous()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""
        for agent, head in self.critics.items():
            prefix = f"critic/{agent}/"
            head.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        for kind, optimizer in self._named_optimizers():
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                if key.startswith(f"{kind}/"):
                    index, _, name = key.removeprefix(f"{kind}/").partition("/")
                    moments.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})

    def _named_optimizers(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        for agent, optimizer in self.optimizers.items():
            yield f"adapter_optimizer/{agent}", optimizer
        for agent, optimizer in self.critic_optimizers.items():
            yield f"critic_optimizer/{agent}", optimizer

    # What is computed once per call

    @torch.no_grad()
    def _score(
        self,
        agent: str,
        places: list[tuple[int, int]],
        episodes: Sequence[Episode],
        *,
        is_updated: bool,
    ) -> AgentBatch:
        """Reference log-probs and critic features: one pass through the base, adapters disabled.

        An agent that is not updated needs them only where other agents' advantages do.
        """
        settings = self._settings
        calls = [episodes[e].calls[k] for e, k in places]
        offsets = token_offsets(calls)
        features = None
        if self.critics:
            width = int(self._team.of(agent).config.hidden_size)
            features = torch.zeros(offsets[-1], width)
        batch = AgentBatch(
            calls=calls,
            place=places,
            offsets=offsets,
            old_logprobs_N=torch.tensor([x for call in calls for x in call.logprobs]),
            ref_logprobs_N=torch.full((offsets[-1],), torch.nan),
            features_NH=features,
            importance_N=torch.ones(offsets[-1]),
            old_values_N=torch.zeros(offsets[-1]),
            advantages_N=torch.zeros(offsets[-1]),
            returns_N=torch.zeros(offsets[-1]),
        )
        referenced = self._referenced(calls, is_updated)
        if referenced:
            batch.ref_logprobs_N[batch.tokens(referenced)] = 0.0  # every process fills in its share
        for rows in self._microbatches(agent, batch, referenced):
            tokens = batch.tokens(_calls_of(rows))
            states, logprobs, _ = self._forward(agent, batch, rows, is_base=True)
            batch.ref_logprobs_N[tokens] = logprobs.cpu()
            if features is not None:
                features[tokens] = states.float().cpu()
        batch.ref_logprobs_N = self.ranks.add(batch.ref_logprobs_N)
        if features is not None:
            batch.features_NH = features = self.ranks.add(features)
            batch.old_values_N = self._values(agent, features)
        if is_updated and settings.importance_cap is not None:
            own_N = self._logprobs(agent, batch)
            batch.importance_N = importance_weights(
                own_N,
                batch.old_logprobs_N,
                settings.importance_cap,
                offsets if settings.level == "action" else None,
            )
            gap_N = (own_N - batch.old_logprobs_N).abs()
            batch.logprob_gap = (gap_N.max().item(), gap_N.mean().item())
            batch.old_logprobs_N = own_N
        return batch

    @torch.no_grad()
    def _logprobs(self, agent: str, batch: AgentBatch) -> Tensor:
        """Log-probs (N,) of an agent's actions under its adapter as it is now."""
        logprobs_N = torch.zeros(batch.offsets[-1])
        for rows in self._microbatches(agent, batch, range(len(batch.calls))):
            logprobs_N[batch.tokens(_calls_of(rows))] = self._forward(agent, batch, rows)[1].cpu()
        return self.ranks.add(logprobs_N)

    def _referenced(self, calls: Sequence[Call], is_updated: bool) -> Sequence[int]:
        """The calls that go through the base: all that need it, else some to tell the KL by."""
        settings = self._settings
        if self.critics or (settings.kl_coef > 0 and (is_updated or settings.kl_in == "reward")):
            return range(len(calls))
        sampled = [i for i, call in enumerate(calls) if call.temperature > 0] if is_updated else []
        return sampled if settings.kl_ceiling is not None else sampled[::_KL_EVERY]

    def _microbatches(
        self, agent: str, batch: AgentBatch, indices: Sequence[int], *, is_learnt: bool = False
    ) -> Iterator[list[Row]]:
        """This process's share of some calls in rows, as many at once as there is memory for.

        Where they are learnt from, no more than keep their activations share a pass; a row longer
        than that computes them again.

        Where the base is sharded, a process with one part less than others makes an idle pass.
        """
        ranks, policy = self.ranks, self._team.of(agent)
        calls = [batch.calls[i] for i in indices]
        tokens = sum(len(call.prompt_ids) + len(call.completion_ids) for call in calls)
        size = self.microbatch_tokens or MICROBATCH_TOKENS
        most = min(size, -(-tokens // ranks.count))
        parts = list(
            microbatches(
                calls,
                max(1, most),
                quadratic=policy.attention_cost,
                longest_row=policy.longest_shared_row,
                kept_tokens=policy.together if is_learnt else sys.maxsize,
            )
        )
        for rows in parts[ranks.index :: ranks.count]:
            for row in rows:
                row.members = [indices[i] for i in row.members]
            yield rows
        if policy.is_sharded and 0 < len(parts) % ranks.count <= ranks.index:
            policy.idle_pass(agent)

    def _log_ratios(self, agent: str, batch: AgentBatch) -> dict[tuple[int, int], float]:
        """Log of new over old probability of each whole action, by (episode, call)."""
        change_N = self._logprobs(agent, batch) - batch.old_logprobs_N
        sums = action_logprobs(change_N, batch.offsets, "sum").tolist()
        sampled = [call.temperature > 0 for call in batch.calls]
        return {
            place: value
            for place, value, is_sampled in zip(batch.place, sums, sampled, strict=True)
            if is_sampled  # a greedy answer is a function of its prompt: its ratio is 1
        }

    def _forward(
        self, agent: str, batch: AgentBatch, rows: Sequence[Row], *, is_base: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States (N, H), log-probs (N,) and entropies (N,) of the action tokens of rows' calls."""
        policy = self._team.of(agent)
        is_learnt = self._settings.entropy_coef > 0
        with policy.using(None if is_base else agent):
            return score(policy, batch.calls, rows, is_entropy_learnt=is_learnt)

    @torch.no_grad()
    def _values(self, agent: str, features_NH: Tensor) -> Tensor:
        values: Tensor = self.critics[agent](features_NH.to(self._team.of(agent).device)).cpu()
        return values

    # Steps

    def _update_adapter(self, agent: str, batch: AgentBatch, iteration: int) -> AgentStats:
        settings = self._settings
        share = rate_share(settings.learning_rate_schedule, iteration, settings.iterations)
        rate = self._rates[agent] * share * self.rate_scale
        for group in self.optimizers[agent].param_groups:
            group["lr"] = rate
        # A greedy call was no sample of the policy: there is no ratio to learn from.
        learnable = [i for i, call in enumerate(batch.calls) if call.temperature > 0]
        totals: dict[str, list[float]] = {}
        for epoch in range(settings.epochs):
            order = _shuffled(learnable, settings.seed, iteration, epoch)
            for indices in _split(order, settings.minibatches):
                for name, value in self._step(agent, batch, indices).items():
                    totals.setdefault(name, []).append(value)
            if (
                settings.target_kl is not None
                and totals
                and totals["kl_step"][-1] > settings.target_kl
            ):
                break
        stats = {name: sum(values) / len(values) for name, values in totals.items()}
        if totals:
            # Before the first step the policy is the one that sampled: this is the engine's error.
            first = totals["logprob_gap"][0], totals["logprob_gap_mean"][0]
            # Where importance is corrected, steps begin at the learner's own figures.
            stats["logprob_gap"], stats["logprob_gap_mean"] = batch.logprob_gap or first
            stats["optimizer_steps"] = float(len(totals["loss_policy"]))
            stats["learning_rate"] = rate
        return stats

    def _step(self, agent: str, batch: AgentBatch, indices: Sequence[int]) -> AgentStats:
        """One optimizer step on some calls; all sums are over exactly these calls."""
        settings = self._settings
        optimizer = self.optimizers[agent]
        calls = [batch.calls[i] for i in indices]
        token_count = sum(len(call.completion_ids) for call in calls)
        names = ("policy", "entropy", "kl_base", "kl_step", "clipped", "gap")
        sums = dict.fromkeys(names, 0.0)
        referenced = 0
        gap = 0.0
        for rows in self._microbatches(agent, batch, indices, is_learnt=True):
            chosen = _calls_of(rows)
            tokens = batch.tokens(chosen)
            _, logprobs_N, entropy_N = self._forward(agent, batch, rows)
            device = logprobs_N.device
            old_N = batch.old_logprobs_N[tokens].to(device)
            policy, clipped = self._policy_loss(
                batch, chosen, logprobs_N, old_N, len(calls), token_count
            )
            ref_N = batch.ref_logprobs_N[tokens].to(device)
            is_known_N = ~ref_N.isnan()
            kl_base = kl_k3(logprobs_N[is_known_N], ref_N[is_known_N]).sum()
            entropy = entropy_N.sum() / token_count
            loss = policy
            if settings.entropy_coef:
                loss = loss - settings.entropy_coef * entropy
            if settings.kl_in == "loss" and settings.kl_coef:
                loss = loss + settings.kl_coef * kl_base / token_count  # all are known
            torch.autograd.backward(loss)
            with torch.no_grad():
                sums["policy"] += policy.item()
                sums["entropy"] += entropy.item()
                sums["kl_base"] += kl_base.item()
                referenced += int(is_known_N.sum())
                sums["kl_step"] += kl_k3(old_N, logprobs_N).sum().item() / token_count
                sums["clipped"] += clipped
                gap_N = (logprobs_N - old_N).abs()
                sums["gap"] += gap_N.sum().item() / token_count
                gap = max(gap, gap_N.max().item())
        self.ranks.add_gradients(self._team.parameters(agent))
        sums, referenced, gap = self._over_all_ranks(sums, referenced, gap)
        norm = torch.nn.utils.clip_grad_norm_(self._team.parameters(agent), settings.max_grad_norm)
        if not (math.isfinite(sums["policy"]) and math.isfinite(float(norm))):
            optimizer.zero_grad(set_to_none=True)
            raise TrainingCollapsedError(
                f"{agent_of_adapter(agent)}: the policy loss is {sums['policy']} and its "
                f"gradient's norm {norm:g}; no step was made"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kl = {"kl": sums["kl_base"] / referenced} if referenced else {}
        return kl | {
            "loss_policy": sums["policy"],
            "entropy": sums["entropy"],
            "kl_step": sums["kl_step"],
            "clip_fraction": sums["clipped"],
            "grad_norm": float(norm),
            "logprob_gap": gap,
            "logprob_gap_mean": sums["gap"],
        }

    def _over_all_ranks(
        self, sums: dict[str, float], referenced: int, gap: float
    ) -> tuple[dict[str, float], int, float]:
        """A step's statistics over the shares of all processes."""
        if self.ranks.count == 1:
            return sums, referenced, gap
        own = [*sums.values(), float(referenced)]
        *totals, known = self.ranks.add(torch.tensor(own, dtype=torch.float64)).tolist()
        widest = max(self.ranks.together(lambda: [gap]))
        return dict(zip(sums, totals, strict=True)), int(known), widest

    def _policy_loss(
        self,
        batch: AgentBatch,
        chosen: Sequence[int],
        logprobs_N: Tensor,
        old_N: Tensor,
        call_count: int,
        token_count: int,
    ) -> tuple[Tensor, float]:
        """This micro-batch's share of the step's loss, and of its clipped ratios."""
        settings = self._settings
        high = settings.clip_ratio_high
        clip = (settings.clip_ratio, settings.clip_ratio if high is None else high)
        tokens = batch.tokens(chosen)
        advantages = (batch.advantages_N * batch.importance_N)[tokens].to(logprobs_N.device)
        if settings.level == "token":
            return policy_loss(logprobs_N, old_N, advantages, clip=clip, denominator=token_count)
        calls = [batch.calls[i] for i in chosen]
        offsets = token_offsets(calls)
        words = None
        if settings.action_logprob == "word":
            codec = self._team.of(calls[0].agent).codec
            words = [len(codec.decode(call.completion_ids).split()) for call in calls]
        first = torch.tensor(offsets[:-1], device=logprobs_N.device)
        return policy_loss(
            action_logprobs(logprobs_N, offsets, settings.action_logprob, words),
            action_logprobs(old_N, offsets, settings.action_logprob, words),
            advantages[first],
            clip=clip,
            denominator=call_count,
        )

    def _update_critic(self, agent: str, batch: AgentBatch) -> AgentStats:
        """Fit the value head to the returns, on states computed once."""
        settings = self._settings
        assert batch.features_NH is not None  # there are critics, so features were kept
        rows = batch.first_tokens if settings.level == "action" else slice(None)
        device = self._team.of(agent).device
        features = batch.features_NH[rows].to(device)
        returns = batch.returns_N[rows].to(device)
        old_values = batch.old_values_N[rows].to(device)
        head, optimizer = self.critics[agent], self.critic_optimizers[agent]
        loss = torch.zeros(())
        for _ in range(settings.critic_epochs):
            loss = value_loss(
                head(features),
                old_values,
                returns,
                clip=settings.value_clip,
                kind=settings.value_loss,
            )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(head.parameters(), settings.max_grad_norm)
            optimizer.step()
        variance = returns.var(correction=0)
        explained = 1 - (returns - old_values).var(correction=0) / variance if variance > 0 else 0.0
        return {"loss_value": loss.item(), "explained_variance": float(explained)}

    def _describe(self, batch: AgentBatch) -> AgentStats:
        calls = batch.calls
        first = batch.first_tokens
        return {
            "calls": float(len(calls)),
            "calls_greedy": float(sum(call.temperature == 0 for call in calls)),
            "tokens_mean": batch.offsets[-1] / len(calls),
            "truncated_share": sum(call.finish_reason == "length" for call in calls) / len(calls),
            "distinct_share": len({call.completion_ids for call in calls}) / len(calls),
            "advantage_abs_mean": batch.advantages_N[first].abs().mean().item(),
            "advantage_zero_share": (batch.advantages_N[first] == 0).float().mean().item(),
            "return_mean": batch.returns_N[first].mean().item(),
        }


def _adamw(
    parameters: Sequence[torch.nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.AdamW:
    on_cpu = parameters[0].device.type == "cpu"  # where torch would take one weight after another
    return torch.optim.AdamW(
        parameters, lr=rate, weight_decay=weight_decay, fused=True if on_cpu else None
    )


def _importance(batch: AgentBatch, cap: float) -> AgentStats:
    """Mean weight of an agent's action tokens, and the share of them whose weight was cut off."""
    weights_N = batch.importance_N
    is_cut_N = weights_N > cap * (1 - 1e-6)  # the cap went through a logarithm
    return {
        "importance_mean": weights_N.mean().item(),
        "importance_capped_share": is_cut_N.float().mean().item(),
    }


def _follow(
    batch: AgentBatch,
    episodes: Sequence[Episode],
    log_ratios: Mapping[tuple[int, int], float],
) -> None:
    """Multiply the advantages of an agent's calls by the ratios of agents updated before it."""
    by_episode: dict[int, dict[int, float]] = {}
    for (e, k), value in log_ratios.items():
        by_episode.setdefault(e, {})[k] = value
    wanted: dict[int, list[int]] = {}
    for e, k in batch.place:
        wanted.setdefault(e, []).append(k)
    factors = {
        (e, k): factor
        for e, calls in wanted.items()
        for k, factor in sequential_factors(
            [call.parents for call in episodes[e].calls], by_episode.get(e, {}), calls
        ).items()
    }
    per_call = torch.tensor([factors[place] for place in batch.place])
    lengths = torch.tensor(batch.offsets).diff()
    batch.advantages_N = batch.advantages_N * torch.repeat_interleave(per_call, lengths)


def _calls_of(rows: Sequence[Row]) -> list[int]:
    """Indices of the calls in rows, in the order of a batch's action tokens."""
    return [index for row in rows for index in row.members]


def _union(places: Iterable[frozenset[Place]]) -> frozenset[Place]:
    return frozenset().union(*places)


def _places(episodes: Sequence[Episode], agent: str) -> list[tuple[int, int]]:
    return [
        (e, k)
        for e, episode in enumerate(episodes)
        for k, call in enumerate(episode.calls)
        if call.agent == agent
    ]


def _shuffled(indices: list[int], seed: int, iteration: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration * 1_009 + epoch)
    return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]


def _split(order: Sequence[int], parts: int) -> Iterator[Sequence[int]]:
    """`parts` slices whose sizes differ by one at most; empty ones are left out."""
    for part in range(parts):
        chunk = order[part * len(order) // parts : (part + 1) * len(order) // parts]
        if chunk:
            yield chunk
