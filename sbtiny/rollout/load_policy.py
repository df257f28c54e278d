"""Load a policy by its name: a run, a model or a .gguf file."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sbtiny import runs
from sbtiny.budget.protocol import FORMATS, SOLUTION, Format
from sbtiny.config import EngineName, PromptSettings, Settings
from sbtiny.errors import InputError
from sbtiny.models.aliases import fill_prompt, model_of, resolve
from sbtiny.models.chat_template import form_of_template
from sbtiny.models.gguf import open_gguf, tokenizer_from_gguf
from sbtiny.models.load import add_lora, load_model, read_base
from sbtiny.models.prompt import PLAIN, fit_template, stop_ids
from sbtiny.rollout.decode_engine import DecodeEngine
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.engines import llama_cpp, vllm
from sbtiny.rollout.engines.generate import GenerateEngine
from sbtiny.rollout.load_upstream import load_upstream_policy
from sbtiny.rollout.memory import return_freed_memory
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.token_pieces import token_pieces

ENGINES: dict[EngineName, type[DecodeEngine]] = {"ours": Engine, "generate": GenerateEngine, "vllm": vllm.VllmEngine}


def build_policy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    slots: int = 64,
    kv_cache_gib: float | None = None,
    engine: EngineName = "ours",
    form: Format = SOLUTION,
    states_budget: bool = True,
    prompt: PromptSettings = PLAIN,
) -> Policy:
    """The policy of a loaded model. Fits the tokenizer's chat template to prompt and format, in place."""
    opening = fit_template(tokenizer, form, prompt)
    pieces = token_pieces(tokenizer, model.get_input_embeddings().weight.shape[0])
    decoder = ENGINES[engine](model, pieces, stop_ids(model, tokenizer), slots, kv_cache_gib)
    return Policy(decoder, tokenizer, form, model, states_budget, opening)


def build_gguf_policy(
    file: Path, slots: int = 64, kv_cache_gib: float | None = None, prompt: PromptSettings = PLAIN, form: Format = SOLUTION
) -> Policy:
    """The policy of a GGUF file, with the file's tokenizer and chat template. Raises InputError when they cannot be read.

    `form`: the format where the template shows none.
    """
    tokenizer = tokenizer_from_gguf(open_gguf(file), file)
    trained = form_of_template(tokenizer.chat_template)
    form = trained or form
    fit_template(tokenizer, form, prompt)
    engine = llama_cpp.LlamaCppEngine(file, slots, kv_cache_gib)
    engine.pieces = token_pieces(tokenizer, engine.size)
    return Policy(engine, tokenizer, form, states_budget=trained is not None)


def is_four_bit(settings: Settings, about: dict[str, Any]) -> bool:
    """Whether to load in NF4: the setting, else the value in `about` (run.json), else true on a GPU."""
    return settings.four_bit if settings.four_bit is not None else about.get("four_bit", torch.cuda.is_available())


def load_policy(name: str, settings: Settings, slots: int, trainable: bool = False, run: Path | None = None) -> Policy:
    """Load a run's policy (base model and adapter), or a plain model without an adapter.

    `run`: the run to resume with it; its base must be the same. A .gguf file is decoded by llama.cpp where its module is installed and
    neither another engine nor NF4 is set. Else it is unpacked like any model; to answer it is not rounded again unless that is asked for.
    With `upstream` set, servers elsewhere decode. Raises InputError for an unfinished run, another base or a missing engine.
    """
    folder = runs.find_run(name)
    if settings.upstream:
        if trainable:
            raise InputError("an upstream answers and cannot be trained: leave --upstream out")
        return load_upstream_policy(name, settings, slots)
    torch.manual_seed(settings.seed)
    answers_gguf = folder is None and name.endswith(".gguf") and not trainable
    if answers_gguf and settings.engine == "ours" and not settings.four_bit and llama_cpp.is_available():
        return build_gguf_policy(Path(resolve(name).ref), slots, settings.kv_cache_gib, settings.prompt, FORMATS[settings.format])
    about = runs.read_run(folder) if folder else {"format": settings.format} | ({"four_bit": False} if answers_gguf else {})
    about |= {"model": model_of(name, settings.base)}
    if settings.engine == "vllm":
        vllm.require_vllm(settings.backend, is_four_bit(settings, about))
    adapter = folder / "adapter" if folder else None
    if folder:
        runs.check_finished(folder)
    if standing := [place for place in (folder, run) if place]:
        fingerprint = read_base(about["model"]).fingerprint()
        for place in standing:
            runs.check_base(place, fingerprint, settings.base)
    options = {"four_bit": is_four_bit(settings, about), "vllm": settings.engine == "vllm", "backend": settings.backend}
    model, tokenizer = load_model(about["model"], **options, adapter=adapter, trainable=trainable)
    if trainable and adapter is None:
        model = add_lora(model, rank=settings.sft.lora_rank, alpha=settings.sft.lora_alpha)
    if model.num_parameters() < 20_000_000:  # such small products are faster on two threads than on many
        torch.set_num_threads(min(torch.get_num_threads(), 2))
    elif not torch.cuda.is_available():
        return_freed_memory()
    form, trained = FORMATS[about["format"]], form_of_template(tokenizer.chat_template)
    if not folder and not trainable:  # an export of ours shows its format in its template
        form = trained or form
    states_budget = bool(folder or trained)
    prompt = fill_prompt(settings.prompt, name)
    return build_policy(model, tokenizer, slots, settings.kv_cache_gib, settings.engine, form, states_budget, prompt)


def base_info(policy: Policy) -> dict[str, Any]:
    """What export needs and config.yaml may leave open: the base in 4 bits or not, its dtype, its fingerprint; what it is asked with."""
    embedding = policy.model.get_input_embeddings().weight
    four_bit = any(hasattr(weight, "quant_state") for weight in policy.model.parameters())
    dtype, base = str(embedding.dtype).removeprefix("torch."), policy.model.base_fingerprint
    return {"four_bit": four_bit, "dtype": dtype, "base": base, "prompt": asdict(policy.asked_with)}
