"""A format and an instruction from the cold start to the files: every stage asks with the same prompt and counts the same tags.

The model is asked through the template of R1's distills, which opens `<think>` itself.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sbtiny
from sbtiny import runs
from sbtiny.budget.protocol import FORMATS, SOLUTION, THINK, Format, render_budget
from sbtiny.cli.main import app
from sbtiny.coldstart.rows import tokenize_row
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.config import EvalSettings, GrpoSettings, PromptSettings, ServeSettings, Settings, SftSettings
from sbtiny.errors import InputError
from sbtiny.evaluation.run import run_eval
from sbtiny.grpo.run import run_grpo
from sbtiny.models.load import load_model
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.load_policy import build_policy, load_policy
from sbtiny.tasks import arithmetic

EVAL = EvalSettings(limit=4, max_tokens=40, max_num_seqs=4)
R1 = (Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
TOLD = "Answer step by step."
PROMPT = {"instruction": TOLD, "system": None}
ENDS = {SOLUTION: "<｜Assistant｜><think>\n", THINK: "<｜Assistant｜>"}  # of a prompt in training


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with R1's template and marks of turns, and rows of their own for those and for the tokens of `<think>`.

    No text of its pretraining had them.
    """
    folder = tmp_path_factory.mktemp("knowing") / "model"
    model, tokenizer = load_model("tiny")
    tokenizer.chat_template = R1
    tokenizer.add_tokens(["<｜User｜>", "<｜Assistant｜>"], special_tokens=True)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        for i in tokenizer.encode("<think<｜User｜><｜Assistant｜>", add_special_tokens=False):
            weight[i] = torch.randn(weight.shape[1]) * weight.norm(dim=1).mean() / weight.shape[1] ** 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=FORMATS.values(), ids=lambda form: form.name)
def form(request: pytest.FixtureRequest) -> Format:
    return request.param


