"""Micro-batches of answers of like length, without columns of padding."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import GRPO, settings_of

from sbtiny.grpo import trainer
from sbtiny.grpo.padding import trim_padding
from sbtiny.grpo.run import run_grpo


def batch(logps: int) -> dict[str, torch.Tensor]:
    """Two rows: prompts of 1 and 2 tokens in 3 columns, completions of 2 and 1 in 4; reference log-probabilities of this width."""
    return {
        "prompt_ids": torch.arange(6).view(2, 3),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "completion_ids": torch.arange(8).view(2, 4),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "ref_per_token_logps": torch.zeros(2, logps),
        "old_per_token_logps": None,
    }


def test_columns_that_are_padding_in_every_row_are_cut() -> None:
    cut = trim_padding(batch(logps=4))
    assert cut["prompt_ids"].tolist() == [[1, 2], [4, 5]]
    assert cut["completion_ids"].tolist() == [[0, 1], [4, 5]]
    assert cut["ref_per_token_logps"].shape == cut["completion_mask"].shape == (2, 2)
    assert cut["advantages"].tolist() == [1, -1]


def test_nothing_is_cut_where_log_probabilities_stand_in_other_columns() -> None:
    inputs = batch(logps=6)  # unsloth's: the completion's columns and the prompt's padding
    assert trim_padding(inputs) is inputs


@pytest.mark.parametrize(("loss_type", "sorted_steps"), [("dapo", 1), ("bnpo", 0)])
def test_answers_are_not_sorted_for_a_loss_that_averages_over_a_micro_batch(
    loss_type: str, sorted_steps: int, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short answers would count more: each micro-batch counts once, however few tokens it has."""
    real, seen = trainer.sort_by_length, []
    monkeypatch.setattr(trainer, "sort_by_length", lambda inputs: seen.append(len(inputs)) or real(inputs))
    run_grpo(settings_of(replace(GRPO, steps=1, save_steps=0, loss_type=loss_type)), started, tmp_path / "run", force=True)
    assert len(seen) == sorted_steps
