"""Rows for a phase that makes a budget follow the question: budgets as they are foretold, brought to a run's mean, beside right answers.

    python examples/gsm8k_0.5b/mix_rows.py OUT.jsonl --budgets ROWS.jsonl --count 2800 --mean 157 --answers ROWS.jsonl[:COUNT] [--seed 0]

ROWS.jsonl is what rows.py, sure_budgets.py, or `sbtiny data build` with `data.budget_quantile` wrote: of --budgets the rows of a budget
alone are taken, of --answers (more than once, if need be) the given ones. --mean is the geometric mean that the budgets shall have: the
initial model's answers are longer than those of a run that has learnt to be short, and only the ratios of its lengths are to be learnt.
"""

import argparse
import random
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from own_answers import draw, positive, scale_budgets
from rows import count

from sbtiny import runs
from sbtiny.coldstart.rows import read_labelled
from sbtiny.errors import InputError, run_script


def bring_to_mean(rows: list[dict[str, Any]], mean: float) -> list[dict[str, Any]]:
    """The rows with all budgets times the same, so that their geometric mean is `mean` but for rounding."""
    return scale_budgets(rows, mean / geometric_mean(row["budget"] for row in rows))


def split_place(place: str) -> tuple[str, int | None]:
    """FILE or FILE:COUNT as file and number of rows; None for all."""
    file, _, number = place.rpartition(":")
    return (file, count(number)) if file and number.isdecimal() else (place, None)


def read_answers(file: str, most: int | None, rng: random.Random) -> list[dict[str, Any]]:
    """`most` of the file's given rows. Raises InputError where there is none."""
    rows = [row for row in read_labelled(file) if row.get("given")]
    if not rows:
        raise InputError(f"{file} has no given rows: give what rows.py or sure_budgets.py wrote")
    return rows if most is None else draw(rows, most, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", required=True)
    parser.add_argument("--count", type=count, default=2800)
    parser.add_argument("--mean", type=positive, required=True)
    parser.add_argument("--answers", type=split_place, action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs.check_writable(args.out, args.budgets, *(file for file, _ in args.answers))
    rng = random.Random(args.seed)
    budgets = [row for row in read_labelled(args.budgets) if row["response"] is None]
    if not budgets:
        raise InputError(f"{args.budgets} has no rows of a budget alone: give what rows.py --budgets wrote")
    answers = [row for file, most in args.answers for row in read_answers(file, most, rng)]
    kept = draw(bring_to_mean(budgets, args.mean), args.count, rng)
    runs.write_jsonl(args.out, answers + kept)
    print(f"{len(answers)} answers, {len(kept)} budgets" + (f" (asked: {args.count})" if len(kept) < args.count else ""))


if __name__ == "__main__":
    run_script(main)
