"""A printed row: every token once, in the colour of its part, and the counts below."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from rich.style import Style
from rich.text import Text

from sbtiny.budget.protocol import render_budget
from sbtiny.coldstart.row_preview import SEPARATOR, color_tokens, show_row
from sbtiny.coldstart.rows import tokenize_row
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.errors import InputError
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question

SUM = Question("q1", "Tom has 3 coins.\na) finds 4\nHow many [bold]coins[/bold]?", "7", 1)
RESPONSE = "a) 3 + 4 = 7 数\n\\boxed{7}"


@pytest.fixture
def row(policy: Policy) -> dict:
    return make_row(policy, SUM, RESPONSE)


@pytest.fixture
def file(tmp_path: Path, row: dict, policy: Policy) -> str:
    """Two rows: a short one, and the one above."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (make_row(policy, SUM, "7"), row)))
    return str(path)


def style_at(text: Text, part: str) -> Style:
    return text.get_style_at_offset(Console(), text.plain.index(part))


def test_every_token_is_shown_once_and_counted(policy: Policy, row: dict, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_row(file, "tiny", 2)
    shown, counts = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    prompt = prompt_ids(policy.tokenizer, SUM.question)
    ids = tokenize_row(policy.encode, row, policy.tokenizer.eos_token_id, prompt, policy.form)["input_ids"]
    assert shown.count(SEPARATOR) + 1 == len(ids)
    text = shown.replace(SEPARATOR, "").replace("↵\n", "\n")
    assert SUM.question in text
    assert render_budget(row["budget"]) + "a) 3 + 4 = 7 " in text
    assert text.endswith("\\boxed{7}</solution>" + policy.tokenizer.eos_token)
    assert counts == f"{len(prompt)} prompt tokens, {len(ids) - len(prompt)} trained tokens, stated budget {row['budget']}"


def test_colours_tell_the_parts_apart() -> None:
    text = color_tokens(["user", " <budget>?", "<bud", "get>", "48", "</budget>", "<solution>", "why"], 2, underline=True)
    assert text.plain == "user <budget>?<budget>48</budget><solution>why"
    asked, written = style_at(text, "user"), style_at(text, "why")
    assert (asked.dim, asked.color) == (True, None)
    assert (written.dim, written.color.name, written.bold) == (None, "green", None)
    assert style_at(text, "<budget>?").bold is None  # the user's words, not our tag
    assert style_at(text, "48").bold is None
    tags = ("<bud", "get>48", "</budget>", "<solution>")
    assert all(style_at(text, tag).color.name == "green" for tag in ("48", *tags[1:]))
    assert all(text.get_style_at_offset(Console(), text.plain.rindex(tag)).bold for tag in tags)


def test_neighbouring_tokens_differ_where_underlines_can_be_seen() -> None:
    text = color_tokens(["a", "b", "c", "d"], 2, underline=True)
    assert [bool(style_at(text, letter).underline) for letter in "abcd"] == [False, True, False, True]


def test_separators_part_them_where_not() -> None:
    assert color_tokens(["a", "", "b\n", "c"], 1, underline=False).plain == SEPARATOR.join(["a", "", "b↵\n", "c"])


def test_what_a_terminal_would_act_on_is_shown_instead() -> None:
    text = color_tokens(["\x1b[31m", "\x9b2J", "\r\x07\t", "\x7f"], 0, underline=True)
    assert text.plain == "␛[31m�2J␍␇␉�"


def test_the_tokenizer_is_enough(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(BUNDLED, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    show_row(file, str(tmp_path / "bare"), 1)
    assert capsys.readouterr().out.endswith(" trained tokens, stated budget 1\n")


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_row_that_is_not_there(file: str, number: int) -> None:
    with pytest.raises(InputError, match=rf"rows.jsonl has no row {number}: give --row 1 to 2"):
        show_row(file, "tiny", number)


def test_a_row_of_another_tokenizer_is_refused(row: dict, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps(row | {"budget": row["budget"] + 3}))
    with pytest.raises(InputError, match="give the --model it was labelled for"):
        show_row(str(tmp_path / "other.jsonl"), "tiny", 1)
