"""Rows that win back the sums: a run's own right answers, asked as it is and for more, each labelled with its own length.

    python examples/gsm8k_0.5b/right_answers.py RUN ROWS.jsonl OUT.jsonl --budgets BUDGETS.jsonl [--base MODEL] [--share 0.93] [--seed 0]

The questions are those of ROWS.jsonl (rows.py), to which the initial model found an answer. Each is answered three times: twice with the
budget that the run states, once told 2.4 times that. Right answers become *given* rows; 600 of the first kind, all of the second. 150 long
answers of ROWS.jsonl join, since a run that is told to write more than it ever did has nothing to learn it from. 420 rows of
BUDGETS.jsonl, times `share`, keep the budgets where they are.
"""

import random
from pathlib import Path
from typing import Any

from own_answers import ROOM, USUAL_BUDGET, draw, load_run, read_budgets, run_parser, scale_budgets

from sbtiny import runs
from sbtiny.coldstart.rows import read_labelled
from sbtiny.coldstart.sample_correct import classify_answer, make_row
from sbtiny.errors import InputError, run_script
from sbtiny.models.prompt import special_tokens
from sbtiny.rollout.episode import Episode, Sampling
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import load_verifier

SAMPLING = Sampling(0.7, 0.95)
DRAWS, TIMES, SLOTS = 2, 2.4, 128
SHORT, LONG, BUDGETS = 600, 150, 420  # most rows of each kind
LONG_TOKENS = 240  # a row of rows.py is long from here on


def keep_right(policy: Policy, questions: list[Question], episodes: list[Episode]) -> list[dict[str, Any]]:
    """A given row for each right answer, without repetitions."""
    verify, special, rows = load_verifier("auto"), special_tokens(policy.tokenizer), {}
    for question, episode in zip(questions, episodes, strict=True):
        if episode.parsed.ok and classify_answer(episode, question, verify, special) == "row":
            text = episode.solution.strip()
            rows[question.id, text] = make_row(policy, question, text) | {"given": True}
    return list(rows.values())


def answer_short_and_long(policy: Policy, questions: list[Question], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The right answers with the run's own budgets, and those told TIMES their mean."""
    asked = [question for question in questions for _ in range(DRAWS)]
    own = policy.sample([policy.request(q.question, ROOM, 10_000 * seed + i, system=q.system) for i, q in enumerate(asked)], SAMPLING)
    budgets, after = [episode.parsed.budget or USUAL_BUDGET for episode in own], 10_000 * seed + len(asked)
    told = [round(TIMES * sum(budgets[i : i + DRAWS]) / DRAWS) for i in range(0, len(asked), DRAWS)]
    more = [policy.request(q.question, ROOM, after + i, told[i], system=q.system) for i, q in enumerate(questions)]
    return keep_right(policy, asked, own), keep_right(policy, questions, policy.sample(more, SAMPLING))


def main() -> None:
    parser = run_parser(__doc__, "rows", "out", share=0.93)
    parser.add_argument("--budgets", required=True)
    args = parser.parse_args()
    rng, file = random.Random(args.seed), Path(args.out)
    runs.check_writable(file, args.rows, args.budgets)
    rows, known = read_labelled(args.rows), read_budgets(args.budgets)
    if any(not isinstance(row.get("answer"), str) for row in rows):
        raise InputError(f"{args.rows} has rows whose answer is no text: give what rows.py wrote")
    policy = load_run(args.run, args.base, SLOTS)
    questions = list({row["id"]: Question(row["id"], row["question"], row["answer"], system=row.system) for row in rows}.values())
    short, long = answer_short_and_long(policy, questions, args.seed)
    if not short:
        raise InputError(f"{args.run} has no right answer to the questions of {args.rows}: train it for longer first")
    ours = [row for row in rows if row.get("given") and row["budget"] >= LONG_TOKENS]
    answers = [*draw(short, SHORT, rng), *long, *draw(ours, LONG, rng)]
    budgets = scale_budgets(draw(known, BUDGETS, rng), args.share)
    runs.write_jsonl(file, answers + budgets)
    print(f"{len(answers)} answers, {len(budgets)} budgets")


if __name__ == "__main__":
    run_script(main)
