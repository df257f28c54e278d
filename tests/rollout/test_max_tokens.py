"""`--max-tokens auto`: a number by the model's own lengths, chosen once and kept, so that a stopped run goes on with the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import GRPO, settings_of

from sbtiny import runs
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import sample_correct
from sbtiny.config import AUTO_LIMIT, DataSettings, EvalSettings, Settings, SftSettings
from sbtiny.errors import InputError
from sbtiny.evaluation.run import run_eval
from sbtiny.grpo.run import run_grpo
from sbtiny.load_settings import load_settings
from sbtiny.planning.workload import StageWorkload
from sbtiny.rollout import max_tokens
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.max_tokens import PROBE_ANSWERS, draw_probe, fit_max_tokens, is_settled, probe_lengths, probe_max_tokens
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic
from sbtiny.tasks.verify import auto

ASKED = arithmetic.generate_questions("train", 40, seed=5)


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe from here on fails the test."""
    monkeypatch.setattr(max_tokens, "probe_max_tokens", lambda *_, **__: pytest.fail("the lengths were probed again"))


@pytest.mark.parametrize(
    ("ended", "answers", "limit", "wanted"),
    [
        (range(1, 101), 100, 4096, 144),  # 95 and half of it, in sixteens
        ([10] * 31 + [4000], 32, 4096, 16),  # one of 32 does not count
        ([10] * 30 + [100] * 2, 32, 4096, 160),  # two do
        ([100] * 16, 32, 4096, 160),  # half of them loop
        ([100] * 15, 32, 4096, 4096),  # most do not end: the lengths are not known
        ([], 32, 1000, 1000),
        ([900] * 32, 32, 1000, 1000),
        ([7], 1, 4096, 16),
    ],
)  # fmt: skip
def test_the_rule(ended: list[int], answers: int, limit: int, wanted: int) -> None:
    assert fit_max_tokens(ended, answers, limit) == wanted


def test_the_order_of_the_answers_changes_nothing() -> None:
    assert fit_max_tokens([3, 90, 5, 40], 4, 4096) == fit_max_tokens([90, 40, 5, 3], 4, 4096)


def test_longer_answers_are_asked_for_while_they_tell_something() -> None:
    assert is_settled(31, 1, 32)
    assert is_settled(16, 0, 32)
    assert not is_settled(30, 1, 32)
    assert not is_settled(15, 0, 32)


