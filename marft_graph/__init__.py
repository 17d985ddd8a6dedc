"""Train the agents of a LangGraph app with multi-agent reinforcement learning.

    from marft_graph import Trainer, TrainConfig

    config = TrainConfig(base_model="Qwen/Qwen2.5-0.5B-Instruct")
    trainer = Trainer(graph, train_dataset=examples, reward=reward, config=config)
    trainer.train()
    trainer.export("adapters")

`bind(graph, "adapters")` is the app again, answered by its trained adapters.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Call",
    "Episode",
    "Evaluation",
    "FakeEngine",
    "FlexMG",
    "MarftError",
    "Reward",
    "TrainConfig",
    "Trainer",
    "bind",
    "compare",
    "compile_graph",
    "emit_reward",
    "run_episodes",
    "workflow_from_env",
    "workflow_from_profiles",
]

_HOMES = {
    "Call": "episode",
    "Episode": "episode",
    "Evaluation": "evaluation",
    "FakeEngine": "engine.fake",
    "FlexMG": "graph.flex_mg",
    "MarftError": "errors",
    "Reward": "episode",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "bind": "deploy.bind",
    "compare": "comparison",
    "compile_graph": "graph.compile",
    "emit_reward": "rollout.emit",
    "run_episodes": "rollout.runner",
    "workflow_from_env": "environments",
    "workflow_from_profiles": "environments",
}

if TYPE_CHECKING:
    from marft_graph.comparison import compare
    from marft_graph.config import TrainConfig
    from marft_graph.deploy.bind import bind
    from marft_graph.engine.fake import FakeEngine
    from marft_graph.environments import workflow_from_env, workflow_from_profiles
    from marft_graph.episode import Call, Episode, Reward
    from marft_graph.errors import MarftError
    from marft_graph.evaluation import Evaluation
    from marft_graph.graph.compile import compile_graph
    from marft_graph.graph.flex_mg import FlexMG
    from marft_graph.rollout.emit import emit_reward
    from marft_graph.rollout.runner import run_episodes
    from marft_graph.trainer import Trainer


def __getattr__(name: str) -> Any:
    # Imported when first used: `marft-graph --help` must not load torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'marft_graph' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"marft_graph.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
