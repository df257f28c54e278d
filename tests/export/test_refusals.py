"""A refused export gives one line and exit code 2 before any work, and writes nothing."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sbtiny.cli.main import main
from sbtiny.coldstart.build import build_data
from sbtiny.coldstart.run import run_sft
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.export.config import check_output
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.load import load_model


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, run: Path, *arguments: str) -> str:
    """The one line of a refused command, which must write nothing."""
    out = run.parent / "out"
    monkeypatch.setattr(sys, "argv", ["sbtiny", "export", str(run), "-o", str(out), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, len(lines)) == (2, 1), lines
    assert not list(run.parent.glob("*out*"))
    return lines[0]


def test_an_output_that_an_export_cannot_take_the_place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file is a file: give --output a folder"):
        check_output(tmp_path / "file")
    monkeypatch.chdir(tmp_path / "empty" / "inside")
    for folder in (Path(), Path.cwd(), Path.cwd().parent, Path("..")):
        with pytest.raises(InputError, match=f"cannot take the place of {folder} while you are in it: give --output a new folder"):
            check_output(folder)
    check_output(Path("export"))


def model_of(run: Path, base: Path) -> Path:
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"model": str(base)}))
    return run


@pytest.mark.parametrize(
    ("config", "gguf", "message"),
    [
        ({"model_type": "gpt2"}, "q8_0", "no GGUF for a 'gpt2' model: llama, qwen2, qwen3 work; use --gguf none"),
        ({"model_type": "mistral"}, "q8_0", "no GGUF for a 'mistral' model: llama, qwen2, qwen3 work; use --gguf none"),
        ({"model_type": "new"}, "none", "config.json: The checkpoint you are trying to load has model type `new`"),
        ("{", "q8_0", "config.json: It looks like the config file"),
    ],
)
def test_an_architecture_that_is_not_known(run: Path, tmp_path: Path, config: object, gguf: str, message: str, capsys, monkeypatch) -> None:
    """The base holds nothing but its config, so that any work would fail."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    other = model_of(shutil.copytree(run, tmp_path / "r"), tmp_path / "base")
    assert message in refused(capsys, monkeypatch, other, "--gguf", gguf)


def test_a_base_laid_out_otherwise(new_run, new_tokenizer, tmp_path: Path, capsys, monkeypatch) -> None:
    tokenizer, base = new_tokenizer(), tmp_path / "base"
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    run = new_run(tmp_path / "r", model=str(base))
    capsys.readouterr()  # of peft
    assert "has no model.embed_tokens.weight" in refused(capsys, monkeypatch, run, "--gguf", "none")


CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}%s{% endif %}"


@pytest.mark.parametrize(
    ("form", "template", "message"),
    [
        ("solution", CHAT.replace("%s", "Assistant:"), "merges a budget into its last token: end its generation prompt with a line break"),
        ("think", CHAT.replace("%s", "<|{{ messages|length }}|><think>\n"), "opens <think> in a generation prompt that is not the same"),
        ("solution", "{{ messages[0].content.text }}", "leaves out a question given as text"),
        ("solution", "{{ messages[0].content + 1 }}", "fails on a plain question (TypeError: "),
    ],
)
def test_a_chat_template_of_no_use_is_refused_before_training(form: str, template: str, message: str, tmp_path: Path) -> None:
    """An export would refuse it, hours later."""
    base, settings = shutil.copytree(BUNDLED, tmp_path / "base"), Settings(model=str(tmp_path / "base"), format=form, four_bit=False)
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=re.escape(message)):
        run_sft(settings, tmp_path / "sft")
    with pytest.raises(InputError, match=re.escape(message)):
        build_data(settings, tmp_path / "data.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("content", ["{}", "[]", "null", "{oops", '{"peft_type": "LORA", "r": 0, "lora_alpha": 8}', '{"peft_type": "IA3"}'])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_broken_adapter_config(run: Path, tmp_path: Path, content: str, more: list[str], capsys, monkeypatch) -> None:
    broken = shutil.copytree(run, tmp_path / "r")
    (broken / "adapter" / "adapter_config.json").write_text(content)
    message = refused(capsys, monkeypatch, broken, *more)
    assert "adapter_config.json is corrupt (" in message
    assert message.endswith("take one from a checkpoint-N of the run")


def test_a_broken_adapter_config_is_refused_by_all_loaders(run: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (broken / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="it describes no LoRA"):
        load_model("tiny", adapter=broken)
