"""Engines are one to their callers: the same request, the same text, the same control, whatever decodes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.models.load import add_lora, load_model
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.engines.generate import GenerateEngine
from sbtiny.rollout.engines.vllm import fit_rank
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.load_policy import build_policy, load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic

WRAP_UP = "\nSo the answer is "


@pytest.fixture
def generate(tiny) -> Policy:
    return build_policy(*tiny, slots=5, engine="generate")


def asked(policy: Policy, count: int, room: int = 40, **more) -> list[Request]:
    """Questions of mixed length with mixed limits of length."""
    return [
        policy.request(q.question, room - 3 * (i % 4), seed=i, expected=i % 7, **more)
        for i, q in enumerate(arithmetic.generate_questions("val", count))
    ]


WISHES = {  # a generation config of a model's own
    "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.3, "guidance_scale": 2.0, "min_new_tokens": 12,
    "bad_words_ids": [[5]], "suppress_tokens": [*range(20, 60)], "begin_suppress_tokens": [*range(60, 90)], "sequence_bias": [[[9], -9.0]],
    "forced_eos_token_id": 2, "max_time": 0.001, "num_return_sequences": 2, "top_k": 3, "renormalize_logits": True,
}  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.8, top_p=0.9, top_k=20, logprobs=True)])
@pytest.mark.parametrize("wishes", [{}, *({key: value} for key, value in WISHES.items()), WISHES], ids=lambda w: "+".join(w)[:30] or "none")
def test_generate_writes_what_ours_writes(policy, generate, tiny, sampling: Sampling, wishes: dict, monkeypatch) -> None:
    """The model's own wishes count for neither, and are there afterwards."""
    for key, value in wishes.items():
        monkeypatch.setattr(tiny[0].generation_config, key, value)
    requests, seen = asked(policy, 12), []
    ours = policy.sample(requests, sampling)
    theirs = generate.sample(requests, sampling, lambda index, _: seen.append(index))
    assert [e.completion_ids for e in theirs] == [e.completion_ids for e in ours]
    assert [(e.stop_reason, e.ended, e.length) for e in theirs] == [(e.stop_reason, e.ended, e.length) for e in ours]
    assert sorted(seen) == list(range(12))
    for a, b in zip(ours, theirs, strict=True):
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert {key: getattr(tiny[0].generation_config, key) for key in wishes} == wishes


def test_an_adapter_leaves_the_wishes_of_its_model_out_as_well(tiny) -> None:
    model, tokenizer = load_model("tiny")
    requests = asked(build_policy(*tiny, slots=5), 4)
    expected = build_policy(*tiny, slots=5).sample(requests, Sampling(0))
    model.generation_config.suppress_tokens = list(range(20, 60))
    found = build_policy(add_lora(model), tokenizer, slots=5, engine="generate").sample(requests, Sampling(0))
    assert [e.completion_ids for e in found] == [e.completion_ids for e in expected]
    assert model.generation_config.suppress_tokens == list(range(20, 60))


def test_generate_is_under_the_same_control(policy, generate) -> None:
    limits = Limits(ceiling=8, wrap_up=tuple(policy.encode(WRAP_UP)), reserve=20)
    mixed = [replace(r, limits=None) if i % 3 else r for i, r in enumerate(asked(policy, 9, 60, limits=limits, budget=30))]
    ours, theirs = policy.sample(mixed, Sampling(1.0)), generate.sample(mixed, Sampling(1.0))
    assert any(any(e.injected) for e in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.completion_ids, a.injected, a.stop_reason) == (b.completion_ids, b.injected, b.stop_reason)
        assert a.enforced_budget == b.enforced_budget


