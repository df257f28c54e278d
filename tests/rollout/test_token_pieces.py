"""Which tokens end inside a character, by their bytes, and the text of tokens that share one."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sbtiny.rollout.episode import Request, read_episode
from sbtiny.rollout.token_pieces import FRAGMENT, TokenPieces, byte_letters, join_pieces, missing_bytes, token_bytes, token_pieces

HEAD = "<budget>9</budget><solution>"


def test_the_bytes_of_a_token_are_those_of_its_text(tiny) -> None:
    tokenizer = tiny[1]
    pieces = token_pieces(tokenizer, len(tokenizer))
    text = "Ünï 😀漢字 é\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    data = b"".join(pieces.fragments[i] if i in pieces.fragments else pieces[i].encode() for i in ids)
    assert data.decode() == text
    assert all(FRAGMENT in pieces[i] for i in pieces.fragments)
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


def byte_level_pieces(*words: bytes) -> TokenPieces:
    """The pieces of a byte-level tokenizer with these words."""
    letters = {byte: letter for letter, byte in byte_letters().items()}
    core = Tokenizer(models.BPE({"".join(letters[byte] for byte in word): i for i, word in enumerate(words)}, []))
    core.decoder = decoders.ByteLevel()
    return token_pieces(PreTrainedTokenizerFast(tokenizer_object=core), len(words))


def cut(text: str, *places: int) -> list[bytes]:
    data = text.encode()
    return [data[a:b] for a, b in zip((0, *places), (*places, len(data)), strict=True)]


@pytest.mark.parametrize("places", [(2,), (1, 2, 3), (4,), (2, 4), (6, 7), (2, 7)], ids=str)
def test_a_character_in_several_tokens_is_whole_in_the_text_and_each_token_counts(places: tuple[int, ...]) -> None:
    body = "√2 ⅓"  # of 3, 1, 1 and 3 bytes
    words = [*cut(body, *places), HEAD.encode(), b"</solution>"]
    pieces, tokens = byte_level_pieces(*words), list(range(len(words) - 2))
    for ids, said in (([len(words) - 2, *tokens, len(words) - 1], ""), ([*tokens, len(words) - 1], HEAD)):
        episode = read_episode(Request((1,), 99, prefill=said), ids, pieces, "length")
        assert (episode.text, episode.solution) == (f"{HEAD}{body}</solution>", body)
        assert (episode.parsed.ok, episode.length) == (True, len(tokens))


def test_bytes_that_are_no_character_stay_fragments() -> None:
    words = [b"a", b"\xe2", b"\x88\x9a", b"\x88b", "\ufffd".encode()]
    pieces = byte_level_pieces(*words)
    for ids in ([0, 1, 0], [1, 1, 2, 0], [2, 3, 0], [1, 3], [4, 1, 2, 4], [0, 1]):
        assert join_pieces(ids, pieces) == b"".join(words[i] for i in ids).decode(errors="replace")
    assert join_pieces([0, 1, 0], pieces) == f"a{FRAGMENT}a"
    assert join_pieces([0, 1], list(pieces)) == f"a{FRAGMENT}"  # pieces whose bytes are not known
