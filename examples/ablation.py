"""The paper's ablation and the rival length rewards on the bundled model; every cell starts from the same cold start.

    python examples/ablation.py        (about 5 hours on 2 idle cores; can be stopped and restarted: finished cells are not rerun)
    python examples/ablation.py --only full,kimi --seeds 0 --steps 60

runs/ablation/seedS/CELL holds each run with its eval.json; docs/results.md gets the table of the finished cells.

*Equal tokens.* Every cell is also measured with its answers cut at CEILINGS tokens (the wrap-up is injected, the answer read from the
text after it) and given SCALES of its stated budget. Each measurement is a point of mean tokens and accuracy. A cell's accuracy at T tokens
is the upper hull of its points there (examples/frontier.py). T is the mean length of `full` on the same questions, neither cut nor given.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from frontier import accuracy_at
from rival_rewards import arora_zanette, hard_cap, kimi, l1_exact, l1_max

from sbtiny import runs
from sbtiny.budget.protocol import parse_budget_option
from sbtiny.budget.reward import DEFAULT, Reward, RewardConfig, compute_reward
from sbtiny.coldstart.run import run_sft
from sbtiny.config import EvalSettings, Settings
from sbtiny.errors import InputError, run_script
from sbtiny.evaluation import evaluate
from sbtiny.grpo.group_reward import GroupReward, RewardInput, scalar_reward
from sbtiny.grpo.run import run_grpo
from sbtiny.load_settings import load_settings, parse_assignment
from sbtiny.progress import console, quieten_libraries
from sbtiny.rollout.load_policy import base_info, load_policy
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.verify import load_verifier

CEILINGS = (16, 24, 32, 48, 64, 96, 128)
SCALES = ("0.25x", "0.5x", "2x")
BEGIN, END = "<!-- ablation: written by examples/ablation.py -->", "<!-- /ablation -->"

# ---- rewards ---------------------------------------------------------------------------------------------------------

NO_BOUND = RewardConfig(r_b=0.0)
L1_ALPHA = 0.0003 * 4000 / 640  # the paper's, scaled to our longest answers
CAP = 64  # tokens; the hardest questions need slightly less


def one_by_one(reward: Callable[[RewardInput, float, float], Reward]) -> GroupReward:
    """Apply a reward (of answer, b_max, alpha) to each answer alone."""
    return lambda _, answers, b_max, alpha: [reward(answer, b_max, alpha) for answer in answers]


def compared(reward: Callable[[list[int], list[bool]], list[float]]) -> GroupReward:
    """Apply a reward of lengths and correctness to the well-formed answers of a group; malformed ones earn r_f."""

    def rewards(_: str, answers: Sequence[RewardInput], b_max: float, alpha: float) -> list[Reward]:
        well_formed = [a for a in answers if a.budget is not None]
        totals = iter(reward([a.length for a in well_formed], [a.correct for a in well_formed]))
        return [scalar_reward(a.budget, 0.0 if a.budget is None else next(totals)) for a in answers]

    return rewards


def budget_penalty(answer: RewardInput, b_max: float, alpha: float) -> Reward:
    """Correctness and P_B."""
    over = answer.budget is not None and answer.budget > b_max
    return scalar_reward(answer.budget, answer.correct + (DEFAULT.r_b if over else 0.0))


def adherence(answer: RewardInput, b_max: float, alpha: float) -> Reward:
    """Correctness and PreB."""
    return compute_reward(**asdict(answer), b_max=b_max, alpha=alpha, config=NO_BOUND)


def towards(reward: Callable[..., float]) -> GroupReward:
    """Apply an L1 reward with the given budget as its target."""
    return one_by_one(lambda a, *_: scalar_reward(a.budget, reward(a.length, a.correct, a.budget or 0, L1_ALPHA)))


def capped(answer: RewardInput, b_max: float, alpha: float) -> Reward:
    return scalar_reward(answer.budget, hard_cap(answer.length, answer.correct, CAP))


# ---- cells -----------------------------------------------------------------------------------------------------------

# Nothing beyond the paper: no relabelling, flat outside the window, peak on its edge, no given budgets, alpha falls to the end.
PAPER = {
    "relabel_per_group": 0,
    "relabel_per_user_group": 0,
    "outside_slope": 0.0,
    "reward_peak": 0.0,
    "user_share": 0.0,
    "alpha_hold": 0.0,
}
GIVEN = PAPER | {"user_share": 1.0}  # L1 needs a target length: every budget is given


@dataclass(frozen=True, slots=True)
class Cell:
    """A run of the ablation: description, changed `grpo` settings, reward (None: SelfBudgeter's), and start."""

    what: str
    grpo: dict[str, Any] = field(default_factory=dict)
    reward: GroupReward | None = None
    cold_start: bool = True
    trained: bool = True


CELLS = {
    "sft": Cell("cold start only: SFT to state the budget", trained=False),
    "format": Cell("format only", PAPER, one_by_one(lambda a, *_: scalar_reward(a.budget, 0.0))),
    "correct": Cell("+ correctness", PAPER, one_by_one(lambda a, *_: scalar_reward(a.budget, float(a.correct)))),
    "preb": Cell("+ correctness + PreB", PAPER, one_by_one(adherence)),
    "penalty": Cell("+ correctness + P_B", PAPER, one_by_one(budget_penalty)),
    "paper": Cell("all of the paper: alpha linear", PAPER),
    "cosine": Cell("all, alpha by a cosine", PAPER | {"alpha_schedule": "cosine"}),
    "fixed": Cell("all, alpha fixed at alpha_end", PAPER | {"alpha_schedule": "fixed"}),
    "full": Cell("sbtiny's defaults: all, without the dead zone"),
    "cold": Cell("the same without the cold start", cold_start=False),
    "l1_exact": Cell("L1-Exact", GIVEN, towards(l1_exact)),
    "l1_max": Cell("L1-Max", GIVEN, towards(l1_max)),
    "arora": Cell("Arora & Zanette, alpha 0.1", PAPER, compared(arora_zanette)),
    "kimi": Cell("Kimi k1.5", PAPER, compared(kimi)),
    "cap": Cell(f"hard cap of {CAP} tokens, as ThinkPrune", PAPER, one_by_one(capped)),
}


# ---- running ---------------------------------------------------------------------------------------------------------


def has_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def start_of(cell: Cell, settings: Settings, root: Path) -> Path:
    """Make or find the run that a cell starts from: the seed's cold start, shared by its cells, or an untrained adapter."""
    folder = root / ("start" if cell.cold_start else "untrained")
    if (folder / "adapter").is_dir():
        return folder
    if cell.cold_start:
        return run_sft(settings, folder, resume=has_run(folder))
    policy = load_policy(settings.model, settings, settings.grpo.max_num_seqs, trainable=True)
    if not has_run(folder):
        runs.create_run("sft", folder, settings, **base_info(policy))
    policy.model.save_pretrained(folder / ".adapter")
    (folder / ".adapter").replace(folder / "adapter")
    return folder


def keep_settings(file: Path, settings: Settings) -> None:
    """Raise InputError where finished cells were made with other settings, as the cells would not compare."""
    if file.is_file() and file.read_text(encoding="utf-8") != settings.as_yaml():
        raise InputError(f"{file} holds other settings than these: give those again, or another --output")
    runs.write_text(file, settings.as_yaml())


def run_cell(name: str, settings: Settings, root: Path) -> dict[str, Any]:
    """Train and measure a cell, unless done. Alarms are off, because some cells are meant to collapse."""
    cell, folder, started = CELLS[name], root / name, time.perf_counter()
    if (folder / "eval.json").is_file():
        return runs.read_json(folder / "eval.json")
    start = start_of(cell, settings, root)
    changed = replace(settings, grpo=replace(settings.grpo, alarm_patience=settings.grpo.steps + 1, **cell.grpo))
    if cell.trained and not (folder / "adapter").is_dir():
        run_grpo(changed, start, folder, resume=has_run(folder), force=True, reward=cell.reward)
    result = measure(folder if cell.trained else start, settings) | {"seconds": round(time.perf_counter() - started, 1)}
    runs.write_json(folder / "eval.json", result)
    return result


def measure(run: Path, settings: Settings) -> dict[str, Any]:
    """Evaluate a run with stated budgets; `points` are (mean tokens, accuracy) of it and of each ceiling and scale."""
    e = settings.eval
    policy = load_policy(str(run), settings, e.max_num_seqs)
    questions, verify = load_questions(e.task, e.split, e.limit, settings.seed), load_verifier(e.verifier)
    e = evaluate.with_max_tokens(policy, questions, e, settings.seed, SCALES[-1])

    def one(eval_settings: EvalSettings) -> dict[str, Any]:
        title = f"{run.name}, budget {eval_settings.budget}, ceiling {eval_settings.ceiling or 'none'}"
        choice = parse_budget_option(eval_settings.budget)
        samples = evaluate.evaluate(policy, questions, verify, choice, eval_settings, settings.seed, title)[1]
        return evaluate.eval_record(samples, str(run), eval_settings, settings.seed)

    uncut = one(e)
    others = [*(replace(e, ceiling=n) for n in CEILINGS), *(replace(e, budget=scale) for scale in SCALES)]
    records = [uncut, *map(one, others)]
    return uncut | {"points": [(x["mean_tokens"], x["accuracy"]) for x in records]}


# ---- the table -------------------------------------------------------------------------------------------------------

MEASURES = {"accuracy %": ("accuracy", 100, 1), "tokens": ("mean_tokens", 1, 1), "budget": ("mean_budget", 1, 1)} | {
    "within 50 %": ("within_50", 100, 1), "format %": ("format_rate", 100, 1), "Spearman(budget, level)": ("spearman_budget_level", 1, 2),
    "accuracy % at the tokens of full": ("at_full", 100, 1),
}  # fmt: skip


def with_comparison(result: dict[str, Any], full: dict[str, Any] | None) -> dict[str, Any]:
    points = [tuple(point) for point in result["points"]]
    at_full = accuracy_at(points, full["mean_tokens"]) if full else None
    return result | {"within_50": (result["within"] or {}).get("0.5"), "at_full": at_full}


def mean_and_each(values: Sequence[float | None], scale: float, digits: int) -> str:
    """Format mean and values: `33.9 (33.1, 34.0, 34.6)`, a dash for None."""
    texts = ["-" if v is None else f"{scale * v:.{digits}f}" for v in values]
    known = [v for v in values if v is not None]
    mean = f"{scale * sum(known) / len(known):.{digits}f}" if known else "-"
    return f"{mean} ({', '.join(texts)})" if len(texts) > 1 else mean


def table(results: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int], command: str, settings: Settings) -> str:
    """Write the Markdown table: a row a cell, the mean over its finished seeds and, in brackets, each seed."""
    rows = [["cell", "", "seeds", *MEASURES], ["---"] * (3 + len(MEASURES))]
    for name, cell in CELLS.items():
        done = [(seed, results[name, seed]) for seed in seeds if (name, seed) in results]
        if done:
            compared_results = [with_comparison(result, results.get(("full", seed))) for seed, result in done]
            cells = [mean_and_each([result[key] for result in compared_results], scale, digits) for key, scale, digits in MEASURES.values()]
            rows.append([f"`{name}`", cell.what, ", ".join(str(seed) for seed, _ in done), *cells])
    e, g = settings.eval, settings.grpo
    about = (
        f"{g.steps} steps of {g.prompts_per_step} questions x {g.num_generations} answers on `{settings.model}`, "
        f"{e.limit} `{e.split}` questions of {e.task} "
        f"a seed, temperature {e.temperature}, top-p {e.top_p}. Means over seeds, each seed in brackets. All of it at this small scale."
    )
    equal = (
        "*Accuracy at the tokens of full*: the upper hull of a cell's points (stated budgets; cut at "
        f"{', '.join(map(str, CEILINGS))} tokens; given {', '.join(SCALES)} of the stated budget), read at the mean tokens of `full` "
        "with the same seed. The rivals' strengths are their papers', untuned; malformed answers earn -1 everywhere."
    )
    grid = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([BEGIN, "## Ablation", f"    {command}", about, grid, equal, END]) + "\n"


