"""The stages of gpu_run.py: each a row of steps, each step a few commands and the figures read off what they print or write."""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Figure, Place, Skipped, Step, stop

sys.path[:0] = [str(ROOT / "tests" / "gpu")]
MEASURE, PROBES = ROOT / "tests" / "gpu" / "measure.py", ROOT / "dev" / "gpu_probes.py"
CAPS = {"t4": 15, "rtx4090": 24}  # GiB of the cards
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


# ---- doctor, graphs ---------------------------------------------------------------------------------------------------------------------


def doctor(place: Place) -> Iterator[Figure]:
    found = place.sbtiny("doctor")
    yield "ok", found["ok"], ""
    yield from ((name, check["found"], "") for name, check in found["device"].items())


def device(place: Place) -> Iterator[Figure]:
    yield from ((name, value, "GiB" if name.endswith("gib") else "") for name, value in place.read(PROBES, "device").items())


def plan(place: Place) -> Iterator[Figure]:
    """What `--preset auto` derives here, and the least hours of the preset's model."""
    found = place.sbtiny("plan", "--preset=auto", "--probe")
    for stage, planned in found["stages"].items():
        yield f"{stage} planned", planned["peak_gb"], "GiB"
        yield f"{stage} micro-batch", planned["micro_batch"], "rows"
        yield f"{stage} at least", planned["hours_at_least"], "h"


def graphs(place: Place) -> Iterator[Figure]:
    found = place.read(PROBES, "graphs", *shapes(place, "8", large=("256",)))
    yield "same answers", found["same"], f"of {found['of']}"
    yield from ((f"{how} graphs", found[f"rate_{how}"], "tok/s") for how in ("with", "without"))


# ---- the recipe: on the bundled model, and on a real one ---------------------------------------------------------------------------------


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
        count = shapes(place, "--limit=20", large=("--limit=500",))
        place.sbtiny("calibrate", f"{name}/grpo", *count, *settings(place)[:1])
        yield "calibrated", (place.folder / name / "grpo" / "calibration.json").is_file(), ""

    def export(place: Place) -> Iterator[Figure]:
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
    if place.model is None:
        return bundled(place)
    config = f"--config={ROOT / 'examples' / 'gsm8k_0.5b' / 'recipe.yaml'}"
    files = [f"--set={key}={file}" for key, file in (("data.task", place.questions), ("grpo.questions", place.questions)) if file]
    return (config, *files, *([f"--set=eval.task={place.test}"] if place.test else []), "--set=data.limit=1200")


# ---- presets, bench ----------------------------------------------------------------------------------------------------------------------


def random_weights(place: Place) -> Path:
    """A model of random weights in the shape of the presets' model, a small one where shapes are small; made once."""
    from test_recipes import REHEARSAL, random_model

    from sbtiny.models.shapes import SHAPES

    folder = place.folder / "random"
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        random_model(folder, REHEARSAL if place.small else SHAPES["qwen-1.5b"])
    return folder


def measured(preset: str, stage: str, backend: str = "transformers", *changes: str, script: tuple[Any, ...] = (MEASURE,)) -> Step:
    """Two updates of a preset under the cap of its card: peak against plan, seconds, finite."""

    def step(place: Place) -> Iterator[Figure]:
        if backend == "unsloth":
            need("unsloth")
        if script != (MEASURE,):
            need_gpu(place)
        if place.small and preset != "t4":
            raise Skipped("small shapes are the same for every card")
        work = place.folder / "-".join((backend, preset, *(str(part) for part in script[1:]), *changes)).replace("=", "-")
        work.mkdir(exist_ok=True)
        shutil.rmtree(work / stage, ignore_errors=True)  # of a step that was killed
        found = place.read(*script, random_weights(place), work, preset, stage, backend, CAPS[preset], *changes)
        yield "peak", found["peak_gb"], "GiB"
        yield "planned without the context", found["plan_gb"], "GiB"
        yield "finite", found["finite"], ""
        yield "micro-batch at the end", found["micro_batch"], "rows"
        for name, unit in (("seconds", "s"), ("generate_seconds", "s"), ("step_seconds", "s"), ("sampled_tokens_per_second", "tok/s")):
            if found[name] is not None:
                yield f"work {name}", found[name], unit

    return step


