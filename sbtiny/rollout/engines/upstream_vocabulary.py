"""The tokens of a model that answers elsewhere: those of a chunk, and those that may not come."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from sbtiny.errors import UpstreamError
from sbtiny.rollout.engines.upstream_dialects import Chunk
from sbtiny.rollout.sampling import TagMask
from sbtiny.rollout.session import Ticket
from sbtiny.rollout.token_pieces import FRAGMENT


class UpstreamVocabulary:
    """`pieces[i]` is the text of token i, `stops[i]` says whether it ends an answer. `encode` turns a text that goes on into tokens."""

    def __init__(self, pieces: Sequence[str], stops: np.ndarray, encode: Callable[[str], list[int]]) -> None:
        self.pieces, self.stops, self.encode = pieces, stops, encode
        self.stop_id, self.tag_mask = int(np.flatnonzero(stops)[0]), TagMask(pieces)

    def read_tokens(self, chunk: Chunk, shown: int) -> Sequence[int]:
        """The tokens of a chunk; from its text where the server does not show them all. `shown`: those that it has shown before.

        Raises UpstreamError for one outside the vocabulary.
        """
        tokens = chunk.tokens
        hides = tokens is None or (chunk.count is not None and chunk.count > shown + len(tokens))
        if hides and chunk.text:
            known = self.ids_of_pieces.get(chunk.text)
            tokens = self.encode(chunk.text) if known is None else (known,)
        if outside := [token for token in tokens or () if not 0 <= token < len(self.stops)]:
            raise UpstreamError(f"the upstream wrote token {outside[0]}, outside the vocabulary of {len(self.stops)}: it has another model")
        return tokens or ()

    @cached_property
    def ids_of_pieces(self) -> dict[str, int]:
        return {piece: token for token, piece in enumerate(self.pieces) if piece and FRAGMENT not in piece and not self.stops[token]}


class TagSkip:
    """Leaves a second closing tag out of what a server writes that cannot be told not to; a part that stands already stays."""

    def __init__(self) -> None:
        self.rest = ""  # of the tag that is being left out

    def leaves_out(self, vocabulary: UpstreamVocabulary, ticket: Ticket, token: int) -> bool:
        if not self.rest and token in vocabulary.tag_mask.masked_tokens(ticket.enforcer):
            tag, matched = ticket.enforcer.masked_tag
            self.rest = tag[matched:]
        piece = vocabulary.pieces[token]
        if not self.rest or not (piece.startswith(self.rest) or self.rest.startswith(piece)):
            self.rest = ""
            return False
        self.rest = self.rest[len(piece) :]
        return True
