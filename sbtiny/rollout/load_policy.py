"""A policy by its name: a run, a model or a .gguf file becomes something that can be asked, and trained."""

from pathlib import Path
from typing import Any

import torch

from sbtiny import runs
from sbtiny.budget.protocol import FORMATS
from sbtiny.models.chat_template import form_of_template
from sbtiny.config import Settings
from sbtiny.models.aliases import resolve
from sbtiny.models.load import add_lora, load, read_base
from sbtiny.rollout.engines import llama_cpp, vllm
from sbtiny.rollout.memory import return_freed
from sbtiny.rollout.policy import Policy


def is_four_bit(settings: Settings, about: dict[str, Any]) -> bool:
    """NF4 as told; untold, as the run had it that `about` (run.json) tells of; of none, where there is a GPU."""
    return settings.four_bit if settings.four_bit is not None else about.get("four_bit", torch.cuda.is_available())


def open_policy(name: str, settings: Settings, slots: int, trainable: bool = False, run: Path | None = None) -> Policy:
    """A run's policy (base model and adapter) or a plain model. Tiny models run faster on two threads than on many.

    `run`: one that goes on with it, and must stand on the same base as well.

    A .gguf file is decoded by llama.cpp where its module is installed and no other engine is named, else unpacked and decoded as any model.
    """
    folder = runs.find(name)
    torch.manual_seed(settings.seed)
    if settings.engine == "vllm":
        vllm.ensure()
    if folder is None and name.endswith(".gguf") and not trainable and settings.engine == "ours" and llama_cpp.available():
        return llama_cpp.GgufPolicy(Path(resolve(name).ref), slots, settings.kv_memory)
    about = runs.read_run(folder) if folder else {"model": name, "format": settings.format}
    adapter = folder / "adapter" if folder else None
    if folder:
        runs.check_finished(folder)
    for standing in filter(None, (folder, run)):
        runs.check_base(standing, read_base(about["model"]).fingerprint())
    how = {"four_bit": is_four_bit(settings, about), "vllm": settings.engine == "vllm", "backend": settings.backend}
    model, tokenizer = load(about["model"], **how, adapter=adapter, trainable=trainable)
    if trainable and adapter is None:
        model = add_lora(model, rank=settings.sft.lora_rank, alpha=settings.sft.lora_alpha)
    if model.num_parameters() < 20_000_000:  # its products are too small to share among many
        torch.set_num_threads(min(torch.get_num_threads(), 2))
    elif not torch.cuda.is_available():
        return_freed()
    form = FORMATS[about["format"]]
    if not folder and not trainable:  # an export of ours says by its template what it writes
        form = form_of_template(tokenizer.chat_template) or form
    return Policy(model, tokenizer, slots, settings.kv_memory, settings.engine, form)


def trained_on(policy: Policy) -> dict[str, Any]:
    """What export must know of the base and config.yaml may leave open: its bits, its number format, and which one it was."""
    embedding = policy.model.get_input_embeddings().weight
    four_bit = any(hasattr(weight, "quant_state") for weight in policy.model.parameters())
    return {"four_bit": four_bit, "dtype": str(embedding.dtype).removeprefix("torch."), "base": policy.model.base_fingerprint}