def test_only_answers_that_were_cut_are_sampled_again(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rounds = [policy.request(q.question, 800, seed=i) for i, q in enumerate(ASKED[:8])], []
    monkeypatch.setattr(max_tokens, "FIRST_LIMIT", 50)
    whole = policy.sample(asked, Sampling(0.7))
    monkeypatch.setattr(policy, "sample", lambda requests, sampling: rounds.append(requests) or Policy.sample(policy, requests, sampling))
    found = probe_lengths(policy, asked, Sampling(0.7))
    assert set(found) <= {len(e.completion_ids) for e in whole if e.ended}
    limits, counts = [{r.max_tokens for r in again} for again in rounds], [len(again) for again in rounds]
    assert limits == [{50 * 2**i} for i in range(len(rounds))]
    assert counts == sorted(counts, reverse=True)
    assert len(found) >= 4


def test_a_probe_draws_questions_by_its_own_seed() -> None:
    assert draw_probe(ASKED, 0) == draw_probe(ASKED, 0) != draw_probe(ASKED, 1)
    assert len({q.id for q in draw_probe(ASKED, 0)}) == PROBE_ANSWERS == len(draw_probe(ASKED[:3], 0))


def test_what_is_chosen_holds_the_answers_of_the_bundled_model(policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    asked = draw_probe(ASKED, 0)
    chosen = probe_max_tokens(policy, asked, Sampling(0.7), 0)
    assert probe_max_tokens(policy, asked, Sampling(0.7), 0) == chosen < AUTO_LIMIT
    others = [policy.request(q.question, chosen, seed=900 + i) for i, q in enumerate(ASKED)]
    assert sum(e.ended for e in policy.sample(others, Sampling(0.7))) >= 0.9 * len(others)
    assert f"max_tokens auto: {chosen} (" in capsys.readouterr().err


def test_a_stopped_build_goes_on_with_its_number(policy: Policy, tmp_path: Path, no_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file, settings = tmp_path / "rows.jsonl", Settings(data=DataSettings(samples_per_question=1, max_tokens="auto", max_num_seqs=8))

    def stop(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as probing:
        probing.setattr(max_tokens, "probe_max_tokens", lambda *_, **__: 250)
        answered: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            sample_correct(policy, ASKED[:12], lambda *_: stop() if len(answered) > 2 else not answered.append(1), settings, file)
    assert json.loads((tmp_path / "rows.jsonl.part").read_text().splitlines()[0])["max_tokens"] == 250
    found = sample_correct(policy, ASKED[:12], auto, settings, file)
    assert found.max_tokens == 250
    number = replace(settings, data=replace(settings.data, max_tokens=250))
    whole = sample_correct(policy, ASKED[:12], lambda *_: True, number, tmp_path / "other.jsonl")
    assert {row["response"] for row in found.rows} <= {row["response"] for row in whole.rows}
    with pytest.raises(InputError, match="begun with other settings"):
        sample_correct(policy, ASKED[:12], auto, number, file)


def test_a_run_keeps_its_number_and_resumes_with_it(started: Path, tmp_path: Path, no_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    auto_settings = settings_of(replace(GRPO, max_tokens="auto"))
    with monkeypatch.context() as probing:
        probing.setattr(max_tokens, "probe_max_tokens", probe_max_tokens)
        probing.setattr("sbtiny.grpo.trainer.train_grpo", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_grpo(auto_settings, started, tmp_path / "run", force=True)
    chosen = runs.read_run(tmp_path / "run")["max_tokens"]
    b_max = runs.read_json(tmp_path / "run" / "b_max.json").values()
    assert list(b_max).count("inf") < len(b_max) / 2  # the answers of the initial model, ten times as long, are not cut
    assert chosen < AUTO_LIMIT
    assert load_settings(tmp_path / "run" / "config.yaml").grpo.max_tokens == chosen
    seen = []
    monkeypatch.setattr("sbtiny.grpo.trainer.train_grpo", lambda *given: seen.append(given[4].grpo.max_tokens))
    run_grpo(auto_settings, started, tmp_path / "run", resume=True, force=True)
    assert seen == [chosen]


def test_an_evaluation_says_what_it_allowed(started: Path, tmp_path: Path) -> None:
    e = EvalSettings(limit=8, max_tokens="auto", max_num_seqs=8)
    found = run_eval(str(started), Settings(eval=e), tmp_path)
    assert found["max_tokens"] % 16 == 0
    assert found["max_tokens"] < 100
    given = run_eval(str(started), Settings(eval=replace(e, budget="60")), tmp_path / "given")
    assert given["mean_budget"] == 60


def test_a_cold_start_that_samples_its_rows_writes_the_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DataSettings(limit=8, samples_per_question=1, max_tokens="auto", max_num_seqs=8)
    folder = run_sft(Settings(data=data, sft=SftSettings(steps=1, max_length=500)), tmp_path / "sft")
    assert runs.read_run(folder)["max_tokens"] == 500 - 256  # no longer row can be trained; the probe would have said 320 or more
    assert load_settings(folder / "config.yaml").data.max_tokens == 500 - 256
    assert "max_tokens auto: 244 (" in capsys.readouterr().err


def test_a_plan_counts_what_a_probe_may_take() -> None:
    assert StageWorkload("eval", Settings(eval=EvalSettings(max_tokens="auto"))).max_new_tokens == AUTO_LIMIT
    sampled = Settings(data=DataSettings(max_tokens="auto"), sft=SftSettings(max_length=500))
    assert StageWorkload("sft", sampled).record()["max_new_tokens"] == 500 - 256  # no longer row can be trained
    assert StageWorkload("data", sampled).record()["max_new_tokens"] == AUTO_LIMIT


@pytest.mark.parametrize("wrong", ["0", "-1", "most", "1.5"])
def test_neither_a_number_nor_auto(wrong: str) -> None:
    with pytest.raises(InputError, match=r"grpo.max_tokens is .*: set it to 1 or more, or auto"):
        load_settings(overrides=[("grpo.max_tokens", wrong)])
    assert load_settings(overrides=[("grpo.max_tokens", "512")]).grpo.max_tokens == 512
