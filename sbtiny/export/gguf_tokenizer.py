"""A Hugging Face tokenizer as the fields of a GGUF file.

GGUF stores the pre-tokenizer by name. A wrong name gives the model unseen tokens without an error, so we find the name by comparing
splits of test strings. No match is an error.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from sbtiny.errors import InputError
from sbtiny.export.strings import STRINGS
from sbtiny.models.gguf import CONTROL, NFC_FIELD, SPLITS, USER_DEFINED, pre_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6  # token types of GGUF; models/gguf.py has the others


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`kind`: gpt2 (byte-level BPE) or llama (SentencePiece). `tokens`, `types`, `scores`: an entry per token id. `merges`: 'left right'.

    `composes`: see `composes_nfc`.
    """

    kind: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    composes: bool


def read_vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> Vocabulary:
    """The vocabulary of a model with `size` rows of embedding. Raises InputError for a tokenizer llama.cpp would misread."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend else {"type": "slow"}
    if model["type"] != "BPE":
        raise InputError(f"no GGUF for a {model['type']} tokenizer: byte-level BPE ({', '.join(SPLITS)}) and SentencePiece BPE work")
    if len(tokenizer) > size:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens and the model {size} rows: resize its embedding first")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens, types, composes = *_tokens(tokenizer, size), composes_nfc(tokenizer)
    if model.get("byte_fallback"):
        types = [BYTE if t == NORMAL and _is_byte(w) else t for w, t in zip(tokens, types, strict=True)]
        return Vocabulary("llama", "default", tokens, types, [], _scores(tokens, types, merges), composes)
    return Vocabulary("gpt2", find_pre_tokenizer(backend, bool(model.get("ignore_merges"))), tokens, types, merges, [], composes)


def composes_nfc(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether this tokenizer composes text first (NFC: e and its accent become one letter). llama.cpp does not.

    Raises InputError for any other change of the text, which no user could make beforehand.
    """
    composes = False
    for text in STRINGS:
        plain, read = _normalised(None, text), _normalised(tokenizer.backend_tokenizer.normalizer, text)
        if read not in (plain, normalize("NFC", plain)):
            raise InputError(f"this tokenizer reads {plain!r} as {read!r}, and llama.cpp does not: use --gguf none")
        composes |= read != plain
    return composes


def _normalised(normalizer: Any, text: str) -> str:
    """The normalised text, with SentencePiece's space marks as spaces, because llama.cpp sets those itself."""
    return (normalizer.normalize_str(text) if normalizer else text).replace("▁", " ").strip(" ")


def find_pre_tokenizer(backend: Any, whole: bool) -> str:
    """llama.cpp's name for this pre-tokenizer. `whole`: a word of the vocabulary becomes one token without merging."""
    for name, (_, takes_whole) in SPLITS.items():
        ours = pre_tokenizer(name)
        same = all(_words(backend.pre_tokenizer, text) == _words(ours, text) for text in STRINGS)
        if same and takes_whole == whole:
            return name
    known = ", ".join(SPLITS)
    raise InputError(f"this tokenizer cuts text as none of {known} does, and llama.cpp would feed other tokens: use --gguf none")


def _words(splitter: Any, text: str) -> list[str]:
    return [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]


def _tokens(tokenizer: "PreTrainedTokenizerBase", size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id. Embedding rows without a token become [PADn]."""
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [UNUSED if i not in by_id else NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED for i in range(size)]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token != tokenizer.eos_token:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """A score per token: minus its rank in the merges, because SentencePiece merges the best score first."""
    rank = {merge.replace(" ", "", 1): n for n, merge in reversed(list(enumerate(merges)))}
    return [-float(rank[token]) if token in rank else 0.0 if kind != NORMAL else -1e6 for token, kind in zip(tokens, types, strict=True)]


def add_tokens(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_bool(NFC_FIELD, vocabulary.composes)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)


def add_special(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", stops: list[int]) -> None:
    """Add the special token ids. `stops` end an answer, the chat template's end of turn first."""
    for name, token in (("bos", tokenizer.bos_token_id), ("pad", tokenizer.pad_token_id), ("unk", tokenizer.unk_token_id)):
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stops[0]
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(stops[0])
    if more := [i for i in stops if i not in (eos, stops[0])]:
        writer.add_eom_token_id(more[0])
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    writer.add_chat_template(tokenizer.chat_template)
