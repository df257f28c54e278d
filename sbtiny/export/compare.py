"""Compare two models on the same tokens: KL of their next-token distributions, and agreement of their first choices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbtiny.rollout.episode import Episode
from sbtiny.rollout.weights import merged_weight

MAX_LOGITS = 60_000_000  # logits of one model in memory: 240 MB
MAX_POSITIONS = 4000
CONFIDENT_MARGIN = 0.1  # probability of first choice less second, from which on rounding must not swap them


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt with an answer; `start` is the first position whose next token belongs to the answer."""

    ids: tuple[int, ...]
    start: int


def comparison_texts(episodes: Sequence[Episode], vocabulary: int) -> list[Text]:
    """The first answers, up to MAX_POSITIONS tokens and MAX_LOGITS logits; the last one may be cut."""
    room, texts = min(MAX_POSITIONS, MAX_LOGITS // vocabulary), []
    for episode in episodes:
        prompt = episode.request.prompt_ids
        answer = episode.completion_ids[: max(room, 0)]
        if not answer:
            break
        texts.append(Text((*prompt, *answer[:-1]), len(prompt) - 1))
        room -= len(answer)
    return texts


def answer_logits(score: Callable[[Sequence[int]], Tensor], samples: Sequence[Text]) -> Tensor:
    """Logits at the answers' positions, (positions, vocabulary) float32; `score` returns those of one whole text."""
    return torch.cat([score(text.ids)[text.start :].float() for text in samples])


def logit_fn(model: nn.Module) -> Callable[[Sequence[int]], Tensor]:
    """A function from token ids to logits, (positions, vocabulary) float32 on the CPU."""

    @torch.inference_mode()
    def score(ids: Sequence[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()

    return score


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over positions of KL(p, q) in nats, from logits (positions, vocabulary). Uses float64, because it may be 1e-8."""
    total = 0.0
    for a, b in zip(p.split(64), q.split(64), strict=True):
        log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return max(0.0, total / len(p))


def agreement(p: Tensor, q: Tensor) -> float:
    """Share of positions with the same most likely token."""
    return (p.argmax(-1) == q.argmax(-1)).float().mean().item()


def confident_positions(logits: Tensor) -> Tensor:
    """Mask, (positions,) bool: the first choice leads the second by CONFIDENT_MARGIN, so that rounding should not swap them."""
    best = logits.softmax(-1).topk(2, -1).values
    return best[:, 0] - best[:, 1] >= CONFIDENT_MARGIN


def distance(reference: Tensor, other: Tensor) -> dict[str, float]:
    """KL(reference, other), and agreement of first choices at all positions and at the reference's confident ones."""
    other = other[:, : reference.shape[1]]  # a GGUF may pad its vocabulary
    sure = confident_positions(reference)
    return {
        "kl": kl(reference, other),
        "argmax_agreement": agreement(reference, other),
        "clear_agreement": agreement(reference[sure], other[sure]) if sure.any() else 1.0,
    }


def in_float32(model: nn.Module) -> nn.Module:
    """Turn the model's layers to plain float32, 4-bit weights dequantised, so that two models differ by their weights alone."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state"):
            model.set_submodule(name, dequantized(layer))
    for weight in model.parameters():
        weight.data = weight.data.float()
    return model


def dequantized(layer: nn.Linear) -> nn.Linear:
    """A plain layer from a 4-bit layer of bitsandbytes."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(merged_weight(layer, torch.float32), requires_grad=False)
    plain.bias = layer.bias
    return plain
