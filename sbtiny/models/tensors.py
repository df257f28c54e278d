"""The tensors of a model folder, by the headers of its files: which ones they are, and whether they are those of its config.json.

Whatever loads, exports or compares a model reads its folder here, so that none of them takes other weights than the others.
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
from sbtiny.models.tensor_faults import WHOLE
from sbtiny.models.shapes import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
COMPUTED = "rotary_emb.inv_freq"  # old files hold it, and every reader computes it
SAMPLE = 4096  # numbers of a tensor's first and last row that its fingerprint takes
ROWS = 256  # of a head that are held against the embedding it is said to be


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is, and what the header of its file says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def rows(self, first: int, last: int) -> torch.Tensor:
        with safe_open(self.file, "pt") as file:
            return file.get_slice(self.name)[first:last]


@dataclass(frozen=True, slots=True)
class Base:
    """A model folder that was read and found to be one model. `parameters` is a count; `tied`: a tensor that is another -> that other."""

    folder: Path
    config: Any
    tensors: dict[str, Stored]
    parameters: int
    tied: dict[str, str]

    def fingerprint(self) -> str:
        """Tells bases of one shape apart: a hash of a few values of every tensor as stored, whatever dtype it is loaded in.

        The values go as float32, so that a copy saved in a wider dtype is the same base.
        """
        found: dict[str, str] = {}
        for file in {tensor.file for tensor in self.tensors.values()}:
            with safe_open(file, "pt") as opened:
                here = [name for name, tensor in self.tensors.items() if tensor.file == file]
                found |= {name: hash_ends(opened, name) for name in here}
        # Some savers write the embedding a second time, as the head.
        lines = [f"{name} {found[name]}" for name in sorted(found) if name not in self.tied]
        return sha256("\n".join(lines).encode()).hexdigest()[:16]


def hash_ends(opened: Any, name: str) -> str:
    """Shape of a tensor in an open file, and a hash of its first and last row, or of the beginning where it is one row."""
    part = opened.get_slice(name)
    shape = part.get_shape()
    one = part[:SAMPLE] if len(shape) == 1 else opened.get_tensor(name) if not shape else None  # a scalar has no slices
    ends = [part[:1], part[shape[0] - 1 :]] if one is None else [one]
    values = [end.flatten()[:SAMPLE].float().numpy().tobytes() for end in ends]
    return f"{shape} {sha256(b''.join(values)).hexdigest()}"


def read_folder(folder: Path) -> Base:
    """Raises InputError when the files are not the model that config.json describes."""
    config = read_config(folder)
    check_folder(folder, config)
    tensors = read_tensors(folder)
    empty = without_weights(folder, config)
    check_tensors(folder, tensors, empty)
    return Base(folder, config, tensors, empty.num_parameters(), dict(empty.all_tied_weights_keys))


def read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    with reading_config(folder):
        return AutoConfig.from_pretrained(folder)


def without_weights(folder: Path, config: Any) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    with reading_config(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@contextmanager
def reading_config(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its fields are anything's: transformers raises KeyError, TypeError and errors of its own as well
        reason = " ".join(str(error).split())[:200].rstrip(" .:") or type(error).__name__
        raise tensor_faults.refusal(folder, f"config.json: {reason}", WHOLE) from error


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> tensor, from headers alone. Raises InputError for files that are missing, broken or hold a tensor twice."""
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        here = read_header(file)
        if twice := found.keys() & here.keys():
            name = min(twice)
            raise tensor_faults.refusal(folder, f"{name} is in {found[name].file.name} and in {file.name}", WHOLE)
        found |= here
    return found


