"""`sbtiny sft`: from settings to the run folder of a cold start."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sbtiny import distributed, runs
from sbtiny.coldstart import trainer as sft
from sbtiny.coldstart.build import build_data
from sbtiny.coldstart.rows import LabelledRow, read_labelled, warn_of_other_prompt
from sbtiny.config import AUTO, Settings
from sbtiny.errors import InputError
from sbtiny.models.aliases import absolute_name, fill_prompt, inherit_settings
from sbtiny.models.prompt import check_prompts
from sbtiny.planning.workload import StageWorkload
from sbtiny.progress import console
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import base_info, load_policy
from sbtiny.rollout.max_tokens import choose_max_tokens
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.leaks import drop_eval_questions
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import Question
from sbtiny.training import checkpoint
from sbtiny.training.interrupt import cleanup_on_stop
from sbtiny.training.out_of_memory import train_with_oom_retry


def run_sft(settings: Settings, output: Path | None, resume: bool = False, start: Path | None = None) -> Path:
    """Train a cold start into a run folder, which it returns. Without `sft.rows` the rows are sampled first, into its data.jsonl.

    `start`: a run whose adapter is trained on, in place of a new one. Wrong input leaves no folder. Raises InputError if another process
    trains there.
    """
    distributed.init_process_group()
    with distributed.claim("sft", output) as folder:
        train_sft_in(folder, settings, resume and output is not None, start)
    return folder


def complete_settings(settings: Settings, resumed: Path | None, start: Path | None = None) -> Settings:
    """The settings with the model's absolute name and instruction; a run that is resumed keeps its prompt and its most tokens.

    `start`: the run that is trained on; its model, format and prompt are taken.
    """
    if start:
        settings = inherit_settings(settings, start)
    else:
        prompt = fill_prompt(settings.prompt, str(resumed or settings.model))
        settings = replace(settings, model=absolute_name(settings.model), prompt=prompt)
    most = runs.kept_max_tokens(resumed, settings.data.max_tokens) if resumed else settings.data.max_tokens
    return replace(settings, data=replace(settings.data, max_tokens=most))


def train_sft_in(folder: Path, settings: Settings, resume: bool, start: Path | None = None) -> None:
    """Cold start in a folder that this process has claimed. Checks all input before it writes anything."""
    # The main process's settings for all: each may have derived another micro-batch from its free memory.
    settings = distributed.broadcast_from_main(lambda: complete_settings(settings, folder if resume else None, start))
    sampled = folder / "data.jsonl"
    rows = read_training_rows(settings, sampled if resume and sampled.is_file() else None)
    d = settings.data
    if not rows and d.max_tokens != AUTO and d.max_tokens >= settings.sft.max_length:
        raise InputError(f"data.max_tokens {d.max_tokens} fills sft.max_length {settings.sft.max_length}, prompt and all: raise that too")
    most = d.limit if d.max_tokens == AUTO else 1  # one shows that they can be read
    questions = [] if rows else load_questions(d.task, "train", most, settings.seed)
    last = distributed.broadcast_from_main(lambda: checkpoint.prepare_resume(folder, settings, "sft", rows)) if resume else None
    policy = load_policy(str(start or settings.model), settings, settings.data.max_num_seqs, trainable=True, run=folder if resume else None)
    check_prompts(policy.tokenizer, policy.form)
    sft.check_tags_learnable(policy)
    dataset = sft.build_dataset(policy, rows, settings) if rows else None
    known = {"parent": start and str(start.resolve()), "data": checkpoint.digest_data(rows)}
    about = base_info(policy) | {key: value for key, value in known.items() if value}
    warn_of_other_prompt(rows, about["prompt"])
    own = {name: text for name, text in about["prompt"].items() if text}  # an export of ours brings its instruction in its template
    settings = replace(settings, prompt=replace(settings.prompt, **own))
    if not rows:
        settings = distributed.broadcast_from_main(lambda: with_max_tokens(policy, questions, settings))
        about |= {"max_tokens": settings.data.max_tokens}
        policy.engine.check_room(settings.data.max_tokens)
    distributed.split_batch(settings.sft.batch, settings.sft.micro_batch, "sft.batch")
    if not resume:
        distributed.broadcast_from_main(lambda: runs.create_run("sft", folder, settings, **about))
    with cleanup_on_stop(folder, "sft"):
        if dataset is None:
            with policy.initial_model():
                rows = distributed.broadcast_from_main(lambda: build_data(settings, sampled, policy=policy).rows)
            dataset = sft.build_dataset(policy, rows, settings)
        signature = checkpoint.resume_signature(settings, "sft", rows)

        def attempt(chosen: Settings, resume_from: Path | None) -> None:
            sft.train_sft(policy, dataset, chosen, folder, signature, resume_from)

        train_with_oom_retry(attempt, policy, settings, "sft", folder, last)


def read_training_rows(settings: Settings, sampled: Path | None) -> list[LabelledRow]:
    """The rows of `sft.rows` that no evaluation asks, or those a resumed run has `sampled`; none if they are still to be sampled."""
    file = settings.sft.rows
    if not file:
        return read_labelled(str(sampled)) if sampled else []
    rows, _ = drop_eval_questions(read_labelled(file), file, settings)
    if settings.data.budget_quantile and not any(row.response is None for row in rows):
        line = f"data.budget_quantile is for rows that are sampled: those of {file} keep their budgets; give it to sbtiny data build"
        console.print(line, markup=False, soft_wrap=True, style="yellow")
    return rows


def with_max_tokens(policy: Policy, questions: Sequence[Question], settings: Settings) -> Settings:
    """The settings with a number for `data.max_tokens`, none longer than can be trained on."""
    d, longest = settings.data, StageWorkload("sft", settings).max_new_tokens
    most = choose_max_tokens(d.max_tokens, policy, questions, Sampling(temperature=d.temperature), settings.seed, most=longest)
    return replace(settings, data=replace(d, max_tokens=most))
