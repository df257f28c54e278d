"""What an export reads of the base beside its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtiny.budget.protocol import Format
from sbtiny.models.chat_template import with_budget
from sbtiny.config import EvalSettings
from sbtiny.errors import InputError
from sbtiny.export.template_check import check_prompts
from sbtiny.models.load import load_tokenizer
from sbtiny.models.prompt import fit_template, turn_end

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def read_tokenizer(base: Path, form: Format) -> "PreTrainedTokenizerBase":
    """The base's, with the chat template of training and a place in it for a budget."""
    found = load_tokenizer(str(base))
    fit_template(found, form)
    check_prompts(found, form)
    found.chat_template = with_budget(found.chat_template, form)
    return found


def read_generation(base: Path, config: Any) -> "GenerationConfig":
    """The base's; where it has none, what transformers makes of its `config`, as in training."""
    from transformers import GenerationConfig

    file = base / "generation_config.json"
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(base)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {file} ({error}): give the model the run was trained on") from error


def as_evaluated(base: "GenerationConfig", stops: list[int], vocabulary: int, e: EvalSettings) -> "GenerationConfig":
    """How to decode the export: with the tokens of its base, sampled as an evaluation samples.

    Nothing else of the base's goes in: no penalty, no limit and no forbidden token was there in training. `top_k` is the whole vocabulary:
    left out it is 50 in transformers, and SGLang refuses 0.
    """
    from transformers import GenerationConfig

    sampled = {"temperature": e.temperature, "top_p": e.top_p, "top_k": vocabulary} if e.temperature else {}
    tokens = {"bos_token_id": base.bos_token_id, "pad_token_id": base.pad_token_id, "eos_token_id": stops}
    return GenerationConfig(**tokens, do_sample=bool(sampled), **sampled)


def ordered_stops(found: frozenset[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The end of a turn first: it is what ends an answer."""
    first = turn_end(tokenizer)
    first = first if first is not None else tokenizer.eos_token_id
    return [first, *sorted(found - {first})] if first is not None else sorted(found)
