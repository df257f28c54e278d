"""`sbtiny calibrate` and what uses its file: on a real run, and refusals in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import put_evaluation, put_run

from sbtiny import locks, runs
from sbtiny.budget.calibration import CalibrationAnswer, calibrate
from sbtiny.budget.calibration_record import from_record, to_record
from sbtiny.budget.metrics import Sample
from sbtiny.cli.main import run as call
from sbtiny.config import EvalSettings, Settings
from sbtiny.errors import InputError
from sbtiny.evaluation import calibrate as module
from sbtiny.evaluation import calibration_file, trained_questions
from sbtiny.evaluation.calibration_file import calibration_path, load_calibration, measure_coverage
from sbtiny.evaluation.calibration_plots import draw_calibration
from sbtiny.evaluation.plots import COLOURS, to_png, to_svg
from sbtiny.evaluation.trained_questions import without_known_questions
from sbtiny.evaluation.write_report import write_report
from sbtiny.rollout.load_policy import load_policy
from sbtiny.tasks import arithmetic, leaks
from sbtiny.tasks.sources import Question

LIMIT, TOKENS = 40, 60


@pytest.fixture(scope="module")
def calibrated(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cold start, calibrated; tests must not write into it."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(started, folder)
    assert call(["calibrate", str(folder), "--limit", str(LIMIT), "--set", f"eval.max_tokens={TOKENS}", "--json"], False) == 0
    return folder


@pytest.fixture
def mine(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "run"))


def error_of(line: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert call(line, False) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ")
    assert "\n" not in err
    return err


def test_the_file_holds_the_ratios_and_what_follows_from_them(calibrated: Path) -> None:
    record = runs.read_json(calibrated / "calibration.json")
    found = from_record(record, "c")
    assert (found.task, found.split, found.format, found.temperature, found.top_p) == ("arithmetic", "val", "solution", 0.6, 0.95)
    assert found.questions == LIMIT == len(found.ratios) + found.cut + found.malformed
    assert record["factors"] == found.scores.factors()
    assert record["factors"]["0.95"] is None  # 40 answers
    assert not list(calibrated.glob(".*.tmp"))
    assert not (calibrated / runs.LOCK).exists()


def test_a_try_on_few_questions_does_not_cost_a_larger_calibration(mine: Path, capsys: pytest.CaptureFixture) -> None:
    larger = (mine / "calibration.json").read_text()

    def calibrate_on(questions: int) -> list[str]:
        assert call(["calibrate", str(mine), "--limit", str(questions), "--set", f"eval.max_tokens={TOKENS}", "--json"], False) == 0
        assert runs.read_json(mine / "calibration.json")["questions"] == questions
        return [file.read_text() for file in mine.glob("calibration-before-*.json")]

    assert calibrate_on(5) == [larger]
    assert f"of {LIMIT} questions and not 5, is kept as" in " ".join(capsys.readouterr().err.split())
    assert calibrate_on(6) == [larger]
    for broken in ("{", "[" * 200_000):
        (mine / "calibration.json").write_text(broken)
        assert calibrate_on(5) == [larger]


def test_eval_reports_promised_and_kept(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = ["eval", str(calibrated), "--limit", "30", "--set", f"eval.max_tokens={TOKENS}", "-o", str(tmp_path / "e")]
    assert call([*line, "--json"], False) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == runs.read_json(tmp_path / "e" / "eval.json")
    assert result["coverage"].keys() == {"0.8", "0.9", "0.95"}
    rows = [json.loads(row) for row in (tmp_path / "e" / "eval_samples.jsonl").read_text().splitlines()]
    record = runs.read_json(calibrated / "calibration.json")
    found = from_record(record, "c")
    named = ("model_fingerprint", "date", "task", "split", "questions", "confidence")
    assert result["calibration"] == {key: record[key] for key in named}
    for key, row in result["coverage"].items():
        if found.scores.factor(float(key)) is None:
            assert row["promised"] is row["kept"] is None
        else:
            kept = [r["ok"] and r["length"] <= found.promise(r["budget"], float(key)) for r in rows]
            assert (row["promised"], row["kept"]) == (float(key), sum(kept) / 30)
    assert call(line, False) == 0
    assert "mean promise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--set", "eval.temperature=1.0"], "at another temperature (temperature 0.6, here 1.0)"),
        (["--set", "eval.top_p=1"], "at another top_p (top_p 0.95, here 1.0)"),
        (["--set", "eval.split=val"], "the calibration is on arithmetic, split val, as this evaluation"),
        (["--task", "FILE"], "for another task (task arithmetic, here "),
    ],
)
def test_what_does_not_fit_is_named_and_not_used(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], reason: str
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "3 + 4?", "answer": "7"}\n')
    more = [str(file) if word == "FILE" else word for word in more]
    line = ["eval", str(calibrated), "--limit", "2", "--set", "eval.max_tokens=20", "-o", str(tmp_path / "e"), "--json", *more]
    assert call(line, False) == 0
    out, err = capsys.readouterr()
    assert "coverage" not in json.loads(out)
    assert "no coverage: " in err
    assert reason in " ".join(err.split())


def test_a_calibrated_run_answers_at_another_temperature_without_promises(calibrated: Path, capsys: pytest.CaptureFixture) -> None:
    line = ["chat", str(calibrated), "1 + 1?", "--temperature", "0", "--set", "serve.max_tokens=60", "--json"]
    assert call(line, False) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["promise"] is None
    assert "no promises: the calibration is at temperature 0.6, top_p 0.95" in err
    assert call([*line, "--budget", "90%"], False) == 2


def test_one_file_calibrates_another_and_not_itself(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = []
    for name, seed in (("one", 7), ("two", 8)):
        asked = arithmetic.generate_questions("val", 12, seed=seed)
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"question": q.question, "answer": q.answer}) + "\n" for q in asked))
    tokens = ["--set", f"eval.max_tokens={TOKENS}", "--json"]
    assert call(["calibrate", str(mine), "--task", str(files[0]), *tokens], False) == 0
    for file, covered in zip(files, (False, True), strict=True):
        capsys.readouterr()
        assert call(["eval", str(mine), "--task", str(file), "-o", str(tmp_path / "e"), *tokens], False) == 0
        out, err = capsys.readouterr()
        assert ("coverage" in json.loads(out)) is covered
        assert (f"the calibration is on {file}, as this evaluation" in " ".join(err.split())) is not covered


@pytest.mark.parametrize("more", [["--budget", "30"], ["--set", "eval.ceiling=10"]])
def test_given_budgets_and_cuts_have_no_coverage(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str]) -> None:
    line = ["eval", str(calibrated), "--limit", "2", "--set", "eval.max_tokens=50", "-o", str(tmp_path / "e"), "--json", *more]
    assert call(line, False) == 0
    assert not {"coverage", "calibration"} & json.loads(capsys.readouterr().out).keys()


def test_another_model_is_refused_by_its_fingerprint(mine: Path) -> None:
    policy = load_policy(str(mine), Settings(), 2)
    sampling = {"temperature": 0.6, "top_p": 0.95}
    own = load_calibration(policy, str(mine), **sampling, task="arithmetic")
    assert own.questions == LIMIT
    assert load_calibration(policy, str(mine), **sampling) == own  # free questions
    assert load_calibration(policy, "tiny", **sampling) is None
    record = runs.read_json(mine / "calibration.json")
    for changed, reason in (
        ({"model_fingerprint": "0" * 16}, f"of another model (model_fingerprint {'0' * 16}, here {own.model_fingerprint})"),
        ({"format": "think"}, "of another format (format think, here solution)"),
    ):
        runs.write_json(mine / "calibration.json", record | changed)
        with pytest.raises(runs.InputError) as error:
            load_calibration(policy, str(mine), **sampling)
        assert str(error.value).startswith(f"{mine / 'calibration.json'}: the calibration is {reason}")
    (mine / "calibration.json").write_text('{"ratios": [1.0')
    with pytest.raises(runs.InputError, match="is not valid JSON"):
        load_calibration(policy, str(mine), **sampling)
    (mine / "calibration.json").write_text('{"ratios": [1.0]}')
    with pytest.raises(runs.InputError, match="is broken: it has no model_fingerprint: run sbtiny calibrate again"):
        load_calibration(policy, str(mine), **sampling)


def test_another_prompt_is_refused(mine: Path) -> None:
    record, about = runs.read_json(mine / "calibration.json"), runs.read_run(mine)
    assert record["prompt"] == {"instruction": None, "system": None}
    runs.write_json(mine / "run.json", about | {"prompt": {"instruction": "Think.", "system": None}})
    policy = load_policy(str(mine), Settings(), 2)
    with pytest.raises(runs.InputError, match=r"for another prompt \(prompt .*None.*, here .*'Think.'.*\): run sbtiny calibrate again"):
        load_calibration(policy, str(mine))
    del record["prompt"]
    runs.write_json(mine / "calibration.json", record)  # as older ones are, which do not say
    assert load_calibration(policy, str(mine)).questions == LIMIT


def test_refusals_are_one_line(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = str(calibrated)
    before = (calibrated / "calibration.json").read_bytes()
    assert "--split test is for eval" in error_of(["calibrate", name, "--split", "test"], capsys)
    assert "--split train of arithmetic is for training" in error_of(["calibrate", name, "--split", "train"], capsys)
    assert "choose from test, val, train" in error_of(["calibrate", name, "--split", "dev"], capsys)
    assert "--confidence 95.0 is no share between 0 and 1" in error_of(["calibrate", name, "--confidence", "95"], capsys)
    assert "unknown model 'nosuch'" in error_of(["calibrate", "nosuch"], capsys)
    assert "no file none.jsonl" in error_of(["calibrate", name, "--task", "none.jsonl"], capsys)
    assert "cannot write /proc/sbtiny" in error_of(["calibrate", name, "-o", "/proc/sbtiny"], capsys)
    asked = arithmetic.generate_questions("train", 400, seed=5)
    trained = tmp_path / "trained.jsonl"
    trained.write_text("".join(json.dumps({"question": q.question, "answer": q.answer}) + "\n" for q in asked if q.level <= 2))
    assert "every question is in the training of" in error_of(["calibrate", name, "--task", f"{trained}", "--limit", "64"], capsys)
    tested = tmp_path / "tested.jsonl"
    test_rows = arithmetic.generate_questions("test", 5)
    tested.write_text("".join(json.dumps({"question": q.question, "answer": q.answer}) + "\n" for q in test_rows))
    assert "every question is an evaluation question of arithmetic" in error_of(["calibrate", name, "--task", f"{tested}"], capsys)
    assert (calibrated / "calibration.json").read_bytes() == before


def test_two_at_once_are_refused(mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(locks, "HELD_LOCKS", set())
    with locks.hold(mine / runs.LOCK, mine):
        locks.HELD_LOCKS.clear()  # as another process sees it
        assert str(mine) in error_of(["calibrate", str(mine), "--limit", "2"], capsys)


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("tiny", ["--limit", "4"], "no promise: no answer states a budget"),
        ("run", ["--limit", "3"], "no finite promise at 80%, 90%, 95%: 3 answers are too few; raise --limit"),
        ("run", ["--limit", "12", "--set", "eval.max_tokens=2"], "12 answers, 0 malformed, 12 cut"),
    ],
)
def test_where_nothing_can_be_promised_it_is_said(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture, model: str, more: list[str], said: str
) -> None:
    name = str(calibrated) if model == "run" else model
    capsys.readouterr()
    assert call(["calibrate", name, "-o", str(tmp_path), "--set", "eval.max_tokens=40", *more], False) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    record = runs.read_json(tmp_path / "calibration.json")
    assert record["factors"]["0.95"] is None
    assert from_record(record, "c").promise(100, 0.95) is None


def test_where_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibration_path(str(calibrated)) == calibrated / "calibration.json"
    assert calibration_path("some/x-q8_0.gguf") == Path("some/x-q8_0.calibration.json")
    assert calibration_path("owner/name") == Path("runs/calibrate-name/calibration.json")
    assert calibration_path("some/x.gguf", Path("out")) == Path("out/x.calibration.json")
    assert module.exported_run("some/x.gguf") is None
    (tmp_path / "export.json").write_text(json.dumps({"run": str(calibrated)}))
    assert module.exported_run("x.gguf") == calibrated


# ---- what the run has seen ---------------------------------------------------------------------------------------------


def write_run(folder: Path, kind: str, config: dict[str, Any], **more: str) -> Path:
    folder.mkdir(parents=True)
    runs.write_json(folder / "run.json", {"kind": kind, "model": "tiny", "format": "solution", **more})
    runs.write_json(folder / "config.yaml", config)  # JSON is YAML
    return folder


@pytest.fixture
def questions() -> Callable[..., list[Question]]:
    return lambda *texts: [Question(text, text, "7") for text in texts]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines on stderr about questions left out or not compared."""
    lines: list[str] = []
    monkeypatch.setattr(leaks, "warn", lines.append)
    for room in (trained_questions, module):
        monkeypatch.setattr(room, "warn", lines.append)
    return lines


