"""The update: episodes to advantages to one PPO step sequence per agent.

`Learner` owns the value heads and the optimizers, one for each agent's adapter and one for its
head; it changes the policy's adapters in place. It knows nothing of graphs, engines or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from marft_graph.config import TrainConfig
from marft_graph.episode import Call, Episode
from marft_graph.learn.batches import collate, microbatches, token_offsets
from marft_graph.learn.credit import AgentBatch, assign_advantages
from marft_graph.learn.losses import action_logprobs, kl_k3, policy_loss, value_loss
from marft_graph.learn.schedule import rate_share
from marft_graph.policy.adapters import Policy
from marft_graph.policy.critic import ValueHead
from marft_graph.policy.logprobs import token_logprobs

AgentStats = dict[str, float]


class Learner:
    """Updates every agent's adapter from an iteration's episodes (MARFT-A, MARFT-T, or groups)."""

    def __init__(self, policy: Policy, settings: TrainConfig) -> None:
        self._policy = policy
        self._settings = settings
        self.optimizers = {
            agent: torch.optim.AdamW(
                parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
            )
            for agent, parameters in policy.adapter_parameters.items()
        }
        self.critics: dict[str, ValueHead] = {}
        self.critic_optimizers: dict[str, torch.optim.AdamW] = {}
        if settings.advantage == "gae":
            for offset, agent in enumerate(policy.agents):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(settings.seed * 1_000_003 + 500_009 + offset)
                    head = ValueHead(int(policy.config.hidden_size)).to(policy.device)
                self.critics[agent] = head
                self.critic_optimizers[agent] = torch.optim.AdamW(
                    head.parameters(), lr=settings.critic_learning_rate, weight_decay=0.0
                )

    def update(self, episodes: Sequence[Episode], iteration: int) -> dict[str, AgentStats]:
        """One iteration's update of all agents; statistics by agent.

        Args:
            episodes: the iteration's episodes; failed ones are ignored.
            iteration: from 1; it seeds the order of minibatches and ends the critic's warm-up.
        """
        kept = [episode for episode in episodes if episode.ok]
        batches = {
            agent: self._score(agent, places, kept)
            for agent in self._policy.agents
            if (places := _places(kept, agent))
        }
        assign_advantages(kept, batches, self._settings)
        stats = {}
        for agent, batch in batches.items():
            stats[agent] = self._describe(batch)
            if self._settings.advantage == "gae":
                stats[agent] |= self._update_critic(agent, batch)
            if iteration > (self._settings.critic_warmup if self.critics else 0):
                stats[agent] |= self._update_adapter(agent, batch, iteration)
        return stats

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
        self, agent: str, places: list[tuple[int, int]], episodes: Sequence[Episode]
    ) -> AgentBatch:
        """Reference log-probs and critic features: one pass through the base, adapters disabled."""
        calls = [episodes[e].calls[k] for e, k in places]
        offsets = token_offsets(calls)
        reference = torch.empty(offsets[-1])
        features = None
        if self.critics:
            features = torch.empty(offsets[-1], int(self._policy.config.hidden_size))
        batch = AgentBatch(
            calls=calls,
            place=places,
            offsets=offsets,
            old_logprobs_N=torch.tensor([x for call in calls for x in call.logprobs]),
            ref_logprobs_N=reference,
            features_NH=features,
            old_values_N=torch.zeros(offsets[-1]),
            advantages_N=torch.zeros(offsets[-1]),
            returns_N=torch.zeros(offsets[-1]),
        )
        for indices in microbatches(calls, self._settings.microbatch_tokens):
            tokens = batch.tokens(indices)
            states, logprobs, _ = self._forward(None, [calls[i] for i in indices])
            reference[tokens] = logprobs.cpu()
            if features is not None:
                features[tokens] = states.float().cpu()
        if features is not None:
            batch.old_values_N = self._values(agent, features)
        return batch

    def _forward(self, agent: str | None, calls: Sequence[Call]) -> tuple[Tensor, Tensor, Tensor]:
        """States (N, H), log-probs (N,) and entropies (N,) of the calls' action tokens."""
        batch = collate(calls, self._policy.device)
        with self._policy.using(agent):
            states_NH = batch.action_states(self._policy.hidden(batch.ids_BT))
            logprobs_N, entropy_N = token_logprobs(
                states_NH,
                batch.target_N,
                batch.temperature_N,
                self._policy.logits,
                self._policy.vocabulary,
            )
        return states_NH, logprobs_N, entropy_N

    @torch.no_grad()
    def _values(self, agent: str, features_NH: Tensor) -> Tensor:
        values: Tensor = self.critics[agent](features_NH.to(self._policy.device)).cpu()
        return values

    # Steps

    def _update_adapter(self, agent: str, batch: AgentBatch, iteration: int) -> AgentStats:
        settings = self._settings
        share = rate_share(settings.learning_rate_schedule, iteration, settings.iterations)
        for group in self.optimizers[agent].param_groups:
            group["lr"] = settings.learning_rate * share
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
            stats["logprob_gap"] = totals["logprob_gap"][0]
            stats["optimizer_steps"] = float(len(totals["loss_policy"]))
        return stats

    def _step(self, agent: str, batch: AgentBatch, indices: Sequence[int]) -> AgentStats:
        """One optimizer step on some calls; all sums are over exactly these calls."""
        settings = self._settings
        optimizer = self.optimizers[agent]
        calls = [batch.calls[i] for i in indices]
        token_count = sum(len(call.completion_ids) for call in calls)
        sums = dict.fromkeys(("policy", "entropy", "kl_base", "kl_step", "clipped"), 0.0)
        gap = 0.0
        for part in microbatches(calls, settings.microbatch_tokens):
            chosen = [indices[i] for i in part]
            tokens = batch.tokens(chosen)
            _, logprobs_N, entropy_N = self._forward(agent, [batch.calls[i] for i in chosen])
            device = logprobs_N.device
            old_N = batch.old_logprobs_N[tokens].to(device)
            policy, clipped = self._policy_loss(
                batch, chosen, logprobs_N, old_N, len(calls), token_count
            )
            kl_base = kl_k3(logprobs_N, batch.ref_logprobs_N[tokens].to(device)).sum() / token_count
            entropy = entropy_N.sum() / token_count
            loss = policy - settings.entropy_coef * entropy
            if settings.kl_in == "loss" and settings.kl_coef:
                loss = loss + settings.kl_coef * kl_base
            torch.autograd.backward(loss)
            with torch.no_grad():
                sums["policy"] += policy.item()
                sums["entropy"] += entropy.item()
                sums["kl_base"] += kl_base.item()
                sums["kl_step"] += kl_k3(old_N, logprobs_N).sum().item() / token_count
                sums["clipped"] += clipped
                gap = max(gap, (logprobs_N - old_N).abs().max().item())
        norm = torch.nn.utils.clip_grad_norm_(
            self._policy.adapter_parameters[agent], settings.max_grad_norm
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {
            "loss_policy": sums["policy"],
            "entropy": sums["entropy"],
            "kl": sums["kl_base"],
            "kl_step": sums["kl_step"],
            "clip_fraction": sums["clipped"],
            "grad_norm": float(norm),
            "logprob_gap": gap,
        }

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
        advantages = batch.advantages_N[tokens].to(logprobs_N.device)
        if settings.level == "token":
            return policy_loss(logprobs_N, old_N, advantages, clip=clip, denominator=token_count)
        calls = [batch.calls[i] for i in chosen]
        offsets = token_offsets(calls)
        words = [self._words(call) for call in calls] if settings.action_logprob == "word" else None
        first = torch.tensor(offsets[:-1], device=logprobs_N.device)
        return policy_loss(
            action_logprobs(logprobs_N, offsets, settings.action_logprob, words),
            action_logprobs(old_N, offsets, settings.action_logprob, words),
            advantages[first],
            clip=clip,
            denominator=call_count,
        )

    def _words(self, call: Call) -> int:
        return len(self._policy.codec.decode(call.completion_ids).split())

    def _update_critic(self, agent: str, batch: AgentBatch) -> AgentStats:
        """Fit the value head to the returns, on states computed once."""
        settings = self._settings
        assert batch.features_NH is not None  # there are critics, so features were kept
        rows = batch.first_tokens if settings.level == "action" else slice(None)
        features = batch.features_NH[rows].to(self._policy.device)
        returns = batch.returns_N[rows].to(self._policy.device)
        old_values = batch.old_values_N[rows].to(self._policy.device)
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
