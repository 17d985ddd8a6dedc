"""The trainer: compile the graph, then rollout and update until the adapters are better.

The only module that knows all rooms. `design.md` places it in `learn/`; it stands above the rooms
because it also writes the run folder, and rooms import only from those above them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from langgraph.pregel import Pregel

from marft_graph.agents import Agent, adapters_of, agents_of
from marft_graph.ahead import RolloutsAhead, check_weights_can_be_kept
from marft_graph.config import MICROBATCH_TOKENS, TrainConfig
from marft_graph.data import as_examples, training_data
from marft_graph.demonstrations import Source, read_demonstrations
from marft_graph.deploy.export import export_run, write_export
from marft_graph.deploy.manifest import read_manifest
from marft_graph.engine.routing import local_engine
from marft_graph.engine.vllm.engine import VllmEngine, check_engine_settings, vllm_engine
from marft_graph.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    MarftError,
    TrainingCollapsedError,
    UndecidedCallError,
)
from marft_graph.evaluation import EVAL_SEED, Evaluation, failed_nodes, failure_reasons, summarize
from marft_graph.graph.compile import as_compiled, compile_with
from marft_graph.learn.fate import count_fates, fates
from marft_graph.learn.groups import share_of_equal_groups
from marft_graph.learn.memory import update_within_memory
from marft_graph.learn.supervised import imitate
from marft_graph.learn.update import Learner
from marft_graph.new_nodes import Kept, agents_added, check_can_add
from marft_graph.policy.adapters import check_base
from marft_graph.policy.fingerprint import fingerprint
from marft_graph.policy.grammar import require_grammar_library
from marft_graph.policy.team import Team, Weights
from marft_graph.ranks import Ranks, check_ranks, own_folder
from marft_graph.rollout.dry_run import with_agent
from marft_graph.rollout.inputs import AppInputs, InputFunction, Reviewer
from marft_graph.rollout.rewards import Rewards, as_reward_function, mean_parts
from marft_graph.rollout.runner import check_examples
from marft_graph.rollout.worker_threads import hung_threads
from marft_graph.run.checkpoint import (
    has_checkpoints,
    latest_checkpoint,
    prune,
    verify,
    write_folder_atomically,
)
from marft_graph.run.fates import IdleNodes
from marft_graph.run.folder import begin_in, claim_run_folder, describe_run, remove_leftovers
from marft_graph.run.health import Health
from marft_graph.run.lock import RunLock
from marft_graph.run.report import write_report
from marft_graph.run.resume import check_accepted, check_same_run
from marft_graph.run.state import RunState, load_weights, read_plans, read_state, write_state
from marft_graph.run.stopping import Stopped, stop_requests
from marft_graph.run.trackers import require_tracker_packages, tracking
from marft_graph.run.tracking import MetricsLog, TrainingProgress, read_metrics
from marft_graph.run.trajectories import write_traces
from marft_graph.sampling import Sampler, TrainingEngine, check_can_learn, check_staleness
from marft_graph.workers.cluster import check_worker_settings, prepare_ray
from marft_graph.workers.job import pack_app
from marft_graph.workers.rollouts import RolloutWorkers

logger = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SHOWN_EXAMPLES = 8
"""Of the training data, to check their keys and for a dry run."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run came to."""

    run_dir: Path
    report: Path
    export: Path
    iterations: int
    before: Evaluation | None
    before_greedy: Evaluation | None
    after: Evaluation | None
    after_greedy: Evaluation | None


_T = TypeVar("_T")
_Evaluations = tuple[Evaluation | None, Evaluation | None]


