"""Push an export to the Hugging Face hub in one commit: the merged folder at the root, GGUF files and export.json beside."""

import re
from pathlib import Path

from sbtiny.errors import Failed, InputError

REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")
EXTRA_FILES = ("*.gguf", "*.calibration.json", "Modelfile", "export.json")


def check_hub_login(name: str) -> None:
    """Raises InputError, before any work, for a name other than USER/NAME or a failed login."""
    if not REPO_NAME.fullmatch(name):
        raise InputError(f"--push {name!r}: give it as USER/NAME, the repository on the hub")
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise InputError(f"--push {name}: not logged in to the hub: run `hf auth login`, or set HF_TOKEN") from error
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"--push {name}: the hub does not let us in ({reason}): check the connection and the token") from error


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a finished export and return its address. Raises Failed; the local files stay."""
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi

    api, files = HfApi(), repo_contents(folder)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=place, path_or_fileobj=str(file)) for place, file in files.items()]
        api.create_commit(name, operations, commit_message="Exported by sbtiny")
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise Failed(f"could not push to {name} ({reason}); the files are whole in {folder}") from error
    return f"{api.endpoint}/{name}"


def repo_contents(folder: Path) -> dict[str, Path]:
    """Place in the repository -> file."""
    merged = {file.name: file for file in sorted((folder / "merged").iterdir()) if file.is_file()}
    return merged | {file.name: file for pattern in EXTRA_FILES for file in sorted(folder.glob(pattern))}
