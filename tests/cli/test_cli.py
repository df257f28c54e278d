"""The command line: what is wrong is told in one line before anything is done, what is right leaves JSON alone on stdout."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import full_disk, listing

import sbtiny
from sbtiny import runs
from sbtiny.cli import main as cli
from sbtiny.cli.data import data_app
from sbtiny.config import EvalSettings, Settings
from sbtiny.errors import Failed, InputError
from sbtiny.load_settings import PRESETS, load_settings
from sbtiny.models.aliases import ALIASES
from sbtiny.models.device import CARDS

HEAVY = ("torch", "peft", "transformers", "trl", "datasets", "numpy", "matplotlib", "sympy")
VERBS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
DATA_VERBS = [f"data {command.name}" for command in data_app.registered_commands]


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


Sbtiny = Callable[[str], Result]


@pytest.fixture
def sbtiny_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sbtiny:
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["sbtiny", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Result(stop.value.code, *capsys.readouterr())

    return call


def rows(count: int = 12) -> str:
    """Answers written elsewhere, as `data build --traces` takes them."""
    lines = [
        {
            "question": f"Tom has {n} coins.\na) finds 4\nHow many coins?",
            "answer": n + 4,
            "response": f"\\boxed{{{n + 4}}}",
        }
        for n in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


FILES = {
    "good.jsonl": '{"question": "1 + 1?", "answer": "2"}\n',
    "broken.jsonl": '{"question": "1 + 1?", "answer": "2"}\n{"question": \n',
    "half.jsonl": '{"question": "1 + 1?", "answer": "2"}\n\n{"question": "2 + 2?"}\n',
    "empty.jsonl": "",
    "traces.jsonl": rows(),
    "labelled.jsonl": '{"id": "a", "question": "1 + 1?", "response": "2", "budget": 1}\n',
    "unknown.yaml": "grpo: {learning_rat: 1}\n",
    "broken.yaml": "grpo: [1\n",
    "check.py": "def check(response):\n    return True\n",
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The files that the wrong commands below are about, and a finished run; returns the listing of it all."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    for name in ("done", "stopped"):
        runs.create_run("sft", tmp_path / name, Settings())
    (tmp_path / "done" / "adapter").mkdir()
    (tmp_path / "stopped" / "checkpoint-5").mkdir()
    return listing(tmp_path)


# ---- wrong input -----------------------------------------------------------------------------------------------------

WRONG = {
    # the command line itself
    "nosuch": "No such command 'nosuch'",
    "sft --nosuch": "sft --help",
    "sft --steps": "requires an argument",
    "sft --steps many": "'--steps'",
    "sft --steps 0": "'--steps'",
    "eval": "Missing argument 'RUN|MODEL'",
    "data show": "sbtiny data show --help",
    "reward traces.jsonl --alpha x": "'--alpha'",
    "data build out --task gsm8k --traces traces.jsonl": "exclude each other",
    "data build out --task gsm8k --questions good.jsonl": "exclude each other",
    "data build out.csv": "call it out.jsonl",
    "data build out.jsonl.gz": "call it out.jsonl",
    "demo --set eval.task=good.jsonl": "a demo calibrates on the val split of a named task, and a file has none",
    "reward ~nobody-has-this-name/x.jsonl": "no file ~nobody-has-this-name/x.jsonl",
    f"reward {'x' * 300}.jsonl": "File name too long",
    "grpo --set grpo.outside_slope=0.2 --dry-run": "use a smaller penalty or slope",
    # models
    "sft --model nosuch -o out": "unknown model 'nosuch'",
    "sft --model qwen-1.5 -o out": "did you mean 'qwen-1.5b'?",
    "sft --model none.gguf -o out": "no file none.gguf",
    "sft --model . -o out": "holds no config.json",
    "sft --model nosuch --dry-run": "unknown model 'nosuch'",
    "data build out.jsonl -m nosuch": "unknown model 'nosuch'",
    "eval nosuch": "unknown model 'nosuch'",
    "eval runs/nosuch/deeper": "unknown model 'runs/nosuch/deeper': there is no such folder; check the path",
    "eval runs/nosuch": "unknown model 'runs/nosuch': there is no such folder; check the path",
    "demo --set model=nosuch": "unknown model 'nosuch'",
    f"sft --model {'x' * 300} -o out": "no file has so long a name as xxx",
    f"eval tiny --task {'x' * 300}": "no file has so long a name as xxx",
    # settings
    "sft -c none.yaml -o out": "no settings file none.yaml",
    "sft -c broken.yaml -o out": "broken.yaml, line 2",
    "sft -c unknown.yaml -o out": "unknown key 'grpo.learning_rat' in unknown.yaml (did you mean 'grpo.learning_rate'?)",
    "sft --set grpo.learning_rat=1 -o out": "did you mean 'grpo.learning_rate'?",
    "sft --set grpo.learning_rate -o out": "--set grpo.learning_rate=3e-4",
    "sft --set sft.learning_rate=fast -o out": "sft.learning_rate in the command line is 'fast'",
    "sft --preset t5 -o out": "choose from cpu, t4, rtx4090",
    "sft --limit 0 -o out": "data.limit is 0",
    "sft --data rows.jsonl --limit 4 -o out": "--limit is for rows that are sampled, and rows.jsonl is trained on whole",
    "sft --data rows.jsonl --max-tokens 40 -o out": "--max-tokens is for rows that are sampled",
    "sft --model tiny --base tiny -o out": "--base says where the model of --run is",
    "sft --seed -1 -o out": "seed is -1",
    "sft --set upstream=http://there -o out": "upstream is for serve, chat, eval and calibrate",
    "data build out.jsonl --set upstream=http://there": "upstream is for serve, chat, eval and calibrate",
    "grpo --preset t5 --dry-run": "unknown preset 't5'",
    "eval tiny --limit -1": "eval.limit is -1",
    "eval tiny --engine theirs": "engine in the command line is 'theirs': choose from ours, generate, vllm",
    "eval tiny --kv-memory 0": "kv_cache_gib is 0.0: set it to a number of GiB above 0",
    "eval tiny --budget lots": "--budget 'lots' is not understood",
    "eval tiny --budget 0": "--budget '0'",
    "eval tiny --budget -0.5x": "--budget '-0.5x'",
    "demo --set eval.budget=lots": "--budget 'lots'",
    # files of questions and rows
    "data build out.jsonl --questions none.jsonl": "no file none.jsonl",
    "data build out.jsonl --questions broken.jsonl": "broken.jsonl, line 2",
    "data build out.jsonl --questions half.jsonl": "half.jsonl, line 3 has no 'answer'",
    "data build out.jsonl --questions empty.jsonl": "empty.jsonl is empty",
    "data build out.jsonl --task arithmetik": "did you mean 'arithmetic'?",
    "data build out.jsonl --traces none.jsonl": "no file none.jsonl",
    "data build out.jsonl --traces broken.jsonl": "broken.jsonl, line 2",
    "data build out.jsonl --traces good.jsonl": "has no 'response'",
    "data build out.jsonl --set data.verifier=nosuch": "unknown verifier 'nosuch'",
    "data build out.jsonl --verifier check.py": "must take (question, completion), or (response, question, answer)",
    "sft --data none.jsonl -o out": "no file none.jsonl",
    "sft --data broken.jsonl -o out": "broken.jsonl, line 2",
    "sft --set data.task=half.jsonl -o out": "half.jsonl, line 3",
    "sft --set data.verifier=nosuch -o out": "unknown verifier 'nosuch'",
    "grpo --run done --data none.jsonl -o out": "no file none.jsonl",
    "grpo --run done --data half.jsonl -o out": "half.jsonl, line 3",
    "grpo --run done --set grpo.verifier=nosuch -o out": "unknown verifier",
    "eval tiny --task none.jsonl": "no file none.jsonl",
    "eval tiny --task half.jsonl": "half.jsonl, line 3",
    "eval tiny --set eval.verifier=nosuch": "unknown verifier",
    "demo --set grpo.task=half.jsonl": "half.jsonl, line 3",
    "data show none.jsonl": "no file none.jsonl",
    "data show good.jsonl": "has no 'id'",
    "data show labelled.jsonl --row 2": "labelled.jsonl has no row 2: give --row 1 to 1",
    "data show labelled.jsonl --row 0": "'--row'",
    "data show labelled.jsonl -m nosuch": "unknown model 'nosuch'",
    "reward none.jsonl": "no file none.jsonl",
    "reward broken.jsonl": "broken.jsonl, line 2",
    "reward good.jsonl": "has no 'budget'",
    # runs
    "grpo -o out": "run `sbtiny sft` first",
    "grpo --run nosuch -o out": "no run 'nosuch'",
    "grpo --run nosuch --dry-run": "no run 'nosuch'",
    "report nosuch": "no run 'nosuch'",
    "sft --resume": "--resume needs --output",
    "sft --resume -o nosuch": "--resume needs --output",
    "grpo --resume -o nosuch": "--resume needs --output",
    # where to write
    "sft -o done": "already holds a finished run",
    "sft -o runs/tiny": "tiny is the name of a model, so runs/tiny cannot be found by its name: name the run otherwise",
    "grpo --run done -o runs/qwen-1.5b": "qwen-1.5b is the name of a model",
    "demo -o runs/tiny": "tiny is the name of a model",
    "sft -o stopped": "go on with --resume",
    "grpo --run done -o done": "already holds a finished run",
    "sft -o good.jsonl/out": "cannot write good.jsonl/out",
    "sft -o good.jsonl": "cannot write good.jsonl",
    "sft -o /proc/sbtiny": "cannot write /proc/sbtiny",
    "grpo --run done -o /proc/sbtiny": "cannot write /proc/sbtiny",
    "eval tiny -o /proc/sbtiny": "cannot write /proc/sbtiny",
    "demo -o /proc/sbtiny": "cannot write /proc/sbtiny",
    "demo -o good.jsonl": "cannot write good.jsonl",
    "data build good.jsonl/out.jsonl": "cannot write good.jsonl/out.jsonl",
    "data build /proc/out.jsonl": "cannot write /proc/out.jsonl",
    "data build done": "it is a folder",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_told_in_one_line_and_nothing_is_left_behind(
    line: str, sbtiny_: Sbtiny, files: dict[str, bytes], tmp_path: Path
) -> None:
    found = sbtiny_(line)
    assert (found.code, found.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", found.err)
    assert WRONG[line] in found.err
    assert listing(tmp_path) == files
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


def test_wrong_input_is_found_before_torch_is_imported(files: dict[str, bytes], tmp_path: Path) -> None:
    lines = [*WRONG, "--help", "sft --dry-run", "grpo --dry-run", "models", "--version", "nosuch --debug"]
    script = f"""