@pytest.fixture(scope="module")
def trained(tiny, knowing: str, form: Format, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRPO run of two updates from a cold start of seconds that answers `<think>` one line `</think>` and a box; or `<solution>`."""
    folder = tmp_path_factory.mktemp(form.name)
    asked = arithmetic.generate_questions("train", 64, seed=5)
    policy = build_policy(*tiny, slots=2)
    data = folder / "rows.jsonl"
    runs.write_jsonl(data, [make_row(policy, q, f"So.\n\\boxed{{{q.answer}}}") for q in asked])
    sft = SftSettings(rows=str(data), steps=300 if form.answered else 120, learning_rate=3e-3)
    prompt = PromptSettings(instruction=TOLD)
    start = run_sft(Settings(model=knowing, format=form.name, prompt=prompt, sft=sft), folder / "sft")
    grpo = GrpoSettings(
        steps=2, prompts_per_step=2, num_generations=4, micro_batch=8, max_tokens=40, limit=4, sample_steps=1, max_num_seqs=8
    )
    return run_grpo(Settings(grpo=grpo), start, folder / "grpo", force=True)


def test_format_and_prompt_are_taken_over_and_kept_to(trained: Path, form: Format, tmp_path: Path) -> None:
    for run in (trained, trained.parent / "sft"):
        assert runs.read_run(run)["format"] == form.name
        assert runs.read_run(run)["prompt"] == PROMPT
    found = run_eval(str(trained), Settings(eval=EVAL), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "eval_samples.jsonl").read_text().splitlines()]
    assert found["format_rate"] >= 0.75
    assert any((form.closing + "\\boxed{" if form.answered else "\\boxed{") in row["text"] for row in rows)
    given = run_eval(str(trained), Settings(eval=replace(EVAL, budget="7")), tmp_path / "given")
    assert given["mean_budget"] == 7
    assert (tmp_path / "given" / "eval_samples.jsonl").read_text().count(json.dumps(render_budget(7, form))[1:-1]) == 4


def test_a_run_is_asked_with_nothing_else(trained: Path, tmp_path: Path) -> None:
    for other in ("", "Be quick."):
        settings = Settings(eval=EVAL, prompt=PromptSettings(instruction=other))
        with pytest.raises(InputError, match=f"prompt.instruction is '{other}', but .* was trained with '{TOLD}'"):
            run_eval(str(trained), settings, tmp_path)
        with pytest.raises(InputError, match="train a new run"):
            run_grpo(settings, trained.parent / "sft", tmp_path / "grpo")
    assert not (tmp_path / "grpo").exists()


def test_a_chat_repeats_what_was_asked_and_the_initial_model_opens_its_thoughts(trained: Path, form: Format) -> None:
    assistant = sbtiny.load(str(trained), settings=Settings(serve=ServeSettings(max_tokens=120, context=400)))
    decode, asked = assistant.policy.tokenizer.decode, {"role": "user", "content": "2+2?"}
    first = assistant.stream("2+2?", budget=20)
    assert decode(first.prompt) == f"<｜User｜>2+2?\n{TOLD}{ENDS[form]}"
    again = assistant.stream([asked, {"role": "assistant", "content": first.wait().text}, asked], budget=20)
    assert decode(again.prompt).startswith(decode(first.prompt).removesuffix(ENDS[form]))
    assert decode(again.prompt).endswith(f"<｜User｜>2+2?\n{TOLD}{ENDS[form]}")
    assistant.drop(again)
    with assistant.base_model():
        assert decode(assistant.stream("2+2?").prompt) == f"<｜User｜>2+2?\n{TOLD}<｜Assistant｜><think>\n"
    assert decode(assistant.stream("2+2?").prompt) == decode(first.prompt)


@pytest.mark.parametrize("name", ["solution", "think"])
def test_own_answers_are_sampled_as_the_models_template_asks(knowing: str, name: str) -> None:
    """The cold start samples them with the template fitted to its format, which ends before `<think>` where the format writes it."""
    policy = load_policy(knowing, Settings(format=name), 2, trainable=True)
    assert policy.tokenizer.decode(policy.prompt("2+2?")) == "<｜User｜>2+2?<｜Assistant｜><think>\n"
    assert policy.tokenizer.decode(prompt_ids(policy.tokenizer, "2+2?")).endswith(ENDS[FORMATS[name]])
    given = policy.request("2+2?", 9, seed=0, budget=7).prompt_ids
    assert policy.tokenizer.decode(given).endswith(ENDS[FORMATS[name]] + render_budget(7, FORMATS[name]))


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
    tokenizer.chat_template = R1
    policy = build_policy(tiny[0], tokenizer, slots=2, form=form)
    question = arithmetic.generate_questions("train", 1, seed=5)[0]
    row = make_row(policy, question, "So.\n</think>\n\n\\boxed{4}")
    ids = tokenize_row(policy.encode, row, 2, prompt_ids(tokenizer, row["question"]), form)["input_ids"]
    text = tokenizer.decode(ids[:-1])
    number = text.partition("<budget>")[2].partition("</budget>")[0]
    assert text == f"<｜User｜>{question.question}" + written.format(number)
    asked = policy.request(question.question, 900, seed=0, budget=int(number)).prompt_ids
    assert tuple(ids[: len(asked)]) == asked


def test_the_files_ask_the_same_and_prefill_the_same_tags(trained: Path, form: Format, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    few = ["--questions", "4", "--set", "eval.max_tokens=40", "--set", "eval.max_num_seqs=4"]
    out = tmp_path / "out"
    app(["export", str(trained), "--gguf", "f16", "--format", form.name, "-o", str(out), *few], standalone_mode=False)
    told = json.loads((out / "export.json").read_text())
    assert (told["format"], told["prompt"]["instruction"], told["passed"]) == (form.name, TOLD, True), told["failures"]
    wanted = load_policy(str(trained), Settings(), 4).prompt("2+2?")
    for place in (out / "grpo-f16.gguf", out / "merged"):
        policy = load_policy(str(place), Settings(), 4)
        assert (policy.form, policy.prompt("2+2?")) == (form, wanted)
    readme = (out / "README.md").read_text()
    assert f"    <｜User｜>...\n    {TOLD}<｜Assistant｜>" in readme
    assert render_budget(200, form) in readme
    assert f"{{{{ .Content }}}}{{{{ if $last }}}}\n{TOLD}{ENDS[form]}{{{{ else }}}}" in (out / "Modelfile").read_text()


def test_a_run_is_not_exported_in_tags_that_it_does_not_write(trained: Path, form: Format, started: Path) -> None:
    other = THINK if form is SOLUTION else SOLUTION
    with pytest.raises(InputError, match=f"trained to write <{form.name}>, not <{other.name}>.*sft --format {other.name}"):
        app(["export", str(trained), "--gguf", "none", "--format", other.name], standalone_mode=False)
    with pytest.raises(InputError, match="choose from solution, think"):
        app(["export", str(started), "--gguf", "none", "--format", "xml"], standalone_mode=False)
