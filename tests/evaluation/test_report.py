"""The report of a run: every text escaped, changes paired, nothing rounded to all, and any stage may be missing."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support import commands, parse

from sbtiny import runs
from sbtiny.budget.calibration import CalibrationAnswer, calibrate
from sbtiny.budget.calibration_record import to_record
from sbtiny.budget.metrics import Sample
from sbtiny.config import EvalSettings, Settings
from sbtiny.errors import InputError
from sbtiny.evaluation import evaluate, report
from sbtiny.evaluation.report import percent, percentage_points
from sbtiny.evaluation.write_report import write_report

EVIL = "<script>alert('1')</script> & \"[red]\" $\\frac$ `</code>`"
VOID = {"meta", "br", "path", "use", "rect", "image", "circle", "line", "defs"}


def sample(i: int, length: int, correct: bool = True, budget: int | None = None) -> Sample:
    return Sample(correct, True, budget, length, i % 4 + 1)


BASE = [sample(i, 100 + i, correct=i != 0) for i in range(24)]
SFT = [sample(i, 60 + i, budget=50 + i) for i in range(24)]
GRPO = [sample(i, 30 + i, correct=i not in (1, 2, 3), budget=30 + i) for i in range(24)]


def put_evaluation(folder: Path, samples: Sequence[Sample], text: str = "so <b>", task: str = "arithmetic") -> dict[str, Any]:
    """An evaluation as `sbtiny eval` leaves it: eval.json and eval_samples.jsonl."""
    found = evaluate.eval_record(samples, "tiny", EvalSettings(task=task), 0)
    rows = [{"id": f"q{i}", "question": text, "text": text, "stop_reason": "end"} | asdict(s) for i, s in enumerate(samples)]
    runs.write_json(folder / "eval.json", found)
    runs.write_jsonl(folder / "eval_samples.jsonl", rows)
    return found


def put_run(folder: Path, kind: str = "grpo", model: str = "tiny", **about: Any) -> Path:
    """A run folder without weights."""
    runs.create_run(kind, folder, Settings(model=model), **about)
    return folder


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A run with everything in it: base, cold start, GRPO, a sweep and metrics."""
    folder = put_run(tmp_path / "demo")
    put_evaluation(folder / "base", BASE)
    put_evaluation(put_run(folder / "sft", "sft"), SFT)
    found = put_evaluation(folder, GRPO)
    runs.write_json(folder / "sweep.json", [found | {"budget": scale} for scale in ("0.5x", "1x", "2x", "4x")])
    for step in range(1, 6):
        row = {"step": step, "reward": 0.1 * step, "accuracy": 0.9, "budget": 40, "tokens": 38, "alpha": 1.0, "malformed": 0.0}
        runs.append_jsonl(folder / "metrics.jsonl", {"stage": "grpo"} | row)
    return folder


