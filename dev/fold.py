"""Does it pay to decode on weights with the adapter folded in? The same loop and requests, once folded, once through the adapter.

    python dev/fold.py MODEL [--dtype bfloat16] [--4bit] [--requests 64] [--rounds 3]

Prints, as JSON, useful tokens of both by turns and what a refresh takes, in seconds of processor time on one thread: a busy machine
changes these little. dev/LOG.md has the figures.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sbtiny.bench.lengths import draw_lengths
from sbtiny.bench.machine import describe_machine
from sbtiny.bench.rollout import RolloutEngine, build_job
from sbtiny.models.load import add_lora, load_model
from sbtiny.progress import quieten_libraries
from sbtiny.rollout.engine import Engine, apply_rotary
from sbtiny.rollout.weights import Layer


class Attached(Engine):
    """The engine with every product done by the model's own modules: base, then adapter; nothing fused."""

    def refresh(self) -> None:
        self.modules = dict(zip(map(id, self.weights.layers), self.weights.model.model.layers, strict=True))

    def _project(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, size = self.modules[id(layer)].self_attn, (-1, self.weights.head_dim)
        h = F.rms_norm(x, x.shape[-1:], layer.norm_attention, self.weights.eps)
        q, k, v = (p(h).unflatten(-1, size) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        module = self.modules[id(layer)]
        x = x + module.self_attn.o_proj(attended)
        h = F.rms_norm(x, x.shape[-1:], layer.norm_mlp, self.weights.eps)
        return x + module.mlp.down_proj(F.silu(module.mlp.gate_proj(h)) * module.mlp.up_proj(h))


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype")
    parser.add_argument("--4bit", action="store_true", dest="four_bit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    a = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    model, tokenizer = load_model(a.model, four_bit=a.four_bit, dtype=a.dtype)
    model = add_lora(model, rank=32, alpha=64).eval()
    work = build_job(tokenizer, draw_lengths(a.requests, 44, 192, seed=0), slots=32, group=8, seed=0)
    folded, attached = RolloutEngine(model, 32, None), RolloutEngine(model, 32, None)
    attached.engine.__class__ = Attached
    folded.engine.refresh()  # the first one finds nothing warm
    refresh = seconds(folded.engine.refresh)
    attached.engine.refresh()
    rates: dict[str, list[float]] = {"folded": [], "attached": []}
    for turn in range(a.rounds + 1):
        for name, engine in (("folded", folded), ("attached", attached)):
            spent = seconds(lambda engine=engine: engine(work, time.process_time))
            if turn:
                rates[name].append(sum(work.lengths) / spent)
    ratios = [f / t for f, t in zip(rates["folded"], rates["attached"], strict=True)]
    found = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    print(
        json.dumps(
            found | {"ratio": statistics.median(ratios), "ratios": ratios, "refresh_seconds": refresh, "machine": describe_machine()}
        )
    )


if __name__ == "__main__":
    main()
