"""ollama's Modelfile, the README beside the files, and the model card."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from sbtiny.cli.main import app
from sbtiny.export.modelfile import go_template
from sbtiny.models.load import load_tokenizer

PROMPT = "<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "out"
    changed = ["--set", "eval.temperature=0.7", "--set", "eval.top_p=0.9"]
    app(["export", str(run), "--gguf", "q8_0,f16", "--no-check", "-o", str(folder), *changed], standalone_mode=False)
    return folder


def test_a_modelfile_names_file_template_stops_and_the_sampling_of_evaluation(out: Path) -> None:
    text = (out / "Modelfile").read_text()
    first, rest = text.split("\n", 1)
    template, parameters = re.fullmatch(r'TEMPLATE """(.*)"""\n(.*)', rest, re.DOTALL).groups()
    assert first == "FROM ./r-q8_0.gguf"  # the first kind of --gguf
    assert (out / "r-q8_0.gguf").is_file()
    assert template == go_template(load_tokenizer(str(out / "merged")))
    assert parameters.splitlines() == [
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 0",
        "PARAMETER min_p 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 2048",
    ]


def test_the_template_says_in_go_what_the_models_own_says(out: Path) -> None:
    """ollama's template, rendered by hand for one question, with a system message and without."""
    text = go_template(load_tokenizer(str(out / "merged")))
    opening = r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}(\{\{ range .*)"
    system, bare, turns = re.fullmatch(opening, text, re.DOTALL).groups()
    assert system == "<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
    after = re.search(r"\{\{ if \$last \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", turns, re.DOTALL)
    assert f"{bare}...{after[1]}" == PROMPT
    assert after[2] == after[1]  # a question in the middle is followed by the same opening of an answer
    assert "{{ .Content }}{{ if not $last }}<|im_end|>\n<|im_start|>user\n{{ end }}" in turns


def test_the_readme_has_a_line_for_every_program(out: Path) -> None:
    lines = (out / "README.md").read_text().splitlines()
    sampled = "--jinja --temp 0.7 --top-k 0 --top-p 0.9 --min-p 0"
    for line in (
        "# r",
        *("    " + line for line in PROMPT.splitlines()),
        "    ollama create r -f Modelfile && ollama run r",
        f"    llama-cli -m r-q8_0.gguf {sampled}",
        f"    llama-server -m r-q8_0.gguf {sampled}",
        '    vllm serve merged            # "chat_template_kwargs": {"budget": 200} in the request gives a budget',
        "    python -m sglang.launch_server --model-path merged",
    ):
        assert line in lines
    raw = next(line for line in lines if "/api/generate" in line)
    body = json.loads(shlex.split(raw)[-1])
    assert body == {"model": "r", "raw": True, "prompt": PROMPT + "<budget>200</budget><solution>", "stream": False}


def test_the_commands_of_a_run_with_a_space_in_its_name_can_be_copied(run: Path, tmp_path: Path) -> None:
    spaced = shutil.copytree(run, tmp_path / "my run")
    app(["export", str(spaced), "--gguf", "q8_0", "--no-check"], standalone_mode=False)
    text = (spaced / "export" / "README.md").read_text()
    assert "    ollama create 'my run' -f Modelfile" in text
    assert text.count(" -m 'my run-q8_0.gguf' --jinja") == 2


def test_a_merged_folder_alone_has_no_line_for_programs_that_need_a_gguf(run: Path, tmp_path: Path) -> None:
    app(["export", str(run), "--gguf", "none", "--no-check", "-o", str(tmp_path / "out")], standalone_mode=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve merged" in text
    assert "ollama create" not in text
    assert "llama-server" not in text
    assert not (tmp_path / "out" / "Modelfile").exists()


def test_the_model_card_says_base_licence_and_how_it_was_merged(out: Path) -> None:
    card = (out / "merged" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [sbtiny, selfbudgeter]\n---\n# r\n")
    assert "Merged onto the dequantized base, saved in float16." in card
