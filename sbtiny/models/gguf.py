"""A GGUF file as an ordinary model folder, unpacked once into the cache.

transformers 5.17 reads the weights right and the tokenizer wrong: for Llama it takes the start token for the end token
and splits every text as GPT-2 does, for Qwen2 it adds special tokens that the file does not have. So the tokenizer is
built here, from the file's own fields; on SmolLM2 it agrees with llama.cpp token by token.
"""

import os
import tempfile
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtiny import __version__
from sbtiny.errors import InputError
from sbtiny.models import sentencepiece

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# How text is cut into words before byte pairs are merged, by llama.cpp's names: the patterns, one after the other, and
# whether a word of the vocabulary is taken whole.
SPLITS = {
    "llama-bpe": ((_WORDS % "{1,3}",), True),
    "qwen2": ((_WORDS % "",), False),
    "deepseek-r1-qwen": ((_WORDS % "",), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "gpt-2": ((_GPT2,), False),
}
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF
COMPOSES = "sbtiny.composes"  # our own field: whether the tokenizer brings text into composed form, for which GGUF has no name
ORIGINAL = "use the original model folder or hub id"


def cache_folder() -> Path:
    """Where unpacked models live: $SBTINY_CACHE, else ~/.cache/sbtiny."""
    return Path(os.environ.get("SBTINY_CACHE") or Path.home() / ".cache" / "sbtiny")


def as_folder(file: Path) -> Path:
    """The folder with the file's model, dequantised, and its tokenizer; made when the file is first met or has changed.

    Raises InputError when the file is no GGUF, holds what cannot be read rightly, or the cache cannot be written.
    """
    if find_spec("gguf") is None:
        raise InputError(f"reading {file.name} needs the gguf package: pip install 'sbtiny[gguf]'")
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {__version__}"
    target = cache_folder() / f"{file.stem}-{sha256(key.encode()).hexdigest()[:12]}"
    if not target.is_dir():
        model, tokenizer = read(file)
        _keep(model, tokenizer, target)
    return target


def _keep(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", target: Path) -> None:
    """Save beside and rename, so that no other process finds half a model."""
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            model.save_pretrained(f"{temporary}/model")
            tokenizer.save_pretrained(f"{temporary}/model")
            if not target.is_dir():  # another process may have been quicker
                Path(temporary, "model").rename(target)
    except (OSError, SafetensorError) as error:
        place = target.parent
        raise InputError(f"cannot unpack into {place}: {error}; free space or set SBTINY_CACHE") from error


def read(file: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Model and tokenizer of a GGUF file, on the CPU, the weights in 16 bits unless the file's matrices have 32."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise InputError(f"{file} is not a readable GGUF file: {error}") from error
    if dropped := lost(reader):
        raise InputError(f"{file} has {dropped}, which transformers drops from a GGUF: {ORIGINAL}")
    tokenizer = read_tokenizer(reader, file)
    model = _read_model(reader, file)
    ends = {field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")} - {None}
    model.generation_config.eos_token_id = sorted(ends) or None
    return model, tokenizer


def field(reader: "GGUFReader", key: str) -> Any:
    """The value of a metadata key, None when the file lacks it."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def lost(reader: "GGUFReader") -> str | None:
    """What transformers drops from this file without a word: the model would be another. None: nothing."""
    architecture, names = field(reader, "general.architecture"), {tensor.name for tensor in reader.tensors}
    if field(reader, f"{architecture}.rope.scaling.type") not in (None, "none") or "rope_freqs.weight" in names:
        return "scaled rotary positions"
    if architecture != "qwen2" and any(name.endswith(".bias") for name in names):
        return "biases"
    return None


def _read_model(reader: "GGUFReader", file: Path) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from sbtiny.models.tensors import check_report

    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2}
    # float16 keeps three bits more of a dequantised weight than bfloat16 does.
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


def read_tokenizer(reader: "GGUFReader", file: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer a GGUF file describes, byte-level BPE or SentencePiece, special tokens and chat template included.

    Raises InputError for other kinds and for splits not listed above: a guess would give tokens it never trained on.
    """
    from transformers import PreTrainedTokenizerFast

    kind, split = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or split not in SPLITS):
        known = ", ".join(SPLITS)
        raise InputError(f"{file} has a {kind!r} tokenizer with split {split!r}, not 'llama', nor 'gpt2' with {known}: {ORIGINAL}")
    if kind == "llama" and not field(reader, "tokenizer.ggml.scores"):
        raise InputError(f"{file} has a 'llama' tokenizer without scores: {ORIGINAL}")
    tokens = field(reader, "tokenizer.ggml.tokens")
    ids = {name: field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in
           (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(tokens, reader, split) if kind == "gpt2" else _pieces(tokens, reader, ids["unk"]),
        clean_up_tokenization_spaces=False,
        chat_template=field(reader, "tokenizer.chat_template"),
        **{f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()},
    )


def splitter(split: str) -> Any:
    """What cuts text into words under one of llama.cpp's names, a key of SPLITS."""
    from tokenizers import Regex, pre_tokenizers

    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[split][0]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*words, to_bytes])


def _byte_pairs(tokens: list[str], reader: "GGUFReader", split: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ignore_merges = SPLITS[split][1]
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges))
    composes = field(reader, COMPOSES)
    if "qwen" in split if composes is None else composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in _added(tokens, reader).items()])
    return tokenizer


def _pieces(tokens: list[str], reader: "GGUFReader", unknown: int | None) -> Any:
    prefixed = field(reader, "tokenizer.ggml.add_space_prefix") is not False  # llama.cpp's default is true
    scores = field(reader, "tokenizer.ggml.scores")
    return sentencepiece.build(tokens, scores, _added(tokens, reader), None if unknown is None else tokens[unknown], prefixed)


def _added(tokens: list[str], reader: "GGUFReader") -> dict[str, bool]:
    """Tokens that are found in a text before it is cut -> whether they are special."""
    types = field(reader, "tokenizer.ggml.token_type")
    return {token: kind == CONTROL for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)}
