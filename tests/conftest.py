"""What every test shares: no network, no tracking service, no window, no user's caches."""

import atexit
import gc
import os
import shutil
import tempfile
import time

# These are read when the libraries are imported, so they are set before any test module is.
_hub_home = tempfile.mkdtemp(prefix="marft-tests-")
atexit.register(shutil.rmtree, _hub_home, ignore_errors=True)
os.environ.update(
    {
        "HF_HOME": _hub_home,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LANGSMITH_TRACING": "false",
        "LANGCHAIN_TRACING_V2": "false",
        "MPLBACKEND": "Agg",
        # Threads that wait for each other are slow where other work shares the processor.
        "OMP_NUM_THREADS": "1",
        # Apps under test build API models at import; a key must exist, and must never work.
        "OPENAI_API_KEY": "sk-not-a-key",
        "OPENAI_BASE_URL": "http://127.0.0.1:9",
    }
)

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402

if TYPE_CHECKING:
    from marft_graph import Trainer


@pytest.fixture
def untouched_langchain() -> None:
    """LangChain as it is while nothing runs: what earlier tests have left running has ended."""
    from marft_graph.rollout import intercept, scopes

    began = time.monotonic()
    while intercept._is_installed and time.monotonic() < began + 60:
        gc.collect()
        if time.monotonic() > began + 5:
            scopes._ended.clear()  # threads that hang on purpose, in earlier tests, never end
        intercept._restore_if_over()
        time.sleep(0.01)
    assert not intercept._is_installed


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer model with a byte-level tokenizer and a context of 256."""
    from tests.support import save_random_model

    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of the environment that `make vllm-cpu` sets up, or of MARFT_VLLM_PYTHON."""
    own = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    found = os.environ.get("MARFT_VLLM_PYTHON", str(own))
    if not Path(found).exists():
        pytest.skip(f"{found} is missing; `make vllm-cpu` makes it (Linux, x86_64)")
    return found


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., "Trainer"]:
    """Makes a Trainer of the duo on the tiny model; every argument can be given instead."""
    from marft_graph import Trainer
    from tests.apps import duo
    from tests.training import EXAMPLES, config, reward

    def build(graph: Any = None, run: str = "run", **given: Any) -> "Trainer":
        options = {
            "train_dataset": EXAMPLES,
            "eval_dataset": EXAMPLES[:4],
            "reward": reward,
            "config": config(tiny_model),
            "run_dir": tmp_path / run,
            **given,
        }
        return Trainer(duo() if graph is None else graph, **options)

    return build
