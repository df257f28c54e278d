"""The report of a run: report.json, the plots, a page for the browser, a model card; and the table in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sbtiny.budget.metrics import compression, paired_difference
from sbtiny.config import parse_yaml
from sbtiny.errors import InputError
from sbtiny.runs import read_json, write_bytes, write_json, write_text
from sbtiny.tasks.sources import read_rows

Row = dict[str, Any]
Eval = dict[str, Any]
Grid = tuple[list[str], list[list[str]]]  # headers, rows; every row as long as the headers
STAGES = {"base": "base", "sft": "cold start", "grpo": "GRPO"}
NEEDED = ("accuracy", "accuracy_ci95", "mean_tokens", "p90_tokens", "format_rate", "within", "by_level", "task")
NONE = "–"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a run folder and its parents hold. Keys of `evals` and `samples` are those of STAGES; absent is None or empty.

    `settings` is config.yaml, its `data` and `sft` sections those the cold start was really made with.
    """

    folder: Path
    run: Row
    start: Path | None
    evals: dict[str, Eval | None]
    samples: dict[str, list[Row]]
    sweep: list[Eval]
    metrics: list[Row]
    settings: Row


def write(folder: Path, seconds: dict[str, float] | None = None) -> dict[str, Any]:
    """Write report.json, plots/, report.html and README.md of an evaluated run; gives report.json's content and `page`.

    `seconds` by stage; without them those of an earlier report stay. Raises InputError where the run has no eval.json.
    """
    from sbtiny.evaluation import page, plots  # matplotlib takes half a second, and the table needs none

    evidence = read(folder)
    result = build(evidence, seconds)
    figures = plots.figures(evidence)
    for name, panels in figures.items():
        file = folder / "plots" / f"{name}.png"
        if panels:
            write_bytes(file, plots.png(panels))
        else:
            file.unlink(missing_ok=True)  # of an earlier report
    svgs = {
        name: [plots.svg(panel, f"{name}{i}") for i, panel in enumerate(panels)] for name, panels in figures.items()
    }
    write_json(folder / "report.json", result)
    write_text(folder / "report.html", page.render(evidence, result, svgs))
    write_text(folder / "README.md", page.card(evidence, result))
    return result | {"page": str(folder / "report.html")}


def read(folder: Path) -> Evidence:
    """All that is there to report on. Raises InputError for no eval.json in `folder` and for broken files."""
    if not (folder / "eval.json").is_file():
        raise InputError(f"no eval.json in {folder}: run `sbtiny eval {quote(str(folder))}` first")
    run = read_json(folder / "run.json")
    places = stage_folders(folder, run)
    sweep, config = folder / "sweep.json", folder / "config.yaml"
    start = next((f for f in starting_points(folder, run) if (f / "run.json").is_file()), None)
    settings = read_settings(config)
    if start:
        settings |= {
            key: value for key, value in read_settings(start / "config.yaml").items() if key in ("data", "sft")
        }
    return Evidence(
        folder=folder,
        run=run,
        start=start,
        evals={stage: read_eval(place / "eval.json") if place else None for stage, place in places.items()},
        samples={stage: rows_of(place / "eval_samples.jsonl") if place else [] for stage, place in places.items()},
        sweep=[checked(e, sweep) for e in read_json(sweep)] if sweep.is_file() else [],
        metrics=[row for row in rows_of(folder / "metrics.jsonl") if row.get("stage") == "grpo"],
        settings=settings,
    )


def stage_folders(folder: Path, run: Row) -> dict[str, Path | None]:
    """Where each stage was evaluated: beside or inside the run, or in the run it went on from."""
    starts = starting_points(folder, run)
    return {
        "base": evaluated([folder / "base", *(start / "base" for start in starts)]),
        "sft": evaluated(starts),
        "grpo": None if run.get("kind") == "sft" else folder,
    }


def starting_points(folder: Path, run: Row) -> list[Path]:
    """Where the cold start may lie, the likeliest first."""
    if run.get("kind") == "sft":
        return [folder]
    return [folder / "sft", *([Path(run["parent"])] if run.get("parent") else [])]


def evaluated(folders: Sequence[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / "eval.json").is_file()), None)


def read_eval(path: Path) -> Eval:
    return checked(read_json(path), path)


def checked(found: Any, path: Path) -> Eval:
    missing = [key for key in NEEDED if not isinstance(found, dict) or key not in found]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}: it is no evaluation of this version; run `sbtiny eval` again"
        )
    return found


def rows_of(path: Path) -> list[Row]:
    """The rows of a JSON Lines file of ours; none where the file is absent or empty."""
    return read_rows(str(path)) if path.is_file() and path.stat().st_size else []


def read_settings(path: Path) -> Row:
    return parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def build(evidence: Evidence, seconds: dict[str, float] | None) -> dict[str, Any]:
    """The content of report.json (design.md section 5)."""
    file = evidence.folder / "report.json"
    earlier = read_json(file) if file.is_file() else {}
    last = evidence.evals["grpo"] or evidence.evals["sft"] or {}
    return {
        **evidence.evals,
        **change(evidence),
        "spearman_budget_level": last.get("spearman_budget_level"),
        "slope": last.get("slope"),
        "sweep": evidence.sweep or None,
        "seconds": earlier.get("seconds") if seconds is None else seconds,
        "export": earlier.get("export"),
    }


