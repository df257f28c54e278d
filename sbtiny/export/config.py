"""The choices of an export, and all checks that can be made before any work. Imports no torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from sbtiny import locks, runs
from sbtiny.budget.protocol import FORMATS, Format, parse_format_name
from sbtiny.config import PromptSettings, Settings
from sbtiny.errors import InputError
from sbtiny.export import gguf, kquants
from sbtiny.models.adapters import read_adapter_config
from sbtiny.models.aliases import Source, model_of, resolve
from sbtiny.models.device import Dtype

Merge = Literal["dequantized", "original"]


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """`kinds`: the GGUF files to write, empty for the merged folder alone. `nf4`: the run was trained on a 4-bit base.
    `trained_in`: dtype of the base in training; None in old runs, which did not record it."""

    run: Path
    settings: Settings
    source: Source
    output: Path
    form: Format
    merge: Merge
    dtype: Dtype
    kinds: tuple[str, ...]
    nf4: bool
    trained_in: Dtype | None
    check: bool
    prompt: PromptSettings

    @property
    def name(self) -> str:
        return self.run.resolve().name


def make_config(
    run: Path, settings: Settings, output: Path | None, form: str | None, merge: str, dtype: str, gguf: str, nf4: bool, check: bool
) -> ExportConfig:
    """Raises InputError for an unknown choice, a missing tool, a run without adapter, or an output that cannot be written."""
    for name, value, choices in ("--merge", merge, Merge), ("--dtype", dtype, Dtype):
        if value not in (known := get_args(choices)):
            raise InputError(f"{name} {value!r} is not known: choose from {', '.join(known)}")
    kinds = read_kinds(gguf)
    about = runs.read_run(run)
    check_format(run, form, about["format"])
    nf4 = bool(about.get("four_bit", nf4))  # as training resolved it; config.yaml may hold null, which means another thing on this machine
    runs.check_finished(run)
    adapter = read_adapter_config(run / "adapter")
    output = output or run / "export"
    check_output(output)
    source = check_hub_base(run, adapter, resolve(model_of(str(run), settings.base)))
    prompt, form = runs.kept_prompt(run, settings.prompt), FORMATS[about["format"]]
    return ExportConfig(run, settings, source, output, form, merge, dtype, kinds, nf4, about.get("dtype"), check, prompt)


def check_format(run: Path, wanted: str | None, trained: str) -> None:
    """Raises InputError for a format that the policy was not trained to write: no template can change its tags."""
    if wanted is not None and parse_format_name(wanted) is not FORMATS[trained]:
        raise InputError(f"{run} was trained to write <{trained}>, not <{wanted}>: train one with sbtiny sft --format {wanted}")


def read_kinds(text: str) -> tuple[str, ...]:
    """Parse `f16,q8_0` or `none`: every kind once, in the order given. Raises InputError for an unknown kind or a missing tool."""
    kinds = tuple(dict.fromkeys(word.strip().lower() for word in text.split(",") if word.strip()))
    if kinds in ((), ("none",)):
        return ()
    known = (*gguf.KINDS, *kquants.KINDS)
    if unknown := [kind for kind in kinds if kind not in known]:
        raise InputError(f"--gguf {unknown[0]!r} is not known: choose from {', '.join(known)}, or none")
    if not find_spec("gguf"):
        raise InputError("writing GGUF needs the gguf package: pip install 'sbtiny[gguf]', or use --gguf none")
    if any(kind in kquants.KINDS for kind in kinds):
        kquants.check_tool()
    return kinds


def check_output(folder: Path) -> None:
    """Raises InputError for a folder that cannot be written or replaced, is in use, or holds anything but an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give --output a folder")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"an export cannot take the place of {folder} while you are in it: give --output a new folder, such as export")
    if folder.exists() and any(folder.iterdir()) and not (folder / "export.json").is_file():
        raise InputError(f"{folder} is there and is no earlier export: choose another --output")
    locks.raise_if_locked(locks.lock_path(folder), folder)
    runs.check_writable(folder / "export.json")


def check_hub_base(run: Path, adapter: dict[str, Any], source: Source) -> Source:
    """Raises InputError when adapter and run name different hub models. With equal shapes they would merge without an error."""
    named = str(adapter.get("base_model_name_or_path") or "")
    on_hub = named.count("/") == 1 and not named.startswith((".", "/", "~"))
    if on_hub and source.kind == "hub" and named != source.ref:
        raise InputError(f"the adapter in {run} was trained on {named}, the run says {source.ref}: give the model it was trained on")
    return source
