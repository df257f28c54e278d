"""`sbtiny grpo`: from the run of a cold start to a run folder of GRPO."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbtiny import distributed, runs
from sbtiny.config import Settings
from sbtiny.grpo import preflight, rollouts
from sbtiny.grpo import trainer as grpo
from sbtiny.grpo.group_reward import GroupReward
from sbtiny.models.aliases import inherit_settings
from sbtiny.models.prompt import check_texts
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import base_info, load_policy
from sbtiny.rollout.max_tokens import choose_max_tokens
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.leaks import drop_eval_questions
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier, check_references, load_verifier
from sbtiny.training import checkpoint
from sbtiny.training.interrupt import cleanup_on_stop
from sbtiny.training.out_of_memory import train_with_oom_retry


def training_questions(settings: Settings) -> list[Question]:
    """The questions of the run, without evaluation questions: shuffled by the seed, no more than the steps need."""
    g = settings.grpo
    questions = load_questions(g.questions or g.task, "train", g.limit, settings.seed + 1)
    questions, _ = drop_eval_questions(questions, g.questions or g.task, settings)
    random.Random(settings.seed).shuffle(questions)
    return questions[: g.steps * g.prompts_per_step]


def complete_settings(settings: Settings, start: Path, resumed: Path | None) -> Settings:
    """The settings with what they take from the run `start`; a run that is `resumed` keeps its most tokens."""
    settings = inherit_settings(settings, start)
    most = runs.kept_max_tokens(resumed, settings.grpo.max_tokens) if resumed else settings.grpo.max_tokens
    return replace(settings, grpo=replace(settings.grpo, max_tokens=most))


def run_grpo(
    settings: Settings,
    start: Path,
    output: Path | None,
    resume: bool = False,
    force: bool = False,
    reward: GroupReward | None = None,
) -> Path:
    """Train by budget-guided GRPO from the adapter of `start` into a run folder, which it returns. `reward` replaces the paper's.

    Raises Failed if the preflight finds the run hopeless, unless `force`; InputError if another process trains in the folder.
    """
    distributed.init_process_group()
    with distributed.claim("grpo", output) as folder:
        train_grpo_in(folder, settings, start, resume and output is not None, force, reward)
    return folder


def train_grpo_in(folder: Path, settings: Settings, start: Path, resume: bool, force: bool, reward: GroupReward | None) -> None:
    """GRPO in a folder that this process has claimed."""
    # The main process's settings for all: each may have derived another micro-batch from its free memory.
    settings = distributed.broadcast_from_main(lambda: complete_settings(settings, start, folder if resume else None))
    verify = load_verifier(settings.grpo.verifier)
    questions = training_questions(settings)
    check_references(verify, questions)
    last = distributed.broadcast_from_main(lambda: checkpoint.prepare_resume(folder, settings, "grpo", questions)) if resume else None
    grpo.split_step(settings)  # raises before a model is loaded
    policy = load_policy(str(start), settings, settings.grpo.max_num_seqs, trainable=True, run=folder if resume else None)
    check_texts(policy.tokenizer, questions)
    settings = distributed.broadcast_from_main(lambda: with_max_tokens(policy, questions, settings))
    policy.engine.check_room(settings.grpo.max_tokens)
    origin = {"parent": str(start.resolve()), "data": checkpoint.digest_data(questions)}
    about = origin | {"max_tokens": settings.grpo.max_tokens} | base_info(policy)
    if not resume:
        distributed.broadcast_from_main(lambda: runs.create_run("grpo", folder, settings, **about))
    with cleanup_on_stop(folder, "grpo"):
        if not last:
            record = distributed.broadcast_from_main(lambda: preflight.run_first_groups(policy, questions, verify, settings))
            if distributed.is_main_process():
                runs.write_json(folder / "preflight.json", record)
            preflight.raise_if_hopeless(record, force)
        b_max = load_or_sample_b_max(policy, questions, verify, settings, folder)
        signature = checkpoint.resume_signature(settings, "grpo", questions)

        def attempt(chosen: Settings, resume_from: Path | None) -> None:
            grpo.train_grpo(policy, questions, verify, b_max, chosen, folder, signature, resume_from, reward)

        train_with_oom_retry(attempt, policy, settings, "grpo", folder, last)


def with_max_tokens(policy: Policy, questions: Sequence[Question], settings: Settings) -> Settings:
    """The settings with a number for `grpo.max_tokens`.

    The initial model is probed too: a b_max is the length of its answer, which is the longer one; cut, it would be none.
    """
    g, initial = settings.grpo, Sampling(temperature=settings.data.temperature)
    most = choose_max_tokens(g.max_tokens, policy, questions, Sampling(temperature=g.temperature), settings.seed, initial=initial)
    return replace(settings, grpo=replace(g, max_tokens=most))


def run_preflight(settings: Settings, start: Path) -> dict[str, Any]:
    """Run the preflight alone; writes nothing."""
    settings = inherit_settings(settings, start)
    questions, verify = training_questions(settings), load_verifier(settings.grpo.verifier)
    check_references(verify, questions)
    policy = load_policy(str(start), settings, settings.grpo.max_num_seqs)
    check_texts(policy.tokenizer, questions)
    settings = with_max_tokens(policy, questions, settings)
    return preflight.run_first_groups(policy, questions, verify, settings)


def load_or_sample_b_max(
    policy: Policy, questions: Sequence[Question], verify: Verifier, settings: Settings, folder: Path
) -> dict[str, float]:
    """b_max by question id, from the run's b_max.json; sampled and saved there the first time."""
    file = folder / "b_max.json"
    if file.is_file():
        return {key: float(value) for key, value in runs.read_json(file).items()}
    b_max = rollouts.sample_b_max(policy, questions, verify, settings)
    if distributed.is_main_process():
        runs.write_json(file, {key: str(value) for key, value in b_max.items()})
    return b_max
