"""Unpack a GGUF file to an ordinary model folder, once, in the cache.

transformers 5.17 reads the weights right and the tokenizer wrong. For Llama it confuses start and end token and splits all text as
GPT-2; for Qwen2 it adds special tokens. So we build the tokenizer from the file's fields. On SmolLM2 it agrees with llama.cpp.
"""

import os
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtiny import __version__
from sbtiny.errors import InputError
from sbtiny.load_settings import expand_home
from sbtiny.models.prompt import SPACE

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp's name of a pre-tokenizer -> its patterns, applied in order, and whether a word of the vocabulary is one token without merging.
SPLITS = {
    "llama-bpe": ((_WORDS % "{1,3}",), True),
    "qwen2": ((_WORDS % "",), False),
    "deepseek-r1-qwen": ((_WORDS % "",), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "gpt-2": ((_GPT2,), False),
}
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF
NFC_FIELD = "sbtiny.composes"  # our own field: whether the tokenizer composes text (NFC); GGUF has none
ORIGINAL = "use the original model folder or hub id"


def cache_folder() -> Path:
    """The folder of unpacked models: $SBTINY_CACHE, else ~/.cache/sbtiny."""
    return Path(expand_home(os.environ.get("SBTINY_CACHE") or "~/.cache/sbtiny"))


def unpack_gguf(file: Path) -> Path:
    """A folder with the file's dequantised model and its tokenizer. Unpacks the file if it is new or has changed.

    Raises InputError when the file is no GGUF, would be read wrongly, or the cache cannot be written.
    """
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {__version__}"
    target = cache_folder() / f"{file.stem}-{sha256(key.encode()).hexdigest()[:12]}"
    if not target.is_dir():
        model, tokenizer = read_gguf(file)
        _save_to_cache(model, tokenizer, target)
    return target


def _save_to_cache(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", target: Path) -> None:
    """Save to a temporary folder and rename, so that no other process finds half a model."""
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            model.save_pretrained(f"{temporary}/model")
            tokenizer.save_pretrained(f"{temporary}/model")
            if not target.is_dir():  # else another process was quicker
                Path(temporary, "model").rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot unpack into {target.parent}: {error}; free space or set SBTINY_CACHE") from error


def open_gguf(file: Path) -> "GGUFReader":
    """Raises InputError where the file is no GGUF, or the package that reads it is missing."""
    if find_spec("gguf") is None:
        raise InputError(f"reading {file.name} needs the gguf package: pip install 'sbtiny[gguf]'")
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise InputError(f"{file} is not a readable GGUF file: {error}") from error


def read_gguf(file: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Model and tokenizer of a GGUF file, on the CPU; weights in 16 bits, or 32 if the file's matrices have them."""
    reader = open_gguf(file)
    if dropped := find_dropped_feature(reader):
        raise InputError(f"{file} has {dropped}, which transformers drops from a GGUF: {ORIGINAL}")
    tokenizer = tokenizer_from_gguf(reader, file)
    model = _read_model(reader, file)
    model.generation_config.eos_token_id = read_ends(reader)
    return model, tokenizer


def read_field(reader: "GGUFReader", key: str) -> Any:
    """The value of a metadata key, None when the file lacks it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def read_ends(reader: "GGUFReader") -> list[int] | None:
    """The tokens that end an answer, as a generation config has them."""
    return sorted({read_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")} - {None}) or None


def find_dropped_feature(reader: "GGUFReader") -> str | None:
    """A part of this model that transformers drops without an error; None if there is none."""
    architecture, names = read_field(reader, "general.architecture"), {tensor.name for tensor in reader.tensors}
    if read_field(reader, f"{architecture}.rope.scaling.type") not in (None, "none") or "rope_freqs.weight" in names:
        return "scaled rotary positions"
    if architecture != "qwen2" and any(name.endswith(".bias") for name in names):
        return "biases"
    return None


def _read_model(reader: "GGUFReader", file: Path) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from sbtiny.models.tensors import check_report

    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2}
    # float16 has three bits more for a dequantised weight than bfloat16.
    dtype = torch.float32 if "F32" in types else torch.bfloat16 if "BF16" in types else torch.float16
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # the report has them, and is read
            output_loading_info=True,
        )
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"transformers cannot read {file}: {error}; {ORIGINAL}") from error
    check_report(file, model, report)
    return model


def tokenizer_from_gguf(reader: "GGUFReader", file: Path) -> "PreTrainedTokenizerBase":
    """Build a file's tokenizer, byte-level BPE or SentencePiece, with special tokens and chat template.

    Raises InputError for other kinds and for splits missing in SPLITS, because a guess gives the model unseen tokens.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind, split = read_field(reader, "tokenizer.ggml.model"), read_field(reader, "tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or split not in SPLITS):
        known = ", ".join(SPLITS)
        raise InputError(f"{file} has a {kind!r} tokenizer with split {split!r}, not 'llama', nor 'gpt2' with {known}: {ORIGINAL}")
    if kind == "llama" and not read_field(reader, "tokenizer.ggml.scores"):
        raise InputError(f"{file} has a 'llama' tokenizer without scores: {ORIGINAL}")
    tokens, types = read_field(reader, "tokenizer.ggml.tokens"), read_field(reader, "tokenizer.ggml.token_type")
    ids = {name: read_field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in
           (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}  # fmt: skip
    tokenizer = _byte_pairs(tokens, reader, split) if kind == "gpt2" else _sentencepiece(tokens, reader, ids["unk"])
    whole = [(token, type_) for token, type_ in zip(tokens, types, strict=True) if type_ in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=type_ == CONTROL) for token, type_ in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=read_field(reader, "tokenizer.chat_template"),
        **{f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()},
    )


def pre_tokenizer(split: str) -> Any:
    """The pre-tokenizer of one of llama.cpp's names, a key of SPLITS."""
    from tokenizers import Regex, pre_tokenizers

    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[split][0]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*words, to_bytes])


def _byte_pairs(tokens: list[str], reader: "GGUFReader", split: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ignore_merges = SPLITS[split][1]
    merges = [tuple(merge.split(" ")) for merge in read_field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges))
    composes = read_field(reader, NFC_FIELD)
    if "qwen" in split if composes is None else composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], reader: "GGUFReader", unknown: int | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefixed = read_field(reader, "tokenizer.ggml.add_space_prefix") is not False  # llama.cpp's default is true
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = score_merges(vocabulary, read_field(reader, "tokenizer.ggml.scores"))
    unk = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    begin = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    end = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return tokenizer


def score_merges(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of pieces that form a piece, best score first. SentencePiece merges by these scores, BPE by this list."""
    scored = []
    for piece, i in vocabulary.items():
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        scored += [(-scores[i], vocabulary[left], vocabulary[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(scored)]
