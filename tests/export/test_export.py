"""Exports are written whole or not at all, and checked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sbtiny.budget.protocol import render_budget
from sbtiny.cli.main import app
from sbtiny.config import Settings
from sbtiny.errors import Failed, InputError
from sbtiny.export import check, kquants, verdict
from sbtiny.export.compare import confident_positions, distance, in_float32, kl
from sbtiny.export.merge import Merged
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.load import load_model
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.engines import llama_cpp
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import base_info, load_policy
from sbtiny.tasks import arithmetic

FULL = [  # from the system, numpy and safetensors
    OSError(28, "No space left on device"),
    OSError("65536 requested and 14768 written"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]
FEW = ["--questions", "4", "--set", "eval.max_tokens=60", "--set", "eval.max_num_seqs=4"]


def export(*arguments: object) -> None:
    app(["export", *map(str, arguments)], standalone_mode=False)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(range(3, 90))])).logits[0].float()


@pytest.mark.parametrize("four_bit", [False, True])
def test_merged_onto_the_training_base_is_the_trained_policy(new_run, four_bit: bool, tmp_path: Path) -> None:
    run = new_run(tmp_path / "r", four_bit=four_bit)
    export(run, "--gguf", "none", "--no-check", "--dtype", "float32")
    policy = load_model("tiny", four_bit=four_bit, adapter=run / "adapter")[0]
    merged = load_model(str(run / "export" / "merged"))[0]
    assert kl(logits(policy), logits(merged)) < 1e-5
    with policy.disable_adapter():
        assert kl(logits(merged), logits(policy)) > 1e-3


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_base_is_rounded_as_training_had_it(new_run, four_bit: bool, tmp_path: Path) -> None:
    """A base stored in float32 and trained in bfloat16: the policy has the rounded weights, measurably not the others."""
    run = new_run(tmp_path / "r", four_bit=four_bit)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"dtype": "bfloat16"}))
    export(run, "--gguf", "none", "--dtype", "float32", "-o", tmp_path / "rounded", *FEW)
    assert json.loads((tmp_path / "rounded" / "export.json").read_text())["merged"]["kl_adapter_merged"] < 1e-9
    export(run, "--gguf", "none", "--no-check", "--merge", "original", "--dtype", "float32", "-o", tmp_path / "original")
    policy = in_float32(load_model("tiny", four_bit=four_bit, dtype="bfloat16", adapter=run / "adapter")[0])
    assert kl(logits(policy), logits(load_model(str(tmp_path / "original" / "merged"))[0])) > 1e-6


def test_a_choice_between_equals_is_not_held_against_a_file() -> None:
    sure, torn = [4.0, 0.0, 0.0], [1.00, 1.01, 0.0]
    reference = torch.tensor([sure, torn, torn])
    assert confident_positions(reference).tolist() == [True, False, False]
    found = distance(reference, torch.tensor([sure, torn, [1.01, 1.0, 0.0]]))
    assert found["argmax_agreement"] == pytest.approx(2 / 3)
    assert found["clear_agreement"] == 1.0
    assert distance(reference, -reference)["clear_agreement"] == 0.0


def test_the_whole_export_is_checked_and_keeps_prompts(run: Path, tmp_path: Path) -> None:
    export(run, "--gguf", "f16,q8_0", "-o", tmp_path / "out", *FEW)
    found = json.loads((tmp_path / "out" / "export.json").read_text())
    assert found["passed"], found["failures"]
    assert found["merged"]["kl_adapter_merged"] * check.MIN_KL_RATIO < found["merged"]["kl_merged_base"]
    assert set(found["files"]) == {"r-f16.gguf", "r-q8_0.gguf"}
    assert found["files"]["r-f16.gguf"]["transformers"]["strings_same"] == 50
    tokenizer, trained = load_model(str(tmp_path / "out" / "merged"))[1], load_model("tiny")[1]
    assert prompt_ids(tokenizer, "What?") == prompt_ids(trained, "What?")
    chat = [{"role": "user", "content": "What?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, budget=70)
    assert ids == prompt_ids(trained, "What?") + trained.encode(render_budget(70), add_special_tokens=False)
    assert "FROM ./r-f16.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    assert not list(tmp_path.glob(".out*"))


EXTRA = {
    "temperature": 1.3, "top_k": 20, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.1, "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[5]],
    "suppress_tokens": [7], "begin_suppress_tokens": [7], "forced_bos_token_id": 8, "forced_eos_token_id": 8,
    "sequence_bias": [[[9], -9.0]], "max_new_tokens": 5, "max_length": 9, "min_new_tokens": 3, "min_length": 2, "guidance_scale": 1.5,
    "num_beams": 3, "length_penalty": 2.0, "max_time": 0.1, "stop_strings": ["4"], "remove_invalid_values": True,
    "renormalize_logits": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def wilful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a generation config that sets everything, and a second, named chat template."""
    folder = shutil.copytree(BUNDLED, tmp_path_factory.mktemp("wilful") / "base")
    about = {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 0, "do_sample": True, **EXTRA}
    (folder / "generation_config.json").write_text(json.dumps(about))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_an_export_is_sampled_as_an_evaluation_whatever_its_base_wished(new_run, wilful: Path, temperature: float, tmp_path: Path) -> None:
    run = new_run(tmp_path / "r", model=str(wilful))
    changed = ["--set", f"eval.temperature={temperature}", "--set", "eval.top_p=0.9"]
    export(run, "--gguf", "none", "--no-check", "-o", tmp_path / "out", *changed)
    found = json.loads((tmp_path / "out" / "merged" / "generation_config.json").read_text())
    found.pop("transformers_version")
    rows = load_model("tiny")[0].get_input_embeddings().weight.shape[0]
    sampled = {"temperature": 0.7, "top_p": 0.9, "top_k": rows} if temperature else {}
    tokens = {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 0}
    assert {key: value for key, value in found.items() if not key.startswith("_")} == {"do_sample": temperature > 0, **tokens, **sampled}