def rows_file(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"question": text, "answer": "7"}) + "\n" for text in texts))
    return str(path)


def test_questions_of_the_run_and_its_parents_are_left_out_and_told(
    tmp_path: Path, questions: Callable[..., list[Question]], said: list[str]
) -> None:
    rows = rows_file(tmp_path / "rows.jsonl", "Row one?", "Row two?")
    asked = rows_file(tmp_path / "asked.jsonl", "Asked one?")
    held = rows_file(tmp_path / "held.jsonl", "Held one?")
    start = write_run(tmp_path / "start", "sft", {"sft": {"rows": rows}})
    run = write_run(tmp_path / "run", "grpo", {"grpo": {"questions": asked}, "eval": {"task": held}}, parent=str(start))
    given = questions("row ONE", "New?", "asked one", "held one?", "Other?")
    found = without_known_questions(given, "mine.jsonl", run)
    assert [q.question for q in found] == ["New?", "Other?"]
    assert said == [
        f"questions that {asked} was trained on left out: 1",
        f"questions that {rows} was trained on left out: 1",
        f"evaluation questions of {held} left out: 1",
    ]


def test_an_average_leaves_out_what_either_of_its_parents_was_trained_on(
    tmp_path: Path, questions: Callable[..., list[Question]], said: list[str]
) -> None:
    rows, more = (rows_file(tmp_path / f"{name}.jsonl", f"{name}?") for name in ("one", "two"))
    first = write_run(tmp_path / "first", "sft", {"sft": {"rows": rows}})
    second = write_run(tmp_path / "second", "sft", {"sft": {"rows": more}}, parent=str(first))
    average = write_run(tmp_path / "average", "sft", {"sft": {"rows": rows}}, parents=[str(first), str(second)])
    assert [q.question for q in without_known_questions(questions("one?", "two?", "three?"), "mine.jsonl", average)] == ["three?"]
    assert not any("is not there" in line for line in said)


