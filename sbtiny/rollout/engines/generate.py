"""The model's own `generate` with our interface: slower than our loop, but it runs any model of transformers.

A batch waits for its longest row. Tokens are sampled here, by the request's seed and limits, and passed to `generate` as the only possible
ones. So a request means the same to both engines, whatever the model's generation config says.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from sbtiny.models.load import inference_mode_for
from sbtiny.models.shapes import config_slot_bytes
from sbtiny.rollout.decode_engine import DecodeEngine, stop_mask
from sbtiny.rollout.memory import fit_slots
from sbtiny.rollout.sampling import TagMask, sample_rows
from sbtiny.rollout.session import BatchSession, Ticket, uniform_draws

PAD_TOKEN = 0  # any token: padding is masked, and tokens after a finished answer are not read


def left_pad(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (rows, longest); every prompt ends in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


class GenerateEngine(DecodeEngine):
    """Samples requests in batches of at most `slots` rows; fewer where their keys and values do not fit (`memory`)."""

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[str],
        stop_ids: frozenset[int],
        slots: int = 64,
        kv_cache_gib: float | None = None,
    ) -> None:
        self.model, self.pieces, self.slots, self.kv_cache_gib = model, pieces, slots, kv_cache_gib
        self.config = model.config.get_text_config()
        self.stops, self.tag_mask = stop_mask(stop_ids, len(pieces)), TagMask(pieces)
        self.max_positions = getattr(self.config, "max_position_embeddings", None)

    def refresh(self) -> None:
        """Do nothing: it decodes with the model itself, adapter included."""

    def check_room(self, tokens: int) -> None:
        self._rows(tokens, 1)

    def _rows(self, capacity: int, wanted: int) -> int:
        """Number of rows that fit, at most `wanted`; a model without attention heads has no keys and values."""
        slot = config_slot_bytes(self.config, capacity, self.model.dtype.itemsize)
        return fit_slots(slot, wanted, self.kv_cache_gib, self.model.device)[0] if slot else wanted

    def open_session(self, capacity: int, kept_prefixes: int = 0) -> BatchSession:
        return BatchSession(self._decode, self.make_ticket, self._rows(capacity, self.slots))

    @torch.no_grad()
    def _decode(self, tickets: list[Ticket]) -> None:
        """Decode a batch to its end."""
        chooser = TokenChooser(tickets, self.stops, self.tag_mask)
        ids, mask = left_pad([t.request.prompt_ids for t in tickets], PAD_TOKEN, self.model.device)
        config = GenerationConfig(
            max_new_tokens=max(t.request.max_tokens for t in tickets),
            do_sample=False,  # of one possible token
            num_beams=1,
            pad_token_id=PAD_TOKEN,
            eos_token_id=-1,  # the chooser stops
        )
        with inference_mode_for(self.model):
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([StopWhenAllEnded(chooser)]),
            )


class TokenChooser(LogitsProcessor):
    """Samples a token for each row and leaves `generate` no other choice."""

    def __init__(self, tickets: list[Ticket], stops: np.ndarray, tag_mask: TagMask) -> None:
        self.tickets, self.stops, self.tag_mask = tickets, stops, tag_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        live = [i for i, ended in enumerate(self.ended()) if not ended]
        tickets, logits = [self.tickets[i] for i in live], scores[live]
        self.tag_mask.apply(logits, [t.enforcer for t in tickets])
        tokens, logprobs = sample_rows(logits, [t.sampling for t in tickets], uniform_draws(tickets))
        chosen = [PAD_TOKEN] * len(self.tickets)
        for i, ticket, token, logprob in zip(live, tickets, tokens, logprobs, strict=True):
            if reason := ticket.append(token, logprob, self.stops):
                ticket.finish(reason)
            else:
                chosen[i] = ticket.written[-1]
        masked = torch.full_like(scores, -torch.inf)
        return masked.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)

    def ended(self) -> list[bool]:
        return [ticket.episode is not None for ticket in self.tickets]


class StopWhenAllEnded(StoppingCriteria):
    def __init__(self, chooser: TokenChooser) -> None:
        self.chooser = chooser

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.tensor(self.chooser.ended(), device=input_ids.device)
