"""Uploads a folder or file to the Hugging Face Hub, as a data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from AutomaticEval.errors import StoreError, first_line
from AutomaticEval.store.local_paths import ASKED, LOCAL_PATHS

PRIVATE = [
    LOCAL_PATHS,
    f"*/{LOCAL_PATHS}",
    ASKED,
    f"*/{ASKED}",
    ".lock",
    ".lock-*",
    "*.partial",
    "*.partial/*",
    "*.damaged*",
]
"""Patterns of the names of files that are never uploaded."""


def push_to_hub(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a folder (or a file) as a data set of the Hugging Face Hub. Returns its address.

    repo_id: "user/name". It is made when it is not there; private says whether a data set that is made is private. When a call was
    interrupted, calling again goes on where it stopped.
    Raises StoreError.
    """
    from huggingface_hub import HfApi

    if not folder.exists():
        raise StoreError(f"no folder {folder}; export to it first.")
    url = create_repository(repo_id, private=private)
    with _named_failures(repo_id):
        if folder.is_dir():
            HfApi().upload_folder(repo_id=repo_id, folder_path=folder, repo_type="dataset", ignore_patterns=PRIVATE)
        else:
            HfApi().upload_file(repo_id=repo_id, path_or_fileobj=folder, path_in_repo=folder.name, repo_type="dataset")
    return url


def create_repository(repo_id: str, *, private: bool = True) -> str:
    """Make a data set on the Hub unless it is there. Raises StoreError when it cannot be written."""
    from huggingface_hub import HfApi

    with _named_failures(repo_id):
        return str(HfApi().create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True))


@contextmanager
def _named_failures(repo_id: str) -> Iterator[None]:
    """Raise the Hub's refusals inside the with as StoreError, in one line that says what to do."""
    from huggingface_hub import errors

    web: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # the error of the HTTP library that the Hub's client uses
    try:
        yield
    except (OSError, ValueError, RuntimeError, web) as failure:
        status = getattr(getattr(failure, "response", None), "status_code", None)
        if isinstance(failure, errors.OfflineModeIsEnabled):
            what = "HF_HUB_OFFLINE is set; unset it"
        elif isinstance(failure, errors.HFValidationError):
            what = "write it as user/name"
        elif status in (401, 403, 404) or isinstance(failure, errors.LocalTokenNotFoundError):
            what = "log in with `hf auth login`, with a token that may write there"
        else:
            what = "check the connection, and run it again: what was uploaded is kept"
        raise StoreError(f"{repo_id} cannot be written on the hub ({first_line(failure)}): {what}.") from failure
