"""Settings: where they come from, which one wins, and that a wrong one is told in one line with its key."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.protocol import parse_budget_option
from sbtiny.config import DataSettings, GrpoSettings, Settings, SftSettings, micro_batch_size
from sbtiny.errors import InputError
from sbtiny.load_settings import PRESETS, load_settings, parse_assignment
from sbtiny.models.aliases import resolve


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def complaint(*overrides: tuple[str, object], file: Path | None = None, preset: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_settings(file, preset, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- where settings come from ----------------------------------------------------------------------------------------


def test_every_default_constructs() -> None:
    assert load_settings() == Settings()


def test_every_preset_file_is_known_and_every_known_preset_is_a_file() -> None:
    folder = Path(load_settings.__code__.co_filename).parent / "presets"
    assert sorted(PRESETS) == sorted(file.stem for file in folder.glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_parsed_and_fits_together(name: str) -> None:
    settings = load_settings(preset=name)
    assert resolve(settings.model).kind in ("bundled", "hub")
    assert parse_budget_option(settings.eval.budget)
    # a row of the cold start is a prompt and an answer of up to data.max_tokens: it must fit into what sft takes
    assert settings.sft.max_length > settings.data.max_tokens
    for stage in ("sft", "grpo"):  # what a preset says is what is taken
        most = getattr(settings, stage).micro_batch
        assert micro_batch_size(settings.batch_size(stage), most) == min(most, settings.batch_size(stage))
    if name != "cpu":
        assert settings.four_bit is None  # on a GPU, but as the run has it where there is one
        assert settings.grpo.task == settings.data.task == settings.eval.task == "gsm8k"


def test_flags_win_over_the_file_the_file_over_the_preset_the_preset_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "sft: {learning_rate: 5e-5, batch: 4}\ngrpo: {steps: 7}")
    found = load_settings(file, "t4", [("sft.learning_rate", 1e-6), ("seed", 3)])
    preset = load_settings(preset="t4")
    assert found.sft.learning_rate == 1e-6  # flag
    assert (found.sft.batch, found.grpo.steps) == (4, 7)  # file
    assert found.sft.max_length == preset.sft.max_length != Settings().sft.max_length  # preset
    assert found.sft.warmup == Settings().sft.warmup  # default
    assert found.seed == 3


def test_the_last_of_two_overrides_wins() -> None:
    assert load_settings(overrides=[("grpo.steps", 5), ("grpo.steps", 6)]).grpo.steps == 6


def test_nothing_can_be_said_over_a_preset() -> None:
    assert load_settings(preset="cpu").four_bit is False
    assert load_settings(preset="cpu", overrides=[parse_assignment("four_bit=null")]).four_bit is None


@pytest.mark.parametrize("text", ["", "# all commented out\n", "grpo:\n", "grpo:\nsft: {}\n"])
def test_an_empty_file_or_section_changes_nothing(text: str, tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, text)) == Settings()


# ---- types -----------------------------------------------------------------------------------------------------------


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    found = load_settings(written(tmp_path, "sft: {learning_rate: 3e-4, batch: 1e2, micro_batch: '2'}\neval: {budget: 200, limit: 50.0}"))
    assert (found.sft.learning_rate, found.sft.batch, found.sft.micro_batch) == (3e-4, 100, 2)
    assert (found.eval.budget, found.eval.limit) == ("200", 50)
    assert isinstance(found.sft.batch, int)
    assert isinstance(found.eval.limit, int)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("grpo.learning_rate=3e-4", 3e-4),
        ("grpo.learning_rate=1", 1.0),
        ("model=a/b", "a/b"),
        ("grpo.lr_scheduler_type=cosine", "cosine"),
        ("seed=7", 7),
        ("prompt.instruction=Put your answer after ####.", "Put your answer after ####."),
        ("prompt.instruction=Answer: step by step", "Answer: step by step"),
        ("prompt.instruction='quoted # text'", "quoted # text"),
        ("prompt.instruction=null", None),
        ("prompt.instruction=", None),
        ("eval.budget=120", "120"),
    ],
)
def test_an_assignment_sets_its_key(text: str, value: object) -> None:
    found = load_settings(overrides=[parse_assignment(text)])
    section, _, key = text.partition("=")[0].rpartition(".")
    assert (asdict(found)[section] if section else asdict(found))[key] == value


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("sft.batch", 2.5, "a whole number"),
        ("sft.batch", "many", "a whole number"),
        ("sft.batch", True, "a whole number"),
        ("sft.batch", [8], "a whole number"),
        ("sft.batch", None, "a whole number"),
        ("sft.batch", float("inf"), "a whole number"),
        ("sft.batch", 10**400, "a whole number"),
        ("sft.learning_rate", "fast", "a number"),
        ("sft.learning_rate", float("nan"), "a number"),
        ("sft.learning_rate", "inf", "a number"),
        ("model", None, "text"),
        ("model", ["tiny"], "text"),
        ("model", True, "text"),
        ("four_bit", "yes", "true or false or null"),
        ("four_bit", 1, "true or false or null"),
        ("sft.rows", [], "text or null"),
        ("grpo.loss_type", "ppo", "choose from dapo, grpo, dr_grpo, bnpo"),
        ("grpo.loss_type", [1], "choose from dapo"),
        ("eval.split", None, "choose from test, val, train"),
    ],
)
def test_a_wrong_type_names_the_key_the_value_and_what_is_wanted(key: str, value: object, wanted: str) -> None:
    said = complaint((key, value))
    assert said.startswith(f"{key} in the command line is ")
    assert repr(value) in said
    assert wanted in said


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("grpo.learning_rat", "'grpo.learning_rate'"),
        ("grpo.Steps", "'grpo.steps'"),
        ("gpro.learning_rate", "'sft.learning_rate' or 'grpo.learning_rate'"),
        ("learning_rate", "'sft.learning_rate' or 'grpo.learning_rate'"),
        ("sft.alpha_start", "'grpo.alpha_start'"),
        ("modell", "'model'"),
        ("sftt.lora_rnk", "'sft.lora_rank'"),
    ],
)
def test_an_unknown_key_suggests_the_right_one(key: str, meant: str, tmp_path: Path) -> None:
    assert complaint((key, 1)) == f"unknown key {key!r} in the command line (did you mean {meant}?)"
    *sections, last = key.split(".")
    text = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)) + f"{'  ' * len(sections)}{last}: 1"
    assert f"did you mean {meant}?" in complaint(file=written(tmp_path, text))


@pytest.mark.parametrize("key", ["zzz", "", "1", "grpo.zzz", "sft.learning_rate.peak"])
def test_an_unknown_key_like_none_says_where_keys_are_shown(key: str) -> None:
    assert f"unknown key {key!r}" in complaint((key, 1))
    assert "--dry-run" in complaint((key, 1))


def test_a_section_is_no_setting(tmp_path: Path) -> None:
    assert "grpo in the command line is 5: it is a section" in complaint(("grpo", 5))
    assert "it is a section" in complaint(file=written(tmp_path, "sft: [1, 2]"))
    assert "unknown key 'model.name'" in complaint(file=written(tmp_path, "model: {name: tiny}"))


@pytest.mark.parametrize("text", ["grpo.learning_rate", "=3", "", "grpo.learning_rate=[", "grpo.learning_rate={a: b", "seed=2020-13-45"])
def test_an_assignment_that_cannot_be_read_is_told_with_its_text(text: str) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(overrides=[parse_assignment(text)])
    assert f"--set {text}" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("grpo: [1\n", "line 2"),
        ("model: tiny\n\tseed: 1\n", "line 2"),
        ("- 1\n- 2\n", "not a list"),
        ("just words", "not a str"),
        ("model: tiny\x07", "no valid YAML"),
        ("sft: {steps: 4}\nsft: {epochs: 2}", "line 2: no valid YAML (sft stands twice)"),
        ("model: !!python/object:os.system x", "no valid YAML"),
    ],
)
def test_a_file_that_is_no_settings_file(text: str, wanted: str, tmp_path: Path) -> None:
    said = complaint(file=written(tmp_path, text))
    assert "mine.yaml" in said
    assert wanted in said


def test_a_file_that_is_missing_a_folder_or_no_text(tmp_path: Path) -> None:
    assert "no settings file" in complaint(file=tmp_path / "none.yaml")
    assert "no settings file" in complaint(file=tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert "save it as UTF-8" in complaint(file=tmp_path / "latin.yaml")


def test_an_unknown_preset_is_told_with_those_there_are() -> None:
    assert complaint(preset="rtx409") == ("unknown preset 'rtx409' (did you mean 'rtx4090'?): choose from cpu, t4, rtx4090")
    assert "choose from cpu, t4, rtx4090" in complaint(preset="t5")


# ---- values ----------------------------------------------------------------------------------------------------------

WRONG = [
    *((f"data.{key}", 0) for key in ("limit", "samples_per_question", "max_tokens", "max_num_seqs")),
    *((f"sft.{key}", 0) for key in ("batch", "micro_batch", "max_length", "lora_rank", "lora_alpha", "learning_rate", "epochs")),
    *((f"grpo.{key}", 0) for key in ("limit", "steps", "prompts_per_step", "micro_batch", "max_tokens", "sample_steps")),
    *((f"grpo.{key}", 0) for key in ("max_num_seqs", "learning_rate", "temperature")),
    *((f"eval.{key}", 0) for key in ("limit", "max_tokens", "max_num_seqs", "top_p")),
    *((f"data.{key}", -1) for key in ("limit", "temperature")),
    *((f"sft.{key}", -1) for key in ("steps", "save_steps", "warmup", "learning_rate")),
    *((f"grpo.{key}", -1) for key in ("save_steps", "beta", "warmup", "relabel_per_group", "user_share", "alpha_hold")),
    ("eval.temperature", -0.1),
    ("eval.top_p", 1.5),
    ("seed", -1),
    ("seed", 2**32),
    ("sft.warmup", 1.1),
    ("grpo.num_generations", 1),
    ("grpo.relabel_per_group", 8),
    ("grpo.alpha_end", 0),
    ("grpo.alpha_end", 6.5),
    ("grpo.alpha_hold", 1),
    ("grpo.user_share", 1.01),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_out_of_range_names_its_key_and_the_mend(key: str, value: float) -> None:
    said = complaint((key, value))
    assert said.startswith(f"{key} is {value}")
    assert ": set it to " in said


def test_a_budget_that_is_no_number_is_found_with_the_settings() -> None:
    assert "--budget 'lots' is not understood" in complaint(("eval.budget", "lots"))
    assert "'-5'" in complaint(("eval.budget", -5))


def test_alpha_start_below_alpha_end_is_told() -> None:
    assert "grpo.alpha_end is 0.1" in complaint(("grpo.alpha_start", 0.05))


@pytest.mark.parametrize(("rows", "most", "taken"), [(4, 16, 4), (40, 16, 10), (15, 2, 1), (12, 8, 6), (8, 8, 8), (7, 6, 1)])
def test_a_micro_batch_divides_the_rows(rows: int, most: int, taken: int) -> None:
    """The user sets prompts and group as they like; what a forward pass takes of them is derived."""
    assert micro_batch_size(rows, most) == taken


def test_settings_made_in_code_are_checked_too() -> None:
    with pytest.raises(InputError, match=r"^sft\.learning_rate is -1"):
        Settings(sft=SftSettings(learning_rate=-1))
    with pytest.raises(InputError, match=r"^data\.temperature is nan"):
        replace(Settings(), data=DataSettings(temperature=float("nan")))


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_saved_settings_read_back_equal(preset: str | None, tmp_path: Path) -> None:
    settings = load_settings(
        preset=preset, overrides=[("sft.learning_rate", 1e-05), ("grpo.lr_scheduler_type", "constant_with_warmup"), ("model", "null")]
    )
    assert load_settings(written(tmp_path, settings.as_yaml())) == settings


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1)


@given(
    model=TEXT,
    data=st.none() | TEXT,
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**32 - 1),
    four_bit=st.none() | st.booleans(),
    beta=st.floats(0, 1e300),
)
def test_any_settings_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, model: str, data: str, lr: float, seed: int, four_bit: bool, beta: float
) -> None:
    settings = Settings(
        model=model, seed=seed, four_bit=four_bit, sft=SftSettings(rows=data, learning_rate=lr), grpo=GrpoSettings(beta=beta)
    )
    file = tmp_path_factory.mktemp("round") / "config.yaml"
    file.write_text(settings.as_yaml(), encoding="utf-8")
    assert load_settings(file) == settings
