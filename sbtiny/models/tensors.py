"""Read the tensors of a model folder from the headers of its files, and check them against config.json.

Loading, export and comparison all read a folder here, so that they take the same weights.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from sbtiny.errors import InputError
from sbtiny.models import tensor_faults
from sbtiny.models.adapters import FILES as ADAPTER
from sbtiny.models.shapes import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
COMPUTED = "rotary_emb.inv_freq"  # in old files; every reader computes it
SAMPLE = 4096  # values of a tensor's first and last row in its fingerprint
ROWS = 256  # of a tied tensor that are compared with its source


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: location, shape and dtype, from the header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def rows(self, first: int, last: int) -> torch.Tensor:
        with safe_open(self.file, "pt") as file:
            return file.get_slice(self.name)[first:last]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checked model folder. `tied`: name of a tied tensor -> its source."""

    folder: Path
    config: Any
    tensors: dict[str, StoredTensor]
    parameters: int
    tied: dict[str, str]

    def fingerprint(self) -> str:
        """Hash a few stored values of every tensor, to distinguish bases of the same shape.

        Hashes them as float32, so that a copy saved in a wider dtype is the same base.
        """
        hashes: dict[str, str] = {}
        for file in {tensor.file for tensor in self.tensors.values()}:
            with safe_open(file, "pt") as opened:
                here = [name for name, tensor in self.tensors.items() if tensor.file == file]
                hashes |= {name: hash_ends(opened, name) for name in here}
        # Tied tensors do not count: some savers write the embedding a second time, as the head.
        lines = [f"{name} {hashes[name]}" for name in sorted(hashes) if name not in self.tied]
        return sha256("\n".join(lines).encode()).hexdigest()[:16]


def hash_ends(opened: Any, name: str) -> str:
    """Shape of a tensor in an open file, and a hash of its first and last row; of a vector, the beginning."""
    part = opened.get_slice(name)
    shape = part.get_shape()
    one = part[:SAMPLE] if len(shape) == 1 else opened.get_tensor(name) if not shape else None  # a scalar has no slices
    ends = [part[:1], part[shape[0] - 1 :]] if one is None else [one]
    values = [end.flatten()[:SAMPLE].float().numpy().tobytes() for end in ends]
    return f"{shape} {sha256(b''.join(values)).hexdigest()}"


def read_folder(folder: Path) -> ModelFolder:
    """Read and check a model folder. Raises InputError when its files do not fit config.json."""
    config = read_config(folder)
    check_folder(folder, config)
    tensors = read_tensors(folder)
    empty = build_on_meta(folder, config)
    check_tensors(folder, tensors, empty)
    return ModelFolder(folder, config, tensors, empty.num_parameters(), dict(empty.all_tied_weights_keys))


def read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    with reading_config(folder):
        return AutoConfig.from_pretrained(folder)