class Trainer:
    """Trains one LoRA adapter per node of an unchanged LangGraph app.

    Args:
        graph: a compiled LangGraph app, or a builder (compiled for you).
        train_dataset: examples as mappings: a `datasets.Dataset`, a list of dicts or another
            sequence, taken in shuffled passes; or a stream (`datasets.IterableDataset`, a
            generator, any iterable), taken in its own order and begun again at its end.
            Keys that are input channels of the graph become its input, but no label: a key that the
            reward names and a node writes, in a graph without an input schema of its own.
        reward: `reward(example, final_state)`, sync or async: the team's outcome (a float), nodes'
            own rewards (a dict by node), or both (`Reward`). Several are added up, see
            `marft_graph.rewards.combine`: a list of functions, or a dict of functions to weights.
        config: settings; a mapping of them will do.
        eval_dataset: held-out examples for evaluation; None: evaluations are left out.
        run_dir: where the run is written; default: the next free `runs/run-N`. Of processes that
            train together (`accelerate launch`) the first one writes it; the others' folders are
            temporary.
        inputs: a list of the examples' keys that the graph is given, or a function that makes its
            input from an example.
        context: what nodes find as `runtime.context`: a value, or a function of the example.
        configurable: values of `config["configurable"]`, likewise.
        store: what an episode's store holds at its beginning, likewise; see `run_episodes`.
        on_interrupt: `reviewer(example, state, interrupt)` answers the app's interrupts.
        overwrite: delete what an earlier run left in `run_dir`.
        resume: continue the run in `run_dir` from its newest intact checkpoint.
        accept_changes: where a run is resumed, names of settings that may differ though they change
            the mathematics; `graph` for the graph, `base_model` also for a base whose files are
            others than before.
        extra_settings: more lines for the run's `config.yaml` (the command line's `dataset`).
        target: with `rollout_workers`, where they import the graph from, as the command line takes
            it: a workflow folder (whose task.py's `reward` and `inputs` they use as well),
            `file.py:variable` or a langgraph.json. None: what is given here is pickled.

    Raises:
        ConfigError, GraphError, UnknownNodeError, DatasetError, ModelError, CheckpointError: before
            anything is written; each names what is wrong.
    """

    def __init__(
        self,
        graph: Any,
        *,
        train_dataset: Any,
        reward: Rewards,
        config: TrainConfig | Mapping[str, Any],
        eval_dataset: Any = None,
        run_dir: str | Path | None = None,
        inputs: InputFunction | None = None,
        context: Any = None,
        configurable: Any = None,
        store: Any = None,
        on_interrupt: Reviewer | None = None,
        overwrite: bool = False,
        resume: bool = False,
        accept_changes: Sequence[str] = (),
        extra_settings: Mapping[str, Any] | None = None,
        target: str | None = None,
    ) -> None:
        self.config = (
            config if isinstance(config, TrainConfig) else TrainConfig.from_mapping(config)
        )
        if self.config.constrain_output:
            require_grammar_library()
        check_engine_settings(self.config)
        require_tracker_packages(self.config.trackers)
        check_worker_settings(self.config)
        _check_training(self.config, has_evaluations=eval_dataset is not None)
        check_accepted(accept_changes)
        earlier = os.path.expanduser(self.config.start_from or "")
        if earlier and os.path.exists(Path(earlier) / "manifest.json"):
            read_manifest(earlier)
        self.graph: Pregel[Any, Any, Any, Any] = as_compiled(graph)
        self._reward = as_reward_function(reward)
        self._given = given = AppInputs(
            inputs=inputs,
            context=context,
            configurable=configurable,
            store=store,
            on_interrupt=on_interrupt,
        )
        self._app = None
        if self.config.rollout_workers:
            prepare_ray(self.config.ray_address)
            self._app = pack_app(self.graph, self._reward, given, target)
        self._data = training_data(train_dataset, self.config.seed)
        shown = self._data.peek(_SHOWN_EXAMPLES)
        self._eval = None
        if eval_dataset is not None:
            most = self.config.eval_examples or None
            self._eval = as_examples(eval_dataset, "eval_dataset", most)
        told: dict[str, None] = {}
        for examples in (shown, self._eval):
            if examples is not None:
                labels = check_examples(self.graph, [examples[0]], given, self._reward)
                told |= dict.fromkeys(labels.told(examples[0]))
        found = compile_with(self.graph, shown, given)  # the code only guesses: the run decides
        for note in (*told, *found.notes):
            logger.warning(note)
        found = replace(found, notes=(*found.notes, *told))
        grown = agents_added(run_dir, found) if self._may_grow and resume else ()
        for node in grown:
            found = with_agent(found, node)
        trained = (*self.config.nodes, *grown) if self.config.nodes else ()
        self._found = found
        self.nodes = found.training(trained).agents
        self._greedy: set[str] = set()
        if self.config.temperature is None:
            greedy = {node: found.graph.nodes[node].get("greedy", False) for node in self.nodes}
            self._greedy = check_can_learn({node: not own for node, own in greedy.items()})
        agents = agents_of(self.nodes, self.config)
        _check_alternate_order(self.config, [agent.name for agent in agents])
        for base in dict.fromkeys(agent.base_model for agent in agents):
            check_base(base, self.config.device, self.config.quantization)
        self.flex_mg = found.training(self.nodes, adapters_of(agents))
        self._torch_threads = torch.get_num_threads()
        self._ranks = Ranks()
        check_ranks(self._ranks, self.config)
        self._lock = RunLock()
        self._has_begun = resume
        self.run_dir = self._ranks.one_after_another(
            lambda: claim_run_folder(
                own_folder(self._ranks, run_dir, resume=resume),
                self._lock,
                overwrite=overwrite,
                resume=resume,
            )
        )
        try:
            self._extra_settings = dict(extra_settings or {})
            self._load_team(agents)
            self._health = Health(
                entropy_floor=self.config.entropy_floor,
                kl_ceiling=self.config.kl_ceiling,
                return_floor=self.config.return_floor,
            )
            self._idle = IdleNodes(self.nodes)
            self._state = RunState()
            self._is_between_steps = True
            """Whether weights, metrics and data position are those of one iteration."""
            self._saved_iteration: int | None = None
            plans = self._resume(accept_changes) if resume else {}
            self._start_sampling(agents, plans)
        except BaseException:
            self._lock.release()
            raise

    def _load_team(self, agents: Sequence[Agent]) -> None:
        """Adapters on their bases, and who updates them."""
        self.team = Team.load(agents, self.config, self._ranks.sharding)
        bases = dict.fromkeys(agent.base_model for agent in agents)
        self._base_files = {base: fingerprint(base) for base in bases}
        check_weights_can_be_kept(self.team, self.config)
        if threads := self.config.cpu_threads or self._threads_beside_rollouts():
            torch.set_num_threads(threads)
        self._rates = {agent.name: agent.learning_rate for agent in agents}
        self._learner = Learner(self.team, self.config, self._rates, self._ranks)

    def _start_sampling(self, agents: Sequence[Agent], plans: Mapping[int, Weights]) -> None:
        """The engine of the team, and the rollouts that ask it."""
        self._weights = self._weights_now()
        self._engine = self._make_engine(agents)
        self._sampler = Sampler(
            self.graph,
            self._engine,
            self._data,
            self.config,
            reward=self._reward,
            adapters={node: self.flex_mg.adapter(node) for node in self.nodes},
            frozen=self.flex_mg.frozen,
            greedy=self._greedy,
            given=self._given,
            ranks=self._ranks,
            # Each process decodes in its own steps: the local engine needs the whole base.
            base=self.team.whole if self.config.engine == "local" else contextlib.nullcontext,
        )
        self._ahead = RolloutsAhead(
            self._sampler,
            staleness=self.config.staleness,
            iterations=self.config.iterations,
            patience=self.config.stop_timeout,
            plans=plans,
        )

    # The public verbs

    @property
    def iteration(self) -> int:
        """Training iterations done."""
        return self._state.iteration

    def train(self, *, progress: bool = True) -> TrainResult:
        """Run all iterations; evaluations, checkpoints and the report go to the run folder.

        The first SIGINT (Ctrl-C) or SIGTERM finishes the running iteration if that takes no longer
        than `stop_timeout`, writes a checkpoint and the report, and raises `Stopped`, which is a
        KeyboardInterrupt; a second one stops at once. A run that an error ends is saved likewise.

        Raises:
            CheckpointError: another process has the run folder, or it cannot be written.
            EpisodesFailedError: too many episodes failed; the message has the reasons.
            RewardError: the reward function raised; the message has the example.
        """
        with self._in_run_folder() as log, stop_requests(self.config.stop_timeout) as stop:
            shown = progress and self._ranks.is_main
            bar = TrainingProgress(self.config.iterations, start=self.iteration, enabled=shown)
            try:
                with bar:
                    with self._ahead:
                        before = self._redone(lambda: self._first_evaluation(log))
                        while self._goes_on() and not self._ranks.any(stop.is_set()):
                            bar.update(self._step(log))
                        stop.check(is_asked=self._ranks.any(stop.is_set()))
                        self._idle.sum_up(read_metrics(self.run_dir))
                    if self.config.load_best:
                        self._put_back_best()
                    after = self._redone(lambda: self._evaluate_both(log, "after"))
                self._checkpoint(None if after[0] is None else after[0].return_mean)
            except BaseException as error:
                if not isinstance(error, Stopped) or error.is_first:
                    stop.met()
                    self._save_before(error)
                raise
            stop.met()
        target = self.run_dir / "export"
        shutil.rmtree(target, ignore_errors=True)  # our own, of an earlier part of this run
        export = export_run(self.run_dir, target)
        report = write_report(self.run_dir)
        return TrainResult(self.run_dir, report, export, self.iteration, *before, *after)

    def warm_start(
        self,
        demonstrations: Source,
        *,
        min_return: float | None = None,
        best: int | None = None,
        epochs: int = 3,
        batch_size: int = 16,
        learning_rate: float | None = None,
    ) -> dict[str, dict[str, float]]:
        """Fine-tune each node's adapter on recorded answers, before `train` or instead of it.

        Args:
            demonstrations: what `marft-graph trace` wrote, an earlier run's folder, episodes, a
                LangSmith export, or rows with `node` and `messages`; see `read_demonstrations`.
            min_return: of recorded episodes, only those with at least this return.
            best: of recorded episodes, at most so many of each example, the best ones.
            epochs: passes over the demonstrations.
            batch_size: answers in an optimizer step.
            learning_rate: AdamW step at the start, which falls to 0; None: each adapter's own.

        Returns:
            Figures by adapter, as `learn.supervised.imitate` describes them.

        Raises:
            DatasetError: there is nothing to learn for a trained node.
            ConfigError: training has begun, or a number is out of range.
            TrainingCollapsedError: the loss is not finite.
        """
        if self.iteration:
            raise ConfigError(
                f"warm_start comes before training; this run has done {self.iteration} iterations"
            )
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if learning_rate is not None and not learning_rate > 0:
            raise ConfigError(f"learning_rate is {learning_rate}; it must be above 0")
        stats = imitate(
            self.team,
            read_demonstrations(demonstrations, min_return=min_return, best=best),
            {node: self.flex_mg.adapter(node) for node in self.nodes},
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=self._rates if learning_rate is None else learning_rate,
            microbatch_tokens=self.config.microbatch_tokens or MICROBATCH_TOKENS,
            max_grad_norm=self.config.max_grad_norm,
            seed=self.config.seed,
        )
        self._weights = self._weights_now()
        return stats

    def evaluate(self, *, greedy: bool = False, name: str | None = None) -> Evaluation:
        """Run the current policy once on each held-out example.

        Args:
            greedy: take the most likely token everywhere instead of sampling.
            name: also write the episodes to `traces/NAME.parquet`.

        Raises:
            DatasetError: there is no `eval_dataset`.
            ConfigError: `name` is no file's name.
        """
        if name is not None and not _FILE_NAME.fullmatch(name):
            raise ConfigError(
                f"evaluate: name is {name!r}; give letters, digits, '.', '_' and '-', not a path"
            )
        if self._eval is None:
            raise DatasetError("evaluate() needs held-out examples: give Trainer an eval_dataset")
        count = min(self.config.eval_examples or len(self._eval), len(self._eval))
        examples = [self._eval[i] for i in range(count)]
        episodes = self._sampler.evaluation(examples, self._weights, seed=EVAL_SEED, greedy=greedy)
        if name is not None:
            path = self.run_dir / "traces" / f"{name}.parquet"
            write_traces(path, episodes, iteration=self.iteration, phase="eval")
        return summarize(episodes, greedy=greedy)

    def export(self, directory: str | Path) -> Path:
        """Write the current adapters to a new folder: PEFT format, a manifest, the vLLM command."""
        staging = self.run_dir / ".export-adapters"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            for agent in self.team.agents:
                self.team.of(agent).save_adapter(agent, staging / agent)
            metrics = {"iteration": self.iteration}
            return write_export(
                staging, Path(directory), self.flex_mg, self.config, metrics, self._base_files
            )
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def close(self) -> None:
        """Stop the engine, with servers and workers that it started, and let the run folder go."""
        self._ahead.stop()
        self._engine.close()
        self._lock.release()
        torch.set_num_threads(self._torch_threads)
        if not self._ranks.is_main:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _weights_now(self) -> Weights:
        """The adapters as they are; copied, where they are sampled from while they learn."""
        copies = self.team.copy_weights() if self.config.staleness else None
        return Weights(self.iteration, copies)

    def _threads_beside_rollouts(self) -> int | None:
        """Threads of updates that share the processor with the next rollout; None: all of them."""
        is_shared = self.config.staleness and self.config.engine == "local" and self._app is None
        return self.team.decode_threads if is_shared else None

    def _make_engine(self, agents: Sequence[Agent]) -> TrainingEngine:
        served = None
        if self.config.engine == "vllm":
            served = vllm_engine(self.team, agents, self.config, self.run_dir, self._ranks)
        if self._app is not None:
            return RolloutWorkers(
                self._app,
                self.nodes,
                self.team,
                agents,
                self.config,
                served,
                frozen=self.flex_mg.frozen,
            )
        return served or local_engine(self.team, self.config)

    # Nodes that first show up while it trains

    @property
    def _may_grow(self) -> bool:
        return self.config.new_nodes == "train"

    def _redone(self, work: Callable[[], _T]) -> _T:
        """What `work` comes to, once each node that it meets has an adapter."""
        while True:
            try:
                return work()
            except UndecidedCallError as error:
                if not self._may_grow or not error.agent or error.agent in self.nodes:
                    raise
                check_can_add(self.config, self._ranks)
                self._add_node(error.agent)

    def _add_node(self, node: str) -> None:
        """Give a node an adapter; the team, its engine and its rollouts are made anew."""
        logger.warning(
            "node %r first asked its model after iteration %d: it gets an adapter (new_nodes is "
            "'train'), and what it was met in is done again",
            node,
            self.iteration,
        )
        self._ahead.stop()
        self._engine.close()
        kept = Kept.of(self.team, self._learner, self.run_dir)
        self._found = with_agent(self._found, node)
        self.nodes = (*self.nodes, node)
        agents = agents_of(self.nodes, self.config)
        self.flex_mg = self._found.training(self.nodes, adapters_of(agents))
        self._idle = IdleNodes(self.nodes)
        self._load_team(agents)
        kept.put_back(self.team, self._learner)
        self._start_sampling(agents, {})
        settings = {**self.config.to_dict(), **self._extra_settings}
        describe_run(self.run_dir, settings, self.flex_mg, self._base_files)
        if self.iteration:
            self._checkpoint(None)

    # One iteration

    def _first_evaluation(self, log: MetricsLog) -> _Evaluations:
        if self.iteration > 0:
            return None, None
        self._is_between_steps = False  # a start without its evaluation is none
        if self._eval is None:
            logger.warning(
                "there is no eval_dataset: evaluations before, in (eval_every) and after training "
                "are left out"
            )
        before = self._evaluate_both(log, "before")
        self._is_between_steps = True
        self._checkpoint(None if before[0] is None else before[0].return_mean)
        return before

    def _step(self, log: MetricsLog) -> dict[str, Any]:
        """One iteration with what follows it: recovery or evaluation, and checkpoint."""
        row = self._redone(self._iterate)
        log.write(row)
        if row["collapsed"] is not None:
            self._recover(row["collapsed"])
        elif self._eval is not None and _due(
            self.config.eval_every, self.iteration, self.config.iterations
        ):
            row |= self._log_evaluation(log, self._redone(self.evaluate))
        self._is_between_steps = True
        if _due(self.config.checkpoint_every, self.iteration, self.config.iterations) or (
            self._state.best_iteration == self.iteration
        ):
            self._checkpoint(row.get("eval_return"))
        return row

    def _iterate(self) -> dict[str, Any]:
        self._state.iteration += 1
        started = time.perf_counter()
        try:
            sampled = self._ahead.rollout(self.iteration, self._weights)
            episodes, learnt = sampled.episodes, sampled.learnt
            lag = check_staleness(episodes, self._weights.version, self.config.staleness)
        except BaseException:  # nothing was learnt yet: the state is still the previous iteration's
            self._state.iteration -= 1
            raise
        self._state.examples_taken = sampled.position
        self._is_between_steps = False
        rolled_out = time.perf_counter()
        stats, collapsed = {}, None
        short_before = self._learner.out_of_memory
        try:
            stats = update_within_memory(self._learner, self.team, learnt, self.iteration)
        except TrainingCollapsedError as error:
            collapsed = str(error)
        self._weights = self._weights_now()
        updated = time.perf_counter()
        path = self.run_dir / "traces" / f"iter_{self.iteration:06d}.parquet"
        write_traces(path, episodes, iteration=self.iteration, phase="train")
        returns = [episode.total_reward for episode in episodes if episode.ok]
        row: dict[str, Any] = {
            "iteration": self.iteration,
            "episodes": len(episodes),
            "episodes_failed": len(episodes) - len(returns),
            "episodes_filtered": len(episodes) - len(learnt),
            "failed_by_reason": failure_reasons(episodes),
            "failed_by_node": failed_nodes(episodes),
            "faults_rewarded": sum(episode.ok and bool(episode.error) for episode in episodes),
            "new_nodes": sorted(self._sampler.new_nodes),
            "threads_hung": hung_threads(),
            "out_of_memory": self._learner.out_of_memory - short_before,
            "microbatch_tokens": self._learner.microbatch_tokens,
            "return_mean": statistics.fmean(returns) if returns else None,
            "return_std": statistics.pstdev(returns) if returns else None,
            **mean_parts(episodes),
            "zero_advantage_groups": share_of_equal_groups(episodes),
            "staleness": lag,
            "seconds_rollout": sampled.seconds,
            "seconds_waited": rolled_out - started,
            "seconds_update": updated - rolled_out,
            "tokens_sampled": sum(len(c.completion_ids) for e in episodes for c in e.calls),
            "agents": stats,
        }
        if isinstance(self._engine, VllmEngine | RolloutWorkers):
            row["engine"] = self._engine.stats()
        row["collapsed"] = collapsed or self._health.problem(row)
        found = fates(episodes, learnt, self._learner.facts, is_undone=row["collapsed"] is not None)
        row["fates"] = count_fates(found)
        row["never_called"] = self._idle.see(self.iteration, row["fates"])
        return row

    # Evaluation and the run folder

    def _evaluate_both(self, log: MetricsLog, when: str) -> _Evaluations:
        """Sampled and greedy evaluation, with traces."""
        if self._eval is None:
            return None, None
        sampled = self.evaluate(name=f"eval_{when}")
        greedy = self.evaluate(greedy=True, name=f"eval_{when}_greedy")
        self._log_evaluation(log, sampled, eval_return_greedy=greedy.return_mean)
        return sampled, greedy

    def _log_evaluation(
        self, log: MetricsLog, evaluation: Evaluation, **more: float
    ) -> dict[str, Any]:
        row = {
            "iteration": self.iteration,
            "eval_return": evaluation.return_mean,
            "eval_stderr": evaluation.return_stderr,
            "eval_episodes": evaluation.episodes,
            "eval_episodes_failed": evaluation.episodes_failed,
            "eval_failed_by_reason": evaluation.failed_by_reason,
            **more,
        }
        log.write_evaluation(row)
        self._state.note_evaluation(evaluation.return_mean)
        return row

    @contextlib.contextmanager
    def _in_run_folder(self) -> Iterator[MetricsLog]:
        """The run's logs, while no other process may write to its folder."""
        if self._has_begun:
            self._lock.acquire(self.run_dir)
        else:
            begin_in(self.run_dir, self._lock)
        self._has_begun = True
        try:
            remove_leftovers(self.run_dir)
            settings = {**self.config.to_dict(), **self._extra_settings}
            describe_run(self.run_dir, settings, self.flex_mg, self._base_files)
            with tracking(
                self.config.trackers if self._ranks.is_main else (),
                self.run_dir,
                project=self.config.tracker_project,
                settings=settings,
                iteration=self.iteration,
            ) as track:
                yield MetricsLog(self.run_dir, track)
        finally:
            self._lock.release()

    def _checkpoint(self, eval_return: float | None) -> None:
        state = self._state
        state.rate_scale = self._learner.rate_scale
        state.note_microbatches(self.config, self._learner.microbatch_tokens)
        state.eval_return = eval_return
        write_folder_atomically(
            self.run_dir / "checkpoints" / f"step_{state.iteration}",
            lambda folder: write_state(folder, self.team, self._learner, state, self._ahead.plans),
        )
        self._saved_iteration = self.iteration
        prune(self.run_dir, self.config.keep_checkpoints, state.best_iteration)

    def _save_before(self, error: BaseException) -> None:
        """What can be saved of a run that ends with an error or a signal."""
        try:
            if self._is_between_steps and self.iteration != self._saved_iteration:
                self._checkpoint(None)
            write_report(self.run_dir, str(error) or type(error).__name__)
        except MarftError as second:
            logger.error("the run could not be saved after %s: %s", type(error).__name__, second)

    def _put_back(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's weights; what others have sampled is dropped."""
        self._ahead.discard()
        load_weights(checkpoint, self.team, self._learner)
        self._weights = self._weights_now()

    def _put_back_best(self) -> None:
        best = self._state.best_iteration
        if best is None or best == self.iteration:
            return
        checkpoint = self.run_dir / "checkpoints" / f"step_{best}"
        try:
            verify(checkpoint)
        except CheckpointError as error:
            logger.warning("staying at the last iteration, for the best checkpoint: %s", error)
            return
        self._put_back(checkpoint)
        logger.info("went back to iteration %d, the best held-out return", best)

    # Health

    def _goes_on(self) -> bool:
        patience = self.config.early_stop
        if patience and self._state.evaluations_since_best >= patience:
            logger.warning(
                "stopping early at iteration %d: no better held-out return in %d evaluations",
                self.iteration,
                patience,
            )
            return False
        return self.iteration < self.config.iterations

    def _recover(self, problem: str) -> None:
        """Put the last good checkpoint back with lower learning rates; give up after N times."""
        self._state.recoveries += 1
        checkpoint = latest_checkpoint(self.run_dir)
        if self._state.recoveries > self.config.max_recoveries or checkpoint is None:
            raise TrainingCollapsedError(
                f"training collapsed in iteration {self.iteration}: {problem}. Gave up after "
                f"max_recoveries={self.config.max_recoveries}; the last good checkpoint is "
                f"{checkpoint}. Try a lower learning_rate, or a higher kl_coef"
            )
        self._put_back(checkpoint)
        self._learner.rate_scale *= self.config.recovery_rate
        self._health.forget()
        logger.warning(
            "iteration %d collapsed: %s; put %s back, learning rates now times %g (%d of %d)",
            self.iteration,
            problem,
            checkpoint.name,
            self._learner.rate_scale,
            self._state.recoveries,
            self.config.max_recoveries,
        )

    def _resume(self, accept_changes: Sequence[str]) -> dict[int, Weights]:
        """Continue where the newest intact checkpoint stands; later metrics are dropped.

        Returns the older weights that are to sample the next iterations. A run that was stopped
        before its first checkpoint begins again.
        """
        check_same_run(self.run_dir, self.config, self.flex_mg, self._base_files, accept_changes)
        checkpoint = latest_checkpoint(self.run_dir)
        if checkpoint is None and has_checkpoints(self.run_dir):
            raise CheckpointError(
                f"{self.run_dir} has no checkpoint that verifies; nothing to resume"
            )
        if checkpoint is None:
            logger.warning("%s has no checkpoint yet; it begins again", self.run_dir)
            MetricsLog(self.run_dir).truncate(-1)
            return {}
        self._state = read_state(checkpoint)
        load_weights(checkpoint, self.team, self._learner)
        self._data.seek(self._state.examples_taken)
        self._saved_iteration = self.iteration
        self._learner.rate_scale = self._state.rate_scale
        self._learner.microbatch_tokens = self._state.microbatches(self.config)
        MetricsLog(self.run_dir).truncate(self.iteration)
        for row in read_metrics(self.run_dir):
            if row.get("collapsed"):
                self._health.forget()
            else:
                self._health.problem(row)
        return read_plans(checkpoint, self.team)


def _check_training(config: TrainConfig, *, has_evaluations: bool) -> None:
    """Refuse settings that cannot do in training what they say."""
    if config.temperature == 0:
        raise ConfigError(
            "temperature is 0; training learns from samples: give a number above 0, such as 1.0 "
            "(evaluations have greedy=True)"
        )
    for name, is_set in (("early_stop", config.early_stop > 0), ("load_best", config.load_best)):
        if is_set and not has_evaluations:
            raise ConfigError(
                f"{name} is {getattr(config, name)}, but there is no eval_dataset, whose returns "
                f"it needs; give one, or leave {name} out"
            )


def _check_alternate_order(config: TrainConfig, agents: Sequence[str]) -> None:
    for name in config.alternate_order:
        if name not in agents:
            raise ConfigError(
                f"alternate_order names {name!r}, which is no agent; they are {', '.join(agents)}"
            )


def _due(every: int, iteration: int, last: int) -> bool:
    """Whether something done every N iterations is due; the last one has its own place."""
    return every > 0 and iteration % every == 0 and iteration < last
