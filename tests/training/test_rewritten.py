"""What stands below our trainers may be rewritten: where ours no longer fit, a line says what is missing, and training goes on or stops."""

from pathlib import Path

import pytest

from sbtiny.coldstart.trainer import ColdStartTrainer
from sbtiny.errors import InputError
from sbtiny.grpo.trainer import BudgetGrpoTrainer
from sbtiny.training.rewritten import choose_trainer, find_gaps, is_rewritten

BELOW = """
from transformers import Trainer

class OtherTrainer(Trainer):
    def __init__(self):
        self._step = 0

    def compute_loss(self, wrapped, batch, return_outputs=False):
        return 0

    def _prepare_inputs(self, generation_batch):
        return generation_batch
"""
OURS = """
from other_trainer import OtherTrainer

class OurTrainer(OtherTrainer):
    weight = 0.5

    def _prepare_inputs(self, generation_batch):
        self._buffered_inputs = super()._prepare_inputs(generation_batch)
        return self._buffered_inputs[self._step]

    def compute_loss(self, model, inputs, *args, **kwargs):
        return self.weight * super().compute_loss(model, inputs, *args, **kwargs) + self.model.loss
"""
LINE = "other_trainer does not fit sbtiny's OurTrainer (no _buffered_inputs; compute_loss takes other arguments)"


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """A trainer on one that sets `_step` but no `_buffered_inputs`, and whose `compute_loss` has other names."""
    (tmp_path / "other_trainer.py").write_text(BELOW)
    (tmp_path / "our_trainer.py").write_text(OURS)
    monkeypatch.syspath_prepend(tmp_path)
    from our_trainer import OurTrainer

    return OurTrainer


@pytest.mark.parametrize("ours", [BudgetGrpoTrainer, ColdStartTrainer])
def test_ours_fit_on_trl(ours: type) -> None:
    assert not is_rewritten(ours)
    assert find_gaps(ours) == []
    assert choose_trainer(ours, "everything") is ours


def test_without_a_fit_the_other_trainer_trains_and_a_line_says_why(ours: type, capfd: pytest.CaptureFixture[str]) -> None:
    assert choose_trainer(ours) is ours.__bases__[0]
    assert capfd.readouterr().err == f"{LINE}: training goes on with other batches, and slower\n"


def test_without_a_fit_what_only_ours_can_do_is_refused(ours: type) -> None:
    with pytest.raises(InputError) as refused:
        choose_trainer(ours, "sft.contrast")
    assert str(refused.value) == f"{LINE}, which sft.contrast needs: use --backend transformers"
