"""The adapters of an export, loaded as they were trained."""

from __future__ import annotations

import logging
from pathlib import Path

from marft_graph.deploy.manifest import Manifest, check_same_bases
from marft_graph.errors import ExportError
from marft_graph.policy.team import Team

logger = logging.getLogger(__name__)


def exported_team(
    manifest: Manifest, export_dir: str | Path, *, device: str, base_model: str | None = None
) -> Team:
    """The team of an export on its base models, or on `base_model` where that is now elsewhere.

    A base that has changed since training is refused, and only logged where it was given.

    Raises:
        ExportError: as `Manifest.folders`, or a base has changed since training.
        ModelError: a base or an adapter cannot be loaded.
    """
    folder = Path(export_dir)
    folders = manifest.folders(folder, base_model)
    team = Team.from_folders(
        folders,
        device=device,
        dtype=manifest.dtype,
        special_tokens_in_text=manifest.special_tokens_in_text,
    )
    bases = {name: base for name, (base, _) in folders.items()}
    try:
        check_same_bases(folder, manifest.adapters, bases)  # now that a hub id's files are here
    except ExportError as error:
        if base_model is None:
            raise
        logger.warning("%s", error)
    return team