def read_generation(folder: Path, config: Any) -> "GenerationConfig":
    """A folder's generation config. Without a file, the one transformers derives from `config`, as in training."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {file} ({error}): give the model the run was trained on") from error


def build_on_meta(folder: Path, config: Any) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    with reading_config(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@contextmanager
def reading_config(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises KeyError, TypeError and errors of its own as well
        reason = " ".join(str(error).split())[:200].rstrip(" .:") or type(error).__name__
        raise tensor_faults.load_error(folder, f"config.json: {reason}") from error


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, from headers alone. Raises InputError for files that are missing, broken or hold a tensor twice."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        here = read_header(file)
        if twice := tensors.keys() & here.keys():
            name = min(twice)
            raise tensor_faults.load_error(folder, f"{name} is in {tensors[name].file.name} and in {file.name}")
        tensors |= here
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if not name.endswith(COMPUTED)]  # noqa: SIM118  (it is no mapping)
            parts = {name: opened.get_slice(name) for name in names}
            return {name: StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise tensor_faults.load_error(file.parent, f"cannot read {file.name}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: the single one if there is one, else the parts that an index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in files_in_index(folder)]
    if next(folder.glob("*-of-*.safetensors"), None):
        raise tensor_faults.load_error(folder, f"it holds parts and no {INDEX}")
    raise tensor_faults.load_error(folder, f"it holds no {SINGLE}", "save the model with save_pretrained first")


def files_in_index(folder: Path) -> list[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise tensor_faults.load_error(folder, f"{INDEX} is corrupt ({error!r})") from error


def unused_weights_warning(folder: Path) -> str | None:
    """A warning if the folder holds other weights beside those that are read; else None."""
    if not ((folder / SINGLE).is_file() and (folder / INDEX).is_file()) or files_in_index(folder) == [SINGLE]:
        return None
    return f"{folder} holds {SINGLE} and an index of other files: {SINGLE} is read, the others are not"


def check_folder(folder: Path, config: Any) -> None:
    """Raises InputError for a folder with an adapter beside the model, or with quantised or renamed weights."""
    if (folder / ADAPTER[0]).is_file():
        hint = "move the adapter's files out, or merge it into the model first"
        raise tensor_faults.load_error(folder, f"it holds an adapter beside the model ({ADAPTER[0]})", hint)
    if how := getattr(config, "quantization_config", None):
        method = how.get("quant_method") if isinstance(how, dict) else how.quant_method
        raise quantised_error(folder, f"{getattr(method, 'value', method)}, config.json says")
    if other := getattr(config, "transformers_weights", None):
        raise tensor_faults.load_error(folder, f"config.json has its weights in {other}", f"name them {SINGLE} and take the entry out")


def quantised_error(folder: Path, how: str) -> InputError:
    hint = "give the 16-bit model it was made from, which --4bit quantises itself"
    return tensor_faults.load_error(folder, f"its weights are quantised already ({how})", hint)


def check_tensors(folder: Path, tensors: Mapping[str, StoredTensor], empty: "PreTrainedModel") -> None:
    """Raises InputError for the first tensor that is not as in `empty`, the model without its weights.

    Checks names only for known ARCHITECTURES. Others may store tensors under other names; `check_report` checks them after loading.
    """
    if odd := next((tensor for tensor in tensors.values() if tensor.dtype not in FLOATS), None):
        raise quantised_error(folder, f"{odd.name} is stored as {odd.dtype}")
    if empty.config.model_type not in ARCHITECTURES:
        return
    wanted = {name: tuple(weight.shape) for name, weight in empty.state_dict().items()}
    tied = empty.all_tied_weights_keys
    missing = [name for name in wanted if name not in tensors and name not in tied]
    unexpected = [name for name in tensors if name not in wanted]
    both = [(name, tensors[name].shape, shape) for name, shape in wanted.items() if name in tensors]
    tensor_faults.check_names_and_shapes(folder, list(wanted), missing, unexpected, [(name, a, b) for name, a, b in both if a != b])
    for name, source in tied.items():
        if name in tensors and not torch.equal(tensors[name].rows(0, ROWS), tensors[source].rows(0, ROWS)):
            raise tensor_faults.untied_error(folder, name, source)


def check_report(where: Path | str, model: "PreTrainedModel", report: dict[str, Any], tied: Mapping[str, str] | None = None) -> None:
    """Raises InputError for the first tensor that transformers left random, resized or untied in loading.

    `report`: the loading info of transformers. `tied`: name of a tied tensor -> its source.
    """
    wanted = list(model.state_dict())
    missing, changed = set(report["missing_keys"]), sorted((name, tuple(a), tuple(b)) for name, a, b in report["mismatched_keys"])
    tensor_faults.check_names_and_shapes(where, wanted, [n for n in wanted if n in missing], sorted(report["unexpected_keys"]), changed)
    for name, source in (tied or {}).items():
        if name not in model.all_tied_weights_keys:
            raise tensor_faults.untied_error(where, name, source)


def check_finite(where: str, model: torch.nn.Module) -> None:
    """Raises InputError for weights that are NaN or infinite, also by the dtype they are loaded in."""
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        values = weight.detach() if state is None else state.offset  # mean scale of the 4-bit blocks
        if values is not None and values.is_floating_point() and not torch.stack(torch.aminmax(values)).isfinite().all():
            raise tensor_faults.load_error(where, f"{name} is not finite in {model.dtype}", "download the model again, or give another")
