"""Download and upload of rules on the Hugging Face Hub; needs huggingface_hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metakern.core.requirements import required

#: Options of :func:`download`, as huggingface_hub names them.
OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


def download(repo_id: str, files: list[str], options: dict[str, Any]) -> Path:
    """Download ``files`` of a repository (or find them in the cache) and return their folder."""
    with required():
        from huggingface_hub import snapshot_download
    return Path(snapshot_download(repo_id, allow_patterns=files, **options))


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str = "Push model using huggingface_hub.",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    **options: Any,
) -> str:
    """Upload the files that ``save`` writes, in one commit, and return its URL; creates the repository if needed."""
    with required():
        from huggingface_hub import HfApi
    api = HfApi(token=token)
    name = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=commit_message, revision=branch, **options
        )
    return str(commit)


def card(text: str) -> Any:
    """The text as a ``huggingface_hub.ModelCard``."""
    with required():
        from huggingface_hub import ModelCard
    return ModelCard(text)
