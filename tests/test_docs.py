"""docs/cli.md and docs/settings.md say what the code says, and writing them takes no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
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