def test_generate_is_interrupted_between_two_tokens(generate) -> None:
    interrupt = Interrupt()
    interrupt.press()
    requests = asked(generate, 4, 12)
    expected = [e.completion_ids for e in generate.sample(requests, Sampling())]
    requests[1] = replace(requests[1], interrupt=interrupt)
    found = generate.sample(requests, Sampling())
    assert (found[1].stop_reason, found[1].completion_ids) == ("interrupted", [])
    assert [found[i].completion_ids for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


def test_generate_runs_models_that_ours_does_not_know() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=96, eos_token_id=96)).eval()
    pieces, stops = [chr(33 + i) for i in range(97)], frozenset({96})
    with pytest.raises(InputError, match="use --engine generate"):
        Engine(model, pieces, stops)
    requests = [Request((5, 7, i), 6) for i in range(3)]
    found = GenerateEngine(model, pieces, stops, slots=2).run(requests, Sampling(0))
    for request, episode in zip(requests, found, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *episode.completion_ids]])
        best = model(input_ids=ids).logits[0, 2:-1].argmax(-1).tolist()
        assert episode.completion_ids == best[: len(episode.completion_ids)]
    with pytest.raises(InputError, match="64 positions"):
        GenerateEngine(model, pieces, stops).run([Request((1,), 64)], Sampling())
    slot = 2 * 2 * 9 * 32 * 4 / 2**30
    small = GenerateEngine(model, pieces, stops, slots=8, kv_cache_gib=3 * slot)
    assert small._rows(9, 8) == 3
    with pytest.raises(InputError, match="raise --kv-memory"):
        small.check_room(100)


def test_generate_leaves_a_model_in_training_as_it_was(tiny) -> None:
    model, tokenizer = load_model("tiny")
    model = add_lora(model, rank=4).train()
    policy = build_policy(model, tokenizer, slots=4, engine="generate")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.03)
    requests = asked(policy, 4, 20)
    adapted = [e.completion_ids for e in policy.sample(requests, Sampling(0))]
    assert model.training
    assert adapted == [e.completion_ids for e in build_policy(model, tokenizer).sample(requests, Sampling(0))]
    with model.disable_adapter():
        policy.refresh()
        plain = [e.completion_ids for e in policy.sample(requests, Sampling(0))]
    assert plain == [e.completion_ids for e in build_policy(*tiny).sample(requests, Sampling(0))] != adapted


# ---- vLLM, where it is not (tests/rollout/test_vllm.py has the rest) ------------------------------------------------


def test_vllm_is_refused_in_one_line_where_it_is_not_installed(tiny, monkeypatch) -> None:
    monkeypatch.setattr("sbtiny.rollout.engines.vllm.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"vllm is not installed: pip install vllm \(on a CPU: make vllm-env\)") as error:
        build_policy(*tiny, engine="vllm")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "world", "said"),
    [
        ({"four_bit": True}, 1, "no 4-bit layers: add --no-4bit, or use --engine ours"),
        ({"backend": "unsloth"}, 1, "needs a GPU: use --backend transformers, or --engine ours"),
        ({}, 2, "in one process, not beside others: use --engine ours"),
    ],
)
def test_vllm_refuses_what_it_cannot_do_on_a_cpu(asked: dict, world: int, said: str, monkeypatch) -> None:
    monkeypatch.setattr("sbtiny.rollout.engines.vllm.find_spec", lambda name: True)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(InputError, match=said) as error:
        load_policy("tiny", Settings(engine="vllm", **asked), slots=4)
    assert "\n" not in str(error.value)


def test_a_rank_is_rounded_up_to_one_of_theirs() -> None:
    assert [fit_rank(r) for r in (1, 8, 12, 32, 500)] == [8, 8, 16, 32, 512]
    with pytest.raises(InputError, match="up to rank 512"):
        fit_rank(513)


def test_a_cache_too_small_for_one_answer_is_told_before_work(tiny, monkeypatch) -> None:
    monkeypatch.setattr("sbtiny.rollout.engines.vllm.find_spec", lambda name: True)
    with pytest.raises(InputError, match="raise --kv-memory"):
        build_policy(*tiny, engine="vllm", kv_cache_gib=0.0001).engine.check_room(400)


def test_what_vllm_reserves_on_a_cpu_is_its_slots_and_a_block_more(tiny, monkeypatch) -> None:
    monkeypatch.setattr("sbtiny.rollout.engines.vllm.find_spec", lambda name: True)
    engine = build_policy(*tiny, slots=5, engine="vllm").engine
    engine.capacity = 128
    assert engine._cache_bytes() == 6 * engine.slot_bytes(128)
