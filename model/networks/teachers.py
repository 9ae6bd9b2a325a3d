"""Teachers on disk and in memory: the base itself, adapters on it, or full checkpoints of the same network.

A teacher is a folder: its weights and `teacher.json`, the record that binds them to a base, a latent space and a
scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_file, write_json
from data.weights import precision_of, read_header
from model.backbones import Backbone, load_backbone, parts
from model.checkpoint import write_tensors
from model.families import FAMILIES
from model.networks.network import (
    NetworkField,
    adapter_parameters,
    add_adapter,
    base_weight,
    keys_in_file,
    load_adapter,
)

BASE = "base"
RECORD = "teacher.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KINDS = ("base", "full", "adapter")
RESERVED = ("student", "frozen", "merged", "specialists")  # the student's adapter, its frozen copy, two starts


@dataclass(frozen=True)
class TeacherRecord:
    """What `teacher.json` holds. `kind`: "base", "adapter" or "full"; rank and alpha are 0 unless it is an adapter;
    hashes are SHA-256 of the weight files.

    The last five have defaults because records written before them are still read: `base_id`, where the base came from;
    `source` and `revision`, where these weights came from; `targets`, the layers of an adapter that covers others than
    its family's own; `files`, the SHA-256 of what comes along with a base.
    """

    name: str
    capability: str
    kind: str
    backbone: str
    base_sha256: str
    sha256: str
    latent_shape: list[int]
    scheduler: dict[str, Any]
    precision: str
    rank: int
    alpha: int
    base_id: str = ""
    source: str = ""
    revision: str = ""
    targets: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def weights_file(folder: Path, kind: str) -> Path:
    return folder / ADAPTER_WEIGHTS if kind == "adapter" else folder / "transformer" / WEIGHTS


def weight_files(folder: Path, kind: str) -> list[Path]:
    """The files that hold the weights: one, or the shards that an index names (diffusers writes large networks so). A
    missing one is listed all the same."""
    whole = weights_file(folder, kind)
    index = whole.with_name(f"{whole.name}.index.json")
    if whole.exists() or not index.exists():
        return [whole]
    mapping = read_json(index)
    names = sorted(set(mapping.get("weight_map", {}).values())) if isinstance(mapping, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index}: names no shards, or files outside its folder; fetch the checkpoint again")
    return [whole.with_name(name) for name in names]


def weights_sha256(folder: Path, kind: str) -> str:
    """SHA-256 of the weights: of the one file, or of the list of shards with theirs."""
    files = weight_files(folder, kind)
    return sha256_file(files[0]) if len(files) == 1 else digest({file.name: sha256_file(file) for file in files})


def save_teacher(
    folder: Path, backbone: Backbone, network: Any, *, name: str, capability: str, kind: str, base_sha256: str | None
) -> None:
    """Writes weights in half precision and the record. `base_sha256` is None for the base, which brings its other parts
    along, in the precision it has."""
    file, rank, alpha = weights_file(folder, kind), 0, 0
    if kind == "base":
        backbone.save(folder, network)
    else:
        tensors: Mapping[str, torch.Tensor] = network.state_dict()
        if kind == "adapter":
            tensors, config = keys_in_file(adapter_parameters(network, name), name), network.peft_config[name]
            rank, alpha = int(config.r), int(config.lora_alpha)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {key: value.to(torch.float16) for key, value in tensors.items()})
    sha256 = sha256_file(file)
    record = TeacherRecord(
        name=name,
        capability=capability,
        kind=kind,
        backbone=backbone.name,
        base_sha256=base_sha256 or sha256,
        sha256=sha256,
        latent_shape=list(backbone.latent_shape),
        scheduler=backbone.scheduler,
        precision=precision_of([read_header(file)]),
        rank=rank,
        alpha=alpha,
    )
    write_json(folder / RECORD, asdict(record))


def read_records(folder: Path) -> dict[str, TeacherRecord]:
    """Every teacher's record below `folder`, by name. Raises UserErrors for records that are damaged or missing
    altogether."""
    records, faults = _scan(folder)
    if faults:
        raise UserErrors("teachers cannot be used:", faults)
    return records


def _scan(folder: Path) -> tuple[dict[str, TeacherRecord], list[str]]:
    """The records that can be read, and the faults of those that cannot or that are not what they say."""
    records, faults = {}, []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            record = TeacherRecord(**read_json(path))
        except (TypeError, UserError) as error:
            faults.append(str(error) if isinstance(error, UserError) else f"{path}: not a teacher record ({error})")
            continue
        if record.name != path.parent.name:
            faults.append(f"{path}: name = {record.name!r}, but the folder is called {path.parent.name!r}")
        if record.kind not in KINDS:
            faults.append(f"{path}: kind = {record.kind!r}: choose one of {list(KINDS)}")
            continue
        if record.name in RESERVED or not re.fullmatch(r"[A-Za-z0-9_-]+", record.name):
            faults.append(f"{path}: name = {record.name!r}: use letters, digits, - and _, and none of {list(RESERVED)}")
        records[path.parent.name] = record
    if not records and not faults:
        faults.append(f"{folder}: no teacher in it; `dvc pull data/teachers` brings the bundled ones")
    return records, faults


def compatibility_faults(folder: Path, names: Iterable[str]) -> list[str]:
    """Why the named teachers cannot be distilled together: missing files, changed hashes, another base, latent space or
    scheduler.

    Reads no weights, only their hashes.
    """
    records, faults = _scan(folder)
    base = records.get(BASE)
    for name in dict.fromkeys([BASE, *names]):
        record = records.get(name)
        if record is None:
            if not (folder / name / RECORD).exists():
                missing = "the base is missing; every teacher is defined on it"
                faults.append(
                    f"{folder / name}: {missing if name == BASE else f'no such teacher; have {sorted(records)}'}"
                )
            continue
        faults += _weight_faults(folder / name, record)
        if record.backbone not in FAMILIES:
            faults.append(f"{name}: backbone = {record.backbone!r}: unknown; choose one of {sorted(FAMILIES)}")
        for key in ("backbone", "base_sha256", "latent_shape", "scheduler") if base else ():
            value, wanted = getattr(record, key), getattr(base, key)
            if value != wanted:
                rule = "teachers must share base, latent space and scheduler"
                faults.append(f"{name}: {key} = {value!r}, the base has {wanted!r}; {rule}")
    return faults


def _weight_faults(folder: Path, record: TeacherRecord) -> list[str]:
    """What is wrong with one teacher's weights: missing, changed, or other than the record says in precision or rank.
    The tensors are not loaded."""
    try:
        files = weight_files(folder, record.kind)
        missing = [file for file in files if not file.exists()]
        if missing:
            return [f"{file}: no such file; `dvc pull data/teachers` brings the bundled teachers" for file in missing]
        if weights_sha256(folder, record.kind) != record.sha256:
            differs = f"its SHA-256 is not the one of {folder.name}/{RECORD}"
            return [f"{files[0]}: {differs}; the file was changed or cut short, pull it again"]
        headers = [read_header(file) for file in files]
    except UserError as error:
        return [str(error)]
    faults = []
    remedy = "the record belongs to other weights"
    if record.precision != precision_of(headers):
        stored = precision_of(headers)
        faults.append(f"{folder.name}: precision = {record.precision!r}, the weights are {stored}; {remedy}")
    ranks = {entry["shape"][0] for header in headers for key, entry in header.items() if key.endswith(".lora_A.weight")}
    if record.kind == "adapter" and ranks != {record.rank}:
        faults.append(f"{folder.name}: rank = {record.rank}, the weights have {sorted(ranks)}; {remedy}")
    if record.kind == "adapter" and record.alpha < 1:
        faults.append(f"{folder.name}: alpha = {record.alpha}; expected 1 or more")
    return faults


def file_faults(folder: Path, names: Iterable[str]) -> list[str]:
    """What came along with the named teachers (text encoders, VAE, tokenizers, scheduler) and is not what their records
    say. Hashes every file."""
    records, faults = _scan(folder)[0], []
    for name in dict.fromkeys([BASE, *names]):
        for file, sha256 in (records[name].files if name in records else {}).items():
            path = folder / name / file
            if not path.is_file():
                faults.append(f"{path}: no such file, but {name}/{RECORD} names it; make the teachers again")
            elif sha256_file(path) != sha256:
                faults.append(f"{path}: its SHA-256 is not the one of {name}/{RECORD}; make the teachers again")
    return faults


def load_base(folder: Path, **options: Any) -> Backbone:
    """The frozen base below the teachers' folder; `options` are those of `load_backbone`. Raises UserErrors when it is
    missing or damaged."""
    faults = compatibility_faults(folder, [])
    if faults:
        raise UserErrors("teachers cannot be used:", faults)
    return load_backbone(folder / BASE, **options)


def _load_full(backbone: Backbone, folder: Path, device: torch.device | str | None) -> Any:
    """A full checkpoint as a frozen network of its own, without the adapters that the base may carry by now: in the
    base's precision, so that student and teacher compute alike, and on its device unless another is named."""
    weight = base_weight(backbone)
    with torch.device("meta"):
        network = type(backbone.network).from_config(dict(backbone.network.config))
    parts.load_weights(network, weight_files(folder, "full"), weight.dtype, device or weight.device)
    network.requires_grad_(False)
    network.eval()
    return network