import shlex, sys
from sbtiny.cli import main as cli
for line in {lines!r}:
    sys.argv = ["sbtiny", *shlex.split(line)]
    try:
        cli.main()
    except BaseException:
        pass
    if found := [name for name in {HEAVY!r} if name in sys.modules]:
        sys.exit(f"{{line}} imported {{found}}")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


@pytest.mark.parametrize("line", ["sft -o out", "data build out.jsonl --limit 2", "eval tiny --limit 2 -o out"])
def test_a_cache_without_room_for_one_answer_is_told_in_one_line_and_nothing_is_left_behind(
    line: str, sbtiny_: Sbtiny, files: dict[str, bytes], tmp_path: Path
) -> None:
    found = sbtiny_(f"{line} --kv-memory 0.000001")
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert found.err.startswith("error: no room for an answer")
    assert found.err.endswith("lower max_tokens, or raise --kv-memory\n")
    assert listing(tmp_path) == files


@pytest.mark.parametrize("line", ["sft -o out", "grpo --run done -o out", "data build out.jsonl", "eval tiny -o out"])
def test_an_engine_that_is_not_there_is_told_in_one_line(
    line: str, sbtiny_: Sbtiny, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbtiny.rollout.engines.vllm.find_spec", lambda name: None)
    found = sbtiny_(f"{line} --engine vllm")
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert "vllm is not installed: pip install vllm (on a CPU: make vllm-env), or use --engine ours or generate" in found.err
    assert listing(tmp_path) == files


@pytest.mark.parametrize("line", ["sft -o out", "grpo --run done -o out"])
def test_a_reporter_that_is_not_there_is_told_in_one_line_before_any_work(
    line: str, sbtiny_: Sbtiny, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbtiny.training.arguments.find_spec", lambda name: None)
    found = sbtiny_(f"{line} --report-to trackio")
    assert (found.code, found.out) == (2, "")
    assert found.err == "error: report_to is trackio, which is not installed: pip install trackio, or leave it at none\n"
    assert listing(tmp_path) == files


def test_bare_commands_show_their_help(sbtiny_: Sbtiny) -> None:
    for line, word in (("", "grpo"), ("data", "build")):
        found = sbtiny_(line)
        assert (found.code, found.err) == (2, "")
        assert "Usage: sbtiny" in found.out
        assert word in found.out


# ---- help, version, dry runs -----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_starts_in_a_blink(tmp_path: Path) -> None:
    before = os.times()
    command = [sys.executable, "-X", "importtime", "-m", "sbtiny", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    after = os.times()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "Usage: sbtiny" in done.stdout
    assert {"sbtiny", "typer"} <= imported
    assert not imported & set(HEAVY)
    assert after.children_user - before.children_user < 1.5  # seconds of CPU; 0.2 on a free machine, torch alone takes 3


@pytest.mark.parametrize("verb", [*VERBS, *DATA_VERBS])
def test_every_verb_has_help_with_an_example(verb: str, sbtiny_: Sbtiny) -> None:
    found = sbtiny_(f"{verb} --help")
    assert (found.code, found.err) == (0, "")
    assert f"sbtiny {verb} [OPTIONS]" in " ".join(found.out.split())
    assert verb == "models" or f"sbtiny {verb}" in found.out.partition("Example:")[2]


def test_the_version(sbtiny_: Sbtiny) -> None:
    assert sbtiny_("--version") == Result(0, f"sbtiny {sbtiny.__version__}\n", "")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run went online")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
def test_a_dry_run_prints_the_resolved_settings_and_makes_nothing(sbtiny_: Sbtiny, tmp_path: Path) -> None:
    found = sbtiny_("sft --model qwen-1.5b --dry-run")
    assert (found.code, found.err) == (0, "")
    assert "ref: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in found.out
    assert f"learning_rate: {Settings().sft.learning_rate}" in found.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_a_dry_run_of_the_demo_shows_the_settings_of_every_stage(sbtiny_: Sbtiny, tmp_path: Path) -> None:
    shown = json.loads(sbtiny_("demo --set grpo.steps=7 --dry-run --json").out)
    assert shown.keys() >= {"data", "sft", "grpo", "eval", "plan"}
    assert (shown["grpo"]["steps"], shown["plan"]["stage"]) == (7, "grpo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("line", "model", "preset"), [
    ("sft", "qwen-1.5b", "t4"),
    ("sft --model smollm2-135m", "smollm2-135m", "t4"),
    ("sft --model tiny", "tiny", "cpu"),
    ("sft --set model=tiny", "tiny", "cpu"),
    ("sft -c mine.yaml --model smollm2-135m", "smollm2-135m", "t4"),
    ("sft --preset rtx4090", "qwen-1.5b", "rtx4090"),
    ("grpo --run small", "smollm2-135m", "t4"),
    ("grpo --run bundled", "tiny", "cpu"),
])  # fmt: skip
def test_where_there_is_a_gpu_its_preset_is_the_default_but_for_the_bundled_model(
    line: str, model: str, preset: str, sbtiny_: Sbtiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, of in (("small", "smollm2-135m"), ("bundled", "tiny")):
        runs.create_run("sft", tmp_path / "runs" / name, Settings(model=of))
    (tmp_path / "mine.yaml").write_text("data: {verifier: exact}")
    monkeypatch.setattr("sbtiny.models.device.probe_device", lambda: CARDS["t4"])
    found = sbtiny_(f"{line} --json --dry-run")
    shown, verb = json.loads(found.out), line.split()[0]
    assert (found.code, shown["model"]) == (0, model)
    assert shown["four_bit"] is (None if model != "tiny" else False)
    assert shown["plan"]["four_bit"] is (model != "tiny")
    assert shown[verb]["learning_rate"] == getattr(load_settings(preset=preset), verb).learning_rate
    assert found.err == ""


@pytest.mark.parametrize("line", ["sft", "sft --set model=tiny", "sft -c mine.yaml"])
def test_on_a_cpu_the_bundled_model_has_the_same_settings(line: str, sbtiny_: Sbtiny, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {verifier: exact}")
    shown = json.loads(sbtiny_(f"{line} --json --dry-run").out)
    assert shown["sft"]["epochs"] == load_settings(preset=None if "-c" in line else "cpu").sft.epochs


def test_whose_settings_they_are_is_told_when_the_work_begins(sbtiny_: Sbtiny, ending, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(lambda: Path("runs/mine"))
    assert sbtiny_("sft").err == ""
    assert sbtiny_("sft --model smollm2-135m").err.startswith("no --preset given: these settings suit the bundled model")
    assert sbtiny_("sft --model smollm2-135m --preset t4").err == ""
    monkeypatch.setattr("sbtiny.models.device.probe_device", lambda: CARDS["t4"])
    assert sbtiny_("sft").err == "using preset t4 for Tesla T4 (--preset cpu: the bundled model's settings)\n"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("preset", [*PRESETS, "auto"])
@pytest.mark.parametrize("alias", [alias.name for alias in ALIASES])
@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_a_dry_run_shows_the_plan_of_every_alias_with_every_preset(verb: str, alias: str, preset: str, sbtiny_: Sbtiny) -> None:
    found = sbtiny_(f"{verb} --set model={alias} --preset {preset} --json --dry-run")
    shown = json.loads(found.out)["plan"]
    assert (found.code, found.err) == (0, "")
    everything = json.loads(sbtiny_(f"plan --model {alias} --preset {preset} --json").out)["stages"][verb]
    by_memory = preset == "auto"  # its micro-batch goes by what is free now
    same = {"stage", "device", "dtype", "slots"} if by_memory else shown.keys() - {"free_gb"}
    assert {key: shown[key] for key in same} == {key: everything[key] for key in same}


@pytest.mark.usefixtures("offline")
def test_the_plan_is_a_table_of_the_stages(sbtiny_: Sbtiny) -> None:
    found = sbtiny_("plan --model qwen-1.5b --preset t4")
    assert (found.code, found.err) == (0, "")
    assert "Tesla T4 (not this machine), float16, 4-bit" in " ".join(found.out.split())
    for word in ("kv slots", "lora and adam", "activations", "peak", "largest micro batch", "tokens trained, at most"):
        assert word in found.out


def test_a_model_whose_shape_only_its_weights_tell_has_no_plan(sbtiny_: Sbtiny) -> None:
    shown = json.loads(sbtiny_("sft --model org/model --dry-run --json").out)
    assert "shape of org/model is not known" in shown["plan"]["unknown"]
    assert (shown["plan"]["gradient_accumulation"], shown["plan"]["tokens_at_most"]["sampled"]) == (1, 1200 * 4 * 900)
    assert sbtiny_("plan --model org/model").code == 2


def test_the_probe_adds_hours_to_the_plan(sbtiny_: Sbtiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbtiny.planning import probe

    monkeypatch.setattr(probe, "SECONDS", 0.01)
    monkeypatch.setattr(probe.benchmark_device, "__defaults__", (0.01,))
    stages = json.loads(sbtiny_("plan --probe --json").out)["stages"]
    assert stages["grpo"]["hours_at_least"] > stages["eval"]["hours_at_least"] >= 0


def test_a_probe_of_this_machine_is_not_told_as_the_hours_of_another(sbtiny_: Sbtiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbtiny.models import device

    monkeypatch.setattr(device, "query_nvidia_smi", lambda: ("", ""))
    found = sbtiny_("plan --preset rtx4090 --probe")
    assert (found.code, found.out) == (2, "")
    assert found.err.endswith("and the plan is for RTX 4090: leave --probe out, or run it there\n")


def test_auto_looks_at_the_machine_alone(sbtiny_: Sbtiny) -> None:
    found = sbtiny_("sft --model org/model --preset auto --dry-run --json")
    assert found.code == 0
    assert found.err.startswith("--preset auto keeps the preset's micro-batch: the shape of org/model is not known")
    assert json.loads(found.out)["model"] == "org/model"
    assert sbtiny_("sft --model nosuch --preset auto --dry-run").code == 2


def test_the_doctor_is_well_and_says_so_to_machines_too(sbtiny_: Sbtiny) -> None:
    found = sbtiny_("doctor --json")
    said = json.loads(found.out)
    assert (found.code, found.err, said["ok"]) == (0, "", True)
    assert said["versions"]["torch"]["state"] in ("ok", "note")
    assert "preset" in said["device"]
    assert "torch" in sbtiny_("doctor").out


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_a_dry_run_shows_what_a_preset_comes_to(verb: str, preset: str, sbtiny_: Sbtiny) -> None:
    found = sbtiny_(f"{verb} --preset {preset} --steps 7 --set {verb}.learning_rate=3e-4 --json --dry-run")
    shown, settings = json.loads(found.out), load_settings(preset=preset)
    assert (found.code, found.err) == (0, "")
    assert (shown["model"], shown["four_bit"]) == (settings.model, settings.four_bit)
    assert (shown[verb]["steps"], shown[verb]["learning_rate"]) == (7, 3e-4)
    rows = settings.sft.batch if verb == "sft" else settings.grpo.prompts_per_step * settings.grpo.num_generations
    assert shown["plan"]["micro_batch"] * shown["plan"]["gradient_accumulation"] == rows
    assert shown["plan"]["tokens_at_most"]["trained"] > 0
    assert "hours" not in found.out
    assert shown[verb]["max_num_seqs" if verb == "grpo" else "max_length"] == (
        settings.grpo.max_num_seqs if verb == "grpo" else settings.sft.max_length
    )


def test_a_dry_run_of_grpo_shows_the_model_and_the_format_of_its_run(sbtiny_: Sbtiny) -> None:
    runs.create_run("sft", Path("mine"), Settings(model="smollm2-135m", format="think"))
    shown = json.loads(sbtiny_("grpo --run mine --dry-run --json").out)
    assert (shown["model"], shown["format"]) == ("smollm2-135m", "think")


def test_a_dry_run_of_a_cold_start_shows_the_prompt_of_the_run_that_it_goes_on_from(sbtiny_: Sbtiny) -> None:
    runs.create_run("sft", Path("mine"), Settings(), prompt={"instruction": "Think.", "system": None})
    assert json.loads(sbtiny_("sft --run mine --dry-run --json").out)["prompt"]["instruction"] == "Think."
    refused = sbtiny_("sft --run mine --set prompt.instruction=Other. --dry-run")
    assert (refused.code, refused.out) == (2, "")


def test_a_run_is_measured_with_its_own_settings_unless_others_are_given(sbtiny_: Sbtiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbtiny.evaluation import calibrate, run

    given: list[Settings] = []

    def stop(name: str, settings: Settings, *_: Any) -> None:
        given.append(settings)
        raise InputError("measured")

    monkeypatch.setattr(run, "run_eval", stop)
    monkeypatch.setattr(calibrate, "run_calibration", stop)
    mine = runs.create_run("sft", Path("mine"), Settings(seed=5, eval=EvalSettings(limit=7, task="good.jsonl", temperature=0.3)))
    (mine / "adapter").mkdir()
    Path("good.jsonl").write_text(FILES["good.jsonl"])
    Path("other.yaml").write_text("eval: {limit: 9}\n")
    for line in (
        "eval mine",
        "eval mine -c other.yaml",
        "eval mine --preset cpu",
        "calibrate mine",
        "calibrate mine --set eval.split=train --limit 11",
        "calibrate mine -c other.yaml",
    ):
        assert "measured" in sbtiny_(line).err
    found = [(s.eval.task, s.eval.limit, s.eval.split, s.eval.temperature, s.seed) for s in given]
    assert found == [
        ("good.jsonl", 7, "test", 0.3, 5),
        ("arithmetic", 9, "test", 0.6, 0),
        ("arithmetic", 500, "test", 0.6, 0),
        ("good.jsonl", 500, "val", 0.3, 5),
        ("good.jsonl", 11, "train", 0.3, 5),
        ("arithmetic", 9, "val", 0.6, 0),
    ]


def test_an_export_asks_as_many_questions_as_are_set(sbtiny_: Sbtiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbtiny.export import config

    asked: list[int] = []

    def stop(run: Path, settings: Settings, *_: Any) -> None:
        asked.append(settings.eval.limit)
        raise InputError("planned")

    monkeypatch.setattr(config, "make_config", stop)
    runs.create_run("sft", Path("mine"), Settings(eval=EvalSettings(limit=7)))
    for line in ("export mine", "export mine --set eval.limit=300", "export mine --set eval.limit=300 --questions 20"):
        sbtiny_(line)
    assert asked == [100, 300, 20]


def test_long_values_stay_on_their_line(sbtiny_: Sbtiny) -> None:
    name = "/".join(["a-rather-long-folder"] * 8)
    assert f"rows: {name}.jsonl" in sbtiny_(f"sft --data {name}.jsonl --dry-run").out


def test_models_lists_every_alias(sbtiny_: Sbtiny) -> None:
    assert [row["name"] for row in json.loads(sbtiny_("models --json").out)] == [alias.name for alias in ALIASES]
    shown = sbtiny_("models").out
    assert all(alias.name in shown and (alias.hub_id or "") in shown for alias in ALIASES)


# ---- exit codes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Lets `sbtiny sft` end as told instead of training."""
    from sbtiny.coldstart import run

    return lambda end: monkeypatch.setattr(run, "run_sft", lambda *_: end())


def raising(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("wrong: mend it"), 2, "error: wrong: mend it\n"),
        (InputError("two\n  lines"), 2, "error: two lines\n"),
        (Failed("the loss is NaN"), 1, "error: the loss is NaN\n"),
        (RuntimeError("CUDA\nout of memory"), 1, "error: RuntimeError: CUDA out of memory (--debug shows where)\n"),
        (KeyError("kind"), 1, "error: KeyError: 'kind' (--debug shows where)\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "No space left on device: 'x'; free space"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2, "Read-only file system: 'x'; free space"),
        (OSError(errno.EIO, "Input/output error"), 1, "(--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (EOFError(), 130, "interrupted\n"),
    ],
)
def test_every_end_has_its_code_and_one_line(error: BaseException, code: int, said: str, sbtiny_, ending) -> None:
    ending(raising(error))
    found = sbtiny_("sft --json")
    assert (found.code, found.out) == (code, "")
    assert said in found.err
    assert found.err.strip().count("\n") == 0
    assert "Traceback" not in found.err


def test_done_is_code_0_and_says_what_is_next(sbtiny_: Sbtiny, ending) -> None:
    ending(lambda: Path("runs/mine"))
    assert sbtiny_("sft") == Result(0, "run: runs/mine\nnext: sbtiny grpo --run runs/mine\n", "")
    assert json.loads(sbtiny_("sft --json").out) == {"run": "runs/mine", "next": "sbtiny grpo --run runs/mine"}
    ending(lambda: Path("runs/my own"))
    assert "next: sbtiny grpo --run 'runs/my own'\n" in sbtiny_("sft").out  # can be copied


def test_ctrl_c_is_code_130(sbtiny_: Sbtiny, ending) -> None:
    ending(lambda: signal.raise_signal(signal.SIGINT))  # a real one: Python turns it into KeyboardInterrupt
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a job of the background it is ignored
    try:
        assert sbtiny_("sft") == Result(130, "", "interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("line", ["--debug sft", "sft --debug"])
def test_debug_shows_the_traceback(line: str, monkeypatch: pytest.MonkeyPatch, ending) -> None:
    ending(raising(InputError("wrong")))
    monkeypatch.setattr(sys, "argv", ["sbtiny", *line.split()])
    with pytest.raises(InputError, match="wrong"):
        cli.main()


@pytest.mark.slow
def test_ctrl_c_while_sampling_ends_at_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sbtiny", "data", "build", "rows.jsonl", "--limit", "400", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "rows.jsonl.part"
    while process.poll() is None and (not part.exists() or len(part.read_text().splitlines()) < 40):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "the same command goes on from rows.jsonl.part" in err
    assert err.rstrip().endswith("interrupted")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [part]
    done = len(part.read_text().splitlines()) - 1
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{done} answers are there" in " ".join(again.stderr.split())
    assert json.loads(again.stdout)["sampled"] == 1600  # four answers to each
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_build_that_was_killed_goes_on_and_gives_the_same_file(sbtiny_: Sbtiny, tmp_path: Path) -> None:
    line = "data build {}.jsonl --limit 24 --set data.samples_per_question=1 --set data.max_num_seqs=6 --json"
    command = [sys.executable, "-m", "sbtiny", *line.format("killed").split()]
    part, alone = tmp_path / "killed.jsonl.part", os.environ | {"OMP_NUM_THREADS": "1"}  # as conftest has it
    process = subprocess.Popen(command, cwd=tmp_path, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and (not part.exists() or len(part.read_bytes().splitlines()) < 8):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {part.name, ".killed.jsonl.lock"}  # which locks nothing
    done = part.read_bytes().count(b"\n") - 1
    with part.open("ab") as file:
        file.write(b'{"answer": 23, "kind": "ro')  # as a power cut leaves it
    again, whole = (sbtiny_(line.format(name)) for name in ("killed", "whole"))
    assert 0 < done < 24
    assert f"{done} answers are there" in " ".join(again.err.split())
    assert json.loads(again.out) | {"file": ""} == json.loads(whole.out) | {"file": ""}
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


# ---- what the verbs hand on ------------------------------------------------------------------------------------------


def test_resuming_takes_the_settings_and_the_start_of_the_run(sbtiny_: Sbtiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sbtiny.grpo import run

    given: list[tuple] = []
    monkeypatch.setattr(run, "run_grpo", lambda *arguments: given.append(arguments) or arguments[2])
    first = runs.create_run("sft", Path("first"), Settings())
    other = runs.create_run("sft", runs.ROOT / "newer", Settings())
    (other / "adapter").mkdir()
    made_with = load_settings(overrides=[("grpo.learning_rate", 5e-5), ("seed", 9)])
    runs.create_run("grpo", Path("mine"), made_with, parent=str(first))
    assert sbtiny_("grpo --resume -o mine").code == 0
    assert given == [(made_with, first, Path("mine"), True, False)]
    assert sbtiny_("grpo --resume -o mine --steps 200").code == 0
    assert given[1][0].grpo.steps == 200
    assert sbtiny_("grpo -o fresh").code == 0
    assert given[2] == (load_settings(preset="cpu"), other, Path("fresh"), False, False)


def test_a_cold_start_goes_on_from_a_run_with_its_model(sbtiny_: Sbtiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbtiny.coldstart import run

    given: list[tuple] = []
    monkeypatch.setattr(run, "run_sft", lambda *arguments: given.append(arguments) or Path("made"))
    first = runs.create_run("sft", Path("first"), Settings(format="think"))
    assert sbtiny_("sft --run first").code == 0
    assert (given[0][0].format, given[0][-1]) == ("think", first)
    runs.create_run("sft", Path("second"), Settings(), parent=str(first))
    assert sbtiny_("sft --resume -o second").code == 0
    assert given[1][-1] == first
    refused = sbtiny_("sft --run first --model tiny")
    assert (refused.code, len(given)) == (2, 2)
    assert "--run goes on from first, which has its model: leave --model out" in refused.err
    assert sbtiny_("sft --run nowhere").code == 2


def test_the_reward_of_given_samples(sbtiny_: Sbtiny) -> None:
    Path("s.jsonl").write_text('{"budget": 100, "length": 90, "correct": true}\n{"budget": null, "length": 9, "correct": false}\n')
    found = sbtiny_("reward s.jsonl --alpha 0.1 --json")
    assert (found.code, found.err) == (0, "")
    assert [row["total"] for row in json.loads(found.out)] == pytest.approx([1.0, -1.0])
    assert "1.0000" in sbtiny_("reward s.jsonl").out


def test_a_labelled_row_is_shown_in_tokens(sbtiny_: Sbtiny) -> None:
    Path("labelled.jsonl").write_text(FILES["labelled.jsonl"])
    found = sbtiny_("data show labelled.jsonl")
    assert (found.code, found.err) == (0, "")
    assert "</▏solution▏>" in found.out
    assert re.search(r"\n\d+ prompt tokens, \d+ trained tokens, stated budget 1\n$", found.out)


# ---- the real thing --------------------------------------------------------------------------------------------------


def test_from_traces_to_an_evaluated_run_with_json_alone_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("traces.jsonl").write_text(rows())

    def call(line: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["sbtiny", *shlex.split(line)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        assert stop.value.code == 0, err
        return json.loads(out)  # the descriptor itself: what libraries print counts too

    built = call("data build rows.jsonl --traces traces.jsonl --set data.limit=10 --json")
    every = built.pop("levels")[-1]
    assert (every["level"], every["rows"], every["accepted"]) == ("all", 10, 1.0)
    assert 0 < every["p10"] <= every["p50"] <= every["p100"]
    assert built == {"file": "rows.jsonl", "rows": 10, "sampled": 10, "wrong": 0, "cut": 0, "spare": 0, "leaked": 0}
    Path("held.jsonl").write_text('{"question": "TOM has 0 coins; a) finds 4. How many coins?", "answer": "4"}\n')
    apart = call("data build apart.jsonl --traces traces.jsonl --set eval.task=held.jsonl --json")
    assert (apart["rows"], apart["sampled"], apart["leaked"]) == (11, 11, 1)
    trained = call("sft --data rows.jsonl --steps 1 -o run --seed 4 --json")
    assert trained == {"run": "run", "next": "sbtiny grpo --run run"}
    assert load_settings(Path("run/config.yaml")).seed == 4
    assert runs.find_run("run") == Path("run")
    result = call("eval run --limit 2 --set eval.max_tokens=20 --json")
    assert result == runs.read_json(Path("run/eval.json"))
    assert (result["questions"], result["task"], result["split"], result["top_p"]) == (2, "arithmetic", "test", 0.95)
    swept = call("eval run --limit 2 --set eval.max_tokens=20 --sweep --json")
    assert [row["budget"] for row in swept["sweep"]] == ["0.5x", "1x", "2x", "4x"]
    assert not [path for path in Path().rglob(".*") if path.is_file()]  # no temporary file


def test_a_full_disk_keeps_the_earlier_file_whole(sbtiny_: Sbtiny, tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text(rows(100))
    (tmp_path / "rows.jsonl").write_text("earlier\n")
    before = listing(tmp_path)
    with full_disk(room=8192):
        found = sbtiny_("data build rows.jsonl --traces traces.jsonl --json")
    assert (found.code, found.out) == (2, "")
    assert re.fullmatch(r"\s*error: cannot write rows.jsonl: [^\n]+\n", found.err)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("more", ["", " --save-steps 1"])
def test_a_disk_that_fills_while_training_leaves_no_half_adapter_and_no_half_checkpoint(more: str, sbtiny_: Sbtiny, tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text(rows())
    assert sbtiny_("data build rows.jsonl --traces traces.jsonl --json").code == 0
    with full_disk(room=100_000):  # an adapter is 0.7 MB
        found = sbtiny_(f"sft --data rows.jsonl --steps 1 -o run --json{more}")
    assert (found.code, found.out) == (2, "")
    assert re.search(r"error: cannot write run: [^\n]+; free space or choose another --output\n$", found.err)
    assert "Traceback" not in found.err
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {"config.yaml", "run.json", "metrics.jsonl", "README.md"}
    assert sbtiny_("sft --data rows.jsonl --steps 1 -o run --json").code == 0  # the same place can be used again
