"""Rows that keep a policy's answers whole while its budgets are trained: well-formed answers that it wrote to training questions.

    python examples/gsm8k_0.5b/answers.py RUN/samples.jsonl QUESTIONS.jsonl ROWS.jsonl --model MODEL

Right or wrong: they teach nothing new. Their budgets are *given*, read and not learnt.
"""

import argparse
from pathlib import Path

from sbtiny import runs
from sbtiny.budget.protocol import parse
from sbtiny.coldstart.sample_correct import fill_row
from sbtiny.errors import InputError, run_script
from sbtiny.models.load import load_tokenizer
from sbtiny.models.prompt import continuation_ids
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import read_rows

FIELDS = {"text": str, "step": int, "length": int, "question": str}
FIRST_STEP = 10  # of GRPO: before it many answers are malformed
LONGEST = 380  # tokens; the run's longest answer was cut at 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("samples", "questions"):
        parser.add_argument(name)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    runs.check_writable(args.rows, args.samples, args.questions)
    tokenizer = load_tokenizer(args.model)
    by_text = {q.question: q for q in load_questions(args.questions, "train")}
    rows = []
    for number, sample in enumerate(read_rows(args.samples), 1):
        if wrong := [key for key, kind in FIELDS.items() if not isinstance(sample.get(key), kind)]:
            raise InputError(f"{args.samples}, row {number} has no {wrong[0]}: give the samples.jsonl of a run of GRPO")
        parsed = parse(sample["text"])
        if sample["step"] < FIRST_STEP or not parsed.ok or sample["length"] > LONGEST:
            continue
        if not (question := by_text.get(sample["question"])):
            raise InputError(f"{args.samples}, row {number}: its question is not in {args.questions}: give the file GRPO was trained on")
        rows.append(fill_row(question, parsed.body, len(continuation_ids(tokenizer, parsed.body))) | {"given": True})
    if not rows:
        raise InputError(f"{args.samples} has no well-formed answer from step {FIRST_STEP} on: give that of a longer run")
    runs.write_jsonl(args.rows, rows)
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    run_script(main)
