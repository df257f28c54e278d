"""Rows for a cold start whose budget is foretold: a question's own correct answers, each told at several lengths.

    python examples/gsm8k_0.5b/rows.py QUESTIONS.jsonl ROWS.jsonl --model MODEL [--limit N] [--budgets BUDGETS.jsonl]

One sample's length is mostly chance, so what a question's budget is learnt from is the correct answer of median length, told without its
preamble: the *stated* row. The others are *given* rows, whose budget is read and not learnt to be stated, so that a user's number
reaches further than the model's own habit: the longest answer in full, the shortest by its sums alone, one with some of its sums in words.

BUDGETS.jsonl gets a row of a budget alone for each question, foretold from the lengths of all of them (`data.budget_quantile`).
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.coldstart.foretell import check_foretellable, foretell_budgets
from sbtiny.coldstart.sample_correct import classify_answer, make_row, sample_answers
from sbtiny.errors import InputError, run_script
from sbtiny.load_settings import load_settings
from sbtiny.models.prompt import special_tokens
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import load_verifier

DISPLAY = re.compile(r"\\\[.*?\\\]", re.DOTALL)
BOXED = re.compile(r"\\boxed\{[^{}]*\}")


def paragraphs(answer: str) -> list[str]:
    """Its paragraphs, a displayed formula with the line that leads to it."""
    return [part.strip() for part in re.split(r"\n\s*\n", answer) if part.strip()]


def without_preamble(answer: str) -> str:
    """From the first paragraph that reckons on."""
    parts = paragraphs(answer)
    first = next((i for i, part in enumerate(parts) if DISPLAY.search(part) or "=" in part), 0)
    return "\n\n".join(parts[first:])


def by_sums(answer: str, told: int = 0) -> str:
    """Its first `told` reckoning paragraphs in words, the others by their displayed formulas alone, the last of which holds the answer."""
    parts = paragraphs(without_preamble(answer))
    short = [" ".join(" ".join(DISPLAY.findall(part)).split()) for part in parts[told:]]
    if "\\boxed" not in (short[-1] if short else "") and (boxed := BOXED.search(parts[-1])):
        short.append(f"\\[ {boxed.group()} \\]")
    return "\n\n".join([*parts[:told], *(line for line in short if line)])


def rows_of(policy: Policy, question: Question, answers: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """The rows of a question from its correct answers."""
    ordered = sorted(answers, key=lambda text: len(policy.encode(text)))
    middle = ordered[(len(ordered) - 1) // 2]
    mixed = by_sums(middle, rng.randint(1, max(1, len(paragraphs(without_preamble(middle))) - 1)))
    told = [(without_preamble(middle), False), (ordered[-1], True), (by_sums(ordered[0]), True), (mixed, True)]
    found: dict[int, dict[str, Any]] = {}
    for text, given in told:
        if "\\boxed" in text:
            row = make_row(policy, question, text) | ({"given": True} if given else {})
            found.setdefault(row["budget"], row)
    return list(found.values())


def count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def sample(policy: Policy, questions: list[Question], samples: int, room: int) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """Right answers, and lengths of all that ended, right or wrong, without their preambles; both by the question's id."""
    verify, special = load_verifier("auto"), special_tokens(policy.tokenizer)
    asked = [q for q in questions for _ in range(samples)]
    requests = [policy.request(q.question, room, seed=i, system=q.system) for i, q in enumerate(asked)]
    right: dict[str, list[str]] = {}
    lengths: dict[str, list[int]] = {}
    for question, episode in zip(asked, sample_answers(policy, requests, 0.7, lambda *_: None), strict=True):
        text, kind = episode.solution.strip(), classify_answer(episode, question, verify, special)
        if kind == "cut" or "```" in text:  # what code prints is guessed
            continue
        if told := len(policy.encode(without_preamble(text))):
            lengths.setdefault(question.id, []).append(told)
        if kind == "row":
            right.setdefault(question.id, []).append(text)
    return right, lengths


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--limit", type=count)
    parser.add_argument("--budgets", type=Path)
    parser.add_argument("--samples", type=count, default=6)
    parser.add_argument("--slots", type=count, default=512)
    parser.add_argument("--room", type=count, default=480, help="longest answer, in tokens")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    for file in filter(None, (args.rows, args.budgets)):
        runs.check_writable(file, args.questions)
    if args.budgets and args.rows.resolve() == args.budgets.resolve():
        raise InputError(f"ROWS and --budgets are both {args.rows}: give each a file of its own")
    questions = load_questions(args.questions, "train", args.limit)
    settings = load_settings(overrides=[("model", args.model), ("four_bit", False)])
    policy = load_policy(args.model, settings, args.slots, trainable=True)  # a .gguf file too is loaded to be read, not by llama.cpp
    policy.states_budget = False  # its adapter is new, so it is the plain model
    if args.budgets:
        check_foretellable(policy, questions)
    right, lengths = sample(policy, questions, args.samples, args.room)
    answers = args.samples * len(questions)
    if not right:
        raise InputError(f"none of {answers} answers is right: give easier questions, a stronger --model, or a higher --room")
    by_id = {q.id: q for q in questions}
    rows = [row for name, texts in right.items() for row in rows_of(policy, by_id[name], texts, random.Random(name))]
    if not rows:
        raise InputError("no right answer has a \\boxed result, which the rows end with: give a --model whose answers box it")
    runs.write_jsonl(args.rows, rows)
    if args.budgets:
        runs.write_jsonl(args.budgets, foretell_budgets(policy, questions, lengths, 0.5))
    counts = {"questions": len(questions), "answers": answers, "right": sum(map(len, right.values())), "with_right": len(right)}
    stated = [row["budget"] for row in rows if not row.get("given")]
    print(json.dumps(counts | {"rows": len(rows), "stated_mean": sum(stated) / max(1, len(stated))}))


if __name__ == "__main__":
    run_script(main)
