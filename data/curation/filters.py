"""The pure filters of curation: each takes candidates and returns what it keeps, with a reason for the rest."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from data.bounds import Count, OneOf, Positive
from data.files import digest
from data.images import ImageFault, Picture, decode_image, picture_of
from data.manifests import RawRow, Rejection
from data.records import CAPABILITIES, SPLITS

BUCKETS = (
    "t2i",
    "local_edit",
    "global_edit",
)  # the capabilities that a row may have; "edit" is their union, for routes only
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """What is kept. Edges are in pixels; an exact size is `min_edge` = `max_edge`."""

    min_edge: Positive
    max_edge: Positive
    max_pixels: Positive  # an image with more is refused before it is decoded
    convert_modes: bool  # turn grey, palette, CMYK and transparent images into RGB instead of rejecting them
    max_prompt_words: Positive
    near_duplicate_distance: Count  # bits of `data.images.fingerprint`
    max_ratio: Annotated[float, Ge(1)]  # no capability has more training rows than this times the smallest one's
    minimum_train: dict[Annotated[str, OneOf(BUCKETS)], Count]  # capability -> rows that must remain
    minimum_eval: dict[Annotated[str, OneOf(BUCKETS)], Count]

    def faults(self) -> list[str]:
        """Cross-field faults, each `key = value: what to do`."""
        found = []
        if self.min_edge > self.max_edge:
            found.append(f"min_edge = {self.min_edge}: expected at most max_edge = {self.max_edge}")
        if self.max_pixels < self.max_edge**2:
            found.append(f"max_pixels = {self.max_pixels}: expected at least max_edge squared = {self.max_edge**2}")
        return found


@dataclass(frozen=True)
class Candidate:
    """A row with its decoded images' summaries."""

    row: RawRow
    source: Picture | None
    target: Picture | None

    @property
    def sha256(self) -> str:
        """Of the prompt and the images' bytes."""
        return digest([self.row.prompt, self.source and self.source.sha256, self.target and self.target.sha256])


def reject(row: RawRow, reason: str, detail: str) -> Rejection:
    return Rejection(row.origin, row.row, row.id, reason, detail)


def where(row: RawRow) -> str:
    return f"{row.id} ({row.origin} row {row.row})"


def known_tasks(rows: Sequence[RawRow]) -> tuple[list[RawRow], list[Rejection]]:
    """Capability and split are known and the category belongs to the capability."""
    kept, rejected = [], []
    for row in rows:
        if row.capability not in BUCKETS:
            rejected.append(reject(row, "unknown capability", f"{row.capability!r}; choose of {', '.join(BUCKETS)}"))
        elif row.category not in CAPABILITIES[row.capability].categories:
            known = ", ".join(CAPABILITIES[row.capability].categories)
            rejected.append(
                reject(row, "unknown task", f"{row.category!r} is no category of {row.capability}; choose of {known}")
            )
        elif row.split not in SPLITS:
            rejected.append(reject(row, "unknown split", f"{row.split!r}; choose of {', '.join(SPLITS)}"))
        else:
            kept.append(row)
    return kept, rejected


def unique_ids(rows: Sequence[RawRow]) -> tuple[list[RawRow], list[Rejection]]:
    """The first row of each id is kept."""
    first: dict[str, RawRow] = {}
    rejected = []
    for row in rows:
        if row.id in first:
            rejected.append(
                reject(row, "duplicate id", f"already used by {first[row.id].origin} row {first[row.id].row}")
            )
        else:
            first[row.id] = row
    return list(first.values()), rejected


# Han, kana and hangul are written without spaces: each sign counts as a word.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)


def count_words(prompt: str) -> int:
    return len(_WORD.findall(prompt))


