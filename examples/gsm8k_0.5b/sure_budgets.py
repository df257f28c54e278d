"""Rows that make a run's budget surer: the middle of several that it states, beside right answers of its own.

    python examples/gsm8k_0.5b/sure_budgets.py RUN QUESTIONS.jsonl OUT.jsonl [--base MODEL] [--share 1] [--seed 0]

A stated budget is a sample: two for one question differ. The first 400 questions are answered three times, as by right_answers.py; right
answers become *given* rows. For each of the others the run states six budgets, and their geometric mean, times `share`, becomes a row of a
budget alone. A share below 1 is for a run whose answers are shorter than its budgets.
"""

from pathlib import Path
from statistics import geometric_mean
from typing import Any

from own_answers import load_run, run_parser
from right_answers import SLOTS, answer_short_and_long

from sbtiny import runs
from sbtiny.coldstart.foretell import round_budget
from sbtiny.coldstart.sample_correct import fill_row
from sbtiny.errors import InputError, run_script
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import Question

ANSWERED, DRAWS = 400, 6
SAMPLING = Sampling(0.6, 0.95)  # as the budget is stated in use


def find_middle(budgets: list[int | None], share: float) -> int | None:
    """`share` of the geometric mean of the budgets that were stated, in two digits; None where none was."""
    known = [budget for budget in budgets if budget]
    return round_budget(share * geometric_mean(known)) if known else None


def middle_budgets(policy: Policy, questions: list[Question], share: float, seed: int) -> list[dict[str, Any]]:
    """A row of a budget alone for each question for which the run states one."""
    asked = [q for q in questions for _ in range(DRAWS)]
    requests = [policy.budget_request(q.question, 1_000_003 * seed + i, q.system) for i, q in enumerate(asked)]
    stated = [episode.parsed.budget for episode in policy.sample(requests, SAMPLING)]
    middles = [find_middle(stated[i * DRAWS : (i + 1) * DRAWS], share) for i in range(len(questions))]
    return [fill_row(question, None, middle) for question, middle in zip(questions, middles, strict=True) if middle]


def main() -> None:
    args = run_parser(__doc__, "questions", "out", share=1.0).parse_args()
    runs.check_writable(Path(args.out), args.questions)
    questions = load_questions(args.questions, "train")
    if len(questions) <= ANSWERED:
        raise InputError(f"{args.questions} has {len(questions)} questions, of which the first {ANSWERED} are answered: give more")
    policy = load_run(args.run, args.base, SLOTS)
    short, long = answer_short_and_long(policy, questions[:ANSWERED], args.seed)
    if not short:
        raise InputError(f"{args.run} has no right answer to the first {ANSWERED} questions: train it for longer first")
    budgets = middle_budgets(policy, questions[ANSWERED:], args.share, args.seed)
    runs.write_jsonl(Path(args.out), [*short, *long, *budgets])
    print(f"{len(short) + len(long)} answers, {len(budgets)} budgets")


if __name__ == "__main__":
    run_script(main)
