"""Plans on the Hugging Face hub: the one file that talks to it, and all that is ever read from there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dit_sparse.plan import FILE_NAME

CARD = "README.md"
SHARED = (FILE_NAME, CARD)  # text only: nothing that is unpickled or run
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(spec: str) -> bool:
    """Say whether a text can only be meant as `user/repo`: one slash, no path's beginning, no file's name."""
    return REPO_ID.fullmatch(spec) is not None and not spec.endswith(".json")


def fetch(repo_id: str) -> Path:
    """Download a repository's plan.json and README.md into the hub's cache, and return their folder there.

    With HF_HUB_OFFLINE=1 the cache alone is asked.

    Raises: ValueError for what is no `user/repo`; FileNotFoundError where the repository, or its plan.json, is not
        there or not in the cache; OSError where the hub cannot be reached.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"a plan on the hub is named user/repo, got {repo_id!r}")
    hub = client()
    try:
        folder = Path(hub.snapshot_download(repo_id, allow_patterns=list(SHARED)))
    except hub.errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"no plan at {repo_id} in the hub's cache, and the Hugging Face hub was not reached: {_first_line(error)}"
        ) from error
    except (hub.errors.RepositoryNotFoundError, hub.errors.EntryNotFoundError) as error:
        raise FileNotFoundError(f"no plan at {repo_id} on the Hugging Face hub: {_first_line(error)}") from error
    if not (folder / FILE_NAME).is_file():
        raise FileNotFoundError(f"{repo_id} on the Hugging Face hub holds no {FILE_NAME}: it is no plan")
    return folder


def send(folder: Path, files: list[str], repo_id: str, private: bool) -> str:
    """Upload these files of a folder, and no others, to a model repository that is made if needed; return its address.

    Raises: ValueError for what is no `user/repo`, or where `private` is asked for and the repository is public;
        OSError where the hub refuses or cannot be reached.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"a plan on the hub is named user/repo, got {repo_id!r}")
    api = client().HfApi()
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model"))
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public, nothing was sent; make it private there first")
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message="dit-sparse plan")
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise OSError(f"cannot send {folder} to {repo_id}: {error}") from error
    return address


def client() -> Any:
    """Return the module huggingface_hub; tests put a stand-in here."""
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