def attention(place: Place) -> Iterator[Figure]:
    need_gpu(place)
    place.run("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "gpu" / "test_attention.py")
    yield "gradients finite", True, ""


def bench_rollout(place: Place) -> Iterator[Figure]:
    model = "tiny" if place.small else str(random_weights(place))
    large = ("--requests=128", "--slots=64", "--mean=200", "--max-tokens=800", "--rounds=1")
    size = shapes(place, "--requests=8", "--slots=4", "--rounds=1", large=large)
    for name, found in place.sbtiny("bench", "rollout", f"--model={model}", *size)["engines"].items():
        yield name, found["tokens_per_second"]["median"], "tok/s"


def bench_grpo(place: Place) -> Iterator[Figure]:
    model = "tiny" if place.small else str(random_weights(place))
    little = ("--prompts=2", "--group=2", "--micro-batch=2", "--steps=1", "--rounds=1")
    found = place.sbtiny(
        "bench", "grpo", f"--model={model}", *shapes(place, *little, large=("--mean=200", "--max-tokens=800", "--rounds=1"))
    )
    yield from ((f"{side} a step", found[side]["seconds"]["median"], "s") for side in ("sbtiny", "trl"))
    yield "difference of losses", found["loss_difference"], ""


# ---- killed and resumed, unsloth, engines ------------------------------------------------------------------------------------------------


def killed_and_resumed(backend: str) -> Step:
    """A cold start of the bundled model, killed after its first checkpoint; whether it then makes all of its updates."""

    def step(place: Place) -> Iterator[Figure]:
        if backend == "unsloth":
            need("unsloth")
        folder = place.folder / f"killed-{backend}"
        sized = (f"--backend={backend}", "--steps=12", "--save-steps=4", "--set=data.limit=40", "--set=data.max_tokens=120")
        if not any(folder.glob("checkpoint-*")):
            child = place.start("-m", "sbtiny", "sft", "--model=tiny", "--no-4bit", f"--output={folder}", *sized)
            while child.poll() is None and not any(folder.glob("checkpoint-*")) and time.monotonic() < place.deadline:
                time.sleep(0.02)
            child.kill()
            stop(child)
        yield from train(place, "sft", folder.name, "--model=tiny", "--no-4bit", *sized)
        yield "adapter", adapter_dtype(folder), ""

    return step


def adapter_dtype(run: Path) -> str:
    """The dtype of a saved adapter's weights, from the header of its file."""
    with (run / "adapter" / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return ", ".join(sorted({entry["dtype"] for name, entry in header.items() if name != "__metadata__"}))


def four_bit_export(place: Place) -> Iterator[Figure]:
    """A run on a 4-bit base and its export, whose check unpacks it and computes in float32."""
    yield from train(place, "sft", "four-bit", "--model=tiny", "--4bit", "--steps=6", "--set=data.limit=40", "--set=data.max_tokens=120")
    yield "adapter", adapter_dtype(place.folder / "four-bit"), ""
    place.sbtiny("export", "four-bit", "--gguf=none", "--questions=4")


def half_import(place: Place) -> Iterator[Figure]:
    need("unsloth")
    found = place.read(PROBES, "half-import", place.folder / f"half-import-{time.time_ns()}")
    yield "backend", found["backend"], ""
    yield "loss", found["loss"], ""


def engine(name: str, *more: str) -> Step:
    """An evaluation of the bundled model through another engine."""

    def step(place: Place) -> Iterator[Figure]:
        for module in {"vllm", "unsloth"} & {word.rpartition("=")[2] for word in (name, *more)}:
            need(module)
        count = shapes(place, "--limit=6", "--set=eval.max_tokens=120", large=("--limit=200",))
        output = f"--output=eval-{'-'.join((name, *more)).replace('=', '').replace('--', '')}"
        yield from evaluation(place.sbtiny("eval", "tiny", f"--engine={name}", output, "--no-4bit", *count, *more))

    return step


def vllm_grpo(place: Place) -> Iterator[Figure]:
    need("vllm")
    yield from train(place, "grpo", "vllm-grpo", "--run=demo/sft", "--force", "--engine=vllm", "--steps=4", *bundled(place))


def several_cards(place: Place) -> Iterator[Figure]:
    if (cards := place.read(PROBES, "device")["cards_of_torch"]) < 2:
        raise Skipped(f"there are {cards} cards here")
    shutil.rmtree(place.folder / "several", ignore_errors=True)
    launch = ("-m", "accelerate.commands.launch", f"--num_processes={cards}", "-m", "sbtiny", "sft")
    place.run(*launch, "--model=tiny", "--output=several", "--steps=6", "--set=data.limit=40")
    yield from training(place.folder / "several")


# ---- serving -----------------------------------------------------------------------------------------------------------------------------


def sessions(place: Place) -> Iterator[Figure]:
    found = place.read(PROBES, "sessions", *shapes(place, "24", large=("64",)))
    yield "held and alone the same", found["same"], f"of {found['of']}"
    yield "from a kept answer the same", found["same_after_kept"], ""
    yield "kept states", round(found["kept_bytes"] / 2**20, 1), "MiB"
    yield "memory that they took", round(found["memory"] / 2**20, 1), "MiB"


def server(place: Place) -> Iterator[Figure]:
    """64 streams on 16 slots, so that most bodies wait with their states kept."""
    run = "demo/grpo" if (place.folder / "demo" / "grpo" / "adapter").is_dir() else "tiny"
    before = place.log.stat().st_size if place.log.is_file() else 0
    child = place.start("-m", "sbtiny", "serve", run, "--port=0", *shapes(place, "--slots=4", large=("--slots=16",)))
    try:
        while not (url := re.search(r"(http://\S+) serves", place.log.read_text(encoding="utf-8")[before:])):
            if child.poll() is not None or time.monotonic() > place.deadline:
                place.fail(child.poll() or 0)
            time.sleep(0.1)
        found = place.read(PROBES, "server", url[1], child.pid, *shapes(place, "12", large=("64",)))
    finally:
        stop(child)
    yield "all at once", found["rate"], "tok/s"
    yield "until the budget", found["until_budget"], "s, median"
    yield "waited", found["waited"], "answers"
    yield "together and alone the same", found["same"], f"of {found['of']}"
    yield from ((name.replace("_", " "), found[name], "GiB") for name in ("memory_before", "memory_most"))
    yield from ((name, found[name.replace(" ", "_")], f"of {found['presses']}") for name in ("interrupted", "closed twice"))


def make_stages(place: Place) -> dict[str, dict[str, Step]]:
    """All stages in the order in which they are worth their minutes."""
    more = ("rtx4090-sft", "rtx4090-grpo")
    presets = {name: measured(*name.split("-")) for name in ("t4-sft", "t4-grpo", *more)}
    as_t4 = {f"float16-{stage}": measured("t4", stage, "transformers", script=(PROBES, "float16")) for stage in ("sft", "grpo")}
    memory = {"too-large": measured("t4", "sft", "transformers", *shapes(place, "sft.micro_batch=4", large=("sft.micro_batch=16",)))}
    contrast = {"contrast": measured("t4", "sft", "unsloth", "sft.contrast=1.0")}
    unsloth = {stage: measured("t4", stage, "unsloth") for stage in ("sft", "grpo")}
    return {
        "doctor": {"doctor": doctor, "device": device, "plan": plan},
        "graphs": {"graphs": graphs},
        "demo": recipe("demo", lambda _: "tiny", bundled, builds=False),
        "presets": {"attention": attention, **presets},
        "float16": {**as_t4, **memory},
        "bench": {"rollout": bench_rollout, "grpo": bench_grpo},
        "unsloth": {**unsloth, **contrast, "resume": killed_and_resumed("unsloth"), "half-import": half_import},
        "real": recipe("real", real_model, real_settings, builds=True),
        "resume": {"transformers": killed_and_resumed("transformers"), "four-bit": four_bit_export, "several-cards": several_cards},
        "engines": {"generate": engine("generate"), "generate-unsloth": engine("generate", "--backend=unsloth")},
        "vllm": {"eval": engine("vllm"), "grpo": vllm_grpo},
        "serving": {"sessions": sessions, "server": server},
    }
