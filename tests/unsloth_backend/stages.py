"""Cold start, contrast, GRPO and resume of one way to train, on the bundled model in float32; JSON on the last line.

    python tests/unsloth_backend/stages.py WAY START FOLDER

WAY: `transformers`; `unsloth` as it trains on a CPU, with TRL's own trainers; `rewritten`: the trainers that unsloth writes on a GPU, and
the models that it loads on a CPU. A process of its own, because unsloth patches the libraries for good. START: a run to go on from.
"""

# ruff: noqa: E402

import json
import os
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

WAY, START, FOLDER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def rewrite_trainers() -> None:
    """Import unsloth as for a GPU and let it write the two trainers, which `UNSLOTH_ALLOW_CPU` alone leaves out."""
    os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_LOCATION": str(FOLDER / "compiled"), "TORCHDYNAMO_DISABLE": "1"}
    os.environ["UNSLOTH_MIXED_PRECISION"] = "bfloat16"  # odd as it sounds: without it a float32 model is trained in 16-bit products
    import unsloth
    from unsloth.models import rl
    from unsloth_zoo.cpu import FastCPUModel

    rl.PatchRL(unsloth.FastLanguageModel)
    for trainer in ("sft_trainer", "grpo_trainer"):
        rl._patch_trl_rl_trainers_impl(trainer)
    unsloth.FastLanguageModel = FastCPUModel  # that of a GPU decodes and trains in Triton kernels


if WAY == "rewritten":
    rewrite_trainers()
BACKEND = "transformers" if WAY == "transformers" else "unsloth"

from sbtiny.models.backend import start_backend

start_backend(BACKEND)  # unsloth patches what is imported below

# isort: split
from support import GRPO

from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.coldstart.trainer import ColdStartTrainer
from sbtiny.config import Settings, SftSettings
from sbtiny.grpo.run import run_grpo
from sbtiny.grpo.trainer import BudgetGrpoTrainer
from sbtiny.models import device
from sbtiny.rollout.load_policy import load_policy
from sbtiny.tasks import arithmetic
from sbtiny.training.rewritten import find_gaps

device.CPUINFO = FOLDER / "none"  # a CPU that computes in float32 alone
SFT = SftSettings(rows=str(START.parent / "terse.jsonl"), steps=20, save_steps=10)


def settings(**changes: object) -> Settings:
    return replace(Settings(backend=BACKEND, four_bit=False, seed=7, grpo=GRPO, sft=SFT), **changes)


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row or "reward" in row]


def digest(run: Path) -> str:
    return sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def interrupted(run: Path, last: str) -> Path:
    """A copy of a finished run as it would be had it been killed before its checkpoint `last` was whole."""
    copy = run.with_name(run.name + "-resumed")
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / last)
    return copy


def pairs_of_rows(count: int) -> list[dict]:
    """Two answers to each question, a bare one and one five times as long: rivals for the contrast. The last has one alone."""
    policy = load_policy("tiny", settings(), 2)
    asked = [q for q in arithmetic.generate_questions("train", 400, seed=5) if q.level <= 2][:count]
    texts = ("\\boxed{{{0}}}", "so {0} " * 5 + "\\boxed{{{0}}}")
    return [make_row(policy, q, text.format(q.answer)) for q in asked for text in texts][:-1]


def main() -> None:
    sft = run_sft(settings(), FOLDER / "sft")
    resumed = run_sft(settings(), interrupted(sft, "checkpoint-20"), resume=True)
    rows = FOLDER / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs_of_rows(8)))
    contrast = run_sft(settings(sft=SftSettings(rows=str(rows), steps=4, contrast=0.5, micro_batch=2)), FOLDER / "contrast")
    grpo = run_grpo(settings(), START, FOLDER / "grpo", force=True)
    grpo_resumed = run_grpo(settings(), START, interrupted(grpo, "checkpoint-6"), resume=True)
    with_reference = run_grpo(settings(grpo=replace(GRPO, steps=4, beta=0.05, save_steps=0)), START, FOLDER / "kl", force=True)
    record = {
        "run": str(grpo),
        "trainers": [base.__module__ for trainer in (ColdStartTrainer, BudgetGrpoTrainer) for base in trainer.__bases__],
        "gaps": [find_gaps(trainer) for trainer in (ColdStartTrainer, BudgetGrpoTrainer)],
        "resumed": [digest(sft) == digest(resumed), digest(grpo) == digest(grpo_resumed)],
        "metrics": {run.name: metrics(run) for run in (sft, contrast, grpo, with_reference)},
    }
    print(json.dumps(record))


main()
