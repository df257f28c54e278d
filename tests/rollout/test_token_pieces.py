"""Which tokens end inside a character, by their bytes."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sbtiny.rollout.token_pieces import FRAGMENT, missing_bytes, token_bytes, token_pieces


def test_the_bytes_of_a_token_are_those_of_its_text(tiny) -> None:
    tokenizer = tiny[1]
    pieces = token_pieces(tokenizer, len(tokenizer))
    text = "Ünï 😀漢字 é\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    data = b"".join(pieces.fragments[i] if i in pieces.fragments else pieces[i].encode() for i in ids)
    assert data.decode() == text
    assert all(pieces[i].endswith(FRAGMENT) for i in pieces.fragments)
    assert len(pieces.fragments) >= 100


@pytest.mark.parametrize(
    ("data", "before", "missing"),
    [(b"a", 2, 0), (b"\xc3", 0, 1), (b"\xe6\xbc", 0, 1), (b"\xa2", 1, 0), (b"\xf0", 0, 3), (b"\x9f\x98", 3, 1), (b"\x80", 0, 0),
     (b"x\xf0", 1, 3)],
)  # fmt: skip
def test_missing_bytes(data: bytes, before: int, missing: int) -> None:
    assert missing_bytes(data, before) == missing


def test_words_of_both_kinds_of_vocabulary() -> None:
    assert token_bytes("<0xE6>") == b"\xe6"
    assert token_bytes("Ġa") == b" a"
    assert token_bytes("Ċ") == b"\n"
    assert token_bytes("âĤ¬") == "€".encode()
    assert token_bytes("") == b""


def test_sentencepiece_words_keep_their_spaces() -> None:
    """Its decoder takes the first space of a text away, and a piece decoded alone is a text."""
    words = ["<unk>", "▁The", "▁answer", "▁", "3", "▁4", "▁▁▁", "s", ".", "<0xC3>", "<0xA9>"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    pieces = token_pieces(tokenizer, len(words) + 1)  # an embedding may have more rows than the vocabulary has words
    ids = [1, 2, 7, 3, 4, 5, 6, 4, 8]
    assert "".join(pieces[i] for i in ids) == " " + tokenizer.decode(ids) == " The answers 3 4   3."
    assert pieces.fragments == {9: b"\xc3", 10: b"\xa9"}
