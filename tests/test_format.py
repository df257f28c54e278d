"""`--format think` from the cold start to the files: every stage writes, rewards and counts the same tags."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sbtiny import runs
from sbtiny.budget.protocol import SOLUTION, THINK, Format, render_budget
from sbtiny.cli.main import app
from sbtiny.coldstart.rows import tokenize_row
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.config import EvalSettings, GrpoSettings, Settings, SftSettings
from sbtiny.errors import InputError
from sbtiny.evaluation.run import run_eval
from sbtiny.grpo.run import run_grpo
from sbtiny.models.load import load_model
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.load_policy import build_policy, load_policy
from sbtiny.tasks import arithmetic

EVAL = EvalSettings(limit=4, max_tokens=40, max_num_seqs=4)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with rows of their own for the tokens of `<think>`, which no text of its pretraining had."""
    folder = tmp_path_factory.mktemp("knowing") / "model"
    model, tokenizer = load_model("tiny")
    weight = model.get_input_embeddings().weight
    torch.manual_seed(0)
    with torch.no_grad():
        for i in tokenizer.encode("<think", add_special_tokens=False):
            weight[i] = torch.randn(weight.shape[1]) * weight.norm(dim=1).mean() / weight.shape[1] ** 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def thinking(tiny, knowing: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRPO run of two updates from a cold start of seconds that answers `<think>` one line `</think>` and a box."""
    folder = tmp_path_factory.mktemp("think")
    asked = arithmetic.generate_questions("train", 64, seed=5)
    policy = build_policy(*tiny, slots=2)
    data = folder / "rows.jsonl"
    runs.write_jsonl(data, [make_row(policy, q, f"So.\n\\boxed{{{q.answer}}}") for q in asked])
    sft = SftSettings(rows=str(data), steps=300, learning_rate=3e-3)
    start = run_sft(Settings(model=knowing, format="think", sft=sft), folder / "sft")
    grpo = GrpoSettings(
        steps=2, prompts_per_step=2, num_generations=4, micro_batch=8, max_tokens=40, limit=4, sample_steps=1, max_num_seqs=8
    )
    return run_grpo(Settings(grpo=grpo), start, folder / "grpo", force=True)


def test_the_format_is_taken_over_and_kept_to(thinking: Path, tmp_path: Path) -> None:
    assert runs.read_run(thinking)["format"] == "think"
    found = run_eval(str(thinking), Settings(eval=EVAL), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "eval_samples.jsonl").read_text().splitlines()]
    assert found["format_rate"] >= 0.75
    assert any("</think>\\boxed{" in row["text"] for row in rows)
    given = run_eval(str(thinking), Settings(eval=replace(EVAL, budget="7")), tmp_path / "given")
    assert given["mean_budget"] == 7
    assert (tmp_path / "given" / "eval_samples.jsonl").read_text().count(json.dumps(render_budget(7, THINK))[1:-1]) == 4


def test_a_tag_of_letters_never_met_is_refused_before_hours_are_spent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot learn to write <think>: its pretraining never met '<'.*--format solution"):
        run_sft(Settings(format="think"), tmp_path / "sft")
    assert not (tmp_path / "sft").exists()


def test_thoughts_and_answer_make_the_label(tiny) -> None:
    policy = build_policy(*tiny, slots=2, form=THINK)
    question = arithmetic.generate_questions("train", 1, seed=5)[0]
    row = make_row(policy, question, "So.\n\\boxed{4}")
    ids = tokenize_row(policy.encode, row, 2, (), THINK)["input_ids"]
    count = len(policy.encode("So.\n")) + len(policy.encode("\\boxed{4}"))
    assert policy.tokenizer.decode(ids[:-1]) == f"<budget>{count}</budget><think>So.\n</think>\\boxed{{4}}"


@pytest.mark.parametrize(
    ("form", "written"),
    [
        (SOLUTION, "<｜Assistant｜><think>\n<budget>{}</budget><solution>So.\n</think>\n\n\\boxed{{4}}</solution>"),
        (THINK, "<｜Assistant｜><budget>{}</budget><think>So.\n</think>\n\n\\boxed{{4}}"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_row_of_a_model_whose_prompt_opens_the_thoughts(tiny, form: Format, written: str) -> None:
    """R1's: its answers begin within the thoughts. The paper's tags stand within them as well; the other format's prompt ends before."""
    tokenizer = copy.deepcopy(tiny[1])
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    policy = build_policy(tiny[0], tokenizer, slots=2, form=form)
    question = arithmetic.generate_questions("train", 1, seed=5)[0]
    row = make_row(policy, question, "So.\n</think>\n\n\\boxed{4}")
    ids = tokenize_row(policy.encode, row, 2, prompt_ids(tokenizer, row["question"]), form)["input_ids"]
    text = tokenizer.decode(ids[:-1])
    number = text.partition("<budget>")[2].partition("</budget>")[0]
    assert text == f"<｜User｜>{question.question}" + written.format(number)
    asked = policy.request(question.question, 900, seed=0, budget=int(number)).prompt_ids
    assert tuple(ids[: len(asked)]) == asked


def test_the_files_prefill_the_same_tags(thinking: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    few = ["--questions", "4", "--set", "eval.max_tokens=40", "--set", "eval.max_num_seqs=4"]
    app(["export", str(thinking), "--gguf", "f16", "--format", "think", "-o", str(tmp_path / "out"), *few], standalone_mode=False)
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (told["format"], told["passed"]) == ("think", True), told["failures"]
    file = tmp_path / "out" / "grpo-f16.gguf"
    assert load_policy(str(file), Settings(), 4).form is THINK
    assert load_policy(str(tmp_path / "out" / "merged"), Settings(), 4).form is THINK
    assert "<budget>200</budget><think>" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_is_not_exported_in_tags_that_it_does_not_write(thinking: Path, started: Path) -> None:
    for run, other, trained in ((thinking, "solution", "think"), (started, "think", "solution")):
        with pytest.raises(InputError, match=f"trained to write <{trained}>, not <{other}>.*sft --format {other}"):
            app(["export", str(run), "--gguf", "none", "--format", other], standalone_mode=False)
    with pytest.raises(InputError, match="choose from solution, think"):
        app(["export", str(started), "--gguf", "none", "--format", "xml"], standalone_mode=False)
