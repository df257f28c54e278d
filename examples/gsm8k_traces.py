"""Traces for a cold start from GSM8K's own solutions: two answers to each question, with more and with fewer words.

    python examples/gsm8k_traces.py gsm8k_train.jsonl traces.jsonl --longest 200
    sbtiny data build rows.jsonl --traces traces.jsonl --limit 10000 --model smollm2-135m
    sbtiny sft --model smollm2-135m --data rows.jsonl --set sft.contrast=1

An answer has its first lines in words and only the sums of the others; the number of lines in words is drawn. With two answers of different
length, only the budget explains the difference (dev/LOG.md, 21 and 27). Input: JSON Lines with id, question, answer and solution. A
question is left out when its sums do not lead to its answer.
"""

import random
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sbtiny.errors import run_script
from sbtiny.runs import write_jsonl
from sbtiny.tasks.numbers import parse_number
from sbtiny.tasks.sources import numbered_rows

NUMBER = r"\$?\(?\s?\d[\d.,]*\s?[%)]?"
SUM = re.compile(rf"{NUMBER}(?:\s?[-+*/x]\s?{NUMBER})+\s?=\s?\$?\d[\d.,]*")


def sums(text: str) -> list[str]:
    """Find the equations of a text, in order: `Natalia sold 48/2 = 24 clips` -> `48/2=24`."""
    return [re.sub(r"[\s$,]", "", match[0]).rstrip(".").replace("x", "*") for match in SUM.finditer(text)]


def answers(row: dict[str, Any]) -> list[str]:
    """Write the solution with 0, 1, ... all lines in words, each boxed. No answers where the sums do not lead to the answer."""
    lines = [line for line in row["solution"].split("\n") if sums(line)]
    if not lines or parse_number(sums(lines[-1])[-1].rpartition("=")[2]) != parse_number(row["answer"]):
        return []
    bodies = [[*lines[:n], *(equation for line in lines[n:] for equation in sums(line))] for n in range(len(lines) + 1)]
    return ["\n".join([*body, f"\\boxed{{{row['answer']}}}"]) for body in bodies]


def traces(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw two answers of the question, seeded by its id."""
    question = {key: row[key] for key in ("id", "question", "answer")}
    bodies = answers(row)
    return [question | {"response": body, "correct": True} for body in random.Random(row["id"]).sample(bodies, min(2, len(bodies)))]


def main(
    source: Path,
    target: Path,
    longest: Annotated[int, typer.Option(help="Most characters of a question.")] = 10_000,
) -> None:
    rows = [trace for _, row in numbered_rows(str(source)) if len(row["question"]) <= longest for trace in traces(row)]
    write_jsonl(target, rows)
    typer.echo(f"{len(rows)} traces of {len({row['id'] for row in rows})} questions in {target}")


if __name__ == "__main__":
    run_script(lambda: typer.run(main))
