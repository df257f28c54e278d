"""Two models on the same tokens: the distance of their next-token distributions, and how often their first choices agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbtiny.rollout.episode import Episode

NUMBERS = 60_000_000  # logits kept of one model: 240 MB
MOST = 4000  # positions


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt with an answer; `start` is the first position whose next token belongs to the answer."""

    ids: tuple[int, ...]
    start: int


def texts(episodes: Sequence[Episode], vocabulary: int) -> list[Text]:
    """As many of the answers as fit into the memory meant for logits, the first one in any case."""
    room, found = min(MOST, NUMBERS // vocabulary), []
    for episode in episodes:
        prompt = episode.request.prompt_ids
        answer = episode.completion_ids[: max(room, 0)]
        if not answer:
            break
        found.append(Text((*prompt, *answer[:-1]), len(prompt) - 1))
        room -= len(answer)
    return found


def gathered(score: Callable[[Sequence[int]], Tensor], samples: Sequence[Text]) -> Tensor:
    """Logits at the answers' positions, (positions, vocabulary) float32; `score` gives those of a whole text."""
    return torch.cat([score(text.ids)[text.start :].float() for text in samples])


def scorer(model: nn.Module) -> Callable[[Sequence[int]], Tensor]:
    @torch.inference_mode()
    def score(ids: Sequence[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()

    return score


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over positions of KL(p, q) in nats, from logits (positions, vocabulary); in float64, for it may be 1e-8."""
    total = 0.0
    for a, b in zip(p.split(64), q.split(64), strict=True):
        log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return max(0.0, total / len(p))


def agreement(p: Tensor, q: Tensor) -> float:
    """Share of positions with the same most likely token."""
    return (p.argmax(-1) == q.argmax(-1)).float().mean().item()


def distance(reference: Tensor, other: Tensor) -> dict[str, float]:
    other = other[:, : reference.shape[1]]  # a GGUF may pad its vocabulary
    return {"kl": kl(reference, other), "argmax_agreement": agreement(reference, other)}
