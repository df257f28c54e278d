"""The adapter is trained in float32 whatever the base is held in: TRL casts that of a 4-bit base to bfloat16."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from sbtiny import runs
from sbtiny.cli.main import app
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.tasks import arithmetic

SMALL = ("grpo.prompts_per_step=2", "grpo.num_generations=3", "grpo.max_tokens=40", "sft.learning_rate=1e-6", "grpo.learning_rate=1e-6")


def rounded(run: Path) -> list[str]:
    """The matrices of an adapter that bfloat16 could hold, but for those that are 0 and what it cannot hold at all."""
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    return [name for name, weight in weights.items() if torch.equal(weight, weight.bfloat16().float())]


def test_both_trainers_keep_every_bit_of_it_on_a_4bit_base(policy, tmp_path: Path) -> None:
    asked = arithmetic.generate_questions("train", 12, seed=5)
    runs.write_jsonl(tmp_path / "rows.jsonl", [make_row(policy, q, f"\\boxed{{{q.answer}}}") for q in asked])
    small = [word for setting in SMALL for word in ("--set", setting)]
    app(["sft", "--4bit", "--data", f"{tmp_path}/rows.jsonl", "-o", f"{tmp_path}/sft", "--steps", "4", *small], standalone_mode=False)
    assert not rounded(tmp_path / "sft")
    told = ["grpo", "--4bit", "--run", f"{tmp_path}/sft", "-o", f"{tmp_path}/grpo", "--steps", "1", "--limit", "4", "--force"]
    app([*told, *small], standalone_mode=False)
    assert not rounded(tmp_path / "grpo")