def normalise(prompt: str) -> str:
    """What two prompts have in common that differ in case, punctuation, spacing or Unicode form only."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(
        "".join(" " if unicodedata.category(character)[0] in "PZC" else character for character in text).split()
    )


def usable_prompts(
    rows: Sequence[RawRow], *, max_words: int, vocabulary: Collection[str] | None = None
) -> tuple[list[RawRow], list[Rejection]]:
    """Prompts with at least one word, at most `max_words`, and, where a vocabulary is given, no word outside it."""
    kept, rejected = [], []
    known = None if vocabulary is None else frozenset(vocabulary)
    for row in rows:
        words = normalise(row.prompt).split()
        unknown = [] if known is None else sorted(set(words) - known)
        if not words:
            rejected.append(reject(row, "empty prompt", repr(row.prompt)))
        elif (count := count_words(row.prompt)) > max_words:
            rejected.append(reject(row, "over-long prompt", f"{count} words, at most {max_words} (max_prompt_words)"))
        elif unknown:
            rejected.append(reject(row, "unknown words", f"{', '.join(unknown)}: not in the text encoder's vocabulary"))
        else:
            kept.append(row)
    return kept, rejected


def consistent_sources(rows: Sequence[RawRow]) -> tuple[list[RawRow], list[Rejection]]:
    """Edits have a source image, T2I has none."""
    kept, rejected = [], []
    for row in rows:
        if CAPABILITIES[row.capability].is_edit and row.source is None:
            rejected.append(
                reject(row, "missing source", f"{row.category} edits an image: name it in the column source")
            )
        elif not CAPABILITIES[row.capability].is_edit and row.source is not None:
            rejected.append(
                reject(
                    row,
                    "unexpected source",
                    f"{row.category} starts from the prompt alone, but source = {row.source!r}",
                )
            )
        else:
            kept.append(row)
    return kept, rejected


def scorable(rows: Sequence[RawRow]) -> tuple[list[RawRow], list[Rejection]]:
    """Held-out T2I rows carry GenEval's metadata, without which no verdict can be given: a tag equal to the category
    and a list `include`.
    """
    kept, rejected = [], []
    for row in rows:
        include = row.record.get("include")
        good = (
            isinstance(include, list)
            and include
            and all(isinstance(item, dict) and "class" in item and "count" in item for item in include)
        )
        if row.capability == "t2i" and row.split == "eval" and not (good and row.record.get("tag") == row.category):
            wanted = f'record needs "tag": "{row.category}" and "include": [{{"class", "count", ...}}], as in GenEval\'s metadata'
            rejected.append(reject(row, "unscorable record", wanted))
        else:
            kept.append(row)
    return kept, rejected


def decoded(
    rows: Sequence[RawRow],
    folder: Path,
    options: Options,
    *,
    save: Callable[[str, bytes], None] | None = None,
    progress: Progress | None = None,
) -> tuple[list[Candidate], list[Rejection]]:
    """Rows whose images are readable, RGB and of the right size after EXIF orientation; both images of an edit have one
    size.

    Each image is read once; `save(sha256, png)` is handed its curated form.
    """
    kept, rejected = [], []
    seen: dict[str, Picture | ImageFault] = {}

    def picture(relative: str | None) -> Picture | None:
        if relative is None:
            return None
        if relative not in seen:
            seen[relative] = _read_picture(folder / relative, options, save)
        found = seen[relative]
        if isinstance(found, ImageFault):
            raise found
        return found

    for done, row in enumerate(rows, 1):
        try:
            source, target = picture(row.source), picture(row.target)
            if source and target and (source.width, source.height) != (target.width, target.height):
                raise ImageFault(
                    "wrong size",
                    f"source is {source.width}x{source.height}, target {target.width}x{target.height}; both must be equal",
                )
            kept.append(Candidate(row, source, target))
        except ImageFault as fault:
            rejected.append(reject(row, fault.reason, fault.detail))
        if progress:
            progress(done, len(rows), "decode")
    return kept, rejected


def _read_picture(path: Path, options: Options, save: Callable[[str, bytes], None] | None) -> Picture | ImageFault:
    try:
        image = decode_image(path, max_pixels=options.max_pixels, convert_modes=options.convert_modes)
    except ImageFault as fault:
        return fault
    if not all(options.min_edge <= edge <= options.max_edge for edge in image.size):
        wanted = (
            f"{options.min_edge}x{options.min_edge}"
            if options.min_edge == options.max_edge
            else f"edges of {options.min_edge} to {options.max_edge}"
        )
        return ImageFault(
            "wrong size", f"{path.name}: {image.width}x{image.height}, {wanted} pixels wanted (min_edge, max_edge)"
        )
    picture, content = picture_of(image)
    if save:
        save(picture.sha256, content)
    return picture
