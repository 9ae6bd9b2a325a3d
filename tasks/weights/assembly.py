"""Teachers that are brought along instead of trained here: the base, adapters and full checkpoints of section
`teachers.sources`, as one folder of teachers.

Every weight is resolved and verified first, then everything is checked against the base by names and shapes, and only
then does the folder appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from data.bounds import OneOf
from data.errors import UserError, UserErrors
from data.files import atomic_folder, link_or_copy, read_json, write_json
from data.records import CapabilityName
from data.weights import SAFETENSORS, precision_of, read_header
from model.backbones import Backbone, load_backbone, parts
from model.checkpoint import write_tensors
from model.networks.adapters import PEFT_CONFIG, RECORDS, read_adapter
from model.networks.network import own_layers
from model.networks.teachers import (
    ADAPTER_WEIGHTS,
    BASE,
    KINDS,
    RECORD,
    WEIGHTS,
    TeacherRecord,
    compatibility_faults,
    weight_files,
    weights_sha256,
)
from tasks.weights.sources import Source, address_faults, resolve_all


@dataclass(frozen=True)
class SourceParams:
    """One teacher that is brought along. `kind`: "base" (a pipeline folder), "adapter" or "full" (a transformer, a
    pipeline, or one file).

    `uri`: as in tasks/weights/sources.py; `sha256`: what the weights must be, "" to pin them at the first fetch.
    """

    capability: CapabilityName
    kind: Annotated[str, OneOf(KINDS)]
    uri: str
    sha256: str


def source_faults(sources: Mapping[str, SourceParams]) -> list[str]:
    """What is wrong with section `teachers.sources` as it is written."""
    found = [] if BASE in sources else [f"sources: {BASE!r} is missing; every other teacher is defined on it"]
    for name, source in sources.items():
        if (source.kind == "base") != (name == BASE):
            found.append(
                f'sources.{name}.kind = {source.kind!r}: must be "base" for {BASE!r} and "full" or "adapter" for the others'
            )
        if source.sha256 and not re.fullmatch(r"[0-9a-f]{64}", source.sha256):
            found.append(f'sources.{name}.sha256 = {source.sha256!r}: expected 64 hexadecimal digits, or ""')
    return found + address_faults({f"sources.{name}.uri": source.uri for name, source in sources.items()})


def addresses(sources: Mapping[str, SourceParams]) -> dict[str, str]:
    """The params' key -> address, as messages name them."""
    return {f"teachers.sources.{name}.uri": source.uri for name, source in sources.items()}


def assemble(sources: Mapping[str, SourceParams], out: Path, project: Path) -> dict[str, Any]:
    """Writes a folder of teachers to `out`; large files are hard links to where they lie. Returns name -> short hash.

    Raises UserErrors with all that is missing, then with all that does not fit the base, before anything is written.
    """
    labels = {name: f"teachers.sources.{name}.uri" for name in sources}
    found = resolve_all({labels[name]: (source.uri, source.sha256) for name, source in sources.items()}, project)
    base = found[labels[BASE]]
    backbone = load_backbone(base.path, need=())  # its shapes; no weight is read
    faults: list[str] = []
    with atomic_folder(out) as folder:
        first = _base(folder / BASE, sources[BASE], base, backbone)
        for name, source in sources.items():
            if name != BASE:
                try:
                    (_adapter if source.kind == "adapter" else _full)(
                        folder / name, name, source, found[labels[name]], backbone, first
                    )
                except UserErrors as errors:
                    faults += [f"{name}: {fault}" for fault in errors.faults]
                except UserError as error:
                    faults.append(f"{name}: {error}")
        if not faults:
            faults = compatibility_faults(folder, sources)
        if faults:
            raise UserErrors(f"these teachers do not belong on the base {base.uri}:", faults)
        return {name: read_json(folder / name / RECORD)["sha256"][:12] for name in sources}


def _record(
    folder: Path, backbone: Backbone, source: SourceParams, found: Source, base: TeacherRecord | None, **changes: Any
) -> TeacherRecord:
    headers = [read_header(file) for file in weight_files(folder, source.kind)]
    sha256 = weights_sha256(folder, source.kind)
    facts: dict[str, Any] = {
        "name": folder.name,
        "capability": source.capability,
        "kind": source.kind,
        "backbone": backbone.name,
        "base_sha256": sha256 if base is None else base.sha256,
        "sha256": sha256,
        "latent_shape": list(backbone.latent_shape),
        "scheduler": backbone.scheduler,
        "precision": precision_of(headers),
        "rank": 0,
        "alpha": 0,
        "base_id": found.uri if base is None else base.base_id,
        "source": found.uri,
        "revision": found.revision,
    }
    record = TeacherRecord(**{**facts, **changes})
    write_json(folder / RECORD, asdict(record))
    return record