@pytest.mark.parametrize("parents", [5, "base", ["base", 5]])
def test_parents_that_are_no_list_of_folders_are_refused(parents: object, tmp_path: Path, questions: Callable[..., list[Question]]) -> None:
    average = write_run(tmp_path / "average", "sft", {"sft": {"rows": "rows.jsonl"}}, parents=parents)
    with pytest.raises(InputError, match="parents is no list of folders"):
        without_known_questions(questions("one?"), "mine.jsonl", average)


def test_named_splits_are_disjoint_and_need_no_comparison(
    tmp_path: Path, questions: Callable[..., list[Question]], said: list[str]
) -> None:
    run = write_run(tmp_path / "run", "grpo", {"grpo": {"task": "arithmetic"}, "eval": {"task": "arithmetic"}}, parent="gone")
    given = questions("one", "two")
    assert without_known_questions(given, "arithmetic", run) == given
    assert said == ["not compared with the training of gone: it is not there"]


def test_what_cannot_be_compared_is_told(tmp_path: Path, questions: Callable[..., list[Question]], said: list[str]) -> None:
    start = write_run(tmp_path / "start", "sft", {"sft": {"rows": str(tmp_path / "gone.jsonl")}})
    run = write_run(tmp_path / "run", "grpo", {"grpo": {"questions": "gone.jsonl"}}, parent=str(start))
    without_known_questions(questions("one"), "mine.jsonl", run)
    assert any(line.startswith(f"not compared with the questions of {run}: no file gone.jsonl") for line in said)
    assert any(line.startswith(f"not compared with the rows of {start}: ") for line in said)