def write_results(file: Path, section: str) -> None:
    """Replace the ablation's section of the file, or append it."""
    old = file.read_text(encoding="utf-8") if file.is_file() else "# Results\n\n"
    if BEGIN in old and END in old:
        before, after = old[: old.index(BEGIN)], old[old.index(END) + len(END) + 1 :]
    else:
        before, after = old.rstrip() + "\n\n", ""
    runs.write_text(file, before + section + after)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(CELLS), help="cells, by commas")
    parser.add_argument("--steps", type=int, help="updates of GRPO in each cell")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--set", action="append", default=[], help="any setting, as section.key=value")
    args = parser.parse_args()
    args.seeds, args.only = [int(seed) for seed in args.seeds.split(",")], args.only.split(",")
    if unknown := [name for name in args.only if name not in CELLS]:
        parser.error(f"no cell {unknown[0]!r}: choose from {', '.join(CELLS)}")
    return args


def main() -> None:
    args = arguments()
    quieten_libraries()
    changed = [parse_assignment(text) for text in args.set] + ([("grpo.steps", args.steps)] if args.steps else [])
    settings = load_settings(overrides=[("four_bit", False), *changed])
    keep_settings(args.output / "settings.yaml", settings)
    options = " ".join(f"--set {key}={value}" for key, value in changed)
    command = f"python examples/ablation.py --seeds {','.join(map(str, args.seeds))} {options}".rstrip()
    todo = [(name, seed) for seed in args.seeds for name in CELLS if name in args.only]
    for index, (name, seed) in enumerate(todo, 1):
        console.print(f"cell {index} of {len(todo)}: {name}, seed {seed}", markup=False)
        run_cell(name, replace(settings, seed=seed), args.output / f"seed{seed}")
        files = {(n, s): args.output / f"seed{s}" / n / "eval.json" for n in CELLS for s in args.seeds}
        results = {key: runs.read_json(file) for key, file in files.items() if file.is_file()}
        write_results(args.results, table(results, args.seeds, command, settings))


if __name__ == "__main__":
    run_script(main)
