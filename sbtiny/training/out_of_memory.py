"""Out of memory in training: halve the micro-batch, double the accumulation, and go on from the last checkpoint."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sbtiny import distributed, runs
from sbtiny.config import Settings, micro_batch_size
from sbtiny.errors import Failed
from sbtiny.progress import console
from sbtiny.rollout.policy import Policy
from sbtiny.training import checkpoint

Train = Callable[[Settings, Path | None], None]  # settings, checkpoint to start from


def train_with_oom_retry(train: Train, policy: Policy, settings: Settings, stage: str, folder: Path, last: Path | None) -> None:
    """Call `train` with smaller micro-batches until it fits, and write the last one into the run's config.yaml.

    The rows of an update stay the same. Raises Failed when not even single rows fit.
    """
    initial = copy_trained_weights(policy) if last is None else {}
    while not try_train(train, settings, last):
        gc.collect()  # the memory belongs to the trainer, which is part of reference cycles
        torch.cuda.empty_cache()
        settings = halve_micro_batch(settings, stage)
        runs.write_text(folder / "config.yaml", settings.as_yaml())
        last = checkpoint.rewind_to_checkpoint(folder)
        if last is None:
            policy.model.load_state_dict(initial, strict=False)
            policy.refresh()


def try_train(train: Train, settings: Settings, last: Path | None) -> bool:
    """Call `train`; False when memory ran out. Returning drops the error, and with it the tensors of its traceback."""
    try:
        train(settings, last)
    except torch.OutOfMemoryError as error:
        if distributed.world_size() > 1:  # the others would wait for this process's gradients
            raise Failed("out of memory in one of several processes: lower micro_batch and go on with --resume") from error
        return False
    return True


def copy_trained_weights(policy: Policy) -> dict[str, Tensor]:
    """A copy on the CPU of the weights in training."""
    return {name: weight.detach().cpu().clone() for name, weight in policy.model.named_parameters() if weight.requires_grad}


def halve_micro_batch(settings: Settings, stage: str) -> Settings:
    """Settings with a smaller micro-batch: the largest divisor of an update's rows up to half of the old one.

    Raises Failed when the old one is 1.
    """
    section, rows = getattr(settings, stage), settings.batch_size(stage)
    old = micro_batch_size(rows, section.micro_batch)
    if old == 1:
        room = "a new run without the longest rows" if stage == "sft" else "shorter answers, a lower grpo.max_num_seqs or --kv-memory"
        raise Failed(f"out of memory with {stage}.micro_batch 1: {room} would make room")
    new = micro_batch_size(rows, old // 2)
    console.print(f"out of memory: {stage}.micro_batch {old} -> {new}, the same rows an update", style="yellow", markup=False)
    return replace(settings, **{stage: replace(section, micro_batch=new)})
