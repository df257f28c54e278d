"""An export on the Hugging Face hub, in one commit: the merged folder with its model card at the root, GGUF files and the proof beside."""

import re
from pathlib import Path

from sbtiny.errors import Failed, InputError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
BESIDE = ("*.gguf", "Modelfile", "export.json")


def check(name: str) -> None:
    """Raise InputError, before the work, for what is no USER/NAME or when the hub does not know us."""
    if not NAME.fullmatch(name):
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
    """Upload a finished export; the address of what is there now. Raises Failed: the files here stay as they are."""
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi

    api, files = HfApi(), contents(folder)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=place, path_or_fileobj=str(file)) for place, file in files.items()]
        api.create_commit(name, operations, commit_message="Exported by sbtiny")
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise Failed(f"could not push to {name} ({reason}); the files are whole in {folder}") from error
    return f"{api.endpoint}/{name}"


def contents(folder: Path) -> dict[str, Path]:
    """Place in the repository -> file."""
    merged = {file.name: file for file in sorted((folder / "merged").iterdir()) if file.is_file()}
    return merged | {file.name: file for pattern in BESIDE for file in sorted(folder.glob(pattern))}
