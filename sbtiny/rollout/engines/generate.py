"""The model's own `generate` behind our interface: slower than our loop, but it works with anything transformers can run.

A batch waits for its longest row. Tokens are sampled here, by the request's own seed and under its control, and handed to `generate`
as the only ones possible: so a request means the same to both engines, whatever the model's generation config says.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from sbtiny.models.load import decoding
from sbtiny.models.shapes import slot_bytes
from sbtiny.rollout.engines.sequence import Answer, draws
from sbtiny.rollout.decoder import OnEpisode, check, stop_mask
from sbtiny.rollout.episode import Episode, Request, StopReason
from sbtiny.rollout.memory import slots_within
from sbtiny.rollout.sampling import Sampling, sample

PAD = 0  # any token: padding is masked, and what follows an answer that ended is not read


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (rows, longest), every prompt ending in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


class Generate:
    """Samples requests in batches of at most `slots` rows; fewer where their keys and values do not fit, see `memory`."""

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[str],
        stop_ids: frozenset[int],
        slots: int = 64,
        kv_memory: float | None = None,
    ) -> None:
        self.model, self.pieces, self.slots, self.kv_memory = model, pieces, slots, kv_memory
        self.config = model.config.get_text_config()
        self.stops = stop_mask(stop_ids, len(pieces))

    def refresh(self) -> None:
        """Nothing: it decodes through the model itself, adapter and all."""

    def check_room(self, tokens: int) -> None:
        self._rows(tokens, 1)

    def _rows(self, capacity: int, wanted: int) -> int:
        """How many of the rows wanted fit; a model without attention heads keeps no keys and values."""
        c = self.config
        if not (heads := getattr(c, "num_attention_heads", None)):
            return wanted
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        slot = slot_bytes(c.num_hidden_layers, kv_heads * head_dim, capacity, self.model.dtype.itemsize)
        return slots_within(slot, wanted, self.kv_memory, self.model.device)

    @torch.no_grad()
    def run(
        self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None
    ) -> list[Episode]:
        """Sample every request, long ones together; see `Decoder`."""
        check(requests, getattr(self.config, "max_position_embeddings", None), self.stops)
        rows = self._rows(max(len(r.prompt_ids) + r.max_tokens for r in requests), self.slots)
        order = sorted(range(len(requests)), key=lambda i: -requests[i].expected)
        episodes: dict[int, Episode] = {}
        with decoding(self.model):
            for start in range(0, len(order), rows):
                answers = [Answer(i, requests[i], self.pieces) for i in order[start : start + rows]]
                chooser = Chooser(answers, self.stops, sampling, on_episode)
                self._decode(chooser)
                episodes |= chooser.episodes
        return [episodes[i] for i in range(len(requests))]

    def _decode(self, chooser: "Chooser") -> None:
        ids, mask = left_padded([a.request.prompt_ids for a in chooser.answers], PAD, self.model.device)
        config = GenerationConfig(
            max_new_tokens=max(a.request.max_tokens for a in chooser.answers),
            do_sample=False,  # of one possible token
            num_beams=1,
            pad_token_id=PAD,
            eos_token_id=-1,  # stops are the chooser's business
        )
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([Ended(chooser)]),
        )


class Chooser(LogitsProcessor):
    """Leaves `generate` one possible token for each row."""

    def __init__(self, answers: list[Answer], stops: np.ndarray, sampling: Sampling, on_episode: OnEpisode | None) -> None:
        self.answers, self.stops, self.sampling, self.on_episode = answers, stops, sampling, on_episode
        self.episodes: dict[int, Episode] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        live = [i for i, ended in enumerate(self.ended()) if not ended]
        answers = [self.answers[i] for i in live]
        tokens, logprobs = sample(scores[live], self.sampling, draws(answers))
        said = [0.0] * len(live) if logprobs is None else logprobs.tolist()
        chosen = [PAD] * len(self.answers)
        for i, answer, token, logprob in zip(live, answers, tokens.tolist(), said, strict=True):
            if reason := answer.take(token, logprob, self.stops):
                self._end(answer, reason)
            else:
                chosen[i] = answer.written[-1]
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)

    def ended(self) -> list[bool]:
        return [answer.index in self.episodes for answer in self.answers]

    def _end(self, answer: Answer, reason: StopReason) -> None:
        episode = self.episodes[answer.index] = answer.episode(reason, self.sampling.logprobs)
        if self.on_episode:
            self.on_episode(answer.index, episode)


class Ended(StoppingCriteria):
    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.tensor(self.chooser.ended(), device=input_ids.device)
