"""The report: says whether it got better, offline, and never lets a model's text be HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypedDict
from xml.etree import ElementTree

import pytest
from langchain_core.language_models import FakeListChatModel
from langgraph.graph import END, START, StateGraph

from marft_graph.episode import Call, Episode
from marft_graph.errors import CheckpointError
from marft_graph.graph.compile import compile_graph
from marft_graph.run.curves import Curve, line_chart, plot_learning_curves
from marft_graph.run.folder import read_graph
from marft_graph.run.overlay import overlays
from marft_graph.run.report import write_report
from marft_graph.run.tracking import MetricsLog
from marft_graph.run.trajectories import write_traces

HOSTILE = '</pre><script src="https://evil.example/x.js">alert(1)</script>\0\ud800'


class State(TypedDict):
    question: str
    answer: str


model = FakeListChatModel(responses=["never asked"])


def writer(state: State) -> dict[str, Any]:
    return {"answer": model.invoke(state["question"]).text}


def episode(index: int, outcome: float, text: str = "seven") -> Episode:
    call = Call(
        agent="writer",
        node="writer",
        index=0,
        parents=(),
        prompt_ids=(1,),
        completion_ids=(2,),
        logprobs=(-0.5,),
        finish_reason="stop",
        adapter_version=0,
        messages=({"role": "assistant", "content": text},),
    )
    return Episode({"question": text}, (call,), outcome_reward=outcome, example_index=index)


def training_row(iteration: int, mean: float) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "episodes": 64,
        "episodes_failed": 1,
        "failed_by_reason": {"<b>timeout</b>": 1},
        "return_mean": mean,
        "seconds_rollout": 2.0,
        "seconds_update": 1.0,
        "tokens_sampled": 500,
        "agents": {"writer": {"kl": 0.01, "entropy": None, "loss_policy": -0.1}},
    }


def run_folder(path: Path) -> Path:
    builder = StateGraph(State)
    builder.add_node("writer", writer)
    builder.add_edge(START, "writer")
    builder.add_edge("writer", END)
    path.mkdir()
    graph = compile_graph(builder.compile()).to_dict()
    (path / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    log = MetricsLog(path)
    log.write_evaluation({"iteration": 0, "eval_return": 0.25, "eval_return_greedy": 0.125})
    log.write(training_row(1, 0.3))
    log.write(training_row(2, 0.8))
    log.write_evaluation({"iteration": 2, "eval_return": 0.875, "eval_return_greedy": 0.9375})
    before = [episode(i, 0.0) for i in range(8)]
    after = [episode(i, 1.0, HOSTILE) for i in range(8)]
    write_traces(path / "traces" / "eval_before.parquet", before, 0, "eval")
    write_traces(path / "traces" / "eval_after.parquet", after, 2, "eval")
    return path


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_says_before_and_after(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path / "run"))
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "report.html"
    assert "0.250 → <b>0.875</b> sampled" in page
    assert "0.125 → <b>0.938</b> greedy" in page
    # Every example went from 0 to 1, so there is nothing to be uncertain about.
    assert "8 held-out examples; difference +1.000, 95 % interval +1.000 to +1.000" in page
    assert "<b>better</b>" in page
    assert "<td>128</td>" in page  # episodes
    assert "4.0 s, 250 tokens/s" in page
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "evaluations.jsonl",
        "graph.json",
        "metrics.jsonl",
        "report.html",
        "traces",
    ]


def test_the_report_says_in_words_whether_it_got_better(tmp_path: Path) -> None:
    def said(*outcomes: float) -> str:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        after = [episode(i, outcome) for i, outcome in enumerate(outcomes)]
        write_traces(run_folder(folder) / "traces" / "eval_after.parquet", after, 2, "eval")
        return write_report(folder).read_text(encoding="utf-8")

    better = said(*[1.0] * 7, 0.0)
    assert "Training made the app better." in better
    assert "7 examples earned more than before, 0 less, 1 the same" in better
    assert "Training made the app worse." in said(*[-1.0] * 8)
    unclear = said(1.0, -1.0, *[0.0] * 6)
    assert "No difference shown: the change may be chance." in unclear
    assert "(eval_examples) would make the interval half as wide" in unclear


def agent_row(iteration: int, **agents: dict[str, float]) -> dict[str, Any]:
    return training_row(iteration, 0.5) | {"agents": agents, "episodes_failed": 0}


def test_agents_are_compared_line_by_line(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    log = MetricsLog(folder)
    for iteration in range(1, 11):
        late = iteration > 5
        writer = {"calls": 128.0, "tokens_mean": 10.0 if late else 30.0, "advantage_abs_mean": 0.3}
        judge = {"calls": 64.0, "tokens_mean": 5.0, "advantage_abs_mean": 0.2}
        writer |= {"kl": 0.25, "return_mean": 0.9 if late else 0.2, "entropy": 0.5}
        log.write(agent_row(iteration, writer=writer, judge=judge | {"kl": 0.0001}))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "writer moved furthest from the base, 0.250 nats per token; judge least, 0.000" in page
    lines = re.findall(r"<tr>(<td>(?:writer|judge)</td>.*?)</tr>", page)
    cells = [re.findall("<td>(.*?)</td>", line) for line in lines]
    # Tokens: 128 x 10 or 30 = 25600 in all, and 64 x 5 x 10 = 3200. Credit: 38.4 and 12.8 a time.
    assert cells == [
        [
            "writer",
            "2.00",
            "30.0 → 10.0",
            "89%",
            "0.250",
            "0.50",
            "75%",
            "",
            "0.20 → 0.90",
            "changed, its calls earn more, writes less",
        ],
        ["judge", "1.00", "5.0", "11%", "0.000", "", "25%", "", "", "hardly changed"],
    ]
    assert "20 tokens · KL 0.25" in page  # in the writer's box: two calls of ten
    assert 'aria-label="Tokens sampled in an iteration"' in page


def test_examples_that_changed_most_stand_node_by_node(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    outcomes = {0: 0.0, 1: 0.5, 2: -1.0, 3: 1.0}
    after = [episode(i, outcome, f"says-{i}") for i, outcome in outcomes.items()]
    failed = Episode({"question": "says-9"}, (), status="failed: timeout", example_index=4)
    write_traces(folder / "traces" / "eval_after.parquet", [*after, failed], 2, "eval")
    page = write_report(folder).read_text(encoding="utf-8")
    _, better, worse = re.split("<h3>Better</h3>|<h3>Worse</h3>", page)
    assert better.index("says-3") < better.index("says-1")
    assert "says-2" in worse
    assert "says-0" not in page  # unchanged, and there are others to show
    assert "says-9" not in page  # failed: nothing to compare
    assert "return 0.00 → <b>-1.00</b>" in worse
    assert re.search(r"<h4>writer</h4>.*before, 1 tokens.*seven.*after, 1 tokens.*says-3", better)


def test_a_failure_is_shown_with_its_first_error_and_when(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    reason = "<b>timeout</b>"
    for iteration in (1, 2):
        failed = Episode({}, (), status=f"failed: {reason}", error=f"late <i>{iteration}</i>")
        path = folder / "traces" / f"iter_{iteration:06d}.parquet"
        write_traces(path, [episode(0, 1.0), failed], iteration, "train")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "iteration 1: late &lt;i&gt;1&lt;/i&gt;" in page
    assert "late &lt;i&gt;2" not in page
    assert 'aria-label="Failed training episodes"' in page


def test_warnings_stand_at_the_top_in_words(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for iteration in (3, 4, 5):
        stats = {"truncated_share": 0.5}
        MetricsLog(folder).write(agent_row(iteration, writer=stats, judge=stats))
    page = write_report(folder).read_text(encoding="utf-8").replace("&#x27;", "'")
    assert page.index("Health: worth a look") < page.index("Dependency graph")
    both = "50% of writer's answers were cut off at the token limit. 50% of judge's"
    assert both in page
    assert page.count("A higher max_new_tokens") == 1  # once for both


def test_the_names_of_curves_never_stand_on_one_another() -> None:
    curves = [Curve("a long name of a reason " * 4, [(0, 1), (1, 2)]) for _ in range(5)]
    svg = ElementTree.fromstring(line_chart("x", curves))
    names = [text for text in svg.iter() if "a long name" in (text.text or "")]
    places = {(text.attrib["x"], text.attrib["y"]) for text in names}
    assert len(places) == 5
    assert all(len(text.text or "") <= 48 for text in names)
    assert max(float(y) for _, y in places) < float(svg.attrib["viewBox"].split()[3])


def test_the_report_needs_no_network_and_runs_no_script_but_its_own(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path / "run")).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not {"iframe", "object", "embed", "img"} & {tag for tag, _ in tags.found}
    scripts = [attributes for tag, attributes in tags.found if tag == "script"]
    assert scripts == [{"type": "application/json"}, {}]  # the graph's data, and its page.js
    for _, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "").partition(",")[0] in ("", "data:")
    assert not re.search(r"url\((?!#)|@import", page)


def test_text_of_a_model_is_escaped_and_made_visible(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path / "run")).read_text(encoding="utf-8")
    assert "&lt;script src=" in page
    assert "alert(1)&lt;/script&gt;\\x00\\ud800" in page
    assert "&lt;b&gt;timeout&lt;/b&gt;" in page
    assert "<b>timeout" not in page


def test_every_chart_is_well_formed(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path / "run")).read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 4  # the graph, the return, KL, policy loss
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_every_trouble_of_a_run_is_shown_with_its_count(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    log = MetricsLog(folder)
    trouble = {
        "failed_by_reason": {"EngineError in writer": 7},
        "faults_rewarded": 3,
        "threads_hung": 2,
        "out_of_memory": 2,
        "microbatch_tokens": 1024,
        "collapsed": "writer: the policy loss is nan",
        "engine": {"servers": 2, "servers_up": 1, "servers_lost": 5, "calls_retried": 9},
    }
    log.write(training_row(3, 0.1) | trouble)
    log.write(training_row(4, 0.1) | {"threads_hung": 1, "out_of_memory": 0})
    log.write_evaluation(
        {"iteration": 4, "eval_return": 0.5, "eval_failed_by_reason": {"timeout & co": 11}}
    )
    page = write_report(folder, "no disk <left>").read_text(encoding="utf-8")
    assert "The run was stopped:</b> no disk &lt;left&gt;" in page
    assert "10 training episodes failed" in page  # seven here, one in each other row
    assert "<td>EngineError in writer</td><td>7</td>" in page
    assert "11 held-out episodes failed" in page
    assert "<td>timeout &amp; co</td><td>11</td>" in page
    assert "<td>3</td><td>writer: the policy loss is nan</td>" in page
    assert "3 training episodes ended with an error that is the policy's own" in page.replace(
        "&#x27;", "'"
    )
    assert "At most 2 threads at once were left behind" in page
    assert "ran out of memory 2 times and were done again, with micro-batches of 1024" in page
    assert "vLLM servers: 5 times a server was lost, 9 calls that were tried again." in page


def test_a_run_without_troubles_says_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    MetricsLog(folder).write(training_row(1, 0.3) | {"failed_by_reason": {}, "out_of_memory": 0})
    page = write_report(folder).read_text(encoding="utf-8")
    assert "No training episode failed" in page
    assert "No held-out episode failed" in page
    assert not re.search("Collapses|stopped|out of memory|left behind|vLLM servers", page)


def test_an_unfinished_run_has_a_report(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        (folder / log).unlink()
    for trace in (folder / "traces").iterdir():
        trace.unlink()
    assert "0 iterations" in write_report(folder).read_text(encoding="utf-8")
    MetricsLog(folder).write(training_row(1, 0.3))
    assert "1 iterations; no two evaluations" in write_report(folder).read_text(encoding="utf-8")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run folder: cannot read graph\.json"):
        write_report(tmp_path)


def test_a_chart_goes_through_its_points() -> None:
    svg = ElementTree.fromstring(line_chart("<T>", [Curve("a&b", [(0, 0), (5, 1), (10, 2)])]))
    line = svg.find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    (x0, y0), (x1, y1), (x2, y2) = (
        tuple(map(float, point.split(","))) for point in line.attrib["points"].split()
    )
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y2 < y1 < y0  # higher values stand higher
    assert svg.attrib["aria-label"] == "<T>"


def test_a_chart_without_points_is_left_out_and_one_point_is_a_dot() -> None:
    assert line_chart("x", [Curve("a", [])]) == ""
    assert "<circle" in line_chart("x", [Curve("a", [(3, 0.0)])])


def test_seeds_are_drawn_into_one_picture(tmp_path: Path) -> None:
    folders = []
    for seed in range(2):
        log = MetricsLog(tmp_path / f"seed-{seed}")
        for iteration in (1, 2, 3):
            log.write(training_row(iteration, 0.2 * iteration + 0.1 * seed))
        folders.append(tmp_path / f"seed-{seed}")
    picture = plot_learning_curves(folders, tmp_path / "curve.png", title="two seeds")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_calls_per_episode_on_the_graph_are_those_of_the_episodes_that_were_learnt_from(
    tmp_path: Path,
) -> None:
    """Of 64 episodes 48 are left out as their examples' returns are equal; 32 calls in 16."""
    folder = run_folder(tmp_path / "run")
    stats = {"calls": 32.0, "tokens_mean": 5.0}
    left_out = {"episodes_failed": 4, "episodes_filtered": 48, "failed_by_node": {"writer": 4}}
    row = training_row(9, 0.3) | left_out | {"agents": {"writer": stats}}
    MetricsLog(folder).truncate(0)
    MetricsLog(folder).write(row)
    facts = dict(overlays(read_graph(folder), folder)["writer"].facts)
    assert facts["calls per episode"] == "2.00"
    assert facts["episodes that failed here, of the whole run"] == "6.2%"
