"""The texts say what the code says: the generated pages (without torch), the commands of every page, the entries of the log."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import commands, parse

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "data" / "README.md", *DOCS.glob("*.md"), *ROOT.glob("examples/**/*.md")]
TEXTS += [ROOT / "examples" / "gsm8k_traces.py", ROOT / "examples" / "speedrun.sh"]
COMMANDS = [(f"{file.relative_to(ROOT)}: {line}", line, inline) for file in TEXTS for line, inline in commands(file.read_text())]
GENERATE = "import runpy, sys; runpy.run_path({!r}, run_name='__main__'); assert 'torch' not in sys.modules"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as docs/generate.py writes them now."""
    folder = tmp_path_factory.mktemp("docs")
    code = GENERATE.format(str(DOCS / "generate.py"))
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    return folder


@pytest.mark.parametrize("page", ["cli.md", "settings.md"])
def test_the_pages_are_up_to_date(page: str, written: Path) -> None:
    same = (DOCS / page).read_text() == (written / page).read_text()
    assert same, f"docs/{page} is behind the code: run make docs"


@pytest.mark.parametrize("page", ["cli.md", "settings.md", "results.md"])
def test_table_rows_have_as_many_cells_as_their_header(page: str) -> None:
    """What follows a row and is none would end the table there: only an empty line may."""
    cells = 0
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("| "):
            found = len(re.findall(r"(?<!\\)\|", line)) - 1
            cells = cells or found
            assert found == cells, line
            assert line.endswith("|"), line
        else:
            assert not (cells and line), line
            cells = 0


@pytest.mark.parametrize(("line", "inline"), [known[1:] for known in COMMANDS], ids=[known[0] for known in COMMANDS])
def test_commands_of_the_texts_exist(line: str, inline: bool) -> None:
    parse(line, mentioned=inline)


def test_entries_of_the_log_are_named_once_and_those_cited_are_there() -> None:
    entries = re.findall(r"^## (\d+[a-z]?)\.", (ROOT / "dev" / "LOG.md").read_text(), re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert entries == sorted(entries, key=lambda name: (int(name.rstrip("ab")), name))
    texts = [*TEXTS, *(ROOT / "tests").rglob("*.py"), *(ROOT / "sbtiny").rglob("*.py")]
    cited = {n for file in texts for n in re.findall(r"LOG(?:\.md)?\]?(?:\([^)]*\))?,? (?:entry )?(\d+)\b", file.read_text())}
    assert {"5", "26"} <= cited <= set(entries)
