"""Two models on the same tokens: the distance of their next-token distributions, and how often their first choices agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbtiny.rollout.episode import Episode
from sbtiny.rollout.weights import folded

NUMBERS = 60_000_000  # logits kept of one model: 240 MB
MOST = 4000  # positions
LEAD = 0.1  # of a first choice that rounding must not change


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


def clear(logits: Tensor) -> Tensor:
    """Positions whose first choice leads the second by LEAD in probability; at the others rounding may take either. (positions,) bool."""
    best = logits.softmax(-1).topk(2, -1).values
    return best[:, 0] - best[:, 1] >= LEAD


def distance(reference: Tensor, other: Tensor) -> dict[str, float]:
    """KL(reference, other), and how often first choices agree: at all positions, and where the reference's is clear."""
    other = other[:, : reference.shape[1]]  # a GGUF may pad its vocabulary
    sure = clear(reference)
    return {
        "kl": kl(reference, other),
        "argmax_agreement": agreement(reference, other),
        "clear_agreement": agreement(reference[sure], other[sure]) if sure.any() else 1.0,
    }


def in_float32(model: nn.Module) -> nn.Module:
    """The same weights in plain float32 layers, those in 4 bits rounded as they are computed with: what can differ is weights alone."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state"):
            model.set_submodule(name, unpacked(layer))
    for weight in model.parameters():
        weight.data = weight.data.float()
    return model


def unpacked(layer: nn.Linear) -> nn.Linear:
    """A layer of bitsandbytes, 4 bits a weight, as a plain one."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(folded(layer, torch.float32), requires_grad=False)
    plain.bias = layer.bias
    return plain
