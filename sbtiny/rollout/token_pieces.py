"""The text of every token, and of tokens that share a character."""

from collections.abc import Sequence
from functools import cache

FRAGMENT = "\ufffd"  # what a decoder shows for bytes that are no whole character
SENTENCEPIECE_SPACE = "▁"  # in its words; its decoder takes the space of the first word of a text away


class TokenPieces(list[str]):
    """The text of every token id, special tokens included; bytes that are no whole character show as FRAGMENT.

    `fragments` holds the bytes of the tokens whose text has one.
    """

    def __init__(self, texts: Sequence[str], fragments: dict[int, bytes]) -> None:
        super().__init__(texts)
        self.fragments = fragments


def token_pieces(tokenizer: object, size: int) -> TokenPieces:
    """The pieces of every token id below `size`."""
    words = [word or "" for word in tokenizer.convert_ids_to_tokens(list(range(size)))]
    texts = [
        word.replace(SENTENCEPIECE_SPACE, " ")
        if word.startswith(SENTENCEPIECE_SPACE)
        else tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for i, word in enumerate(words)
    ]
    broken = (i for i, text in enumerate(texts) if FRAGMENT in text and FRAGMENT not in words[i])  # a word may be that very character
    return TokenPieces(texts, {i: token_bytes(words[i]) for i in broken})


def join_pieces(ids: Sequence[int], pieces: Sequence[str]) -> str:
    """The text of tokens. A character in several of them is whole; bytes that are none stay FRAGMENT."""
    fragments = pieces.fragments if isinstance(pieces, TokenPieces) else {}
    if fragments.keys().isdisjoint(ids):
        return "".join([pieces[i] for i in ids])
    return b"".join([fragments.get(i) or pieces[i].encode() for i in ids]).decode(errors="replace")


def missing_bytes(data: bytes, missing: int = 0) -> int:
    """Count the bytes that the last character lacks after `data`, where it lacked `missing` before. Broken text lacks none for long."""
    for byte in data:
        continues = 0x80 <= byte < 0xC0
        missing = max(0, missing - 1) if continues else (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
    return missing


def token_bytes(word: str) -> bytes:
    """The bytes of a word of a vocabulary: `<0xE6>`, or GPT-2's letters for bytes."""
    if len(word) == 6 and word.startswith("<0x"):
        return bytes([int(word[3:5], 16)])
    letters = byte_letters()
    return bytes(letters.get(letter, ord("?")) for letter in word)


@cache
def byte_letters() -> dict[str, int]:
    """GPT-2's letter of each byte: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