@pytest.mark.parametrize("model", ["x.gguf", "merged"])
def test_the_run_of_an_export_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], model: str
) -> None:
    (tmp_path / "here" / "elsewhere").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    inside, beside = Path("runs/demo/export"), Path("out")
    for folder in (write_run(Path("runs/demo"), "sft", {}) / "export", beside):
        (folder / "merged").mkdir(parents=True)
        runs.write_json(folder / "export.json", {"run": "runs/demo"})
    for folder in (inside, beside):
        assert module.exported_run(str(folder / model)).resolve() == Path("runs/demo").resolve()
    monkeypatch.chdir("elsewhere")
    write_run(Path("runs/demo"), "sft", {})  # another one of this name
    for folder in (inside, beside):
        assert module.exported_run(str(".." / folder / model)).resolve() == Path("../runs/demo").resolve()
    assert module.exported_run(str(Path("..") / "merged")) is module.exported_run("tiny") is None
    assert said == []


def test_a_run_that_was_renamed_is_the_one_that_its_export_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs.write_json(write_run(Path("runs/demo"), "sft", {}) / "export" / "export.json", {"run": "runs/demo"})
    aside = Path("runs/demo").rename("runs/demo-before")
    write_run(Path("runs/demo"), "sft", {})
    assert module.exported_run("runs/demo-before/export/x.gguf").resolve() == aside.resolve()


