"""What an export reads of the base beside its weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from sbtiny.budget.protocol import Format
from sbtiny.budget.template import fitted, with_budget
from sbtiny.export import template
from sbtiny.models.load import load_tokenizer
from sbtiny.models.prompts import turn_end

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def read_tokenizer(base: Path, form: Format) -> "PreTrainedTokenizerBase":
    """The base's, with the chat template of training and a place in it for a budget."""
    trained, found = load_tokenizer(str(base)), load_tokenizer(str(base))
    trained.chat_template = fitted(trained.chat_template, form)
    found.chat_template = with_budget(trained.chat_template or "", form)
    template.check_prompts(trained, found, form)
    return found


def read_generation(base: Path) -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(base) if (base / "generation_config.json").is_file() else GenerationConfig()


def ordered_stops(found: frozenset[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The end of a turn first: it is what ends an answer."""
    first = turn_end(tokenizer)
    first = first if first is not None else tokenizer.eos_token_id
    return [first, *sorted(found - {first})] if first is not None else sorted(found)
