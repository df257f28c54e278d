"""Traces for a cold start from GSM8K's own solutions: each question answered twice, more and less of it in words.

    python examples/gsm8k_traces.py gsm8k_train.jsonl traces.jsonl --longest 200
    sbtiny data build rows.jsonl --traces traces.jsonl --limit 10000 --model smollm2-135m
    sbtiny sft --model smollm2-135m --data rows.jsonl --set sft.contrast=1

An answer has its first lines as they were written and of the others the sums alone; how many is drawn for each. Two lengths of an answer to
one question are what a number can tell apart, and drawn ones are of every length (dev/LOG.md, 21 and 27). Input: JSON Lines with id,
question, answer and solution; a question whose sums do not lead to its answer is left out.
"""

import random
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sbtiny.runs import write_jsonl
from sbtiny.tasks.numbers import parse_number
from sbtiny.tasks.sources import numbered_rows

NUMBER = r"\$?\(?\s?\d[\d.,]*\s?[%)]?"
SUM = re.compile(rf"{NUMBER}(?:\s?[-+*/x]\s?{NUMBER})+\s?=\s?\$?\d[\d.,]*")


def sums(text: str) -> list[str]:
    """The equations of a text, in order: `Natalia sold 48/2 = 24 clips` -> `48/2=24`."""
    return [re.sub(r"[\s$,]", "", found[0]).rstrip(".").replace("x", "*") for found in SUM.finditer(text)]


def answers(row: dict[str, Any]) -> list[str]:
    """The solution with none of its lines in words, with the first, and so on to all, each boxed; none where the sums lead elsewhere."""
    lines = [line for line in row["solution"].split("\n") if sums(line)]
    if not lines or parse_number(sums(lines[-1])[-1].rpartition("=")[2]) != parse_number(row["answer"]):
        return []
    told = [[*lines[:n], *(each for line in lines[n:] for each in sums(line))] for n in range(len(lines) + 1)]
    return ["\n".join([*body, f"\\boxed{{{row['answer']}}}"]) for body in told]


def traces(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Two answers of the question, drawn by its id."""
    asked = {key: row[key] for key in ("id", "question", "answer")}
    found = answers(row)
    return [asked | {"response": body, "correct": True} for body in random.Random(row["id"]).sample(found, min(2, len(found)))]


def main(
    source: Path,
    target: Path,
    longest: Annotated[int, typer.Option(help="Most characters of a question.")] = 10_000,
) -> None:
    rows = [trace for _, row in numbered_rows(str(source)) if len(row["question"]) <= longest for trace in traces(row)]
    write_jsonl(target, rows)
    typer.echo(f"{len(rows)} traces of {len({row['id'] for row in rows})} questions in {target}")


if __name__ == "__main__":
    typer.run(main)