def test_an_export_whose_run_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runs.write_json(tmp_path / "export.json", {"run": "runs/gone"})
    assert module.exported_run("x.gguf") is None
    about = tmp_path / "export.json"
    assert said == [
        f"not compared with the training of runs/gone, which {about} names: it is not there; calibrate in the folder that it is in"
    ]


# ---- plots -------------------------------------------------------------------------------------------------------------


ABOUT = {
    "model_fingerprint": "a", "format": "solution", "task": "arithmetic", "split": "val", "temperature": 0.6, "top_p": 1.0, "date": "now",
}  # fmt: skip


@pytest.mark.parametrize("task", ["kept.jsonl", "./kept.jsonl", "../here/kept.jsonl", "ABSOLUTE", "kept.jsonl#500", "other.jsonl"])
def test_a_calibration_is_not_checked_on_its_own_file_however_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, task: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = calibrate(noisy(30, 0), **ABOUT | {"task": "kept.jsonl#20"})
    monkeypatch.setattr(calibration_file, "load_calibration", lambda *_, **__: found)
    settings = EvalSettings(task=str(Path("kept.jsonl").absolute()) if task == "ABSOLUTE" else task, split="test")
    measured = measure_coverage(None, "run", settings, [Sample(True, True, 50, 50)])
    said = "the calibration is on kept.jsonl#20, as this evaluation: evaluate on other questions" in capsys.readouterr().err
    assert ("coverage" in measured, said) == ((True, False) if task == "other.jsonl" else (False, True))


def noisy(n: int, seed: int) -> list[CalibrationAnswer]:
    """Answers whose length has noise, more of it for a large budget."""
    rng = np.random.default_rng(seed)
    stated = rng.integers(20, 500, n)
    used = stated * np.exp(0.3 * stated / 250 * rng.standard_normal(n))
    return [CalibrationAnswer(int(b), max(1, int(u))) for b, u in zip(stated, used, strict=True)]