def read_header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if not name.endswith(COMPUTED)]  # noqa: SIM118  (it is no mapping)
            parts = {name: opened.get_slice(name) for name in names}
            return {name: Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise tensor_faults.refusal(file.parent, f"cannot read {file.name}: {error}", WHOLE) from error


def weight_files(folder: Path) -> list[Path]:
    """The files transformers takes: the single one before the parts that an index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in indexed(folder)]
    if next(folder.glob("*-of-*.safetensors"), None):
        raise tensor_faults.refusal(folder, f"it holds parts and no {INDEX}", WHOLE)
    raise tensor_faults.refusal(folder, f"it holds no {SINGLE}", "save the model with save_pretrained first")


def indexed(folder: Path) -> list[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise tensor_faults.refusal(folder, f"{INDEX} is corrupt ({error!r})", WHOLE) from error


def unread(folder: Path) -> str | None:
    """A line on the weights that stand beside those that are read, and might be taken for them."""
    if not ((folder / SINGLE).is_file() and (folder / INDEX).is_file()) or indexed(folder) == [SINGLE]:
        return None
    return f"{folder} holds {SINGLE} and an index of other files: {SINGLE} is read, the others are not"


def check_folder(folder: Path, config: Any) -> None:
    """Raises InputError for a folder with more than one meaning, or with weights that are quantised."""
    if (folder / ADAPTER[0]).is_file():
        mend = "move the adapter's files out, or merge it into the model first"
        raise tensor_faults.refusal(folder, f"it holds an adapter beside the model ({ADAPTER[0]})", mend)
    if how := getattr(config, "quantization_config", None):
        method = how.get("quant_method") if isinstance(how, dict) else how.quant_method
        raise quantised(folder, f"{getattr(method, 'value', method)}, config.json says")
    if other := getattr(config, "transformers_weights", None):
        raise tensor_faults.refusal(folder, f"config.json has its weights in {other}", f"name them {SINGLE} and take the entry out")


def quantised(folder: Path, how: str) -> InputError:
    mend = "give the 16-bit model it was made from, which --4bit quantises itself"
    return tensor_faults.refusal(folder, f"its weights are quantised already ({how})", mend)


def check_tensors(folder: Path, tensors: Mapping[str, Stored], empty: "PreTrainedModel") -> None:
    """Raises InputError for the first tensor that is not as in `empty`, the model without its weights.

    Files of other architectures may name tensors otherwise than the model does: of those `check_report` tells.
    """
    if odd := next((tensor for tensor in tensors.values() if tensor.dtype not in FLOATS), None):
        raise quantised(folder, f"{odd.name} is stored as {odd.dtype}")
    if empty.config.model_type not in ARCHITECTURES:
        return
    wanted = {name: tuple(weight.shape) for name, weight in empty.state_dict().items()}
    tied = empty.all_tied_weights_keys
    missing = [name for name in wanted if name not in tensors and name not in tied]
    unexpected = [name for name in tensors if name not in wanted]
    both = [(name, tensors[name].shape, shape) for name, shape in wanted.items() if name in tensors]
    tensor_faults.check(folder, list(wanted), missing, unexpected, [(name, a, b) for name, a, b in both if a != b])
    for name, source in tied.items():
        if name in tensors and not torch.equal(tensors[name].rows(0, ROWS), tensors[source].rows(0, ROWS)):
            raise tensor_faults.untied(folder, name, source)


def check_report(where: Path | str, model: "PreTrainedModel", report: dict[str, Any], tied: Mapping[str, str] | None = None) -> None:
    """Raises InputError for the first tensor that transformers left random, cut off or untied as it loaded a model.

    `report` is its loading info, `tied` what config.json ties.
    """
    wanted = list(model.state_dict())
    missing, changed = set(report["missing_keys"]), sorted((name, tuple(a), tuple(b)) for name, a, b in report["mismatched_keys"])
    tensor_faults.check(where, wanted, [n for n in wanted if n in missing], sorted(report["unexpected_keys"]), changed)
    for name, source in (tied or {}).items():
        if name not in model.all_tied_weights_keys:
            raise tensor_faults.untied(where, name, source)


def check_finite(where: str, model: torch.nn.Module) -> None:
    """Raises InputError for weights that are NaN or infinite, or become so in the dtype they are loaded in."""
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        values = weight.detach() if state is None else state.offset  # the mean of what 4-bit blocks are scaled by
        if values is not None and values.is_floating_point() and not torch.stack(torch.aminmax(values)).isfinite().all():
            raise tensor_faults.refusal(where, f"{name} is not finite in {model.dtype}", "download the model again, or give another")
