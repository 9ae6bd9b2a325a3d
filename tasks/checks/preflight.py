"""Faults that can be known before anything expensive runs: the whole of params.yaml, and the teachers that its routes
name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scorers import entries
from data.errors import UserError, UserErrors
from data.files import read_json
from data.records import CAPABILITIES
from data.sources import SOURCES
from data.yaml_files import read_yaml
from tasks.environment import TEACHERS
from tasks.params.reading import PARAMS_FILE, check_sections
from tasks.stages.contract import sections
from tasks.weights.sources import HUB, address_faults, missing_faults, unfetchable_faults

MALFORMED = (KeyError, TypeError, AttributeError)  # of a section with another form, which check_all names


def check_all(path: str | Path = PARAMS_FILE) -> None:
    """Checks every section of params.yaml against the code that reads it. Raises UserErrors with all faults at once."""
    check_sections(sections(), path)


def preflight(path: str | Path = PARAMS_FILE, teachers: Path = TEACHERS) -> None:
    """Raises UserErrors with every fault: of all sections, and of what they name and is not there."""
    faults: list[str] = []
    try:
        check_all(path)
    except UserErrors as errors:
        faults += errors.faults
    document, project = read_yaml(path), teachers.absolute().parents[1]
    faults += teacher_faults(document, teachers) + folder_faults(document, project)
    faults += network_faults(document, project) + judge_faults(document)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise UserErrors(f"{path}: {count} found before anything ran", faults)


def folder_faults(document: dict[str, Any], project: Path) -> list[str]:
    """The folder of examples that section `collect` names, where it is not there."""
    collect = document.get("collect")
    source = SOURCES.get(str(collect.get("source"))) if isinstance(collect, dict) else None
    folder = collect.get("folder") if isinstance(collect, dict) and source and source.reads_folder else None
    if not folder or (project / str(folder)).is_dir():
        return []
    remedy = "put your manifests and images there, or name where they are"
    return [f"collect.folder = {folder!r}: no such folder; {remedy}"]


def evaluators(document: dict[str, Any], project: Path) -> dict[str, tuple[str, str]]:
    """The params' key -> (address, "here", "to fetch" or "missing") of the networks that look at the images."""
    section, found = document.get("benchmark"), {}
    benchmark = section if isinstance(section, dict) else {}
    for key in (key for entry in entries(str(benchmark.get("detector"))) for key in entry.networks):
        name = str(benchmark.get(key) or "")
        if name:
            here = (project / name).is_dir() or in_hub_cache(name)
            found[f"benchmark.{key}"] = (
                name,
                "here" if here else "to fetch" if HUB.fullmatch(f"hf://{name}") else "missing",
            )
    return found


def in_hub_cache(name: str) -> bool:
    """Whether the hub's cache on this machine has the model `owner/name` or `owner/name@revision`."""
    from huggingface_hub import try_to_load_from_cache

    model, _, revision = name.partition("@")
    return isinstance(try_to_load_from_cache(model, "config.json", revision=revision or None), str)


def network_faults(document: dict[str, Any], project: Path) -> list[str]:
    """Networks that judge images and are nowhere, and weights that the hub would have to give and does not."""
    uris, known = _source_uris(document), evaluators(document, project)
    remedy = "no such folder, and no name on the hub (owner/name); put the network there, or name where it is"
    faults = [f"{key} = {name!r}: {remedy}" for key, (name, state) in known.items() if state == "missing"]
    uris |= {key: f"hf://{name}" for key, (name, state) in known.items() if state == "to fetch"}
    return faults if address_faults(uris) else faults + unfetchable_faults(uris, project)


def _source_uris(document: dict[str, Any]) -> dict[str, str]:
    """The params' key -> address of every teacher that is fetched."""
    try:
        sources = dict(document["teachers"].get("sources") or {})
        return {f"teachers.sources.{name}.uri": str(source["uri"]) for name, source in sources.items()}
    except MALFORMED:
        return {}


def judge_faults(document: dict[str, Any]) -> list[str]:
    """A judge that the routes will need, and that is not named or whose key is not in the environment."""
    try:
        judge, asks = document["judge"], any(entry.asks for entry in entries(str(document["benchmark"]["detector"])))
        edits = sorted(
            {
                route["capability"]
                for route in document["routing"]["routes"]
                if CAPABILITIES[route["capability"]].is_edit
            }
        )
        variable = judge["server"]["key_variable"] if judge["kind"] == "endpoint" else ""
    except (KeyError, TypeError):
        return []  # the sections' own checks name what is wrong with them
    if not asks or not edits:
        return []
    if judge["kind"] == "none":
        remedy = "which a detector cannot judge; name an endpoint or a local judge"
        return [f"judge.kind = 'none': the routes edit ({', '.join(edits)}), {remedy}"]
    if variable and not os.environ.get(variable):
        remedy = 'export it, or write "" for a server that needs no key'
        return [f"judge.server.key_variable = {variable!r}: this variable is not set; {remedy}"]
    return []


def teacher_faults(document: dict[str, Any], teachers: Path) -> list[str]:
    """Routed teachers that section `teachers` does not make, or without files in the folder `teachers`."""
    try:
        routed = [(index, route["teacher"]) for index, route in enumerate(document["routing"]["routes"])]
        sources = dict(document["teachers"].get("sources") or {})
        made = [*document["teachers"]["teachers"], *sources]
    except MALFORMED:
        return []
    section = "teachers.sources" if sources else "section teachers"
    unknown = f"no such teacher in {section}; choose of {', '.join(map(str, made))}"
    faults = []
    uris = _source_uris(document)
    if sources and not address_faults(uris):  # the folder is made from them when the run fetches its teachers
        faults = missing_faults(uris, teachers.absolute().parents[1])
    for index, name in routed:
        key = f"routing.routes[{index}].teacher = {name!r}"
        if name not in made:
            faults.append(f"{key}: {unknown}")
        elif not sources and teachers.is_dir() and not any((teachers / name).rglob("*.safetensors")):
            remedy = f"restore them with: dvc checkout --force {teachers}"
            faults.append(f"{key}: no weights in {teachers / name}; {remedy}")
    return faults


def require_teachers(path: str | Path = PARAMS_FILE, teachers: Path = TEACHERS) -> None:
    """Raises UserError(s) unless `teachers` is there and holds every teacher that a route names."""
    if not teachers.is_dir():
        raise UserError(f"{teachers}: no such folder; fetch the trained teachers with: dvc pull {teachers}")
    document = read_yaml(path)
    faults = teacher_faults(document, teachers) + other_teachers(document, teachers)
    if faults:
        raise UserErrors(f"{teachers}: not every routed teacher is there", faults)


def other_teachers(document: dict[str, Any], teachers: Path) -> list[str]:
    """Teachers of `teachers.sources` whose folder was made from another address, or not at all."""
    faults = []
    remedy = f"make it again: python -m tasks teachers --out {teachers}, then dvc commit --force teachers"
    for name, source in (document["teachers"].get("sources") or {}).items():
        record = teachers / name / "teacher.json"
        origin = read_json(record).get("source") if record.is_file() else None
        if origin != source["uri"]:
            wanted = f"teachers.sources.{name}.uri is {source['uri']}"
            faults.append(f"{record.parent}: made from {origin or 'nothing that is named'}, {wanted}; {remedy}")
    return faults


def cli(arguments: Sequence[str]) -> int:
    about = "Check every section of params.yaml, the routes and the teachers they name."
    parser = argparse.ArgumentParser("python -m tasks check", description=about)
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE")
    path = parser.parse_args(arguments).params
    preflight(path)
    print(f"{path}: no fault found")
    return 0
