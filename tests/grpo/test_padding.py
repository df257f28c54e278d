"""Micro-batches without columns of padding."""

import torch

from sbtiny.grpo.padding import trim_padding


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
