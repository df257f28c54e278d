"""Rows that draw a run's budgets together: its own answers to training questions, told less and more, and budgets of a lower quantile.

    python examples/gsm8k_0.5b/own_answers.py RUN QUESTIONS.jsonl ROWS.jsonl [--base MODEL] [--budgets BUDGETS.jsonl] [--share 1] [--seed 0]

Each of 64 questions is answered six times: twice each told 0.5, 1 and 2 times `share` of what the run states for it. Every answer that is
kept is labelled with its own length, as a *given* budget. Kept are those nearest to what they were told, right ones first. BUDGETS.jsonl
holds rows of a budget alone (rows.py); 200 of them join, times `share`.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.coldstart.foretell import round_budget
from sbtiny.coldstart.rows import read_labelled
from sbtiny.coldstart.sample_correct import classify_answer, make_row
from sbtiny.errors import InputError, run_script
from sbtiny.load_settings import load_settings
from sbtiny.models.prompt import special_tokens
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import load_verifier

QUESTIONS, DRAWS, BUDGETS = 64, 2, 200
ROOM = 480  # longest answer, in tokens
USUAL_BUDGET = 180  # where a run states none
KEPT = {0.5: (40, 0.5), 1: (40, 0.3), 2: (40, 0.5)}  # by the multiple told: rows, and how far off a right answer comes before wrong ones

Told = tuple[bool, int, dict[str, Any]]  # whether it is right, the budget told, the row


def answer_told(policy: Policy, questions: list[Question], share: float, seed: int) -> dict[float, list[Told]]:
    """Well-formed answers told KEPT's multiples of `share` of the stated budget, by the multiple."""
    verify, special = load_verifier("auto"), special_tokens(policy.tokenizer)
    asked = policy.sample([policy.budget_request(q.question, i, q.system) for i, q in enumerate(questions)], Sampling(0.0, 1.0))
    budgets = [(episode.parsed.budget or USUAL_BUDGET) * share for episode in asked]
    told = [(q, max(1, round(b * times)), times) for q, b in zip(questions, budgets, strict=True) for times in KEPT for _ in range(DRAWS)]
    requests = [policy.request(q.question, ROOM, 10_000 * seed + i, budget, system=q.system) for i, (q, budget, _) in enumerate(told)]
    found: dict[float, list[Told]] = {times: [] for times in KEPT}
    for (question, budget, times), episode in zip(told, policy.sample(requests, Sampling(0.7, 0.95)), strict=True):
        kind = classify_answer(episode, question, verify, special)
        if kind != "cut" and episode.parsed.ok:
            row = make_row(policy, question, episode.solution.strip()) | {"given": True}
            found[times].append((kind == "row", budget, row))
    return found


def keep_nearest(answers: list[Told], count: int, furthest: float) -> list[dict[str, Any]]:
    def order(answer: Told) -> tuple[bool, float]:
        right, told, row = answer
        off = abs(row["budget"] - told) / told
        return not right or off > furthest, off

    return [row for _, _, row in sorted(answers, key=order)[:count]]


def draw(items: list[Any], most: int, rng: random.Random) -> list[Any]:
    return rng.sample(items, min(most, len(items)))


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def run_parser(description: str, *files: str, share: float) -> argparse.ArgumentParser:
    """The arguments of a script that reads a run and writes rows, which the last of `files` names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    for name in files:
        parser.add_argument(name)
    parser.add_argument("--base")
    parser.add_argument("--share", type=positive, default=share)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_budgets(file: str | None) -> list[dict[str, Any]]:
    """Rows of a budget alone; none without a file. Raises InputError for others."""
    known = read_labelled(file) if file else []
    if any(row["response"] is not None for row in known):
        raise InputError(f"{file} has rows with a response: give what rows.py --budgets wrote")
    return known


def load_run(run: str, base: str | None, slots: int) -> Policy:
    return load_policy(run, load_settings(overrides=[("four_bit", False), *([("base", base)] if base else [])]), slots)


def scale_budgets(rows: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    return [row | {"budget": round_budget(row["budget"] * share)} for row in rows]


def main() -> None:
    parser = run_parser(__doc__, "questions", "rows", share=1.0)
    parser.add_argument("--budgets")
    args = parser.parse_args()
    rng, file = random.Random(args.seed), Path(args.rows)
    runs.check_writable(file, args.questions, args.budgets)
    known = read_budgets(args.budgets)
    policy = load_run(args.run, args.base, QUESTIONS)
    questions = draw(load_questions(args.questions, "train"), QUESTIONS, rng)
    answers = answer_told(policy, questions, args.share, args.seed)
    rows = [row for times, (count, furthest) in KEPT.items() for row in keep_nearest(answers[times], count, furthest)]
    if not rows:
        raise InputError(f"{args.run} has no well-formed answer to {len(questions)} questions that ended: train it for longer first")
    budgets = draw(known, BUDGETS, rng)
    runs.write_jsonl(file, rows + scale_budgets(budgets, args.share))
    print(f"{len(rows)} answers, {len(budgets)} budgets")


if __name__ == "__main__":
    run_script(main)
