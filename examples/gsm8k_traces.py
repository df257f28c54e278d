"""Traces for a cold start from GSM8K's own solutions: each question answered twice, as it was written and by its sums alone.

    python examples/gsm8k_traces.py gsm8k_train.jsonl traces.jsonl --longest 230 --limit 1600
    sbtiny data build rows.jsonl --traces traces.jsonl --limit 4000 --model smollm2-135m

Two answers of different length to one question are what a number can tell apart (dev/LOG.md, 21). Input: JSON Lines with question, answer
and solution; a question whose sums do not end on its answer is left out.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sbtiny.tasks.numbers import parse_number
from sbtiny.tasks.sources import numbered_rows

NUMBER = r"\$?\(?\s?\d[\d.,]*\s?[%)]?"
SUM = re.compile(rf"{NUMBER}(?:\s?[-+*/x]\s?{NUMBER})+\s?=\s?\$?\d[\d.,]*")


def sums(solution: str) -> list[str]:
    """The equations of a solution, in order: `Natalia sold 48/2 = 24 clips` -> `48/2=24`."""
    return [re.sub(r"[\s$,]", "", found[0]).rstrip(".").replace("x", "*") for found in SUM.finditer(solution)]


def answers(row: dict[str, Any]) -> list[str]:
    """The written solution and its sums, each ending on the boxed answer; none where the sums do not lead to it."""
    lines = sums(row["solution"])
    if not lines or parse_number(lines[-1].rpartition("=")[2]) != parse_number(row["answer"]):
        return []
    return [f"{body}\n\\boxed{{{row['answer']}}}" for body in (row["solution"].strip(), "\n".join(lines))]


def main(
    source: Path,
    target: Path,
    longest: Annotated[int, typer.Option(help="Most characters of a question.")] = 10_000,
    limit: Annotated[int, typer.Option(help="Most questions.")] = 10_000,
    skip: Annotated[int, typer.Option(help="Usable questions to leave for something else.")] = 0,
) -> None:
    rows = (row for _, row in numbered_rows(str(source)))
    usable = [(row, told) for row in rows if len(row["question"]) <= longest and (told := answers(row))][skip : skip + limit]
    traces = [
        {"id": row["id"], "question": row["question"], "answer": row["answer"], "response": body, "correct": True}
        for row, told in usable
        for body in told
    ]
    target.write_text("".join(json.dumps(trace, ensure_ascii=False) + "\n" for trace in traces), encoding="utf-8")
    typer.echo(f"{len(traces)} traces of {len(usable)} questions in {target}")


if __name__ == "__main__":
    typer.run(main)
