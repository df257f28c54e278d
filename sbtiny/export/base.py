"""The tokenizer, stops and generation config of an export, made from those of the base."""

from pathlib import Path
from typing import TYPE_CHECKING

from sbtiny.budget.protocol import Format
from sbtiny.config import EvalSettings, PromptSettings
from sbtiny.models.chat_template import with_budget
from sbtiny.models.load import load_tokenizer
from sbtiny.models.prompt import PLAIN, check_prompts, fit_template, turn_end

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def load_export_tokenizer(base: Path, form: Format, prompt: PromptSettings = PLAIN) -> "PreTrainedTokenizerBase":
    """The base's tokenizer, with the chat template of training, instruction included, and a place in it for a given budget."""
    tokenizer = load_tokenizer(str(base))
    fit_template(tokenizer, form, prompt)
    check_prompts(tokenizer, form)
    tokenizer.chat_template = with_budget(tokenizer.chat_template, form)
    return tokenizer


def make_generation_config(base: "GenerationConfig", stops: list[int], vocabulary: int, e: EvalSettings) -> "GenerationConfig":
    """The generation config of the export: special tokens from the base, sampling from the evaluation.

    Drops the base's penalties, limits and forbidden tokens, because training had none.
    """
    from transformers import GenerationConfig

    # top_k is the whole vocabulary: transformers takes 50 where it is missing, and SGLang refuses 0.
    sampled = {"temperature": e.temperature, "top_p": e.top_p, "top_k": vocabulary} if e.temperature else {}
    tokens = {"bos_token_id": base.bos_token_id, "pad_token_id": base.pad_token_id, "eos_token_id": stops}
    return GenerationConfig(**tokens, do_sample=bool(sampled), **sampled)


def ordered_stops(stops: frozenset[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The stop tokens, the end of a turn first: it ends most answers."""
    first = turn_end(tokenizer)
    first = first if first is not None else tokenizer.eos_token_id
    return [first, *sorted(stops - {first})] if first is not None else sorted(stops)
