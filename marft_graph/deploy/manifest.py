"""What an export folder says of itself, and whether it is still what was exported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marft_graph.errors import ExportError
from marft_graph.policy.fingerprint import differing, fingerprint

FORMAT = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export folder says of itself (`manifest.json`)."""

    dtype: str
    graph_hash: str
    nodes: Mapping[str, str]
    """Agent path -> name of its adapter; several may share one."""
    adapters: Mapping[str, Mapping[str, Any]]
    """Name -> `path` of the adapter's folder, relative to the export folder, `base_model`, and
    `base_files`, the base's `fingerprint` in training, where that is known."""
    max_new_tokens: int
    metrics: Mapping[str, Any]
    sha256: Mapping[str, str]
    """Digest of every other file in the folder, by relative path."""
    constrain_output: bool = False
    """Whether structured output was constrained to its schema in training."""
    schema_in_prompt: bool = False
    """Whether models were told the form of structured output in training; older ones were not."""
    special_tokens_in_text: bool = False
    """Whether special tokens in messages' text were encoded as such in training."""
    temperature: float | None = None
    """Sampling temperature in training; None: what the app asked for, else 1."""
    frozen: Sequence[str] = ()
    """Agent paths whose own models answered on purpose in training."""
    merged: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Adapter -> folder of its base model with the adapter merged in, where that was asked for."""
    serve: Sequence[str] = ()
    """Commands that serve the adapters on vLLM where they were exported to, one for each base."""

    @property
    def rollout(self) -> dict[str, Any]:
        """Settings of the rollouts in training that the adapters need wherever they answer."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "constrain_output": self.constrain_output,
            "schema_in_prompt": self.schema_in_prompt,
        }

    def folders(self, folder: Path, base_model: str | None = None) -> dict[str, tuple[str, Path]]:
        """Base model and folder of each adapter.

        Args:
            folder: the export folder.
            base_model: where the base is now, if not where the manifest says.

        Raises:
            ExportError: adapters stand on several bases, which one `base_model` cannot replace.
        """
        bases = {str(own["base_model"]) for own in self.adapters.values()}
        if base_model is not None and len(bases) > 1:
            raise ExportError(
                f"the adapters in {folder} stand on {len(bases)} base models "
                f"({', '.join(sorted(bases))}); base_model can replace only a single one"
            )
        return {
            name: (base_model or str(own["base_model"]), folder / own["path"])
            for name, own in self.adapters.items()
        }


def read_manifest(export_dir: str | Path) -> Manifest:
    """The manifest of an export folder, every file checked against its digest.

    Raises:
        ExportError: the folder or its manifest is missing, or a file (the manifest itself
            included) is missing, changed or not in the manifest; or a path leads out of the folder.
    """
    folder = Path(export_dir)
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        raw = json.loads(content.decode())
        if raw.get("format", FORMAT) != FORMAT:
            raise ExportError(
                f"{folder} has format {raw['format']!r} of exports, this version of marft-graph "
                f"reads {FORMAT}; export the run again, or install the version that wrote it"
            )
        given = {spec.name for spec in dataclasses.fields(Manifest) if spec.name in raw}
        manifest = Manifest(**{name: raw[name] for name in given})
        is_intact = content == sealed(raw)
        paths = [str(own["path"]) for own in manifest.adapters.values()]
        digests = dict(manifest.sha256)
    except OSError as error:
        raise ExportError(
            f"{folder} is no export folder: cannot read {path.name}: {error}"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{path} is damaged, or no manifest of an export by this version: {error!r}"
        ) from error
    if not is_intact:
        raise ExportError(f"{folder} is damaged: {MANIFEST} differs from what was exported")
    for name in [*digests, *paths]:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ExportError(f"{path} names {name!r}, which is not in its folder")
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise ExportError(f"{folder} is incomplete: {name} is missing")
        if digest_of(folder / name) != digest:
            raise ExportError(f"{folder} is damaged: {name} differs from what was exported")
    for name in files_of(folder):
        if name not in digests:
            raise ExportError(f"{folder} is damaged: {name} is not in its manifest")
    return manifest


def check_same_bases(
    export_dir: Path, adapters: Mapping[str, Mapping[str, Any]], bases: Mapping[str, str]
) -> None:
    """Refuse base models whose files are others than those that the adapters were trained on.

    Args:
        export_dir: for the message.
        adapters: as in `Manifest.adapters`.
        bases: adapter -> the base model to use.

    Raises:
        ExportError: names the files.
        ModelError: they cannot be read.
    """
    recorded = {base: adapters[name].get("base_files") or {} for name, base in bases.items()}
    for base, files in recorded.items():
        if names := differing(files, fingerprint(base)):
            raise ExportError(
                f"the adapters in {export_dir} were trained on another base model: {base} has "
                f"another {', '.join(names)} now (put the old files back, or give base_model to "
                "use what is there all the same)"
            )


def files_of(folder: Path) -> list[str]:
    """Relative names of all files but the manifest, sorted."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MANIFEST)


def digest_of(file: Path) -> str:
    """Digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The content of a manifest's file, which ends with a digest of all the rest."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    whole = rest | {"manifest_sha256": digest}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()