def _base(folder: Path, source: SourceParams, found: Source, backbone: Backbone) -> TeacherRecord:
    if not found.files:
        raise UserError(
            f"{found.uri}: the base is a pipeline folder (model_index.json, transformer/, text_encoder/, vae/, ...), not one file"
        )
    for name in found.files:
        link_or_copy(found.path / name, folder / name)
    weights = {file.relative_to(folder).as_posix() for file in weight_files(folder, "base")}
    _fit(backbone, weight_files(folder, "base"))
    return _record(
        folder,
        backbone,
        source,
        found,
        None,
        files={name: sha256 for name, sha256 in found.files.items() if name not in weights},
    )


def _adapter(
    folder: Path, name: str, source: SourceParams, found: Source, backbone: Backbone, base: TeacherRecord
) -> None:
    _says_another_base(found, base)
    adapter = read_adapter(found.path, backbone.network, backbone.name)
    folder.mkdir(parents=True)
    write_tensors(folder / ADAPTER_WEIGHTS, adapter.tensors)
    targets = [] if set(adapter.modules) == own_layers(backbone) else list(adapter.modules)
    _record(folder, backbone, source, found, base, rank=adapter.rank, alpha=adapter.alpha, targets=targets)


def _full(
    folder: Path, name: str, source: SourceParams, found: Source, backbone: Backbone, base: TeacherRecord
) -> None:
    _says_another_base(found, base)
    origin = found.path / "transformer" if (found.path / "transformer").is_dir() else found.path
    changes: dict[str, Any] = {}
    if origin.is_dir():
        for file in (
            [*weight_files(origin.parent, "full")]
            if origin.name == "transformer"
            else sorted(origin.glob(f"*{SAFETENSORS}"))
        ):
            link_or_copy(file, folder / "transformer" / file.name)
        for file in origin.glob(f"{WEIGHTS}.index.json"):
            link_or_copy(file, folder / "transformer" / file.name)
        if (found.path / "scheduler").is_dir():
            changes["scheduler"] = parts.read_scheduler(found.path)
    else:
        link_or_copy(origin, folder / "transformer" / WEIGHTS)
    files = weight_files(folder, "full")
    absent = [file for file in files if not file.exists()]
    if absent:
        raise UserError(
            f"{found.uri}: no {absent[0].name} in it; a full teacher is a transformer as diffusers saves it"
        )
    _fit(backbone, files)
    _record(folder, backbone, source, found, base, **changes)


def _fit(backbone: Backbone, files: list[Path]) -> None:
    """Names and shapes of the weights against the base's network, by headers alone."""
    expected = {name: list(value.shape) for name, value in parts.plain_state(backbone.network).items()}
    stored = {name: entry["shape"] for file in files for name, entry in read_header(file).items()}
    faults = [f"missing key {name!r}" for name in sorted(expected.keys() - stored.keys())]
    faults += [f"extra key {name!r}" for name in sorted(stored.keys() - expected.keys())]
    faults += [
        f"{name!r} is {stored[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if faults:
        shown = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise UserError(
            f"{files[0].parent}: the weights do not fit the base's network ({len(expected)} tensors): {shown}"
        )


def _says_another_base(found: Source, base: TeacherRecord) -> None:
    """Raises UserError where the files beside the weights name another base: a record of this pipeline by its hash,
    PEFT's config by the hub's name.
    """
    folder = found.path if found.path.is_dir() else found.path.parent
    for name in RECORDS:
        if (folder / name).is_file():
            record = read_json(folder / name)
            if record.get("base_sha256") not in (None, base.sha256):
                raise UserError(
                    f"{found.uri}: {name} says base_sha256 = {record['base_sha256'][:12]}, the base has {base.sha256[:12]}; it was trained on another base"
                )
            if record.get("own_start") and record.get("adapter"):
                raise UserError(
                    f"{found.uri}: this student's adapter lies on a start of its own; export it as merged and bring that as a full teacher"
                )
    if (folder / PEFT_CONFIG).is_file():
        named = read_json(folder / PEFT_CONFIG).get("base_model_name_or_path") or ""
        match = re.match(r"hf://([^/@]+/[^/@]+)", base.base_id)
        if (
            match
            and re.fullmatch(r"[\w.-]+/[\w.-]+", named)
            and named.lower() != match[1].lower()
            and not Path(named).exists()
        ):
            words = f"{PEFT_CONFIG} says base_model_name_or_path = {named!r}, the base is {match[1]!r}"
            raise UserError(f"{found.uri}: {words}; it was trained on another base")
