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
    faults = [] if BASE in sources else [f"sources: {BASE!r} is missing; every other teacher is defined on it"]
    for name, source in sources.items():
        if (source.kind == "base") != (name == BASE):
            wanted = f'must be "base" for {BASE!r} and "full" or "adapter" for the others'
            faults.append(f"sources.{name}.kind = {source.kind!r}: {wanted}")
        if source.sha256 and not re.fullmatch(r"[0-9a-f]{64}", source.sha256):
            faults.append(f'sources.{name}.sha256 = {source.sha256!r}: expected 64 hexadecimal digits, or ""')
    return faults + address_faults({f"sources.{name}.uri": source.uri for name, source in sources.items()})


def _label(name: str) -> str:
    return f"teachers.sources.{name}.uri"


def addresses(sources: Mapping[str, SourceParams]) -> dict[str, str]:
    """The params' key -> address, as messages name them."""
    return {_label(name): source.uri for name, source in sources.items()}


def assemble(sources: Mapping[str, SourceParams], out: Path, project: Path) -> dict[str, Any]:
    """Writes a folder of teachers to `out`; large files are hard links to where they lie. Returns name -> short hash.

    Raises UserErrors with all that is missing, then with all that does not fit the base, before anything is written.
    """
    weights = resolve_all({_label(name): (source.uri, source.sha256) for name, source in sources.items()}, project)
    origin = weights[_label(BASE)]
    backbone = load_backbone(origin.path, need=())  # its shapes; no weight is read
    faults: list[str] = []
    with atomic_folder(out) as folder:
        base = _bring(folder / BASE, sources[BASE], origin, backbone, None)
        for name, source in sources.items():
            try:
                if name != BASE:
                    _bring(folder / name, source, weights[_label(name)], backbone, base)
            except UserError as error:
                faults += [f"{name}: {fault}" for fault in getattr(error, "faults", [error])]
        faults = faults or compatibility_faults(folder, sources)
        if faults:
            raise UserErrors(f"these teachers do not belong on the base {origin.uri}:", faults)
        return {name: read_json(folder / name / RECORD)["sha256"][:12] for name in sources}


def _bring(
    folder: Path, params: SourceParams, source: Source, backbone: Backbone, base: TeacherRecord | None
) -> TeacherRecord:
    """Fills `folder` with a teacher's weights and record; `base` is the base's record, None for the base itself."""
    if base is not None:
        _check_base(source, base)
    kind = params.kind
    facts: dict[str, Any] = {"scheduler": backbone.scheduler, "rank": 0, "alpha": 0}
    facts |= {"base": _base, "adapter": _adapter, "full": _full}[kind](folder, source, backbone)
    sha256 = weights_sha256(folder, kind)
    record = TeacherRecord(
        name=folder.name,
        capability=params.capability,
        kind=kind,
        backbone=backbone.name,
        base_sha256=base.sha256 if base else sha256,
        sha256=sha256,
        latent_shape=list(backbone.latent_shape),
        precision=precision_of([read_header(file) for file in weight_files(folder, kind)]),
        base_id=base.base_id if base else source.uri,
        source=source.uri,
        revision=source.revision,
        **facts,
    )
    write_json(folder / RECORD, asdict(record))
    return record


def _base(folder: Path, source: Source, backbone: Backbone) -> dict[str, Any]:
    """Links the pipeline's files. Each of the three writers returns what it adds to the record."""
    if not source.files:
        form = "(model_index.json, transformer/, text_encoder/, vae/, ...)"
        raise UserError(f"{source.uri}: the base is a pipeline folder {form}, not one file")
    for name in source.files:
        link_or_copy(source.path / name, folder / name)
    files = weight_files(folder, "base")
    _check_shapes(backbone, files)
    weights = {file.relative_to(folder).as_posix() for file in files}
    return {"files": {name: sha256 for name, sha256 in source.files.items() if name not in weights}}


def _adapter(folder: Path, source: Source, backbone: Backbone) -> dict[str, Any]:
    adapter = read_adapter(source.path, backbone.network, backbone.name)
    folder.mkdir(parents=True)
    write_tensors(folder / ADAPTER_WEIGHTS, adapter.tensors)
    targets = [] if set(adapter.modules) == own_layers(backbone) else list(adapter.modules)
    return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": targets}


def _full(folder: Path, source: Source, backbone: Backbone) -> dict[str, Any]:
    inner = source.path / "transformer"
    if source.path.is_file():
        link_or_copy(source.path, folder / "transformer" / WEIGHTS)
    else:
        origin = inner if inner.is_dir() else source.path
        shards = weight_files(source.path, "full") if inner.is_dir() else sorted(origin.glob(f"*{SAFETENSORS}"))
        for file in [*shards, *origin.glob(f"{WEIGHTS}.index.json")]:
            link_or_copy(file, folder / "transformer" / file.name)
    files = weight_files(folder, "full")
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise UserError(f"{source.uri}: no {absent[0]} in it; a full teacher is a transformer as diffusers saves it")
    _check_shapes(backbone, files)
    return {"scheduler": parts.read_scheduler(source.path)} if (source.path / "scheduler").is_dir() else {}


def _check_shapes(backbone: Backbone, files: list[Path]) -> None:
    """Raises UserError where names or shapes of the weights, by headers alone, are not those of the base's network."""
    expected = {name: list(value.shape) for name, value in parts.plain_state(backbone.network).items()}
    stored = {name: entry["shape"] for file in files for name, entry in read_header(file).items()}
    faults = [f"missing key {name!r}" for name in sorted(expected.keys() - stored.keys())]
    faults += [f"extra key {name!r}" for name in sorted(stored.keys() - expected.keys())]
    shared = [name for name in expected if name in stored]
    faults += [
        f"{name!r} is {stored[name]}, expected {expected[name]}" for name in shared if stored[name] != expected[name]
    ]
    if faults:
        shown = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        where = f"{files[0].parent}: the weights do not fit the base's network ({len(expected)} tensors)"
        raise UserError(f"{where}: {shown}")


def _check_base(source: Source, base: TeacherRecord) -> None:
    """Raises UserError where the files beside the weights name another base: a record of this pipeline by its hash,
    PEFT's config by the hub's name."""
    folder = source.path if source.path.is_dir() else source.path.parent
    for name in RECORDS:
        record = read_json(folder / name) if (folder / name).is_file() else {}
        sha256 = record.get("base_sha256") or base.sha256
        if sha256 != base.sha256:
            words = f"{name} says base_sha256 = {sha256[:12]}, the base has {base.sha256[:12]}"
            raise UserError(f"{source.uri}: {words}; it was trained on another base")
        if record.get("own_start") and record.get("adapter"):
            words = "this student's adapter lies on a start of its own"
            raise UserError(f"{source.uri}: {words}; export it as merged and bring that as a full teacher")
    path = folder / PEFT_CONFIG
    trained_on = (read_json(path).get("base_model_name_or_path") if path.is_file() else "") or ""
    match = re.match(r"hf://([^/@]+/[^/@]+)", base.base_id)
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", trained_on) and not Path(trained_on).exists()
    if match and is_hub_name and trained_on.lower() != match[1].lower():
        words = f"{PEFT_CONFIG} says base_model_name_or_path = {trained_on!r}, the base is {match[1]!r}"
        raise UserError(f"{source.uri}: {words}; it was trained on another base")
