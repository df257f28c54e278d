"""Which tokens end inside a character, by their bytes."""

import pytest

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
    assert token_bytes(None) == b""
