"""Build the SentencePiece tokenizer of a Llama GGUF file with the `tokenizers` library."""

from collections.abc import Sequence
from typing import Any

SPACE = "▁"


def build_sentencepiece(tokens: Sequence[str], scores: Sequence[float], added: dict[str, bool], unknown: str | None, prefixed: bool) -> Any:
    """A `tokenizers.Tokenizer` from pieces and scores. `added`: token -> special. `prefixed`: a space is put before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    begin = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    end = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in added.items()])
    return tokenizer


def merges(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of pieces that form a piece, best score first. SentencePiece merges by these scores, BPE by this list."""
    scored = []
    for piece, i in vocabulary.items():
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        scored += [(-scores[i], vocabulary[left], vocabulary[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(scored)]
