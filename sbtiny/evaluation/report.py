"""The data, tables and terminal output of a run's report. A table is a grid of texts; report.html and README.md draw the same grids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sbtiny.budget.calibration import Calibration
from sbtiny.budget.calibration_record import from_record, to_record
from sbtiny.budget.metrics import compression, paired_difference
from sbtiny.errors import InputError
from sbtiny.load_settings import parse_yaml, read_utf8
from sbtiny.progress import format_duration
from sbtiny.runs import read_json, read_run
from sbtiny.tasks.sources import read_rows

Row = dict[str, Any]
Eval = dict[str, Any]
NamedEvals = list[tuple[str, Eval]]
Grid = tuple[list[str], list[list[str]]]  # headers, rows; every row as long as the headers
STAGES = {"base": "base", "sft": "cold start", "grpo": "GRPO"}
REQUIRED_EVAL_KEYS = ("accuracy", "accuracy_ci95", "mean_tokens", "p90_tokens", "format_rate", "within", "by_level", "task")
SAME_QUESTIONS = ("task", "split")
SAME_IN_A_SWEEP = (*SAME_QUESTIONS, "questions", "seed", "temperature", "top_p", "max_tokens", "ceiling", "upstream")
NO_VALUE = "–"


@dataclass(frozen=True, slots=True)
class ReportData:
    """The files of a run folder and its parents. `evals` and `samples` have the keys of STAGES; a missing file is None or empty.

    `settings` is config.yaml with the `data` and `sft` sections of the cold start's own config.yaml.
    """

    folder: Path
    run: Row
    start: Path | None
    evals: dict[str, Eval | None]
    samples: dict[str, list[Row]]
    sweep: list[Eval]
    cuts: list[Eval]
    calibration: Calibration | None
    metrics: list[Row]
    settings: Row

    @property
    def last_stage(self) -> str:
        """The stage of the folder's own evaluation."""
        return "grpo" if self.evals["grpo"] else "sft"


def read_report_data(folder: Path) -> ReportData:
    """Read all files of a report. Raises InputError for no eval.json in `folder` and for broken files."""
    if not (folder / "eval.json").is_file():
        raise InputError(f"no eval.json in {folder}: run `sbtiny eval {quote(str(folder))}` first")
    run = read_run(folder)
    places = stage_folders(folder, run)
    sweep, cuts, calibration, config = (folder / name for name in ("sweep.json", "cuts.json", "calibration.json", "config.yaml"))
    start = next((f for f in list_cold_start_folders(folder, run) if (f / "run.json").is_file()), None)
    settings = read_settings(config)
    if start:
        settings |= {key: value for key, value in read_settings(start / "config.yaml").items() if key in ("data", "sft")}
    evals = {stage: read_eval(place / "eval.json") if place else None for stage, place in places.items()}
    own = evals["grpo"] or evals["sft"]  # the folder's, which is there
    return ReportData(
        folder=folder,
        run=run,
        start=start,
        evals=evals,
        samples={stage: read_optional_rows(place / "eval_samples.jsonl") if place else [] for stage, place in places.items()},
        sweep=read_evals(sweep, own),
        cuts=read_evals(cuts, own, ("cut_rate", "plain")),
        calibration=from_record(read_json(calibration), str(calibration)) if calibration.is_file() else None,
        metrics=[row for row in read_optional_rows(folder / "metrics.jsonl") if row.get("stage") == "grpo"],
        settings=settings,
    )


def stage_folders(folder: Path, run: Row) -> dict[str, Path | None]:
    """Find the folder of each stage's evaluation: inside the run, or in the run it started from. None where there is none."""
    starts = list_cold_start_folders(folder, run)
    return {
        "base": first_evaluated([folder / "base", *(start / "base" for start in starts)]),
        "sft": first_evaluated(starts),
        "grpo": None if run.get("kind") == "sft" else folder,
    }


def list_cold_start_folders(folder: Path, run: Row) -> list[Path]:
    """List the folders that may hold the cold start, the likeliest first."""
    if run.get("kind") == "sft":
        return [folder]
    return [folder / "sft", *([Path(run["parent"])] if run.get("parent") else [])]


def first_evaluated(folders: Sequence[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / "eval.json").is_file()), None)


def read_eval(path: Path) -> Eval:
    return validate_eval(read_json(path), path)


def read_evals(path: Path, own: Eval, more: Sequence[str] = ()) -> list[Eval]:
    """Read the evaluations that were made with `own`; others are left over from an earlier one. Empty without the file."""
    records = [validate_eval(record, path, more) for record in read_json(path)] if path.is_file() else []
    return [record for record in records if are_alike(record, own, SAME_IN_A_SWEEP)]


