"""The stages of gpu_run.py: each a row of steps, each step a few commands and the figures read off what they print or write."""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_recipe import LITTLE, bundled, evaluation, need, need_gpu, real_model, real_settings, recipe, shapes, train, training
from gpu_run import ROOT, Figure, Place, Skipped, Step, stop

sys.path[:0] = [str(ROOT / "tests" / "gpu")]
MEASURE, PROBES = ROOT / "tests" / "gpu" / "measure.py", ROOT / "dev" / "gpu_probes.py"
CAPS = {"t4": 15, "rtx4090": 24}  # GiB of the cards

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
        fewer = shapes(place, "sft.batch=4")
        found = place.read(*script, random_weights(place), work, preset, stage, backend, CAPS[preset], *changes, *fewer)
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


def loaded_by_transformers(place: Place) -> Iterator[Figure]:
    """The run that unsloth has trained, asked without it."""
    need("unsloth")
    run = "killed-unsloth"
    yield from evaluation(place.sbtiny("eval", run, "--backend=transformers", f"--output={run}/eval", *shapes(place, *LITTLE)))


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
        "unsloth": {
            **unsloth,
            **contrast,
            "resume": killed_and_resumed("unsloth"),
            "load": loaded_by_transformers,
            "half-import": half_import,
        },
        "real": recipe("real", real_model, real_settings, builds=True),
        "resume": {"transformers": killed_and_resumed("transformers"), "four-bit": four_bit_export, "several-cards": several_cards},
        "engines": {"generate": engine("generate"), "generate-unsloth": engine("generate", "--backend=unsloth")},
        "vllm": {"eval": engine("vllm"), "grpo": vllm_grpo},
        "serving": {"sessions": sessions, "server": server},
    }
