"""GenEval's folder of images, as its own scripts write and read it: ROOT/00017/metadata.jsonl and
ROOT/00017/samples/00000.png, one folder a prompt.

Images made elsewhere are read too: any folder whose name is a number, any PNG whose name begins with one. Which prompt
a folder belongs to is told by its metadata and by nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError, UserErrors
from data.files import write_text
from data.images import ImageFault, decode_image

SUITE = "geneval"
METADATA_FILE = "metadata.jsonl"
SAMPLES = "samples"
MAX_PIXELS = 4096 * 4096
SHOWN = 5  # faults of a kind that are named one by one


@dataclass(frozen=True)
class Item:
    """One image of the set: the k-th sample of the prompt with this index; `path` is relative to the folder."""

    index: int
    k: int
    path: str
    record: Mapping[str, Any]

    @property
    def example_id(self) -> str:
        return example_id(self.index)


def example_id(index: int) -> str:
    return f"{index:05d}"


def image_path(index: int, k: int) -> str:
    """Relative to the folder of images."""
    return f"{index:05d}/{SAMPLES}/{k:05d}.png"


def image_seed(index: int, k: int, seed: int) -> int:
    """Of one image, from suite, prompt, sample and base seed alone: two models start from the same noise, two prompts
    do not. 63 bits.
    """
    return int.from_bytes(hashlib.sha256(f"{SUITE}|{example_id(index)}|{k}|{seed}".encode()).digest()[:8], "big") >> 1


def write_metadata(root: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes every prompt's metadata file, so that the folder says which images are still missing."""
    for index, record in enumerate(records):
        path, text = Path(root) / example_id(index) / METADATA_FILE, json.dumps(record) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _canonical(record: Any) -> str:
    return json.dumps(record, sort_keys=True)


def _folders(root: Path, records: Sequence[Mapping[str, Any]], faults: list[str]) -> dict[int, Path]:
    """prompt index -> its folder, by the folder's metadata."""
    index_of = {_canonical(record): index for index, record in enumerate(records)}
    found: dict[int, Path] = {}
    broken, foreign, repeated = [], [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name.isdecimal()):
        try:
            lines = (folder / METADATA_FILE).read_text(encoding="utf-8").splitlines()
            index = index_of.get(_canonical(json.loads(lines[0])))
        except (OSError, ValueError, IndexError) as error:
            broken.append(f"{folder.name} ({error})")
            continue
        if index is None:
            foreign.append(folder.name)
        elif index in found:
            repeated.append(f"{folder.name} and {found[index].name}")
        else:
            found[index] = folder
    faults += [f"{len(broken)} folders without a readable {METADATA_FILE}: {_some(broken)}"] if broken else []
    faults += (
        [f"{len(foreign)} folders whose {METADATA_FILE} is no record of the prompt set: {_some(foreign)}"]
        if foreign
        else []
    )
    faults += [f"{len(repeated)} prompts appear in two folders: {_some(repeated)}"] if repeated else []
    missing = [example_id(index) for index in range(len(records)) if index not in found]
    faults += [f"{len(missing)} of {len(records)} prompts have no folder: {_some(missing)}"] if missing else []
    return found


def _samples(folder: Path, faults: list[str]) -> dict[int, str]:
    """Sample number -> file name, of the PNG files whose names begin with digits."""
    found: dict[int, str] = {}
    for file in sorted((folder / SAMPLES).glob("*.png")):
        match = re.match(r"\d+", file.name)
        if match is None:
            continue
        number = int(match.group())
        if number in found:
            faults.append(f"{folder.name}: {found[number]} and {file.name} have the same number; keep one")
        found[number] = file.name
    return found


def read_images(root: str | Path, records: Sequence[Mapping[str, Any]], samples: int | None = None) -> list[Item]:
    """Every image of the set in the order of prompts and samples; `samples` images a prompt, or as many as there are
    where None.

    Raises UserErrors with all faults at once: a wrong or missing metadata file, a prompt that is missing or there
    twice, an unequal number of images.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; give the folder that holds 00000/{METADATA_FILE} and 00000/{SAMPLES}/"
        )
    faults: list[str] = []
    folders = _folders(root, records, faults)
    names = {index: _samples(folder, faults) for index, folder in sorted(folders.items())}
    counts = {index: len(found) for index, found in names.items()}
    expected = max(counts.values(), default=0) if samples is None else samples
    unequal = [f"{folders[index].name} has {count}" for index, count in counts.items() if count != expected]
    if expected < 1:
        faults.append("there is no image; generate them first")
    elif unequal:
        faults.append(f"{len(unequal)} prompts do not have {expected} image(s): {_some(unequal)}")
    if faults:
        raise UserErrors(f"{root}: not a complete set of {len(records)} prompts:", faults)
    return [
        Item(index, k, f"{folders[index].name}/{SAMPLES}/{found[number]}", records[index])
        for index, found in names.items()
        for k, number in enumerate(sorted(found))
    ]


def read_pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises UserError for a file that is missing or cannot be decoded to its last byte."""
    try:
        return np.asarray(decode_image(path, max_pixels=MAX_PIXELS, convert_modes=True))
    except ImageFault as fault:
        raise UserError(f"{path}: {fault}; make this image again") from fault
