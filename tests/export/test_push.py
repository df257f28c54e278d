"""The files of a push and their places, with a stand-in for the hub."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from sbtiny.cli.main import app
from sbtiny.errors import Failed, InputError
from sbtiny.export import push


class Hub:
    """A stand-in for HfApi that records its calls."""

    endpoint = "https://hub.example"
    made: list[tuple] = []  # noqa: RUF012
    full = False

    def whoami(self) -> dict:
        return {"name": "me"}

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self.made.append((name, private))

    def create_commit(self, name: str, operations: list, commit_message: str) -> None:
        if self.full:
            raise OSError("no room on the hub")
        self.made.append((name, {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "made", [])
    return Hub


def test_an_export_is_one_commit_with_the_model_at_its_root(run: Path, hub: type[Hub], tmp_path: Path, capsys) -> None:
    flags = ["--gguf", "q8_0", "--no-check", "-o", str(tmp_path / "out"), "--push", "me/mine", "--private", "--json"]
    app(["export", str(run), *flags], standalone_mode=False)
    assert hub.made[0] == ("me/mine", True)
    name, files = hub.made[1]
    assert name == "me/mine"
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md", "r-q8_0.gguf", "Modelfile", "export.json"} <= set(files)
    assert files["README.md"].startswith(b"---\nlicense: apache-2.0")  # the model card, not the notes beside the files
    assert json.loads(capsys.readouterr().out)["pushed"] == "https://hub.example/me/mine"


def test_where_an_export_was_pushed_is_told_without_json_too(run: Path, hub: type[Hub], tmp_path: Path, capsys) -> None:
    app(["export", str(run), "--gguf", "q8_0", "--no-check", "-o", str(tmp_path / "out"), "--push", "me/mine"], standalone_mode=False)
    assert "pushed to https://hub.example/me/mine" in capsys.readouterr().out


def test_a_push_that_fails_leaves_the_files(run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "full", True)
    with pytest.raises(Failed, match=r"could not push to me/mine \(no room on the hub\); the files are whole in .*out"):
        app(["export", str(run), "--gguf", "none", "--no-check", "-o", str(tmp_path / "out"), "--push", "me/mine"], standalone_mode=False)
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/", "/mine", "me/my model"])
def test_a_name_that_is_none_is_refused_before_the_work(run: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give it as USER/NAME"):
        app(["export", str(run), "-o", str(tmp_path / "out"), "--push", name], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_without_a_token_it_says_how_to_log_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="hf auth login"):
        push.check_hub_login("me/mine")