def test_the_plots_are_drawn() -> None:
    found, few = calibrate(noisy(500, 0), **ABOUT), calibrate(noisy(30, 0), **ABOUT)  # few: no promise at 95 %
    rows = [{"budget": a.stated, "length": a.used, "ok": True} for a in noisy(300, 1)] + [{"budget": None, "length": 9, "ok": False}]
    evaluation = {"questions": 50, "coverage": found.kept_coverage(noisy(300, 1))}
    figure = draw_calibration(found, evaluation, rows, COLOURS["grpo"])
    bars = [list(line.get_ydata()) for line in figure.axes[0].lines if line.get_linewidth() == 7]
    assert bars[1] == pytest.approx([0.82, 0.96])  # what 50 answers keep of 90 %
    assert [ax.get_xlabel() for ax in figure.axes] == ["promised coverage", "budget, tokens"]
    assert "promise at 90 %" in [text.get_text() for text in figure.axes[1].get_legend().texts]
    assert to_png(figure).startswith(b"\x89PNG")
    assert to_svg(figure, "x").startswith("<svg")
    assert draw_calibration(None, evaluation, rows, COLOURS["grpo"]) is draw_calibration(found, {}, rows, COLOURS["grpo"]) is None
    for samples in (rows[:1], []):
        assert to_png(draw_calibration(few, {"questions": 50, "coverage": few.kept_coverage(noisy(50, 1))}, samples, COLOURS["sft"]))


def test_a_report_with_finite_promises_draws_them(tmp_path: Path) -> None:
    folder, found = put_run(tmp_path / "run"), calibrate(noisy(500, 0), **ABOUT)
    evaluation = put_evaluation(folder, [Sample(True, True, a.stated, a.used) for a in noisy(60, 1)])
    runs.write_json(folder / "eval.json", evaluation | {"coverage": found.kept_coverage(noisy(60, 1))})
    runs.write_json(folder / "calibration.json", to_record(found))
    result = write_report(folder)
    assert result["calibration"]["factors"] == found.scores.factors()
    assert (folder / "plots" / "calibration.png").is_file()
    page = (folder / "report.html").read_text()
    assert 'aria-label="What is a budget worth?"' in page
    assert "by chance %" in page
    assert "83.3–96.7" in page  # 50 to 58 of 60 answers
    (folder / "calibration.json").unlink()
    assert write_report(folder)["calibration"] is None
    assert not (folder / "plots" / "calibration.png").exists()


def test_a_report_shows_promised_and_kept_and_answers_stopped_early(mine: Path, capsys: pytest.CaptureFixture) -> None:
    write_report_of = ["report", str(mine), "--json"]
    line = ["eval", str(mine), "--limit", "12", "--set", f"eval.max_tokens={TOKENS}", "--json"]
    (calibration := mine / "calibration.json").rename(mine / "aside.json")
    assert call(line, False) == call(write_report_of, False) == 0
    page = (mine / "report.html").read_text()
    assert "sbtiny calibrate makes one" in page
    assert " --cuts adds it" in page
    (mine / "aside.json").rename(calibration)
    assert call([*line, "--cuts"], False) == 0
    capsys.readouterr()
    assert call(write_report_of, False) == 0
    result, record = json.loads(capsys.readouterr().out), runs.read_json(calibration)
    assert result["calibration"]["coverage"] == runs.read_json(mine / "eval.json")["coverage"]
    assert all(result["calibration"][key] == record[key] for key in ("questions", "factors", "promises", "true_coverage_range", "date"))
    assert result["cuts"] == runs.read_json(mine / "cuts.json")
    page = (mine / "report.html").read_text()
    drawn = {file.stem for file in (mine / "plots").iterdir()}
    assert 'aria-label="Stopped early"' in page
    assert "interruption" in drawn
    assert ("calibration" in drawn) is (result["calibration"]["factors"]["0.8"] is not None)
    assert "no finite promise" in page  # at 95 %, of 40 answers


def test_500_questions_are_asked_unless_told(started: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "run_calibration", lambda name, settings, *_: asked.append(settings.eval.limit) or {})
    file = tmp_path / "c.yaml"
    file.write_text("eval: {limit: 33}\n")
    for more in ([], ["--preset", "t4", "--task", "arithmetic"], ["--set", "eval.limit=44"], ["--limit", "55"], ["-c", str(file)]):
        assert call(["calibrate", str(started), "--json", *more, "-o", str(tmp_path)], False) == 0
    assert asked == [500, 500, 44, 55, 33]
