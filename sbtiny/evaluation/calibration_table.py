"""The tables of what a budget is worth: the promises that `sbtiny calibrate` prints, coverage kept, accuracy of interrupted answers."""

from collections.abc import Sequence

from rich.console import Console

from sbtiny.budget.calibration import COVERAGES, promise_rank
from sbtiny.evaluation.report import NO_VALUE, Eval, Grid, Row, percent, rich_table, tokens

KEYS = tuple(map(str, COVERAGES))


def print_calibration(record: Row) -> None:
    """Print the promises, the bins, and what cannot be promised, to stdout."""
    out = Console()
    out.print(rich_table(promise_grid(record)))
    if record["by_bin"]:
        out.print("\nkept within the one factor, %, by stated budget:", highlight=False)
        out.print(rich_table(bin_grid(record)))
    for line in shortfalls(record):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def promise_grid(record: Row) -> Grid:
    """Build one row a coverage. The promise is for the median stated budget, by the factor of its bin where bins have their own."""
    headers = ["asked", "factor of all", f"promise for {record['median_stated'] or 'any'} stated", "true coverage,\n5 to 95 %"]
    rows = []
    for key in KEYS:
        low_high, limit = record["true_coverage_range"][key], (record["promises"] or {}).get(key)
        chance = f"{percent(low_high[0])} to {percent(low_high[1])} %" if low_high else NO_VALUE
        rows.append([f"{float(key):.0%}", format_factor(record["factors"][key]), "none" if limit is None else f"{limit} tokens", chance])
    return headers, rows


def bin_grid(record: Row) -> Grid:
    """Build one row a bin: the share that the one factor keeps (does the bin need its own?), and its own, where each has one."""
    own = KEYS if record["by_bin"][0]["factors"] else ()
    headers = ["stated", "answers", *(f"{float(key):.0%}" for key in KEYS), *(f"own,\n{float(key):.0%}" for key in own)]
    rows = []
    for row in record["by_bin"]:
        cells = [percent(row["kept"][key]) for key in KEYS] + [format_factor(row["factors"][key]) for key in own]
        rows.append([f"{row['from']} to {row['to']}", str(row["questions"]), *cells])
    return headers, rows


def format_factor(factor: float | None) -> str:
    return "none" if factor is None else f"{factor:.2f}"


def shortfalls(record: Row) -> list[str]:
    """What is not promised, and why, one line each."""
    n, bad = record["questions"], record["malformed"] + record["cut"]
    lines = [f"{n} answers, {record['malformed']} malformed, {record['cut']} cut"]
    if record["median_stated"] is None:
        return [*lines, "no promise: no answer states a budget; train one with sbtiny sft"]
    missing = [float(key) for key, factor in record["factors"].items() if factor is None]
    few = [c for c in missing if promise_rank(n, c, record["confidence"]) is None]
    reasons = (
        (few, f"{n} answers are too few; raise --limit"),
        ([c for c in missing if c not in few], f"{bad} of {n} answers are cut or malformed; train further, or raise eval.max_tokens"),
    )
    return lines + [f"no finite promise at {', '.join(f'{c:.0%}' for c in cs)}: {why}" for cs, why in reasons if cs]


def coverage_grid(coverage: dict[str, Row], ranges: dict[str, list[float] | None] | None = None) -> Grid:
    """Build one row a promised coverage; `ranges`, where given, says what share chance alone lets so many answers keep."""
    headers = ["promised", "kept %", *(["by chance %"] if ranges else []), "mean promise,\ntokens", "kept by stated budget"]
    rows = []
    for key, row in coverage.items():
        promised = row["kept"] is not None
        chance = [] if ranges is None else ["–".join(percent(edge) for edge in ranges[key]) if ranges[key] else NO_VALUE]
        bins = ",\n".join(f"{b['from']}–{b['to']}: {percent(b['kept'])} %" for b in row["by_bin"] if b["kept"] is not None)
        rows.append(
            [
                f"{100 * float(key):.0f} %",
                percent(row["kept"]),
                *chance,
                tokens(row["mean_promise"]),
                bins if promised else "no finite promise",
            ]
        )
    return headers, rows


def cuts_grid(cuts: Sequence[Eval]) -> Grid:
    """Build one row a share of cuts.json: accuracy where answers end there, and where they are wrapped up."""
    headers = [
        "stopped at,\nof its budget",
        "plain cut,\naccuracy %",
        "wrapped up,\naccuracy %",
        "95 %\ninterval",
        "tokens",
        "stopped\n%",
        "format %",
    ]
    rows = []
    for e in cuts:
        lo, hi = e["accuracy_ci95"]
        plain = percent((e["plain"] or e)["accuracy"])
        sizes = [tokens(e["mean_tokens"]), percent(e["cut_rate"], 0), percent(e["format_rate"])]
        rows.append(
            [
                f"{100 * e['cut']:.0f} %" if e["cut"] else "not at all",
                plain,
                percent(e["accuracy"]),
                f"{percent(lo)}–{percent(hi)}",
                *sizes,
            ]
        )
    return headers, rows
