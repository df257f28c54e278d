"""What a training and an evaluation say, and the recipe: base, cold start, GRPO, each evaluated, and the export."""

import json
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Figure, Place, Skipped, Step

LITTLE = ("--set=data.limit=60", "--set=sft.steps=8", "--set=grpo.steps=2", "--set=eval.limit=10", "--set=eval.max_tokens=160")
LITTLE += ("--set=grpo.prompts_per_step=4", "--set=grpo.max_tokens=160", "--set=data.max_tokens=160")
EVALUATED = (("accuracy", "share"), ("mean_tokens", "tokens"), ("mean_budget", "tokens"), ("format_rate", "share"))


def shapes(place: Place, *little: str, large: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The arguments for small shapes, or those for large ones."""
    return little if place.small else large


def need(module: str) -> None:
    if find_spec(module) is None:
        raise Skipped(f"{module} is not installed")


def need_gpu(place: Place) -> None:
    if not place.on_gpu:
        raise Skipped("there is no GPU")


def evaluation(found: dict[str, Any]) -> Iterator[Figure]:
    yield from ((name, found[name], unit) for name, unit in EVALUATED)
    yield "within 50 %", found["within"]["0.5"], "share"


def training(run: Path) -> Iterator[Figure]:
    """Of a finished run's metrics.jsonl: updates, those that were not finite, seconds, tokens sampled a second, peak memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    numbers = [row.get(key, 0.0) for row in steps for key in ("loss", "grad_norm")]
    yield "updates", steps[-1]["step"], "updates"
    yield "not finite", sum(not math.isfinite(number) for number in numbers), "numbers"
    yield "last loss", steps[-1]["loss"], ""
    yield "peak", max(row["peak_gb"] for row in rows), "GiB"
    for key, unit in (("step_time", "s"), ("tokens_per_second", "tok/s"), ("reward", ""), ("within_50", "share")):
        if found := [row[key] for row in steps if key in row]:
            yield key, found[-1], unit


def train(place: Place, verb: str, run: str, *arguments: str) -> Iterator[Figure]:
    """A training that goes on from its checkpoint where it was stopped before."""
    folder = place.folder / run
    if not (folder / "adapter").is_dir():
        kept = [word for word in arguments if word == "--force"]  # all else is in the run's own settings
        place.sbtiny(verb, f"--output={folder}", *(["--resume", *kept] if (folder / "run.json").is_file() else arguments))
    yield from training(folder)


def recipe(name: str, model: Callable[[Place], str], settings: Callable[[Place], tuple[str, ...]], builds: bool) -> dict[str, Step]:
    """Base, cold start and GRPO, each evaluated, and the export. `builds`: with rows of `data build`, else sampled by the cold start."""

    def evaluated(what: str, *more: str) -> Step:
        def step(place: Place) -> Iterator[Figure]:
            policy = model(place) if what == "base" else f"{name}/{what}"
            yield from evaluation(place.sbtiny("eval", policy, f"--output={name}/eval-{what}", *settings(place), *more))

        return step

    def rows(place: Place) -> Iterator[Figure]:
        file = place.folder / name / "rows.jsonl"
        file.parent.mkdir(exist_ok=True)
        if not file.is_file():  # the build goes on from the answers in its .part file
            place.sbtiny("data", "build", file, f"--model={model(place)}", *settings(place))
        yield "rows", len(file.read_text(encoding="utf-8").splitlines()), "rows"

    def sft(place: Place) -> Iterator[Figure]:
        data = (f"--data={name}/rows.jsonl",) if builds else ()
        (saves,) = shapes(place, "--save-steps=4", large=("--save-steps=20",))
        yield from train(place, "sft", f"{name}/sft", f"--model={model(place)}", *data, *settings(place), saves)

    def grpo(place: Place) -> Iterator[Figure]:
        yield from train(place, "grpo", f"{name}/grpo", f"--run={name}/sft", "--force", "--save-steps=5", *settings(place))

    def calibrate(place: Place) -> Iterator[Figure]:
        if place.model is not None:
            raise Skipped("needs questions that are neither trained on nor evaluated: sbtiny calibrate RUN --task FILE")
        count = shapes(place, "--limit=20", large=("--limit=500",))
        place.sbtiny("calibrate", f"{name}/grpo", *count, *settings(place)[:1])
        yield "calibrated", (place.folder / name / "grpo" / "calibration.json").is_file(), ""

    def export(place: Place) -> Iterator[Figure]:
        model(place)  # skips where there is none
        place.sbtiny("export", f"{name}/grpo", "--gguf=q8_0", *shapes(place, "--questions=4", large=("--questions=50",)))
        yield "checked", json.loads((place.folder / name / "grpo" / "export" / "export.json").read_text()).get("passed"), ""

    steps = {"base": evaluated("base"), "rows": rows, "sft": sft, "eval-sft": evaluated("sft"), "grpo": grpo}
    steps |= {"eval-grpo": evaluated("grpo"), "calibrate": calibrate, "export": export}
    return steps if builds else {key: step for key, step in steps.items() if key != "rows"}


def bundled(place: Place) -> tuple[str, ...]:
    return ("--preset=cpu", *shapes(place, *LITTLE))


def real_model(place: Place) -> str:
    if place.model is None and not place.small:
        raise Skipped("give --model, --questions and --test")
    return place.model or "tiny"


def real_settings(place: Place) -> tuple[str, ...]:
    """Those of the example on GSM8K, with these files of questions."""
    real_model(place)
    if place.model is None:
        return bundled(place)
    config = f"--config={ROOT / 'examples' / 'gsm8k_0.5b' / 'recipe.yaml'}"
    files = [f"--set={key}={file}" for key, file in (("data.task", place.questions), ("grpo.questions", place.questions)) if file]
    return (config, *files, *([f"--set=eval.task={place.test}"] if place.test else []), "--set=data.limit=1200")
