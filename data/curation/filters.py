"""The checks of curation that judge each row by itself: a row passes, or is rejected with a reason."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from annotated_types import Ge

from data.bounds import Count, OneOf, Positive
from data.errors import RowFault
from data.files import digest
from data.images import Picture, decode_image, picture_of
from data.manifests import RawRow, Rejection
from data.records import BUCKETS, CAPABILITIES, HELD_OUT, SPLITS

Progress = Callable[[int, int, str], None]
Save = Callable[[str, bytes], None]


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
    minimum_eval: dict[Annotated[str, OneOf(BUCKETS)], Count]  # of eval; of dev too, where dev has any row

    def faults(self) -> list[str]:
        faults = []
        if self.min_edge > self.max_edge:
            faults.append(f"min_edge = {self.min_edge}: expected at most max_edge = {self.max_edge}")
        if self.max_pixels < self.max_edge**2:
            faults.append(f"max_pixels = {self.max_pixels}: expected at least max_edge squared = {self.max_edge**2}")
        return faults


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


Item = TypeVar("Item", RawRow, Candidate)
Kept = TypeVar("Kept", RawRow, Candidate)


def sift(items: Iterable[Item], check: Callable[[Item], Kept]) -> tuple[list[Kept], list[Rejection]]:
    """What `check` returns for the items that pass, and a rejection for each that it raises RowFault for."""
    kept, rejected = [], []
    for item in items:
        try:
            kept.append(check(item))
        except RowFault as fault:
            row = item.row if isinstance(item, Candidate) else item
            rejected.append(Rejection(row.origin, row.row, row.id, fault.reason, fault.detail))
    return kept, rejected


def where(row: RawRow) -> str:
    return f"{row.id} ({row.origin} row {row.row})"


def known_task(row: RawRow) -> RawRow:
    """Capability and split are known and the category belongs to the capability."""
    if row.capability not in BUCKETS:
        raise RowFault("unknown capability", f"{row.capability!r}; choose of {', '.join(BUCKETS)}")
    known = CAPABILITIES[row.capability].categories
    if row.category not in known:
        detail = f"{row.category!r} is no category of {row.capability}; choose of {', '.join(known)}"
        raise RowFault("unknown task", detail)
    if row.split not in SPLITS:
        raise RowFault("unknown split", f"{row.split!r}; choose of {', '.join(SPLITS)}")
    return row


def unique_ids(rows: Sequence[RawRow]) -> tuple[list[RawRow], list[Rejection]]:
    """The first row of each id is kept."""
    first: dict[str, RawRow] = {}

    def check(row: RawRow) -> RawRow:
        if (earlier := first.setdefault(row.id, row)) is not row:
            raise RowFault("duplicate id", f"already used by {earlier.origin} row {earlier.row}")
        return row

    return sift(rows, check)


# Han, kana and hangul are written without spaces: each sign counts as a word.
_SIGNS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SIGNS}]|[^\s{_SIGNS}]+")


def count_words(prompt: str) -> int:
    return len(_WORD.findall(prompt))


def normalise(prompt: str) -> str:
    """Equal for prompts that differ in case, punctuation, spacing or Unicode form only."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join("".join(" " if unicodedata.category(sign)[0] in "PZC" else sign for sign in text).split())


def usable_prompts(
    rows: Sequence[RawRow], *, max_words: int, vocabulary: Collection[str] | None = None
) -> tuple[list[RawRow], list[Rejection]]:
    """Prompts of 1 to `max_words` words and, where a vocabulary is given, no word outside it."""
    known = None if vocabulary is None else frozenset(vocabulary)

    def check(row: RawRow) -> RawRow:
        words = normalise(row.prompt).split()
        unknown = [] if known is None else sorted(set(words) - known)
        if not words:
            raise RowFault("empty prompt", repr(row.prompt))
        if (count := count_words(row.prompt)) > max_words:
            raise RowFault("over-long prompt", f"{count} words, at most {max_words} (max_prompt_words)")
        if unknown:
            raise RowFault("unknown words", f"{', '.join(unknown)}: not in the text encoder's vocabulary")
        return row

    return sift(rows, check)


def consistent_source(row: RawRow) -> RawRow:
    """Edits have a source image, T2I has none."""
    is_edit = CAPABILITIES[row.capability].is_edit
    if is_edit and row.source is None:
        raise RowFault("missing source", f"{row.category} edits an image: name it in the column source")
    if not is_edit and row.source is not None:
        detail = f"{row.category} starts from the prompt alone, but source = {row.source!r}"
        raise RowFault("unexpected source", detail)
    return row


def scorable(row: RawRow) -> RawRow:
    """Held-out T2I rows need GenEval's metadata for a verdict: a tag equal to the category and a list `include`."""
    if row.capability != "t2i" or row.split not in HELD_OUT:
        return row
    tag, include = row.record.get("tag"), row.record.get("include")
    clauses = include if isinstance(include, list) else []
    complete = all(isinstance(clause, dict) and {"class", "count"} <= clause.keys() for clause in clauses)
    if not clauses or not complete or tag != row.category:
        wanted = f'"tag": "{row.category}" and "include": [{{"class", "count", ...}}], as in GenEval\'s metadata'
        raise RowFault("unscorable record", f"record needs {wanted}")
    return row


def decoded(
    rows: Sequence[RawRow],
    folder: Path,
    options: Options,
    *,
    save: Save | None = None,
    progress: Progress | None = None,
) -> tuple[list[Candidate], list[Rejection]]:
    """Rows whose images are readable, RGB and of the right size after EXIF orientation; an edit's images share a size.

    An image is read once; `save(sha256, png)` is handed its curated form.
    """
    seen: dict[str, Picture | RowFault] = {}

    def picture(relative: str | None) -> Picture | None:
        if relative is None:
            return None
        if relative not in seen:
            try:
                seen[relative] = _read_picture(folder / relative, options, save)
            except RowFault as fault:
                seen[relative] = fault
        known = seen[relative]
        if isinstance(known, RowFault):
            raise RowFault(known.reason, known.detail)
        return known

    def check(row: RawRow) -> Candidate:
        source, target = picture(row.source), picture(row.target)
        if source and target and (source.width, source.height) != (target.width, target.height):
            sizes = f"source is {source.width}x{source.height}, target {target.width}x{target.height}"
            raise RowFault("wrong size", f"{sizes}; both must be equal")
        return Candidate(row, source, target)

    def counted() -> Iterator[RawRow]:
        for done, row in enumerate(rows, 1):
            yield row
            if progress:
                progress(done, len(rows), "decode")

    return sift(counted(), check)


def _read_picture(path: Path, options: Options, save: Save | None) -> Picture:
    image = decode_image(path, max_pixels=options.max_pixels, convert_modes=options.convert_modes)
    least, most = options.min_edge, options.max_edge
    if not all(least <= edge <= most for edge in image.size):
        wanted = f"{least}x{least}" if least == most else f"edges of {least} to {most}"
        detail = f"{path.name}: {image.width}x{image.height}, {wanted} pixels wanted (min_edge, max_edge)"
        raise RowFault("wrong size", detail)
    picture, content = picture_of(image)
    if save:
        save(picture.sha256, content)
    return picture
