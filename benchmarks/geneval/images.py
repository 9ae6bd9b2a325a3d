"""GenEval's folder of images, as its own scripts write and read it: ROOT/00017/metadata.jsonl and
ROOT/00017/samples/00000.png, one folder a prompt.

Images made elsewhere are read too: any folder whose name is a number, any PNG whose name is one ("00001_mask.png" is no
sample). The metadata alone tells which prompt a folder belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError, UserErrors
from data.files import write_text
from data.images import ImageFault, decode_image
from data.randomness import seed_of

SUITE = "geneval"
METADATA_FILE = "metadata.jsonl"
SAMPLES = "samples"
MAX_PIXELS = 4096 * 4096
SHOWN = 5  # names that a message shows of many
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Item:
    """An image of the set: the k-th sample of the prompt with this index; `path` is relative to the folder."""

    index: int
    k: int
    path: str
    record: Mapping[str, Any]

    @property
    def example_id(self) -> str:
        return example_id(self.index)


@dataclass(frozen=True)
class ImageSet:
    """A folder with every image of a prompt set, `items` in the order of prompts and samples; `pictures` are their
    paths and records."""

    root: Path
    records: Records
    items: tuple[Item, ...]

    @property
    def pictures(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(item.path, item.record) for item in self.items]

    @property
    def samples(self) -> int:
        """Images a prompt."""
        return len(self.items) // len(self.records)


def example_id(index: int) -> str:
    return f"{index:05d}"


def image_path(index: int, k: int) -> str:
    """Relative to the folder of images."""
    return f"{index:05d}/{SAMPLES}/{k:05d}.png"


def image_seed(index: int, k: int, seed: int) -> int:
    """An image's seed, from suite, prompt, sample and base seed alone: two models start from the same noise."""
    return seed_of(SUITE, example_id(index), k, seed)


def write_metadata(root: str | Path, records: Records) -> None:
    """Writes every prompt's metadata file, so that the folder says which images are still missing."""
    for index, record in enumerate(records):
        path, text = Path(root) / example_id(index) / METADATA_FILE, json.dumps(record) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def canonical(record: Any) -> str:
    """Equal for equal records, whatever the order of their keys."""
    return json.dumps(record, sort_keys=True)


def _folders(root: Path, records: Records, faults: list[str]) -> dict[int, Path]:
    """Prompt index -> its folder, by the folder's metadata."""
    index_of = {canonical(record): index for index, record in enumerate(records)}
    folders: dict[int, Path] = {}
    broken, foreign, repeated = [], [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name.isdecimal()):
        try:
            lines = (folder / METADATA_FILE).read_text(encoding="utf-8").splitlines()
            index = index_of.get(canonical(json.loads(lines[0])))
        except (OSError, ValueError, IndexError) as error:
            broken.append(f"{folder.name} ({error})")
            continue
        if index is None:
            foreign.append(folder.name)
        elif index in folders:
            repeated.append(f"{folder.name} and {folders[index].name}")
        else:
            folders[index] = folder
    missing = [example_id(index) for index in range(len(records)) if index not in folders]
    for names, fault in (
        (broken, f"folders without a readable {METADATA_FILE}"),
        (foreign, f"folders whose {METADATA_FILE} is no record of the prompt set"),
        (repeated, "prompts appear in two folders"),
        (missing, f"of {len(records)} prompts have no folder"),
    ):
        faults += [f"{len(names)} {fault}: {some(names)}"] if names else []
    return folders


def _samples(folder: Path, faults: list[str]) -> list[str]:
    """The PNG files whose names are numbers, in the order of these numbers."""
    files: dict[int, str] = {}
    for file in sorted((folder / SAMPLES).glob("*.png")):
        if file.stem.isdecimal():
            first = files.setdefault(int(file.stem), file.name)
            if first != file.name:
                faults.append(f"{folder.name}: {first} and {file.name} have the same number; keep one")
    return [files[number] for number in sorted(files)]


def read_images(root: str | Path, records: Records, samples: int | None = None) -> ImageSet:
    """The set with `samples` images a prompt, or as many as there are where None.

    Raises UserErrors with all faults at once: a wrong or missing metadata file, a prompt that is missing or there
    twice, an unequal number of images."""
    root = Path(root)
    if not root.is_dir():
        layout = f"00000/{METADATA_FILE} and 00000/{SAMPLES}/"
        raise UserError(f"{root}: no such folder; give the folder that holds {layout}")
    faults: list[str] = []
    folders = _folders(root, records, faults)
    files = {index: _samples(folder, faults) for index, folder in sorted(folders.items())}
    expected = max(map(len, files.values()), default=0) if samples is None else samples
    unequal = [f"{folders[index].name} has {len(names)}" for index, names in files.items() if len(names) != expected]
    if expected < 1:
        faults.append("there is no image; generate them first")
    elif unequal:
        faults.append(f"{len(unequal)} prompts do not have {expected} image(s): {some(unequal)}")
    if faults:
        raise UserErrors(f"{root}: not a complete set of {len(records)} prompts:", faults)
    items = (
        Item(index, k, f"{folders[index].name}/{SAMPLES}/{name}", records[index])
        for index, names in files.items()
        for k, name in enumerate(names)
    )
    return ImageSet(root, records, tuple(items))


def read_pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises UserError for a file that is missing or cannot be decoded to its last byte."""
    try:
        return np.asarray(decode_image(path, max_pixels=MAX_PIXELS, convert_modes=True))
    except ImageFault as fault:
        raise UserError(f"{path}: {fault}; make this image again") from fault
