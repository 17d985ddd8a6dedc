"""The adapters of an export, loaded as they were trained."""

from __future__ import annotations

from pathlib import Path

from marft_graph.deploy.manifest import Manifest
from marft_graph.policy.team import Team


def exported_team(
    manifest: Manifest, export_dir: str | Path, *, device: str, base_model: str | None = None
) -> Team:
    """The team of an export on its base models, or on `base_model` where that is now elsewhere.

    Raises:
        ExportError: as `Manifest.folders`.
        ModelError: a base or an adapter cannot be loaded.
    """
    return Team.from_folders(
        manifest.folders(Path(export_dir), base_model),
        device=device,
        dtype=manifest.dtype,
        special_tokens_in_text=manifest.special_tokens_in_text,
    )