class Page(HTMLParser):
    """The names of a page's elements, its text, and those left open."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text, self.open = "", []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.names.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_whole_report_has_every_figure_and_its_readme_names_commands_that_exist(demo: Path) -> None:
    result = write_report(demo, {"sft": 61.2, "grpo": 30.0})
    assert {file.stem for file in (demo / "plots").iterdir()} == {"accuracy_tokens", "predicted_used", "tokens_by_level", "training"}
    told = Page(demo / "report.html")
    assert "svg" in told.names
    assert "sft 1 min 01 s, grpo 30 s" in told.text
    assert json.loads((demo / "report.json").read_text()) | {"page": result["page"]} == result
    found = commands((demo / "README.md").read_text())
    assert len(found) == 2
    for line, _ in found:
        parse(line)
    assert write_report(demo)["seconds"] == {"sft": 61.2, "grpo": 30.0}  # drawn again, they stay


def test_the_change_of_accuracy_is_paired_by_question(demo: Path) -> None:
    result = write_report(demo)
    assert result["accuracy_change"] == pytest.approx(-2 / 24)  # one more right, three fewer
    lo, hi = result["accuracy_change_ci95"]
    assert lo < -2 / 24 < hi
    assert result["compression"] == pytest.approx(1 - 41.5 / 111.5)
    assert "24 questions answered by both" in Page(demo / "report.html").text
    rows = (demo / "eval_samples.jsonl").read_text().splitlines()[1:4]  # the three that GRPO lost
    runs.write_text(demo / "eval_samples.jsonl", "\n".join(rows) + "\n")
    assert write_report(demo)["accuracy_change"] == pytest.approx(-1)
    (demo / "eval_samples.jsonl").unlink()
    result = write_report(demo)
    assert (result["accuracy_change"], result["accuracy_change_ci95"]) == (pytest.approx(-2 / 24), None)


def test_other_tasks_are_not_compared(demo: Path) -> None:
    put_evaluation(demo / "base", BASE, task="other.jsonl")
    result = write_report(demo)
    assert [result[key] for key in ("compression", "accuracy_change", "accuracy_change_ci95")] == [None] * 3
    assert "evaluated on other.jsonl (test), this run on arithmetic" in Page(demo / "report.html").text


def test_a_sweep_of_an_earlier_evaluation_is_left_out(demo: Path) -> None:
    assert len(write_report(demo)["sweep"]) == 4
    found = runs.read_json(demo / "eval.json")
    runs.write_json(demo / "eval.json", found | {"temperature": 0.0})
    assert write_report(demo)["sweep"] is None
    for changed in ({"max_tokens": 7}, {"split": "val"}, {"upstream": "http://there"}):
        runs.write_json(demo / "eval.json", found | changed)
        assert write_report(demo)["sweep"] is None
    put_evaluation(demo, GRPO, task="other.jsonl")
    assert write_report(demo)["sweep"] is None


def test_tokens_are_compared_on_the_questions_that_both_answered(demo: Path) -> None:
    put_evaluation(demo, GRPO[:8])
    result = write_report(demo)
    assert result["compression"] == pytest.approx(1 - sum(s.length for s in GRPO[:8]) / sum(s.length for s in BASE[:8]))
    runs.write_json(demo / "base" / "eval.json", runs.read_json(demo / "base" / "eval.json") | {"split": "val"})
    assert write_report(demo)["compression"] is None
    assert "on arithmetic (val), this run on arithmetic" in " ".join(Page(demo / "report.html").text.split())


def test_the_check_of_an_export_stands_in_the_report(demo: Path) -> None:
    assert write_report(demo)["export"] is None
    runs.write_json(demo / "export" / "export.json", {"passed": True})
    assert write_report(demo)["export"] == {"passed": True}


def test_coverage_is_of_the_calibration_that_it_names(demo: Path) -> None:
    about = {"model_fingerprint": "x", "format": "solution", "task": "arithmetic", "split": "val", "temperature": 0.6, "top_p": 0.95}
    found = calibrate([CalibrationAnswer(10, n) for n in range(6, 16)] * 20, **about, date="2026-01-01 10:00:00")
    runs.write_json(demo / "calibration.json", to_record(found))
    answers = [CalibrationAnswer(s.budget, s.length) for s in GRPO]
    evaluation = runs.read_json(demo / "eval.json") | {"coverage": found.kept_coverage(answers)}
    for date, is_shown in (("2026-01-01 10:00:00", True), ("2026-01-02 10:00:00", False)):
        runs.write_json(demo / "eval.json", evaluation | {"calibration": {"date": date}})
        assert (write_report(demo)["calibration"] is not None) == is_shown
        assert (demo / "plots" / "calibration.png").exists() == is_shown


def test_every_text_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put_run(tmp_path / "a <script> & run", model=EVIL)
    put_evaluation(folder / "base", [Sample(True, True, None, 9, EVIL), Sample(True, True, None, 8, 1)] * 4, EVIL, EVIL)
    found = put_evaluation(folder, [Sample(True, True, 7, 9, EVIL), Sample(True, True, 6, 8, 1)] * 4, EVIL, EVIL)
    runs.write_json(folder / "sweep.json", [found | {"budget": EVIL}])
    runs.write_text(folder / "config.yaml", json.dumps({"model": EVIL, "seed": EVIL, "eval": {"task": EVIL}}))
    report.print_report_table(write_report(folder, {EVIL: 1.0}))
    told = Page(folder / "report.html")
    assert "script" not in told.names
    assert told.text.count(EVIL) >= 10
    assert EVIL in re.sub(r"\s+", " ", capsys.readouterr().out)
    svgs = re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)
    assert any("&lt;script&gt;" in svg for svg in svgs)


def test_commands_of_a_folder_with_a_space_can_be_copied(tmp_path: Path) -> None:
    folder = put_run(tmp_path / "my run")
    with pytest.raises(InputError, match="first") as caught:
        write_report(folder)
    parse(re.search(r"`sbtiny (.+)`", str(caught.value))[1])
    put_evaluation(folder, GRPO)
    write_report(folder)
    texts = [line for line, _ in commands((folder / "README.md").read_text())]
    texts += re.findall(r"sbtiny (eval .+?)(?:\.$| adds it)", Page(folder / "report.html").text, re.MULTILINE)
    assert len(texts) == 5
    for line in texts:
        parse(line)


@pytest.mark.parametrize(
    ("present", "said", "plots"),
    [
        (("grpo",), ["The base model was not evaluated", "The cold start was not evaluated"], {"predicted_used"}),
        (("grpo", "base"), ["The cold start was not evaluated"], {"accuracy_tokens", "predicted_used"}),
        (("grpo", "sft"), ["The base model was not evaluated"], {"accuracy_tokens", "predicted_used"}),
    ],
)
def test_what_was_not_evaluated_is_said(present: tuple[str, ...], said: list[str], plots: set[str], tmp_path: Path) -> None:
    start = put_run(tmp_path / "start", "sft")
    folder = put_run(tmp_path / "grpo", parent=str(start))
    for stage, (place, samples) in {"grpo": (folder, GRPO), "base": (folder / "base", BASE), "sft": (start, SFT)}.items():
        if stage in present:
            put_evaluation(place, samples)
    result = write_report(folder)
    assert {stage for stage in report.STAGES if result[stage]} == set(present)
    told = Page(folder / "report.html").text
    assert [line for line in ("The base model was not", "The cold start was not") if line in told] == [line[:22] for line in said]
    assert {file.stem for file in (folder / "plots").iterdir()} == plots | {"tokens_by_level"}


def test_a_cold_start_alone_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put_run(tmp_path / "sft", "sft")
    put_evaluation(folder, SFT)
    result = write_report(folder)
    assert result["sft"]["mean_budget"] == 61.5
    assert (result["base"], result["grpo"], result["compression"]) == (None, None, None)
    assert "This run is a cold start; GRPO has not followed it." in Page(folder / "report.html").text
    report.print_report_table(result)
    assert "compression: unknown" in capsys.readouterr().out
    assert "| cold start | 100.0 " in (folder / "README.md").read_text()


def test_a_readme_of_somebodys_own_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put_run(tmp_path / "sft", "sft")
    put_evaluation(folder, SFT)
    write_report(folder)
    put_evaluation(folder, BASE)
    write_report(folder)  # over its own
    assert "| cold start | 100.0 " not in (folder / "README.md").read_text()
    assert capsys.readouterr().err == ""
    (folder / "README.md").write_text("---\ntags:\n- generated_from_trainer\n---\n# Model Card for None\n")  # TRL's, of earlier versions
    write_report(folder)
    assert "| cold start" in (folder / "README.md").read_text()
    (folder / "README.md").write_bytes("# Modell für mich\n".encode("latin-1"))
    write_report(folder)
    assert (folder / "README.md").read_bytes() == "# Modell für mich\n".encode("latin-1")
    assert f"kept {folder / 'README.md'}" in capsys.readouterr().err


def test_an_answer_without_a_budget_or_a_level_is_drawn(tmp_path: Path) -> None:
    """A plain model's evaluation: no budget, no level, and a length of 0."""
    folder = put_run(tmp_path / "plain")
    put_evaluation(folder, [Sample(False, False, None, 0), Sample(False, False, None, 0)])
    write_report(folder)
    told = Page(folder / "report.html").text
    assert "No answer of this run stated a budget." in told
    assert "The questions of this task have no levels." in told
    assert "The run has no metrics.jsonl of GRPO steps." in told


@pytest.mark.parametrize(
    ("rate", "digits", "text"),
    [
        (1.0, 1, "100.0"),
        (0.9996, 1, "99.96"),
        (0.998, 0, "99.8"),
        (0.99999, 0, "99.999"),
        (0.994, 0, "99"),
        (0.5, 1, "50.0"),
        (0.0, 0, "0"),
        (None, 1, "–"),
    ],
)
def test_what_is_not_all_is_not_rounded_to_100(rate: float | None, digits: int, text: str) -> None:
    assert percent(rate, digits) == text


@pytest.mark.parametrize(("change", "text"), [(-0.0006, "−0.1"), (-0.0004, "0.0"), (0.012, "+1.2")])
def test_a_difference_is_signed_in_points(change: float, text: str) -> None:
    assert percentage_points(change) == text