def are_alike(one: Eval, other: Eval, keys: Sequence[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def validate_eval(record: Any, path: Path, more: Sequence[str] = ()) -> Eval:
    missing = [key for key in (*REQUIRED_EVAL_KEYS, *more) if not isinstance(record, dict) or key not in record]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: it is no evaluation of this version; run `sbtiny eval` again")
    return record


def read_optional_rows(path: Path) -> list[Row]:
    """Read the rows of a JSON Lines file; none where the file is absent or empty."""
    return read_rows(str(path)) if path.is_file() and path.stat().st_size else []


def read_settings(path: Path) -> Row:
    return parse_yaml(read_utf8(path), str(path)) if path.is_file() else {}


def build_report(evidence: ReportData, seconds: dict[str, float] | None) -> dict[str, Any]:
    """Build the content of report.json."""
    file = evidence.folder / "report.json"
    earlier, export = read_json(file) if file.is_file() else {}, evidence.folder / "export" / "export.json"
    last = evidence.evals[evidence.last_stage] or {}
    return {
        **evidence.evals,
        **compare_to_base(evidence),
        "spearman_budget_level": last.get("spearman_budget_level"),
        "slope": last.get("slope"),
        "sweep": evidence.sweep or None,
        "cuts": evidence.cuts or None,
        "calibration": describe_calibration(evidence.calibration, last),
        "seconds": earlier.get("seconds") if seconds is None else seconds,
        "export": read_json(export) if export.is_file() else None,
    }


def describe_calibration(calibration: Calibration | None, last: Eval) -> dict[str, Any] | None:
    """Collect the promises of a calibration and how they were kept. None where the run is not calibrated, or not evaluated since."""
    if calibration is None or not measures_coverage_of(calibration, last):
        return None
    record = to_record(calibration)
    return {key: value for key, value in record.items() if key not in ("ratios", "by_bin")} | {"coverage": last["coverage"]}


def measures_coverage_of(calibration: Calibration, evaluation: Eval) -> bool:
    """Whether an evaluation says how the promises of this calibration were kept, rather than those of another one or of none."""
    named = evaluation.get("calibration") or {}
    return "coverage" in evaluation and all(getattr(calibration, name) == value for name, value in named.items())


def compare_to_base(evidence: ReportData) -> dict[str, Any]:
    """Compute compression and accuracy change, both on the questions that both answered, paired by id.

    None between different tasks or splits. Without samples they are those of all questions, without an interval.
    """
    base, after = evidence.evals["base"], evidence.evals["grpo"]
    if base is None or after is None or not are_alike(base, after, SAME_QUESTIONS):
        return dict.fromkeys(("compression", "accuracy_change", "accuracy_change_ci95"))
    if not (pairs := paired_change(evidence.samples["base"], evidence.samples["grpo"])):
        saved = compression(base["mean_tokens"], after["mean_tokens"])
        return {"compression": saved, "accuracy_change": after["accuracy"] - base["accuracy"], "accuracy_change_ci95": None}
    saved = compression(*(sum(row["length"] for row in rows) for rows in zip(*pairs, strict=True)))
    d = paired_difference([a["correct"] for _, a in pairs], [b["correct"] for b, _ in pairs])
    return {"compression": saved, "accuracy_change": d["mean"], "accuracy_change_ci95": [d["lo"], d["hi"]]}


def paired_change(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair the rows of the same question, in the order of `after`."""
    known = {row["id"]: row for row in before}
    return [(known[row["id"]], row) for row in after if row["id"] in known]


def percent(rate: float | None, digits: int = 1) -> str:
    """Format a rate in percent; a rate below 1 is never rounded to 100."""
    if rate is None:
        return NO_VALUE
    text = f"{100 * rate:.{digits}f}"
    return percent(rate, digits + 1) if rate < 1 and float(text) == 100 and digits < 4 else text


def tokens(value: float | None) -> str:
    if value is None:
        return NO_VALUE
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def percentage_points(difference: float) -> str:
    """Format a difference of rates in percentage points, signed."""
    value = round(100 * difference, 1)
    return f"{value:+.1f}".replace("-", "−") if value else "0.0"


def describe_time(seconds: dict[str, float]) -> str:
    """Write the time of a run in all and by stage."""
    stages = ", ".join(f"{stage} {format_duration(value)}" for stage, value in seconds.items())
    return f"{format_duration(sum(seconds.values()))} in all ({stages})" if seconds else "not recorded"


def name_stages(evals: dict[str, Eval | None]) -> NamedEvals:
    """Name the evaluations that there are, in the order of STAGES."""
    return [(STAGES[stage], e) for stage, e in evals.items() if e]


def name_budgets(sweep: Sequence[Eval]) -> NamedEvals:
    """Name the evaluations of a sweep by the budget given."""
    return [(e.get("budget", NO_VALUE), e) for e in sweep]


def comparison_grid(evals: NamedEvals, title: str = "") -> Grid:
    """Build one row an evaluation; `title` heads the names."""
    headers = ["accuracy %\n(95 % interval)", "tokens", "p90", "budget", "format %", "within %\n10 / 20 / 50", "over\nbudget %"]
    rows = []
    for name, e in evals:
        lo, hi = e["accuracy_ci95"]
        accuracy = f"{percent(e['accuracy'])} ({percent(lo)}–{percent(hi)})"
        within = " / ".join(percent(e["within"][t], 0) for t in ("0.1", "0.2", "0.5")) if e.get("mean_budget") else NO_VALUE
        sizes = [tokens(e[key]) for key in ("mean_tokens", "p90_tokens", "mean_budget")]
        rows.append([name, accuracy, *sizes, percent(e["format_rate"]), within, percent(e.get("over_budget_rate"))])
    return [title, *headers], rows


def level_grid(evals: NamedEvals) -> Grid:
    """Build one row a level: questions and budget of the last evaluation, accuracy and tokens of each. No rows without levels."""
    names = [name for name, _ in evals] if len(evals) > 1 else [""]
    headers = ["level", "questions", *(f"{name}\n{measure}".strip() for measure in ("accuracy %", "tokens") for name in names), "budget"]
    rows = []
    for level, last in evals[-1][1]["by_level"].items():
        entries = [e["by_level"].get(level) for _, e in evals]
        accuracies = [percent(entry["accuracy"]) if entry else NO_VALUE for entry in entries]
        lengths = [tokens(entry["mean_tokens"]) if entry else NO_VALUE for entry in entries]
        rows.append([level, str(last["questions"]), *accuracies, *lengths, tokens(last["mean_budget"])])
    return headers, rows


def summary_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """List (name, words) of the comparison with the base; a missing base is a line too."""
    lines = []
    saved = result["compression"]
    if saved is None:
        lines.append(("compression", "unknown: base and GRPO were not both evaluated on one task in this run"))
    else:
        lines.append(("compression", f"{percent(abs(saved))} % {'fewer' if saved >= 0 else 'more'} tokens than the base"))
    if result["accuracy_change"] is not None:
        low_high = result["accuracy_change_ci95"]
        interval = f" (95 %: {percentage_points(low_high[0])} to {percentage_points(low_high[1])})" if low_high else " (not paired)"
        lines.append(("accuracy change", f"{percentage_points(result['accuracy_change'])} points{interval}"))
    if result["spearman_budget_level"] is not None:
        lines.append(("Spearman(budget, level)", f"{result['spearman_budget_level']:.2f} (1: harder always means larger)"))
    return [*lines, ("time", describe_time(result["seconds"] or {}))]


def print_report_table(result: dict[str, Any]) -> None:
    """Print a report to stdout."""
    console = Console()
    console.print(rich_table(comparison_grid(name_stages({stage: result[stage] for stage in STAGES}))))
    console.print()
    for name, words in summary_lines(result):
        console.print(f"{name}: {words}", markup=False, highlight=False)
    if result["sweep"]:
        console.print("\ngiven a multiple of the stated budget:", highlight=False)
        console.print(rich_table(comparison_grid(name_budgets(result["sweep"]), "given budget")))
        console.print()
    if "page" in result:
        console.print(f"report: {result['page']}", markup=False, highlight=False, soft_wrap=True)


def print_eval_table(result: Eval) -> None:
    """Print a single evaluation, and its levels, to stdout."""
    console = Console()
    evals = [(str(result["model"]), result)]
    console.print(rich_table(comparison_grid(evals)))
    if result["by_level"]:
        console.print()
        console.print(rich_table(level_grid(evals)))


def rich_table(grid: Grid) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), collapse_padding=True)
    for i, header in enumerate(grid[0]):
        table.add_column(header, justify="right" if i else "left", vertical="bottom", no_wrap=i > 0)
    for row in grid[1]:
        table.add_row(*map(escape, row))
    return table
