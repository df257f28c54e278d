"""A Llama model with a SentencePiece tokenizer: the file's pieces and scores give the ids of the original, in both readers."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sbtiny.cli.main import app
from sbtiny.export import gguf
from sbtiny.export.gguf_tokenizer import read_vocabulary
from sbtiny.export.merge import Merged
from sbtiny.export.strings import STRINGS
from sbtiny.models.gguf import tokenizer_from_gguf
from sbtiny.models.load import load_tokenizer
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.engines import llama_cpp
from sbtiny.tasks import arithmetic

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)  # as TinyLlama's


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like LlamaTokenizerFast: byte fallback, a space before every text, merges in order of training."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [q.question for q in arithmetic.generate_questions("train", 300, seed=1)] + [text for text in STRINGS if text.isascii()]
    learning = Tokenizer(models.BPE(unk_token="<unk>"))
    learning.pre_tokenizer = pre_tokenizers.Metaspace()
    learning.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False))
    learnt = json.loads(learning.to_str())["model"]
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    made = Tokenizer(models.BPE(learnt["vocab"], pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("spm") / "base", llama_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, eos_token_id=2, bos_token_id=1, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_both_readers_find_the_ids_of_the_original(base: Path, tmp_path: Path) -> None:
    tokenizer, file = load_tokenizer(str(base)), tmp_path / "x.gguf"
    merged = Merged(base, None, tied=False)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert vocabulary.kind == "llama"
    list(gguf.write_gguf(file, "f32", merged, AutoConfig.from_pretrained(base), tokenizer, vocabulary, [2], "x"))
    wanted = [tokenizer.encode(text, add_special_tokens=False) for text in STRINGS]
    ours = tokenizer_from_gguf(GGUFReader(file), file)
    assert [ours.encode(text, add_special_tokens=False) for text in STRINGS] == wanted
    assert prompt_ids(ours, "What is 3 + 4?") == prompt_ids(tokenizer, "What is 3 + 4?")
    assert [ours.decode(ids) for ids in wanted] == [tokenizer.decode(ids) for ids in wanted]
    if llama_cpp.is_available():
        engine = llama_cpp.LlamaCppEngine(file, slots=2)
        assert [engine.tokenize(text) for text in STRINGS] == wanted
        engine.close()


def test_a_run_on_it_is_exported_and_checked(base: Path, new_run, tmp_path: Path) -> None:
    run = new_run(tmp_path / "r", model=str(base))
    few = ["--questions", "4", "--set", "eval.max_tokens=40", "--set", "eval.max_num_seqs=4"]
    app(["export", str(run), "--gguf", "f32", "--dtype", "float32", "-o", str(tmp_path / "out"), *few], standalone_mode=False)
    assert (tmp_path / "out" / "r-f32.gguf").is_file()