def change(evidence: Evidence) -> dict[str, Any]:
    """Compression, and accuracy change on the questions both answered, paired by id; None between different tasks."""
    base, after = evidence.evals["base"], evidence.evals["grpo"]
    found = dict.fromkeys(("compression", "accuracy_change", "accuracy_change_ci95"))
    if base is None or after is None or base["task"] != after["task"]:
        return found
    found |= {"accuracy_change": after["accuracy"] - base["accuracy"]}
    found |= {"compression": compression(base["mean_tokens"], after["mean_tokens"])}
    if pairs := paired(evidence.samples["base"], evidence.samples["grpo"]):
        d = paired_difference([a["correct"] for _, a in pairs], [b["correct"] for b, _ in pairs])
        found |= {"accuracy_change": d["mean"], "accuracy_change_ci95": [d["lo"], d["hi"]]}
    return found


def paired(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The answers of both to the same questions, in the order of `after`."""
    known = {row["id"]: row for row in before}
    return [(known[row["id"]], row) for row in after if row["id"] in known]


def percent(rate: float | None, digits: int = 1) -> str:
    """A rate in percent; what is not all is not rounded to 100."""
    if rate is None:
        return NONE
    text = f"{100 * rate:.{digits}f}"
    return percent(rate, digits + 1) if rate < 1 and float(text) == 100 and digits < 4 else text


def tokens(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def points(difference: float) -> str:
    """A difference of rates in percentage points, signed."""
    value = round(100 * difference, 1)
    return f"{value:+.1f}".replace("-", "−") if value else "0.0"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def accuracy(e: Eval) -> str:
    lo, hi = e["accuracy_ci95"]
    return f"{percent(e['accuracy'])} ({percent(lo)}–{percent(hi)})"


def comparison(evals: dict[str, Eval | None]) -> Grid:
    """One row an evaluation; the keys are stages, `model` for a single one."""
    headers = [
        "",
        "accuracy %\n(95 % interval)",
        "tokens",
        "p90",
        "budget",
        "format %",
        "within %\n10 / 20 / 50",
        "over\nbudget %",
    ]
    rows = []
    for stage, e in evals.items():
        if e:
            within = (
                " / ".join(percent(e["within"][t], 0) for t in ("0.1", "0.2", "0.5")) if e.get("mean_budget") else NONE
            )
            sizes = [tokens(e[key]) for key in ("mean_tokens", "p90_tokens", "mean_budget")]
            rates = [percent(e["format_rate"]), within, percent(e.get("over_budget_rate"))]
            rows.append([STAGES.get(stage, str(e.get("model", stage))), accuracy(e), *sizes, *rates])
    return headers, rows


def level_grid(evals: dict[str, Eval | None]) -> Grid:
    """One row a level: questions and budget of the last evaluation, accuracy and tokens of each; no rows without levels."""
    present = {STAGES.get(stage, ""): e["by_level"] for stage, e in evals.items() if e}
    last = list(present.values())[-1]
    measures = {"accuracy %": lambda x: percent(x["accuracy"]), "tokens": lambda x: tokens(x["mean_tokens"])}
    headers = [
        "level",
        "questions",
        *(f"{name}\n{measure}".strip() for measure in measures for name in present),
        "budget",
    ]
    rows = []
    for level, found in last.items():
        cells = [show(of[level]) if level in of else NONE for show in measures.values() for of in present.values()]
        rows.append([level, str(found["questions"]), *cells, tokens(found["mean_budget"])])
    return headers, rows


def sweep_grid(sweep: Sequence[Eval] | None) -> Grid:
    headers = ["budget given", "mean budget", "mean tokens", "accuracy %\n(95 % interval)", "within 50 %\nof it, %"]
    return headers, [
        [
            e.get("budget", NONE),
            tokens(e.get("mean_budget")),
            tokens(e["mean_tokens"]),
            accuracy(e),
            percent(e["within"]["0.5"]),
        ]
        for e in sweep or ()
    ]


def findings(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What follows from the comparison: (name, words). Says so where the base is missing."""
    lines = []
    saved = result["compression"]
    if saved is None:
        lines.append(("compression", "unknown: base and GRPO were not both evaluated on one task in this run"))
    else:
        lines.append(
            ("compression", f"{percent(abs(saved))} % {'fewer' if saved >= 0 else 'more'} tokens than the base")
        )
    if result["accuracy_change"] is not None:
        low_high = result["accuracy_change_ci95"]
        interval = f" (95 %: {points(low_high[0])} to {points(low_high[1])})" if low_high else " (not paired)"
        lines.append(("accuracy change", f"{points(result['accuracy_change'])} points{interval}"))
    if result["spearman_budget_level"] is not None:
        lines.append(("Spearman(budget, level)", f"{result['spearman_budget_level']:.2f}"))
    if result["seconds"]:
        stages = ", ".join(f"{stage} {value:.0f}" for stage, value in result["seconds"].items())
        lines.append(("seconds", f"{sum(result['seconds'].values()):.0f} in all ({stages})"))
    return lines


def table(result: dict[str, Any]) -> None:
    """Print a report, or a single evaluation given as {"model": eval}, to stdout."""
    console = Console()
    evals = {stage: result[stage] for stage in ("model", *STAGES) if result.get(stage)}
    console.print(rich_table(comparison(evals)))
    if "model" in result:
        if result["model"]["by_level"]:
            console.print()
            console.print(rich_table(level_grid(evals)))
        return
    console.print()
    for name, words in findings(result):
        console.print(f"{name}: {words}", markup=False, highlight=False)
    if result["sweep"]:
        console.print("\ntold to use a multiple of its own number:", highlight=False)
        console.print(rich_table(sweep_grid(result["sweep"])))
        console.print()
    if "page" in result:
        console.print(f"report: {result['page']}", markup=False, highlight=False, soft_wrap=True)


def rich_table(grid: Grid) -> Table:
    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), collapse_padding=True)
    for i, header in enumerate(grid[0]):
        drawn.add_column(header, justify="right" if i else "left", vertical="bottom", no_wrap=i > 0)
    for row in grid[1]:
        drawn.add_row(*map(escape, row))
    return drawn
