"""A run whose adapter lies between those of two others, of which one was trained on from the other: it keeps of both.

    python examples/gsm8k_0.5b/average.py RUN OTHER OUT [--share 0.5]

Each weight is (1 - share) that of RUN and share that of OTHER, saved in float16 (Wortsman et al. 2022, "Robust fine-tuning of zero-shot
models"). OTHER is a run or one of its checkpoint folders. OUT has RUN's config.yaml, and both as `parents` in its run.json, so that
`sbtiny calibrate` leaves out what either was trained on.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sbtiny import runs
from sbtiny.errors import InputError, run_script
from sbtiny.models.adapters import FILES, read_adapter_config

CONFIG, WEIGHTS = FILES


def find_adapter(folder: Path) -> Path:
    """The adapter's folder of a run or of a checkpoint."""
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def find_run_of(folder: Path) -> Path:
    """The run that a checkpoint's folder lies in; a run's own folder."""
    return next((place for place in (folder, *folder.resolve().parents) if (place / "run.json").is_file()), folder)


def average_adapters(first: Path, second: Path, share: float) -> bytes:
    """The content of the averaged adapter's file. Raises InputError for adapters of different shapes."""
    for folder in (first, second):
        read_adapter_config(folder)
    try:
        ours, theirs = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter of {first} or {second} cannot be read: {error}") from error
    if {name: tensor.shape for name, tensor in ours.items()} != {name: tensor.shape for name, tensor in theirs.items()}:
        raise InputError(f"{first} and {second} have other layers or another rank: average adapters of which one goes on from the other")
    mixed = {name: ((1 - share) * ours[name].float() + share * theirs[name].float()).half() for name in ours}
    return save(mixed, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "other", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    args = parser.parse_args()
    if not 0 <= args.share <= 1:
        raise InputError(f"--share is {args.share}: use 0 (all of RUN) to 1 (all of OTHER)")
    runs.check_finished(args.run)
    about, other = runs.read_run(args.run), find_run_of(args.other)
    if (other / "run.json").is_file() and runs.read_run(other).get("base") != about.get("base"):
        raise InputError(f"{args.other} was trained on another base model than {args.run}: average runs of one base")
    runs.check_writable(args.out / "run.json")
    if args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"{args.out} is not empty: give a new folder")
    content = average_adapters(args.run / "adapter", find_adapter(args.other), args.share)
    if not (args.run / "config.yaml").is_file():
        raise InputError(f"{args.run} has no config.yaml: give a whole run")
    about = {key: value for key, value in about.items() if key != "parent"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as place:
        made = Path(place) / "run"
        (made / "adapter").mkdir(parents=True)
        for name in ("config.yaml", f"adapter/{CONFIG}"):
            shutil.copy(args.run / name, made / name)
        runs.write_bytes(made / "adapter" / WEIGHTS, content)
        runs.write_json(made / "run.json", about | {"parents": [str(args.run.resolve()), str(other.resolve())], "share": args.share})
        made.replace(args.out)  # whole or not at all; an empty folder gives way
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
