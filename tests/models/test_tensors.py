"""Tensors that do not fit config.json give one line, before any weight is loaded."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sbtiny import runs
from sbtiny.cli.main import main
from sbtiny.coldstart.run import complete_settings, run_sft
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.export.merge import Merged
from sbtiny.models.aliases import BUNDLED, absolute_name, inherit_settings
from sbtiny.models.gguf import read_gguf
from sbtiny.models.load import load_model, read_base
from sbtiny.models.tensors import INDEX, SINGLE, ModelFolder, read_header
from sbtiny.pipeline import demo
from sbtiny.rollout.load_policy import base_info, load_policy

Tensors = dict[str, torch.Tensor]
WEIGHTS = load_file(BUNDLED / SINGLE)
TABLE, Q, HEAD = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"


def changed(folder: Path, weights: Tensors | None = None, **config: object) -> Path:
    """The bundled model with other weights, or another config.json."""
    shutil.copytree(BUNDLED, folder)
    if weights:
        save_file({name: weight.clone() for name, weight in weights.items()}, folder / SINGLE, {"format": "pt"})
    about = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def in_parts(folder: Path, weights: Tensors) -> Path:
    """The weights in two files with an index, beside the files that are there."""
    where = {name: f"model-0000{1 + 2 * i // len(weights)}-of-00002.safetensors" for i, name in enumerate(weights)}
    for part in set(where.values()):
        save_file({name: weight for name, weight in weights.items() if where[name] == part}, folder / part, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(name): weight for name, weight in WEIGHTS.items()}


def beyond(rows: int) -> torch.Tensor:
    """The embedding with other values from a row on."""
    table = WEIGHTS[TABLE].clone()
    table[rows:] += 0.1
    return table


NAN = WEIGHTS[Q].clone()
NAN[3, 3] = float("nan")
LAYER_GONE = "model.layers.3.self_attn.q_proj.weight and 8 more are missing: the files have 3 layers, config.json says 4"


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        ({name: w for name, w in WEIGHTS.items() if ".layers.3." not in name}, {}, LAYER_GONE),
        ({name: w for name, w in WEIGHTS.items() if name != Q}, {}, f"{Q} is missing; download the model again"),
        (renamed("module.{}".format), {}, f"module.{TABLE} is {TABLE} with 'module.' of DataParallel in its name; unwrap"),
        (renamed("_orig_mod.{}".format), {}, "with '_orig_mod.' of torch.compile in its name"),
        (renamed(lambda name: "base_model.model." + name.replace("_proj.", "_proj.base_layer.")), {}, "of peft in its name"),
        (renamed("model.{}".format), {}, f"model.{TABLE} is {TABLE} with 'model.' in front"),
        (renamed(lambda name: name.removeprefix("model.")), {}, f"embed_tokens.weight is {TABLE} without 'model.'; save it as AutoModel"),
        (None, {"num_hidden_layers": 3}, "not the model's: the files have 4 layers, config.json says 3 (num_hidden_layers)"),
        (None, {"num_hidden_layers": 5}, "the files have 4 layers, config.json says 5"),
        (None, {"vocab_size": 1600}, f"{TABLE} is 1509 x 128 in the file and 1600 x 128 by config.json; the vocabulary was resized"),
        (None, {"intermediate_size": 256}, "gate_proj.weight is 512 x 128 in the file and 256 x 128 by config.json; take the config.json"),
        (None, {"model_type": "qwen2"}, "self_attn.q_proj.bias and 11 more are missing"),
        (WEIGHTS | {Q.replace("weight", "bias"): torch.zeros(128)}, {}, "q_proj.bias is no part of the model that config.json describes"),
        (WEIGHTS | {"v_head.summary.weight": torch.zeros(1, 128)}, {}, "v_head.summary.weight is no part of the model"),
        (WEIGHTS | {Q.replace("weight", "lora_A.weight"): torch.zeros(4, 128)}, {}, "lora_A.weight is part of an adapter; merge it"),
        (None, {"tie_word_embeddings": False}, f"{HEAD} is missing, and config.json does not tie it to the embedding"),
        (WEIGHTS | {HEAD: beyond(0)}, {}, f"{HEAD} has other values than {TABLE}, to which config.json ties it"),
        (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised already (gptq, config.json says); give the 16-bit"),
        (WEIGHTS | {Q: WEIGHTS[Q].to(torch.int8)}, {}, f"quantised already ({Q} is stored as I8)"),
        (WEIGHTS | {Q: WEIGHTS[Q].to(torch.float8_e4m3fn)}, {}, f"quantised already ({Q} is stored as F8_E4M3)"),
        (None, {"transformers_weights": "other.safetensors"}, "config.json has its weights in other.safetensors"),
        (None, {"hidden_act": "nonsense"}, "config.json: 'nonsense'"),
        (None, {"num_hidden_layers": "four"}, "config.json: Validation error for field 'num_hidden_layers'"),
    ],
)
def test_headers_say_that_it_is_another_model(weights: Tensors | None, config: dict, message: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", weights, **config)
    with pytest.raises(InputError) as error:
        read_base(str(folder))
    line = str(error.value)
    assert line.startswith(f"cannot load {folder}: ")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (WEIGHTS | {HEAD: beyond(700)}, {}, f"{HEAD} has other values than"),
        (WEIGHTS | {Q: NAN}, {}, f"{Q} is not finite in torch.float32"),
        ({name: w for name, w in WEIGHTS.items() if ".layers.3." not in name}, {"model_type": "mistral"}, LAYER_GONE),
        (None, {"model_type": "mistral", "intermediate_size": 256}, "is 128 x 512 in the file and 128 x 256 by config.json"),
        (None, {"model_type": "gpt_neox"}, "gpt_neox.embed_in.weight and"),
    ],
)
def test_loading_says_what_headers_cannot(weights: Tensors | None, config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_model(str(changed(tmp_path / "m", weights, **config)))
    assert message in str(error.value)


def test_a_weight_that_is_not_finite_is_found_in_4_bits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"q_proj\.weight is not finite"):
        load_model(str(changed(tmp_path / "m", WEIGHTS | {Q: NAN})), four_bit=True)


def cut(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cannot read model-00002-of-00002.safetensors: .*not fully covered"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "cannot read model-00002-of-00002.safetensors"),
        (lambda folder: (folder / INDEX).unlink(), f"holds parts and no {INDEX}"),
        (lambda folder: save_file(WEIGHTS, folder / "model-00002-of-00002.safetensors"), f"{TABLE} is in model-00001-of"),
        (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX} is corrupt"),
    ],
)
def test_parts_that_are_no_whole(harm: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = in_parts(changed(tmp_path / "m"), WEIGHTS)
    (folder / SINGLE).unlink()
    assert read_base(str(folder)).fingerprint() == read_base("tiny").fingerprint()
    harm(folder)
    with pytest.raises(InputError, match=message):
        read_base(str(folder))


def test_weights_that_no_export_could_read_are_not_trained_on(tmp_path: Path) -> None:
    folder = changed(tmp_path / "m")
    (folder / SINGLE).unlink()
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"it holds no model\.safetensors; save the model with save_pretrained"):
        read_base(str(folder))


def test_a_single_file_is_read_before_parts_by_load_and_export_alike(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = {name: weight + 1 for name, weight in WEIGHTS.items()}
    folder = in_parts(changed(tmp_path / "m"), other)
    model, _ = load_model(str(folder), dtype="float32")
    assert "model.safetensors is read, the others are not" in capsys.readouterr().err
    merged = Merged(folder, None, tied=True)
    for name in WEIGHTS:
        assert torch.equal(merged[name], WEIGHTS[name])
        assert torch.equal(model.get_parameter(name).detach().cpu(), WEIGHTS[name])


def test_harmless_oddities_load_and_are_the_same_base(tmp_path: Path) -> None:
    """A head that is the embedding, tables that every reader computes, a wider dtype."""
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
    wide = {name: weight.double() for name, weight in WEIGHTS.items()}
    for i, weights in enumerate((WEIGHTS | {HEAD: beyond(1509)}, WEIGHTS | inv_freq, wide)):
        folder = changed(tmp_path / str(i), weights)
        assert load_model(str(folder))[0].base_fingerprint == read_base("tiny").fingerprint()
        assert set(Merged(folder, None, tied=True).tensors) == set(WEIGHTS)


def test_a_gguf_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("sbtiny.export.gguf")
    from sbtiny.export.gguf_tokenizer import read_vocabulary
    from sbtiny.models.load import load_tokenizer

    merged, config, tokenizer = Merged(BUNDLED, None, tied=True), read_base("tiny").config, load_tokenizer("tiny")
    del merged.tensors[Q]
    vocabulary = read_vocabulary(tokenizer, merged.tensors[TABLE].shape[0])
    list(gguf.write_gguf(tmp_path / "m.gguf", "f16", merged, config, tokenizer, vocabulary, [2], "m"))
    with pytest.raises(InputError, match=r"cannot load .*m\.gguf: .*q_proj.weight is missing"):
        read_gguf(tmp_path / "m.gguf")


# ---- a folder with an adapter in it; the base a run stands on --------------------------------------------------------


def sbtiny(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of a refused command."""
    monkeypatch.setattr(sys, "argv", ["sbtiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a copy of the bundled model, beside it."""
    here = tmp_path_factory.mktemp("stands")
    settings = Settings(model=absolute_name(str(changed(here / "base"))), four_bit=False)
    policy = load_policy(settings.model, settings, 2, trainable=True)
    run = runs.create_run("sft", here / "run", settings, **base_info(policy))
    policy.model.save_pretrained(run / "adapter")
    return here


def test_training_a_broken_model_is_refused_before_a_run_is_made(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = changed(tmp_path / "m", tie_word_embeddings=False)
    message = sbtiny(monkeypatch, capsys, "sft", "-m", str(folder), "-o", str(tmp_path / "run"), "--limit", "2", "--preset", "cpu")
    assert message.startswith(f"error: cannot load {folder}: {HEAD} is missing")
    assert not (tmp_path / "run").exists()
    (tmp_path / "demo" / "base").mkdir(parents=True)
    (tmp_path / "demo" / "base" / "eval.json").write_text("{}")
    with pytest.raises(InputError, match="is missing"):
        demo.run_demo(Settings(model=str(folder)), tmp_path / "demo")
    assert [path.name for path in tmp_path.glob("demo*")] == ["demo"]


def test_a_model_with_an_adapter_inside_is_refused_everywhere(made: Path, tmp_path: Path) -> None:
    here = shutil.copytree(made, tmp_path / "here")
    shutil.copytree(here / "run" / "adapter", here / "base", dirs_exist_ok=True)
    about = json.loads((here / "run" / "run.json").read_text()) | {"model": str(here / "base")}
    (here / "run" / "run.json").write_text(json.dumps(about))
    message = rf"cannot load {here / 'base'}: it holds an adapter beside the model \(adapter_config.json\); move"
    for name in ("base", "run"):
        with pytest.raises(InputError, match=message):
            load_policy(str(here / name), Settings(four_bit=False), 2)


def test_run_json_has_the_whole_path_and_a_fingerprint_that_no_dtype_changes(made: Path, tmp_path: Path, monkeypatch) -> None:
    about = runs.read_run(made / "run")
    monkeypatch.chdir(made)
    for model in ("base", "./base", str(made / "base")):
        assert about["model"] == absolute_name(model) == str(made / "base")
    assert absolute_name("tiny") == "tiny"
    assert absolute_name("owner/name") == "owner/name"
    for dtype in ("float32", "float16", "bfloat16"):
        for four_bit in (False, True):
            assert load_model("base", dtype=dtype, four_bit=four_bit)[0].base_fingerprint == about["base"]
    monkeypatch.chdir(tmp_path)
    assert base_info(load_policy(str(made / "run"), Settings(), 2))["base"] == about["base"]


@pytest.mark.parametrize("name", [TABLE, Q, "model.norm.weight", "model.layers.3.mlp.down_proj.weight"])
def test_a_fingerprint_is_of_every_tensor(name: str, tmp_path: Path) -> None:
    other = WEIGHTS | {name: WEIGHTS[name] * 1.01}
    assert read_base(str(changed(tmp_path / "m", other))).fingerprint() != read_base("tiny").fingerprint()


@pytest.mark.parametrize("verb", [("eval",), ("grpo", "--run"), ("export",)])
def test_another_base_under_the_name_is_refused_wherever_a_run_is_opened(
    verb: tuple, made: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    run = shutil.copytree(made / "run", tmp_path / "run")
    other = changed(tmp_path / "other", WEIGHTS | {Q: WEIGHTS[Q] * 1.01})
    (run / "run.json").write_text(json.dumps(runs.read_run(run) | {"model": str(other)}))
    monkeypatch.chdir(tmp_path)
    message = sbtiny(monkeypatch, capsys, *verb, str(run))
    assert f"{other} (fingerprint {read_base(str(other)).fingerprint()}) has other weights than the base {run} was trained on" in message
    assert runs.read_run(run)["base"] in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]
    (run / "run.json").write_text(json.dumps({k: v for k, v in runs.read_run(run).items() if k != "base"}))
    load_policy(str(run), Settings(four_bit=False), 2)  # an absent one is not compared


def test_a_base_that_is_gone_is_named_with_its_path(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made / "run", tmp_path / "run")
    (run / "run.json").write_text(json.dumps(runs.read_run(run) | {"model": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=rf"unknown model '{tmp_path / 'gone'}': there is no such folder; check the path"):
        load_policy(str(run), Settings(), 2)


@pytest.mark.parametrize("verb", [("eval",), ("chat",), ("grpo", "--run"), ("sft", "--run"), ("export",)])
def test_where_the_base_of_a_run_is_may_be_said(verb: tuple, made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run, other = shutil.copytree(made / "run", tmp_path / "run"), changed(tmp_path / "other", WEIGHTS | {Q: WEIGHTS[Q] * 1.01})
    (run / "run.json").write_text(json.dumps(runs.read_run(run) | {"model": "gone.gguf"}))
    monkeypatch.chdir(tmp_path)
    lost = "no file gone.gguf: check the path; or say with --base where the model of run is"
    assert lost in sbtiny(monkeypatch, capsys, *verb, "run")
    message = sbtiny(monkeypatch, capsys, *verb, "run", "--base", "other", *(("What is 3 + 4?",) if verb == ("chat",) else ()))
    assert re.search(r"other \(fingerprint \w+\) has other weights than the base run was trained on", message)
    found = load_policy("run", Settings(base=str(made / "base"), four_bit=False), 2)
    assert base_info(found)["base"] == runs.read_run(run)["base"]
    for settings in (inherit_settings(Settings(base="other"), run), complete_settings(Settings(base="other"), None, run)):
        assert settings.model == settings.base == str(other)
    with pytest.raises(InputError, match="base says where the model of a run is, and tiny is no run: leave it out"):
        load_policy("tiny", Settings(base="other"), 2)


def test_a_run_goes_on_only_on_the_base_it_began_with(made: Path, tmp_path: Path, monkeypatch) -> None:
    here = shutil.copytree(made, tmp_path / "here")
    shutil.rmtree(here / "run" / "adapter")
    save_file(WEIGHTS | {Q: WEIGHTS[Q] * 1.01}, here / "base" / SINGLE, {"format": "pt"})
    settings = Settings(model=str(here / "base"), four_bit=False)
    (here / "run" / "config.yaml").write_text(settings.as_yaml())
    with pytest.raises(InputError, match="has other weights than the base"):
        run_sft(settings, here / "run", resume=True)


def test_reading_is_quick_and_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    base = read_base("tiny")
    assert isinstance(base, ModelFolder)
    assert (base.parameters, len(base.tensors)) == (1_177_344, 38)


def test_a_scalar_has_a_fingerprint_too(tmp_path: Path) -> None:
    found = set()
    for i, value in enumerate((0.5, 0.5, 0.6)):
        save_file({"scale": torch.tensor(value), "none": torch.zeros(0, 4)}, tmp_path / f"{i}.safetensors")
        found.add(ModelFolder(tmp_path, None, read_header(tmp_path / f"{i}.safetensors"), 1, {}).fingerprint())
    assert len(found) == 2
