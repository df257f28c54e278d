"""The stages of the method, each from settings to a run folder: data build -> sft -> grpo -> eval (`demo.py` runs them all)."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from sbtiny import locks, runs
from sbtiny.budget.metrics import Sample
from sbtiny.budget.protocol import parse_budget_option
from sbtiny.config import Settings
from sbtiny.evaluation import evaluate
from sbtiny.evaluation import cuts as cutting
from sbtiny.export.template_check import check_prompts
from sbtiny.models.aliases import lasting
from sbtiny.models.prompt import check_texts
from sbtiny.rollout.load_policy import open_policy, trained_on
from sbtiny.progress import console
from sbtiny.rollout.episode import Episode
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.leaks import Item, without_heldout
from sbtiny.tasks.sources import Question, load_questions
from sbtiny.tasks.traces import Trace, read_traces, unjudged
from sbtiny.tasks.verify import check_references, load_verifier
from sbtiny.training import checkpoint
from sbtiny.coldstart import sample_correct, trainer as sft
from sbtiny.grpo import trainer as grpo, preflight, rollouts
from sbtiny import distributed
from sbtiny.training.out_of_memory import fitting
from sbtiny.training.interrupt import going_on, keeping
from sbtiny.coldstart.rows import read_labelled
from sbtiny.grpo.group_reward import GroupReward

SWEEP = ("0.5x", "1x", "2x", "4x")


def build_data(
    settings: Settings, file: Path, traces: str | None = None, policy: Policy | None = None
) -> sample_correct.Harvest:
    """Label the model's own correct answers, or those of a trace file, and write them as JSONL; evaluation questions are left out.

    Stopped, it goes on from `file`.part where it was. Raises InputError where another process builds that file.
    """
    with locks.hold(locks.beside(file), file):
        return build(settings, file, traces, policy)


def build(settings: Settings, file: Path, traces: str | None, policy: Policy | None) -> sample_correct.Harvest:
    d = settings.data
    source = first_traces(traces, d.limit) if traces else load_questions(d.task, "train", d.limit, settings.seed)
    source, leaked = trainable(source, traces or d.task, settings)
    verify = load_verifier(d.verifier)
    check_references(verify, unjudged(source) if traces else source)
    policy = policy or open_policy(settings.model, settings, d.slots)
    check_prompts(policy.tokenizer, policy.form)
    check_texts(policy.tokenizer, [trace.asked() for trace in source] if traces else source)
    if traces:
        found = sample_correct.label_traces(policy, source, verify, d.keep)
    else:
        policy.engine.check_room(d.max_tokens)
        found = sample_correct.harvest(policy, source, verify, settings, file)
    harvest = replace(found, leaked=leaked)
    runs.write_jsonl(file, harvest.rows)
    file.with_name(f"{file.name}.part").unlink(missing_ok=True)
    told(harvest, file)
    return harvest


def first_traces(path: str, limit: int) -> list[Trace]:
    """The first `limit` traces of a file, and a line where there are more: nobody should find out from the row count."""
    traces = read_traces(path)
    if len(traces) > limit:
        console.print(f"{path}: the first {limit:,} of {len(traces):,} traces; --limit reads more", markup=False)
    return traces[:limit]


def told(harvest: sample_correct.Harvest, file: Path) -> None:
    """What came of it, on stderr: rows, what was dropped and why, lengths by level."""
    why = {"wrong": harvest.wrong, "cut": harvest.cut, "spare": harvest.spare, "evaluation questions": harvest.leaked}
    dropped = ", ".join(f"{count} {name}" for name, count in why.items() if count) or "none"
    ends = f"; turn ends cut off: {harvest.turn_ends}" if harvest.turn_ends else ""
    console.print(f"{len(harvest.rows)} labelled rows of {harvest.sampled} answers in {file}; dropped: {dropped}{ends}", soft_wrap=True)
    table = Table("level", "rows", "accepted", "p10", "p50", "p90", "longest", box=None, title="tokens by level")
    for row in harvest.levels():
        lengths = ("-" if row[key] is None else f"{row[key]:.0f}" for key in ("p10", "p50", "p90", "p100"))
        table.add_row(str(row["level"]), str(row["rows"]), f"{row['accepted']:.1%}", *lengths)
    console.print(table)


def trainable(items: list[Item], source: str, settings: Settings) -> tuple[list[Item], int]:
    """The items that no evaluation asks, and how many it does; the generated task keeps its splits apart by itself."""
    e = settings.eval
    if source == e.task == "arithmetic":
        return items, 0
    return without_heldout(items, e.task, e.split, lambda said: console.print(said, markup=False, style="yellow"), settings.seed)


def run_sft(settings: Settings, output: Path | None, resume: bool = False) -> Path:
    """Cold start into a run folder; without `sft.data` the rows are sampled first and kept in it as data.jsonl.

    Nothing is left of the folder where something is wrong. Raises InputError where another process trains there.
    """
    distributed.join()
    with distributed.claim("sft", output) as folder:
        sft_into(folder, settings, resume and output is not None)
    return folder


def sft_into(folder: Path, settings: Settings, resume: bool) -> None:
    """Cold start in a folder that this process has to itself. Everything that can be wrong is read before anything is written."""
    settings = distributed.once(lambda: replace(settings, model=lasting(settings.model)))  # its micro-batch may be of what one process saw free
    kept = folder / "data.jsonl"
    given = settings.sft.data or (str(kept) if resume and kept.is_file() else None)
    rows = read_labelled(given) if given else []
    if settings.sft.data:
        rows, _ = trainable(rows, settings.sft.data, settings)
    questions = [] if given else load_questions(settings.data.task, "train", 1, settings.seed)
    last = distributed.once(lambda: going_on(folder, settings, "sft", rows)) if resume else None
    policy = open_policy(settings.model, settings, settings.data.slots, trainable=True, run=folder if resume else None)
    check_prompts(policy.tokenizer, policy.form)
    sft.check_tags(policy)
    dataset = sft.prepare(policy, rows, settings) if rows else None
    if not rows:
        policy.engine.check_room(settings.data.max_tokens)
    distributed.share(settings.sft.batch, settings.sft.micro_batch, "sft.batch")
    if not resume:
        distributed.once(lambda: runs.new("sft", folder, settings, **trained_on(policy)))
    with keeping(folder, "sft"):
        if dataset is None and questions:
            with policy.model.disable_adapter():
                policy.refresh()
                rows = distributed.once(lambda: build_data(settings, folder / "data.jsonl", policy=policy).rows)
            dataset = sft.prepare(policy, rows, settings)
        matters = checkpoint.mattering(settings, "sft", rows)

        def once(chosen: Settings, at: Path | None) -> None:
            sft.train(policy, dataset, chosen, folder, matters, at)

        fitting(once, policy, settings, "sft", folder, last)


def training_questions(settings: Settings) -> list[Question]:
    """The questions GRPO will meet, in their order: as many as its steps need, seeded, drawn again when there are too few."""
    g = settings.grpo
    found = load_questions(g.data or g.task, "train", g.limit, settings.seed + 1)
    found, _ = trainable(found, g.data or g.task, settings)
    random.Random(settings.seed).shuffle(found)
    return found[: g.steps * g.prompts]


def of_parent(settings: Settings, start: Path) -> Settings:
    """The settings with what a run takes over from the one it goes on from."""
    about = runs.read_run(start)
    return replace(settings, model=lasting(about["model"]), format=about["format"])


def run_grpo(
    settings: Settings,
    start: Path,
    output: Path | None,
    resume: bool = False,
    force: bool = False,
    reward: GroupReward | None = None,
) -> Path:
    """Budget-guided GRPO from the adapter of `start` into a run folder; b_max is kept in it as b_max.json.

    `reward` takes the place of the paper's. Raises Failed when the preflight finds it hopeless, unless `force`, and InputError where
    another process trains there.
    """
    distributed.join()
    with distributed.claim("grpo", output) as folder:
        grpo_into(folder, settings, start, resume and output is not None, force, reward)
    return folder


def grpo_into(folder: Path, settings: Settings, start: Path, resume: bool, force: bool, reward: GroupReward | None) -> None:
    """GRPO in a folder that this process has to itself."""
    settings = distributed.once(lambda: of_parent(settings, start))  # each process may have derived a micro-batch from what it saw free
    verify = load_verifier(settings.grpo.verifier)
    questions = training_questions(settings)
    check_references(verify, questions)
    last = distributed.once(lambda: going_on(folder, settings, "grpo", questions)) if resume else None
    policy = open_policy(str(start), settings, settings.grpo.slots, trainable=True, run=folder if resume else None)
    policy.engine.check_room(settings.grpo.max_tokens)
    check_texts(policy.tokenizer, questions)
    about = {"parent": str(start)} | trained_on(policy)
    if not resume:
        distributed.once(lambda: runs.new("grpo", folder, settings, **about))
    with keeping(folder, "grpo"):
        if not last:
            look = distributed.once(lambda: look_before(policy, questions, verify, settings))
            if distributed.first():
                runs.write_json(folder / "preflight.json", look)
            preflight.insist(look, force)
        b_max = lengths_of(policy, questions, verify, settings, folder)
        matters = checkpoint.mattering(settings, "grpo", questions)

        def once(chosen: Settings, at: Path | None) -> None:
            grpo.train(policy, questions, verify, b_max, chosen, folder, matters, at, reward)

        fitting(once, policy, settings, "grpo", folder, last)


def look_before(policy: Policy, questions: Sequence[Question], verify: rollouts.Verify, settings: Settings) -> dict[str, Any]:
    """The preflight: figures of a few groups and the verdict, told on stderr."""
    b_max = {q.id: math.inf for q in questions}
    sampled = rollouts.Rollouts(policy, questions, verify, b_max, settings, Path())
    found = preflight.measure(sampled, questions, verify, settings)
    look = preflight.record(found, preflight.judge(found, settings.grpo.temperature))
    for line in ("preflight: " + look["verdict"], *look["notes"]):
        console.print(line, markup=False)
    return look


def run_preflight(settings: Settings, start: Path) -> dict[str, Any]:
    """The preflight alone: writes nothing."""
    settings = of_parent(settings, start)
    questions, verify = training_questions(settings), load_verifier(settings.grpo.verifier)
    check_references(verify, questions)
    policy = open_policy(str(start), settings, settings.grpo.slots)
    check_texts(policy.tokenizer, questions)
    return look_before(policy, questions, verify, settings)


def lengths_of(
    policy: Policy, questions: Sequence[Question], verify: rollouts.Verify, settings: Settings, folder: Path
) -> dict[str, float]:
    """b_max of the training questions: sampled once, then kept in the run as b_max.json."""
    kept = folder / "b_max.json"
    if kept.is_file():
        return {key: float(value) for key, value in runs.read_json(kept).items()}
    b_max = rollouts.initial_lengths(policy, questions, verify, settings)
    if distributed.first():
        runs.write_json(kept, {key: str(value) for key, value in b_max.items()})
    return b_max


def run_eval(name: str, settings: Settings, folder: Path, sweep: bool = False, cuts: bool = False) -> dict[str, Any]:
    """Evaluate a run or model into `folder`: eval.json, eval_samples.jsonl and, when asked for, sweep.json and cuts.json.

    Raises InputError where another process writes there: figures and samples would be of two evaluations.
    """
    with runs.claim("eval", folder):
        return eval_into(folder, name, settings, sweep, cuts)


def eval_into(folder: Path, name: str, settings: Settings, sweep: bool, cuts: bool) -> dict[str, Any]:
    e = settings.eval
    questions = load_questions(e.task, e.split, e.limit, settings.seed)
    verify = load_verifier(e.verifier)
    check_references(verify, questions)
    policy = open_policy(name, settings, e.slots)
    policy.engine.check_room(e.max_tokens)
    check_texts(policy.tokenizer, questions)

    def one(**changed: Any) -> tuple[dict[str, Any], list[Episode], list[Sample]]:
        asked = replace(e, **changed)
        title = f"evaluating ({asked.budget}{f', cut at {asked.cut:.0%}' if asked.cut else ''})"
        choice = parse_budget_option(asked.budget)
        episodes, samples = evaluate.evaluate(policy, questions, verify, choice, asked, settings.seed, title)
        return evaluate.record(samples, name, asked, settings.seed), episodes, samples

    result, episodes, samples = one()
    rows = [
        {"id": q.id, "question": q.question, "text": x.text, "stop_reason": x.stop_reason} | asdict(s)
        for q, x, s in zip(questions, episodes, samples, strict=True)
    ]
    runs.write_json(folder / "eval.json", result)
    runs.write_jsonl(folder / "eval_samples.jsonl", rows)
    if sweep:
        runs.write_json(folder / "sweep.json", [one(budget=text)[0] for text in SWEEP])
    if cuts:
        found = cutting.measure(lambda share: one(budget=cutting.FREE, cut=share)[:2])
        runs.write_json(folder / "cuts.json", found)
    return result