def load_teachers(
    folder: Path, names: Iterable[str], offload: bool = False, **options: Any
) -> tuple[Backbone, dict[str, NetworkField]]:
    """The shared base and the named teachers as fields: "base" is the base with every adapter off, adapters are
    switched on it, full checkpoints stand alone.

    `offload` keeps full checkpoints on the CPU but for their own evaluations. `options` are those of `load_backbone`.
    Raises UserErrors with every fault when they do not belong together.
    """
    names = list(dict.fromkeys(names))
    faults = compatibility_faults(folder, names)
    if faults:
        raise UserErrors("teachers cannot be used:", faults)
    records, backbone = read_records(folder), load_backbone(folder / BASE, **options)
    fields = {}
    for name in names:
        record = records[name]
        if record.kind == "base":
            fields[name] = NetworkField(backbone, backbone.network)
        elif record.kind == "full":
            device = next(backbone.network.parameters()).device
            network = _load_full(backbone, folder / name, "cpu" if offload else None)
            fields[name] = NetworkField(backbone, network, None, device if offload else None)
        else:
            network, rank, alpha = backbone.network, record.rank, record.alpha
            parameters = add_adapter(backbone, network, name, rank, alpha, seed=0, targets=record.targets)
            load_adapter(parameters, weights_file(folder / name, record.kind), name)
            fields[name] = NetworkField(backbone, network, name)
    backbone.network.requires_grad_(False)
    return backbone, fields
