"""Out of memory in the middle of training: half the micro-batch, twice the accumulation, and on from the last checkpoint."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sbtiny import runs
from sbtiny.config import Settings, micro_batch
from sbtiny.errors import Failed
from sbtiny.progress import console
from sbtiny.rollout.policy import Policy
from sbtiny.training import checkpoint
from sbtiny import distributed

Train = Callable[[Settings, Path | None], None]  # with these settings, from this checkpoint


def fitting(train: Train, policy: Policy, settings: Settings, stage: str, folder: Path, last: Path | None) -> None:
    """Call `train` until it fits. The rows of an update stay the same; the run's config.yaml remembers the micro-batch that fitted.

    Raises Failed when not even single rows fit.
    """
    begun = weights(policy) if last is None else {}
    while not fits(train, settings, last):
        gc.collect()  # what filled the memory hangs on the trainer, which is part of cycles
        torch.cuda.empty_cache()
        settings = halved(settings, stage)
        runs.write_text(folder / "config.yaml", settings.as_yaml())
        last = checkpoint.rewind(folder)
        if last is None:
            policy.model.load_state_dict(begun, strict=False)
            policy.refresh()


def fits(train: Train, settings: Settings, last: Path | None) -> bool:
    """False when memory ran out; with the error goes all that its traceback held."""
    try:
        train(settings, last)
    except torch.OutOfMemoryError as error:
        if distributed.count() > 1:  # the others know nothing of it and wait for this process's gradients
            raise Failed("out of memory in one of several processes: lower micro_batch and go on with --resume") from error
        return False
    return True


def weights(policy: Policy) -> dict[str, Tensor]:
    """A copy, outside the GPU, of what is trained."""
    return {name: weight.detach().cpu().clone() for name, weight in policy.model.named_parameters() if weight.requires_grad}


def halved(settings: Settings, stage: str) -> Settings:
    """Settings whose micro-batch is the largest divisor of an update's rows up to half of the one that did not fit."""
    chosen, rows = getattr(settings, stage), settings.rows(stage)
    old = micro_batch(rows, chosen.micro_batch)
    if old == 1:
        raise Failed(f"out of memory with {stage}.micro_batch 1: shorter answers, fewer slots or a lower --kv-memory would make room")
    new = micro_batch(rows, old // 2)
    console.print(f"out of memory: {stage}.micro_batch {old} -> {new}, the same rows an update", style="yellow", markup=False)
    return replace(settings, **{stage: replace(chosen, micro_batch=new)})
