"""An export folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from marft_graph.deploy.manifest import read_manifest
from marft_graph.errors import ExportError


def push_to_hub(
    export_dir: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    message: str = "Adapters trained by marft-graph",
    api: Any = None,
) -> str:
    """Upload an export folder to a model repository, which is made where it does not exist.

    Args:
        export_dir: what `export` wrote; it is checked first.
        repo_id: `owner/name`.
        private: whether a new repository is private.
        message: of the commit.
        api: a `huggingface_hub.HfApi`; by default one with the login of this machine.

    Returns:
        The address of the commit.

    Raises:
        ExportError: the folder is no intact export, or the hub refused.
    """
    read_manifest(export_dir)
    hub = HfApi() if api is None else api
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=str(export_dir), commit_message=message
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ExportError(f"cannot push {export_dir} to {repo_id}: {error}") from error
    return str(commit.commit_url)
