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
from sbtiny.models.shapes import slot_bytes
from sbtiny.rollout.decoder import OnEpisode, stop_mask, validate_requests
from sbtiny.rollout.engines.sequence import RunningSequence, uniform_for
from sbtiny.rollout.episode import Episode, Request, StopReason
from sbtiny.rollout.memory import fit_slots
from sbtiny.rollout.sampling import Sampling, sample_tokens

PAD_TOKEN = 0  # any token: padding is masked, and tokens after a finished answer are not read


def left_pad(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (rows, longest); every prompt ends in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


class GenerateEngine:
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
        self.stops = stop_mask(stop_ids, len(pieces))

    def refresh(self) -> None:
        """Do nothing: it decodes with the model itself, adapter included."""

    def check_room(self, tokens: int) -> None:
        self._rows(tokens, 1)

    def _rows(self, capacity: int, wanted: int) -> int:
        """Number of rows that fit, at most `wanted`; a model without attention heads has no keys and values."""
        c = self.config
        if not (heads := getattr(c, "num_attention_heads", None)):
            return wanted
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        slot = slot_bytes(c.num_hidden_layers, kv_heads * head_dim, capacity, self.model.dtype.itemsize)
        return fit_slots(slot, wanted, self.kv_cache_gib, self.model.device)

    @torch.no_grad()
    def run(self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None) -> list[Episode]:
        """Sample every request, long ones together; see `DecodeEngine`."""
        validate_requests(requests, getattr(self.config, "max_position_embeddings", None), self.stops)
        rows = self._rows(max(len(r.prompt_ids) + r.max_tokens for r in requests), self.slots)
        order = sorted(range(len(requests)), key=lambda i: -requests[i].expected)
        episodes: dict[int, Episode] = {}
        with inference_mode_for(self.model):
            for start in range(0, len(order), rows):
                answers = [RunningSequence(i, requests[i], self.pieces) for i in order[start : start + rows]]
                chooser = TokenChooser(answers, self.stops, sampling, on_episode)
                self._decode(chooser)
                episodes |= chooser.episodes
        return [episodes[i] for i in range(len(requests))]

    def _decode(self, chooser: "TokenChooser") -> None:
        ids, mask = left_pad([a.request.prompt_ids for a in chooser.answers], PAD_TOKEN, self.model.device)
        config = GenerationConfig(
            max_new_tokens=max(a.request.max_tokens for a in chooser.answers),
            do_sample=False,  # of one possible token
            num_beams=1,
            pad_token_id=PAD_TOKEN,
            eos_token_id=-1,  # the chooser stops
        )
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([StopWhenAllEnded(chooser)]),
        )


class TokenChooser(LogitsProcessor):
    """Samples a token for each row and leaves `generate` no other choice."""

    def __init__(self, answers: list[RunningSequence], stops: np.ndarray, sampling: Sampling, on_episode: OnEpisode | None) -> None:
        self.answers, self.stops, self.sampling, self.on_episode = answers, stops, sampling, on_episode
        self.episodes: dict[int, Episode] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        live = [i for i, ended in enumerate(self.ended()) if not ended]
        answers = [self.answers[i] for i in live]
        tokens, logprobs = sample_tokens(scores[live], self.sampling, uniform_for(answers))
        values = [0.0] * len(live) if logprobs is None else logprobs.tolist()
        chosen = [PAD_TOKEN] * len(self.answers)
        for i, answer, token, logprob in zip(live, answers, tokens.tolist(), values, strict=True):
            if reason := answer.append(token, logprob, self.stops):
                self._end(answer, reason)
            else:
                chosen[i] = answer.written[-1]
        masked = torch.full_like(scores, -torch.inf)
        return masked.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)

    def ended(self) -> list[bool]:
        return [answer.index in self.episodes for answer in self.answers]

    def _end(self, answer: RunningSequence, reason: StopReason) -> None:
        episode = self.episodes[answer.index] = answer.episode(reason, self.sampling.logprobs)
        if self.on_episode:
            self.on_episode(answer.index, episode)


class StopWhenAllEnded(StoppingCriteria):
    def __init__(self, chooser: TokenChooser) -> None:
        self.chooser = chooser

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.tensor(self.chooser.ended(), device=input_ids.device)
