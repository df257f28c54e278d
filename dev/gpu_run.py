"""What waits for a GPU (docs/gpu-unverified.md), in stages that take minutes: each prints one line of JSON a figure and is not run twice.

    python dev/gpu_run.py FOLDER [STAGE ...]        on a CPU the same stages run on small shapes

Stopped in the middle, the same command goes on: a stage that ended left FOLDER/STAGE.json, one that trains goes on from its checkpoint.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]
Figures = Iterator[dict[str, Any]]


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(folder: Path, name: str, *command: str, limit: float = 480) -> tuple[int, str]:
    """Run a command with its output in FOLDER/NAME.log; the code and what it wrote on stdout. 124: it ran past `limit` seconds."""
    with (folder / f"{name}.log").open("a", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=limit, cwd=ROOT, check=False)
        except subprocess.TimeoutExpired as error:
            return 124, (error.stdout or b"").decode(errors="replace")
        log.write(done.stdout)
    return done.returncode, done.stdout


def sbtiny(folder: Path, name: str, *arguments: str, limit: float = 480) -> dict[str, Any]:
    """What a verb says of itself with --json; of one that failed, the code and its last lines."""
    code, said = run(folder, name, sys.executable, "-m", "sbtiny", *arguments, "--json", limit=limit)
    if code == 0:
        return json.loads(said)
    return {"failed": code, "said": (folder / f"{name}.log").read_text(encoding="utf-8")[-600:]}


# ---- stages ----------------------------------------------------------------------------------------------------------------------------


def machine(folder: Path) -> Figures:
    """The card, the versions, and whether doctor finds anything bad."""
    import torch

    card = torch.cuda.get_device_name() if on_gpu() else "cpu"
    yield {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda}
    found = sbtiny(folder, "doctor", "doctor")
    yield {"doctor_ok": found.get("ok"), "versions": {name: each["found"] for name, each in found.get("versions", {}).items()}}


def graphs(folder: Path) -> Figures:
    """Greedy answers with and without the decode step as a CUDA graph: the same tokens, and how fast."""
    from sbtiny.config import Settings
    from sbtiny.rollout.load_policy import load_policy
    from sbtiny.rollout.sampling import Sampling
    from sbtiny.tasks.arithmetic import generate_questions

    policy = load_policy("tiny", Settings(), 64)
    asked = [policy.request(q.question, 160, seed=i) for i, q in enumerate(generate_questions("val", 256 if on_gpu() else 16, 0))]
    policy.sample(asked, Sampling(temperature=0))  # the cache is made, and what is recorded at first is recorded
    said, rates = {}, {}
    for name, recorded in (("graphs", policy.engine.graphs), ("plain", None)):
        policy.engine.graphs = recorded
        started = time.perf_counter()
        said[name] = [episode.completion_ids for episode in policy.sample(asked, Sampling(temperature=0))]
        rates[name] = round(sum(map(len, said[name])) / (time.perf_counter() - started))
    same = sum(a == b for a, b in zip(said["graphs"], said["plain"], strict=True))
    yield {"same_answers": same, "of": len(asked), "tokens_per_second": rates}


def demo(folder: Path) -> Figures:
    """The whole pipeline on the bundled model; on a CPU a little of it."""
    little = () if on_gpu() else ("--set=data.limit=60", "--set=sft.steps=8", "--set=grpo.steps=2", "--set=eval.limit=20")
    said = sbtiny(folder, "demo", "demo", f"--output={folder / 'demo'}", *little, limit=600)
    keep = ("accuracy", "mean_tokens", "mean_budget", "format_rate", "within")
    yield (
        said
        if "failed" in said
        else {"seconds": said["seconds"], **{name: {key: said[name][key] for key in keep} for name in ("base", "sft", "grpo")}}
    )


def recipes(folder: Path, backend: str) -> Figures:
    """Both presets on random weights of Qwen2.5-1.5B's shape, each stage under the cap of its card: peak against plan, seconds."""
    from test_recipes import CAPS, REHEARSAL, random_model

    from sbtiny.models.shapes import SHAPES

    model = folder / "random"
    if not model.is_dir():
        random_model(model, SHAPES["qwen-1.5b"] if on_gpu() else REHEARSAL)
    for preset, cap in CAPS.items():
        if not on_gpu() and preset != "t4":
            continue
        for stage in ("sft", "grpo"):
            script = str(ROOT / "tests" / "gpu" / "measure.py")
            work = folder / f"{backend}-{preset}"
            work.mkdir(exist_ok=True)
            name = f"{backend}-{preset}-{stage}"
            code, said = run(folder, name, sys.executable, script, str(model), str(work), preset, stage, backend, str(cap))
            last = (folder / f"{name}.log").read_text(encoding="utf-8")[-600:]
            yield json.loads(said.splitlines()[-1]) if code == 0 else {"preset": preset, "stage": stage, "failed": code, "said": last}


def bench(folder: Path) -> Figures:
    """Decode loop and GRPO step against generate, continuous batching and plain TRL, on that shape."""
    model = str(folder / "random") if on_gpu() else "tiny"
    size = ("--requests=256", "--slots=64", "--mean=300", "--max-tokens=1024") if on_gpu() else ("--requests=8", "--slots=4", "--rounds=1")
    yield {"bench": "rollout", **sbtiny(folder, "bench-rollout", "bench", "rollout", f"--model={model}", *size)}
    size = ("--mean=300", "--max-tokens=1024") if on_gpu() else ("--prompts=2", "--group=2", "--micro-batch=2", "--steps=1", "--rounds=1")
    yield {"bench": "grpo", **sbtiny(folder, "bench-grpo", "bench", "grpo", f"--model={model}", *size)}


STAGES: dict[str, Callable[[Path], Figures]] = {
    "machine": machine,
    "graphs": graphs,
    "demo": demo,
    "transformers": lambda folder: recipes(folder, "transformers"),
    "bench": bench,
    "unsloth": lambda folder: recipes(folder, "unsloth"),
}


def main(folder: Path, wanted: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in wanted if name not in STAGES]:
        sys.exit(f"no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    for name in wanted or STAGES:
        kept = folder / f"{name}.json"
        if kept.is_file():
            print(kept.read_text(encoding="utf-8"), end="", flush=True)
            continue
        started, lines = time.perf_counter(), []
        for figures in STAGES[name](folder):
            lines.append(json.dumps({"stage": name, **figures}))
            print(lines[-1], flush=True)
        lines.append(json.dumps({"stage": name, "took_seconds": round(time.perf_counter() - started, 1)}))
        print(lines[-1], flush=True)
        whole = kept.with_suffix(".tmp")
        whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
        whole.rename(kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
