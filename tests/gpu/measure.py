"""One training stage of a preset in a process of its own, on a model of random weights: what it took, as JSON on the last line.

    python tests/gpu/measure.py MODEL FOLDER PRESET STAGE BACKEND CAP_GIB [SECTION.KEY=VALUE ...]

A process of its own, because unsloth patches the libraries for good and a peak is one process's.
"""

import json
import sys
import time
from pathlib import Path

import torch
import yaml

from sbtiny.models.backend import start_backend

start_backend(sys.argv[5])  # unsloth patches what is imported below
# ruff: noqa: E402

# isort: split
from sbtiny import runs
from sbtiny.coldstart.run import run_sft
from sbtiny.config import Settings
from sbtiny.grpo.run import run_grpo
from sbtiny.load_settings import load_settings
from sbtiny.models.device import probe_device
from sbtiny.models.load import load_tokenizer
from sbtiny.models.shapes import shape_of
from sbtiny.planning.memory_plan import plan_memory

GB = 2**30
SMALL = {"sft.max_length": 256, "grpo.max_tokens": 24, "grpo.max_num_seqs": 8, "grpo.prompts_per_step": 1}  # the rehearsal without a GPU


def settings(model: str, preset: str, stage: str) -> Settings:
    """Those of the preset for two updates; what a rehearsal on a processor can bear where there is no GPU."""
    sized = {} if torch.cuda.is_available() else SMALL
    changes = {"model": model, "sft.steps": 2, "sft.save_steps": 0, "grpo.steps": 2, "grpo.save_steps": 0, "backend": sys.argv[5], **sized}
    changes |= dict(change.split("=", 1) for change in sys.argv[7:])
    return load_settings(preset=preset, overrides=changes.items())


def rows(model: str, tokens: int, count: int) -> list[dict]:
    """Labelled rows of about so many tokens each."""
    tokenizer = load_tokenizer(model)
    line = "a)+1=2 "
    each = len(tokenizer.encode(line * 50, add_special_tokens=False)) / 50
    text = line * int(tokens / each)
    budget = len(tokenizer.encode(text, add_special_tokens=False))
    return [{"id": str(i), "question": "1 + 1?", "answer": "2", "response": text, "budget": budget} for i in range(count)]


def main() -> None:
    model, folder, preset, stage, backend, cap = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:7]
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(cap) * GB / torch.cuda.mem_get_info()[1]))
    s = settings(model, preset, stage)
    data, sft = folder / "rows.jsonl", folder / "sft"
    runs.write_jsonl(data, rows(model, s.sft.max_length - 64, 2 * s.sft.batch))
    s = load_settings(preset=preset, overrides=[("sft.rows", str(data)), *flat(s)])
    started = time.perf_counter()
    if stage == "sft":
        run_sft(s, sft)
    else:
        questions = folder / "questions.jsonl"
        asked = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(2 * s.grpo.prompts_per_step)]
        runs.write_jsonl(questions, asked)
        s = load_settings(preset=preset, overrides=[*flat(s), ("grpo.questions", str(questions))])
        run_grpo(s, sft, folder / "grpo", force=True)  # random weights end no answer, which the preflight would refuse
    report(s, model, folder, preset, stage, backend, time.perf_counter() - started)


def flat(s: Settings) -> list[tuple[str, object]]:
    """What `settings` changed, to be changed again beside more."""
    keys = (
        *(change.partition("=")[0] for change in sys.argv[7:]),
        "sft.max_length",
        "sft.steps",
        "grpo.steps",
        "grpo.max_tokens",
        "grpo.max_num_seqs",
        "grpo.prompts_per_step",
    )
    pairs = [(key, getattr(getattr(s, key.split(".")[0]), key.split(".")[1])) for key in keys]
    fixed = [("model", s.model), ("backend", s.backend), ("eval.task", "arithmetic")]  # an evaluation of the hub's would ask for a network
    return [*fixed, ("sft.save_steps", 0), ("grpo.save_steps", 0), *pairs]


def report(s: Settings, model: str, folder: Path, preset: str, stage: str, backend: str, seconds: float) -> None:
    steps = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    last = steps[-2] if stage == "grpo" else steps[-1]
    expected = plan_memory(stage, s, shape_of(model), probe_device())
    found = {
        "preset": preset,
        "stage": stage,
        "backend": backend,
        "peak_gb": last["peak_gb"],
        "plan_gb": expected.peak_gb if expected.target.device == "cpu" else round(expected.peak_gb - expected.parts["process"], 2),
        "seconds": round(seconds, 1),
        "generate_seconds": last.get("generate_seconds"),
        "step_seconds": last.get("step_time"),
        "sampled_tokens_per_second": last.get("tokens_per_second"),
        "micro_batch": yaml.safe_load((folder / stage / "config.yaml").read_text())[stage]["micro_batch"],
        "finite": all(step.get("loss", 0.0) == step.get("loss", 0.0) for step in steps),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
