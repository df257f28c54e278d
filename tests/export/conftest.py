"""A run with a random adapter, and small random models of every architecture."""

from pathlib import Path

import pytest
import torch
from support import write_gguf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sbtiny import runs
from sbtiny.config import Settings
from sbtiny.export.strings import STRINGS
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.gguf import pre_tokenizer
from sbtiny.models.load import add_lora, load_model, load_tokenizer
from sbtiny.rollout.engines import llama_cpp

pytest.importorskip("gguf")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SBTINY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_run(folder: Path, model: str = "tiny", four_bit: bool = False) -> Path:
    """A run folder with a random adapter that moves the policy well away from its base."""
    torch.manual_seed(0)
    policy = add_lora(load_model(model, four_bit=four_bit)[0], rank=4, alpha=8)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.02)
    policy.save_pretrained(folder / "adapter")
    runs.write_text(folder / "config.yaml", Settings(model=model, four_bit=four_bit).as_yaml())
    runs.write_json(folder / "run.json", {"kind": "grpo", "model": model, "format": "solution", "started": "now"})
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "r")


@pytest.fixture(scope="session")
def new_run():
    """make_run, for tests that need a run of their own."""
    return make_run


@pytest.fixture(scope="session")
def new_model():
    return random_model


def random_model(folder: Path, kind: str, tied: bool, tokenizer: PreTrainedTokenizerBase | None = None, **more: object) -> Path:
    """A folder with a random model of an architecture, with the bundled tokenizer unless another is given."""
    torch.manual_seed(0)
    tokenizer = tokenizer or load_tokenizer(str(BUNDLED))
    head = 128 if kind == "qwen3" else 32  # the default of transformers' GGUF reader, which does not read it
    shape = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 64 if kind != "llama" else 128, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2 if kind != "llama" else 4, "num_key_value_heads": 1 if kind != "llama" else 2,
        "head_dim": head, "max_position_embeddings": 512, "tie_word_embeddings": tied, "eos_token_id": 2, "bos_token_id": None,
        "initializer_range": 0.2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | more))
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # zeros and ones would hide a mistake
            torch.nn.init.normal_(weight.data, mean=1.0, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def new_tokenizer():
    return byte_pair_tokenizer


def byte_pair_tokenizer(split: object = None, normalizer: object = None) -> PreTrainedTokenizerFast:
    """A tokenizer like Qwen2's: byte-level BPE, NFC, ChatML; its end of turn (2) is eos. `split`, `normalizer` replace parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if normalizer is None else normalizer
    tokenizer.pre_tokenizer = pre_tokenizer("qwen2") if split is None else split
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*STRINGS, "Ünïcödé é", "user assistant\nWhat is 3 + 4?"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def write():
    return write_gguf


@pytest.fixture(scope="session")
def llama_logits():
    return through_llama_cpp


def through_llama_cpp(file: Path, ids: list[int]) -> torch.Tensor:
    engine = llama_cpp.LlamaCppEngine(file, slots=2)
    found = torch.from_numpy(engine.score(ids))
    engine.close()
    return found
