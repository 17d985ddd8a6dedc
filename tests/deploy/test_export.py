"""What an export folder says and holds: manifest, cards, commands, merged models, the hub."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from marft_graph import Trainer, compile_graph
from marft_graph.cli import main
from marft_graph.deploy import export
from marft_graph.deploy.export import export_run
from marft_graph.deploy.hub import push_to_hub
from marft_graph.deploy.manifest import read_manifest
from marft_graph.errors import ExportError
from marft_graph.policy.adapters import quietly
from marft_graph.policy.chat import PLAIN_TEMPLATE
from tests.apps import duo
from tests.support import TEMPLATE, save_random_model
from tests.training import EXAMPLES, config, reward


def finished(folder: Path, model: Path, **changes: Any) -> Path:
    """A short run whose adapters differ clearly from the base."""
    given = {"learning_rate": 3e-2, "eval_every": 0, "temperature": 0.9, **changes}
    with Trainer(
        duo(),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:4],
        reward=reward,
        config=config(model, **given),
        run_dir=folder / "run",
    ) as trainer:
        trainer.train(progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("exported"), tiny_model)


@pytest.fixture(scope="module")
def out(run: Path) -> Path:
    return export_run(run, run.parent / "out", merged=True)


def test_the_manifest_says_what_is_needed_to_serve_and_to_repeat(
    out: Path, tiny_model: Path
) -> None:
    raw = json.loads((out / "manifest.json").read_text())
    assert raw["graph_hash"] == compile_graph(duo()).hash
    assert raw["nodes"] == {"planner": "planner", "actor": "actor"}
    assert raw["adapters"]["actor"]["base_model"] == str(tiny_model.resolve())
    assert raw["adapters"]["actor"]["revision"] is None  # a folder has none
    assert (raw["max_new_tokens"], raw["temperature"]) == (6, 0.9)
    assert {"marft-graph", "torch", "peft", "transformers"} <= raw["versions"].keys()
    assert raw["metrics"]["iteration"] == 2
    assert (out / raw["adapters"]["actor"]["chat_template"]).read_text() == TEMPLATE
    manifest = read_manifest(out)
    assert manifest.merged == {"planner": "merged/planner", "actor": "merged/actor"}
    assert "merged/actor/model.safetensors" in manifest.sha256


def test_every_adapter_has_a_model_card_that_the_hub_can_read(out: Path) -> None:
    for name in ("planner", "actor"):
        card = (out / "adapters" / name / "README.md").read_text()
        _, head, text = card.split("---\n", 2)
        front = yaml.safe_load(head)
        assert front["library_name"] == "peft"
        assert front["pipeline_tag"] == "text-generation"
        assert f"`{name}`" in text
        assert "temperature 0.9" in text


def test_the_command_and_the_compose_file_tell_vllm_the_same(out: Path, tiny_model: Path) -> None:
    command = next(
        line for line in (out / "README.md").read_text().splitlines() if line.startswith("vllm ")
    )
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", str(tiny_model.resolve())]
    assert f"actor={out / 'adapters' / 'actor'}" in words
    assert words[words.index("--tool-call-parser") + 1] == "hermes"
    assert "--chat-template" not in words  # the tokenizer has one
    service = yaml.safe_load((out / "compose.yaml").read_text())["services"]["vllm"]
    inside = [word.replace(str(out), "/adapters") for word in words[3:]]
    assert service["command"][2:] == inside
    assert f"{tiny_model.resolve()}:{tiny_model.resolve()}:ro" in service["volumes"]


def test_a_base_without_a_chat_template_is_served_with_that_of_training(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "bare", template=None)
    folder = finished(tmp_path, model, iterations=0) / "export"
    assert (folder / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    assert f"--chat-template {folder}/chat_template.jinja" in (folder / "README.md").read_text()
    assert "/adapters/chat_template.jinja" in (folder / "compose.yaml").read_text()


def test_a_merged_model_answers_as_base_and_adapter_do(out: Path, tiny_model: Path) -> None:
    ids = AutoTokenizer.from_pretrained(out / "merged" / "actor")("plan", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged" / "actor")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        plain = base(**ids).logits
        adapted = quietly(PeftModel.from_pretrained, base, out / "adapters" / "actor")
        adapted = adapted(**ids).logits
        found = merged(**ids).logits
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, adapted, atol=1e-4, rtol=1e-4)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[5, 9, 33, 100, 71, 12, 250]])).logits
    return logits


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_base_is_untied_where_an_adapter_changes_one_end(
    tiny_model: Path, tmp_path: Path, target: str
) -> None:
    run = finished(tmp_path, tiny_model, lora_targets=("q_proj", target), iterations=2)
    folder = export_run(run, tmp_path / "out", merged=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert base.config.tie_word_embeddings
    expected = logits_of(quietly(PeftModel.from_pretrained, base, folder / "adapters" / "actor"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged" / "actor")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_what_was_trained_is_not_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export._name_base

    def damaged(path: Path, base: str) -> None:
        write(path, base)
        own = json.loads(path.read_text())
        path.write_text(json.dumps(own | {"lora_alpha": 3 * own["lora_alpha"]}))

    monkeypatch.setattr(export, "_name_base", damaged)
    with pytest.raises(ExportError, match=r"the adapter of 'planner' is not what was trained"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_of_a_base_in_four_bits_is_refused(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    settings = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(
        settings.replace("quantization: none", "quantization: 4bit")
    )
    with pytest.raises(ExportError, match=r"trained on a base in 4bit"):
        export_run(copied, tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()


def test_a_merged_model_in_sixteen_bits_is_compared_within_rounding(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = finished(tmp_path, tiny_model, dtype="bfloat16", iterations=1)
    assert read_manifest(export_run(run, tmp_path / "out", merged=True)).merged


def test_nodes_can_be_left_out(run: Path, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "out", nodes=["actor"])
    assert dict(read_manifest(folder).nodes) == {"actor": "actor"}
    assert not (folder / "adapters" / "planner").exists()
    with pytest.raises(ExportError, match=r"no node is left .* trained planner, actor"):
        export_run(run, tmp_path / "none", nodes=[])


class FakeHub:
    """Takes what `HfApi` would send."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._error = error

    def create_repo(self, repo_id: str, **given: Any) -> None:
        self.asked.append((repo_id, given))
        if self._error is not None:
            raise self._error

    def upload_folder(self, **given: Any) -> Any:
        self.asked.append(("upload", given))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_the_whole_folder_goes_to_the_hub(out: Path) -> None:
    hub = FakeHub()
    assert push_to_hub(out, "team/adapters", api=hub) == "https://hub/commit/1"
    (name, made), (_, sent) = hub.asked
    assert (name, made) == ("team/adapters", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("team/adapters", str(out))


def test_a_hub_that_refuses_and_a_folder_that_is_no_export_are_named(
    out: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"cannot push .* to team/a: no login"):
        push_to_hub(out, "team/a", api=FakeHub(OSError("no login")))
    hub = FakeHub()
    with pytest.raises(ExportError, match="no export folder"):
        push_to_hub(tmp_path, "team/a", api=hub)
    assert hub.asked == []


GRAPH = """
from langchain_core.language_models import FakeListChatModel
import tests.apps
from tests.rollout.test_own_models import Teacher

class Own(Teacher):
    def _generate(self, messages, *args, **kwargs):
        result = super()._generate(messages, *args, **kwargs)
        result.generations[0].message.content = "own"
        return result

tests.apps.model = Own()
graph = tests.apps.duo()
"""
TASK = """
def load_data(dataset="d"):
    rows = [{"question": c} for c in "abcdefghijkl"]
    return rows, rows

def reward(example, state):
    # The adapter's answers are better than the app's own only where the actor is concerned.
    return float(state["answer"] != "own")
"""


def test_only_adapters_that_improve_the_team_are_exported(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.apps

    monkeypatch.setattr(tests.apps, "model", tests.apps.model)  # put back what graph.py changes
    files = {"graph.py": GRAPH, "task.py": TASK, "config.yaml": f"base_model: {tiny_model}\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = ["export", str(run), str(tmp_path / "out"), "--only-improved", str(tmp_path)]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "planner: left out: with it no difference shown (+0.000" in shown.stdout
    assert "actor: kept: with it better (+1.000" in shown.stdout
    manifest = read_manifest(tmp_path / "out")
    assert dict(manifest.nodes) == {"actor": "actor"}
    assert manifest.metrics["gain_of_each_adapter"]["actor"]["verdict"] == "better"
