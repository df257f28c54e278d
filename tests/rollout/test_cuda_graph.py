"""The recorded decode step as far as a CPU can show it: fixed shapes and buffers, and what happens where recording fails."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbtiny.rollout import cuda_graph
from sbtiny.rollout.cuda_graph import CudaGraphs, Recording, round_to_power_of_two
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.episode import Sampling
from sbtiny.tasks import arithmetic


def test_sizes_are_rounded_up_within_their_bounds() -> None:
    assert [round_to_power_of_two(n, 1, 12) for n in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    assert [round_to_power_of_two(n, 256, 700) for n in (1, 256, 257, 513, 700)] == [256, 256, 512, 700, 700]


def unrecorded(step: Callable[[], Tensor], pool: object) -> Recording:
    """Stands for a recording: plays the step back from the buffers, into the same memory each time."""
    logits = step().clone()

    def replay() -> None:
        logits.copy_(step())

    return Recording(replay, logits)


@pytest.fixture
def graphs(monkeypatch) -> list[CudaGraphs]:
    """Every engine of the test decodes through these."""
    made, reserve = [], Engine._reserve

    def with_graphs(self: Engine, *given: int) -> None:
        before = self.capacity
        reserve(self, *given)
        if self.capacity != before:
            self.graphs = CudaGraphs(self._decode, self.rows, self.capacity, self.cache.device)
            made.append(self.graphs)

    monkeypatch.setattr(Engine, "_reserve", with_graphs)
    return made


def asked(policy, count: int, room: int = 60):
    return [policy.request(q.question, room - i % 9, seed=i) for i, q in enumerate(arithmetic.generate_questions("val", count))]


def test_a_cpu_decodes_without(policy) -> None:
    policy.sample(asked(policy, 1, 3), Sampling())
    assert policy.engine.graphs is None


def test_fixed_buffers_and_rounded_shapes_give_the_same_tokens(policy, graphs, monkeypatch) -> None:
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", unrecorded)
    recorded = [e.completion_ids for e in policy.sample(asked(policy, 40), Sampling())]
    policy.sample(asked(policy, 12), Sampling())  # what free slots hold by now is none of the next request's business
    again = [e.completion_ids for e in policy.sample(asked(policy, 40), Sampling())]
    rows = {size[0] for size in graphs[0].recordings}
    assert rows <= {1, 2, 4, 8, 12}
    assert len(rows) > 2
    monkeypatch.setattr(policy.engine, "graphs", None)
    plain = [e.completion_ids for e in policy.sample(asked(policy, 40), Sampling())]
    assert plain == recorded == again


def test_a_longer_request_gets_another_cache_and_other_recordings(policy, graphs, monkeypatch) -> None:
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", unrecorded)
    policy.sample(asked(policy, 3, 20), Sampling())
    policy.sample(asked(policy, 3, 600), Sampling())
    assert len(graphs) == 2
    assert policy.engine.graphs is graphs[1]
    assert graphs[1].capacity > graphs[0].capacity


def test_where_recording_fails_the_step_runs_as_written_and_says_so_once(policy, graphs, monkeypatch, capsys) -> None:
    tried = 0

    def refuse(step: Callable[[], Tensor], pool: object) -> Recording:
        nonlocal tried
        tried += 1
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", refuse)
    found = [e.completion_ids for e in policy.sample(asked(policy, 14), Sampling())]
    monkeypatch.setattr(policy.engine, "graphs", None)
    assert found == [e.completion_ids for e in policy.sample(asked(policy, 14), Sampling())]
    assert tried == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said == "no CUDA graph for the decode step, it runs without: operation not permitted when stream is capturing"


def test_recordings_see_refreshed_weights_in_their_old_memory() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64, tie_word_embeddings=False)).eval()
    weights = Engine(model, ["a"] * 30, frozenset({1})).weights
    weights = type(weights)(model, torch.bfloat16)  # another dtype than the model's: nothing is shared with it
    held = [weights.embed, weights.norm, weights.head, *weights.layers[0].tensors()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    weights.refresh()
    assert all(a is b for a, b in zip(held, [weights.embed, weights.norm, weights.head, *weights.layers[0].tensors()], strict=True))
    assert torch.equal(held[0], model.model.embed_tokens.weight.to(torch.bfloat16))
    assert torch.equal(held[2], model.lm_head.weight.to(torch.bfloat16))