def test_an_export_answers_in_transformers_as_the_run_does_here(new_run, wilful: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "r", model=str(wilful))
    export(run, "--gguf", "none", "--no-check", "--dtype", "float32", "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "merged" / "additional_chat_templates").exists()
    policy = load_policy(str(run), Settings(four_bit=False), 4)
    model, tokenizer = load_model(str(tmp_path / "out" / "merged"))
    for question in arithmetic.generate_questions("test", 4):
        [ours] = policy.sample([policy.request(question.question, 60, seed=0)], Sampling(0))
        ids = torch.tensor([prompt_ids(tokenizer, question.question)])
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        assert written[0, ids.shape[1] :].tolist() == ours.completion_ids


def test_a_base_without_a_generation_config_ends_where_training_ended(new_run, tmp_path: Path) -> None:
    base = shutil.copytree(BUNDLED, tmp_path / "base", ignore=shutil.ignore_patterns("generation_config.json"))
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"eos_token_id": [2, 9]}))
    export(new_run(tmp_path / "r", model=str(base)), "--gguf", "none", "--no-check", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "merged" / "generation_config.json").read_text())["eos_token_id"] == [2, 9]


def test_a_failed_check_keeps_the_files_aside(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verdict.MIN_AGREEMENT, "q8_0", 1.1)
    with pytest.raises(Failed, match="first choices agree"):
        export(run, "--gguf", "q8_0", "-o", tmp_path / "out", *FEW)
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out-failed" / "export.json").read_text())["passed"] is False


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_leaves_nothing_and_the_earlier_export(
    run: Path, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(run, "--gguf", "none", "--no-check", "-o", out)
    before = (out / "export.json").read_text()

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("sbtiny.export.gguf.tensor_bytes", full)
    with pytest.raises(InputError, match="the disk is full or read-only"):
        export(run, "--gguf", "q8_0", "--no-check", "-o", out)
    assert (out / "export.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_corrupt_adapter_and_another_base_are_one_line(new_model, run: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(run, tmp_path / "broken")
    file = broken / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="is corrupt"):
        export(broken, "--no-check")
    base = shutil.copytree(BUNDLED, tmp_path / "base")

    other = new_model(base, "qwen2", True)
    with pytest.raises(InputError, match="does not fit"):
        Merged(other, run / "adapter")
    odd = shutil.copytree(run, tmp_path / "odd")
    config = odd / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(InputError, match="only plain LoRA"):
        export(odd, "--no-check")
    assert not list(tmp_path.glob("*/export"))


def test_a_base_with_other_weights_is_refused(run: Path, tmp_path: Path) -> None:
    """A new bundled model of the same shapes: only the fingerprint shows it."""
    policy = load_policy("tiny", Settings(four_bit=False), 4)
    about = json.loads((run / "run.json").read_text()) | base_info(policy)
    other = shutil.copytree(run, tmp_path / "other")
    (other / "run.json").write_text(json.dumps(about))
    export(other, "--gguf", "none", "--no-check")
    (other / "run.json").write_text(json.dumps(about | {"base": "0" * 16}))
    with pytest.raises(InputError, match="has other weights than the base"):
        export(other, "--gguf", "none", "--no-check", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_training_resolved_says_whether_the_base_had_4_bits(run: Path, tmp_path: Path) -> None:
    """config.yaml may hold null: yes on the GPU of training, no on a CPU that exports."""
    other = shutil.copytree(run, tmp_path / "other")
    (other / "config.yaml").write_text(Settings(model="tiny").as_yaml())
    (other / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"four_bit": True}))
    export(other, "--gguf", "none", "--no-check")
    assert json.loads((other / "export" / "export.json").read_text())["trained_in_4bit"] is True


def test_wrong_choices_are_refused_before_any_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"'q9' is not known: choose from f32"):
        export(run, "--gguf", "q9")
    monkeypatch.setattr(kquants, "find_spec", lambda name: None)
    monkeypatch.setattr(kquants.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sbtiny\[llama\]'"):
        export(run, "--gguf", "q4_k_m")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InputError, match="is no earlier export"):
        export(run, "-o", tmp_path / "mine")


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs llama-cpp-python")
@pytest.mark.parametrize("budget", ["auto", "30"])
def test_a_gguf_file_is_measured_as_the_run_it_came_from(run: Path, budget: str, tmp_path: Path) -> None:
    """The same questions, greedy and under a ceiling, get the same answers."""
    export(run, "--gguf", "f32", "--no-check", "-o", tmp_path / "out")
    changed = ["eval.temperature=0", "eval.max_tokens=60", f"eval.ceiling={40 if budget == '30' else 0}"]
    flags = ["--limit", "6", "--budget", budget, *(word for item in changed for word in ("--set", item))]
    for name, folder in (str(run), "trained"), (str(tmp_path / "out" / "r-f32.gguf"), "file"):
        app(["eval", name, "-o", str(tmp_path / folder), *flags], standalone_mode=False)
    trained, file = (json.loads((tmp_path / folder / "eval.json").read_text()) for folder in ("trained", "file"))
    assert trained.keys() == file.keys()
    assert {key: trained[key] for key in ("accuracy", "mean_tokens", "format_rate", "budget")} == {
        key: file[key] for key in ("accuracy", "mean_tokens", "format_rate", "budget")
    }
    assert (tmp_path / "trained" / "eval_samples.jsonl").read_text() == (tmp_path / "file" / "eval_samples.jsonl").read_text()
