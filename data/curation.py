"""From raw manifests to the curated set: a chain of pure filters, each of which returns what it keeps and what it rejects, with the reason.

Every row that was read is either kept or listed in `rejected.csv`. Curated: `examples.parquet`, `images/<sha256>.png` (RGB, upright), `rejected.csv`
(origin, row, id, reason, detail) and `summary.json` with the counts.
"""

from __future__ import annotations

import bisect
import csv
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserErrors
from data.files import atomic_folder, digest, write_json
from data.images import ImageFault, Picture, decode_image, distances, picture_of
from data.manifests import Manifests, RawRow, Rejection, read_manifests
from data.records import CAPABILITIES, SPLITS, Example, write_examples

IMAGES_FOLDER = "images"
REJECTED_FILE = "rejected.csv"
SUMMARY_FILE = "summary.json"
BUCKETS = ("t2i", "local_edit", "global_edit")  # the capabilities that a row may have; "edit" is their union, for routes only

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """What is kept. Edges are in pixels; an exact size is `min_edge` = `max_edge`."""

    min_edge: int
    max_edge: int
    max_pixels: int  # an image with more is refused before it is decoded
    convert_modes: bool  # turn grey, palette, CMYK and transparent images into RGB instead of rejecting them
    max_prompt_words: int
    near_duplicate_distance: int  # bits of `data.images.fingerprint`
    max_ratio: float  # no capability has more training rows than this times the smallest one's
    minimum_train: dict[str, int]  # capability -> rows that must remain
    minimum_eval: dict[str, int]

    def faults(self) -> list[str]:
        """Cross-field faults, each `key = value: what to do`."""
        found = []
        if not 1 <= self.min_edge <= self.max_edge:
            found.append(f"min_edge = {self.min_edge}: expected 1 or more and at most max_edge = {self.max_edge}")
        if self.max_pixels < self.max_edge**2:
            found.append(f"max_pixels = {self.max_pixels}: expected at least max_edge squared = {self.max_edge**2}")
        if self.max_prompt_words < 1:
            found.append(f"max_prompt_words = {self.max_prompt_words}: expected 1 or more")
        if self.near_duplicate_distance < 0:
            found.append(f"near_duplicate_distance = {self.near_duplicate_distance}: expected 0 or more bits")
        if not self.max_ratio >= 1:
            found.append(f"max_ratio = {self.max_ratio}: expected 1 or more")
        for key in ("minimum_train", "minimum_eval"):
            for name, count in getattr(self, key).items():
                if name not in BUCKETS:
                    found.append(f"{key}.{name} = {count}: unknown capability; choose of {', '.join(BUCKETS)}")
                elif count < 0:
                    found.append(f"{key}.{name} = {count}: expected 0 or more")
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


# --- filters on the text of a row --------------------------------------------------------------------------------------------


def known_tasks(rows: Sequence[RawRow]) -> tuple[list[RawRow], list[Rejection]]:
    """Capability and split are known and the category belongs to the capability."""
    kept, rejected = [], []
    for row in rows:
        if row.capability not in BUCKETS:
            rejected.append(reject(row, "unknown capability", f"{row.capability!r}; choose of {', '.join(BUCKETS)}"))
        elif row.category not in CAPABILITIES[row.capability].categories:
            known = ", ".join(CAPABILITIES[row.capability].categories)
            rejected.append(reject(row, "unknown task", f"{row.category!r} is no category of {row.capability}; choose of {known}"))
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
            rejected.append(reject(row, "duplicate id", f"already used by {first[row.id].origin} row {first[row.id].row}"))
        else:
            first[row.id] = row
    return list(first.values()), rejected


# Han, kana and hangul are written without spaces: each sign counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+")


def count_words(prompt: str) -> int:
    return len(_WORD.findall(prompt))


def normalise(prompt: str) -> str:
    """What two prompts have in common that differ in case, punctuation, spacing or Unicode form only."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join("".join(" " if unicodedata.category(character)[0] in "PZC" else character for character in text).split())


def usable_prompts(rows: Sequence[RawRow], *, max_words: int, vocabulary: Collection[str] | None = None) -> tuple[list[RawRow], list[Rejection]]:
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
            rejected.append(reject(row, "missing source", f"{row.category} edits an image: name it in the column source"))
        elif not CAPABILITIES[row.capability].is_edit and row.source is not None:
            rejected.append(reject(row, "unexpected source", f"{row.category} starts from the prompt alone, but source = {row.source!r}"))
        else:
            kept.append(row)
    return kept, rejected


def scorable(rows: Sequence[RawRow]) -> tuple[list[RawRow], list[Rejection]]:
    """Held-out T2I rows carry GenEval's metadata, without which no verdict can be given: a tag equal to the category and a list `include`."""
    kept, rejected = [], []
    for row in rows:
        include = row.record.get("include")
        good = isinstance(include, list) and include and all(isinstance(item, dict) and "class" in item and "count" in item for item in include)
        if row.capability == "t2i" and row.split == "eval" and not (good and row.record.get("tag") == row.category):
            wanted = f'record needs "tag": "{row.category}" and "include": [{{"class", "count", ...}}], as in GenEval\'s metadata'
            rejected.append(reject(row, "unscorable record", wanted))
        else:
            kept.append(row)
    return kept, rejected


# --- images ------------------------------------------------------------------------------------------------------------------


def decoded(
    rows: Sequence[RawRow], folder: Path, options: Options, *, save: Callable[[str, bytes], None] | None = None, progress: Progress | None = None
) -> tuple[list[Candidate], list[Rejection]]:
    """Rows whose images are readable, RGB and of the right size after EXIF orientation; both images of an edit have one size.

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
                raise ImageFault("wrong size", f"source is {source.width}x{source.height}, target {target.width}x{target.height}; both must be equal")
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
        wanted = f"{options.min_edge}x{options.min_edge}" if options.min_edge == options.max_edge else f"edges of {options.min_edge} to {options.max_edge}"
        return ImageFault("wrong size", f"{path.name}: {image.width}x{image.height}, {wanted} pixels wanted (min_edge, max_edge)")
    picture, content = picture_of(image)
    if save:
        save(picture.sha256, content)
    return picture


# --- duplicates and leakage --------------------------------------------------------------------------------------------------


def without_exact_duplicates(rows: Sequence[Candidate]) -> tuple[list[Candidate], list[Rejection]]:
    """The first of the rows of a split with equal prompt and equal pixels is kept."""
    first: dict[tuple[str, str], RawRow] = {}
    kept, rejected = [], []
    for candidate in rows:
        key = (candidate.row.split, candidate.sha256)
        if key in first:
            rejected.append(reject(candidate.row, "exact duplicate", f"of {where(first[key])}"))
        else:
            first[key] = candidate.row
            kept.append(candidate)
    return kept, rejected


class _Neighbours:
    """Finds a known item whose pictures are all within `limit` bits. Only items of nearly the same number of set bits are compared, which loses none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: list[tuple[int, int]] = []  # (weight, index), sorted
        self.rows: list[RawRow] = []
        self.bits: list[np.ndarray] = []  # one row per picture

    def find(self, pictures: Sequence[Picture]) -> tuple[RawRow, int] | None:
        """The first item added that is near, and its distance in bits (that of the picture that differs most)."""
        weight = sum(picture.weight for picture in pictures)
        reach = self.limit * max(len(pictures), 1)
        low, high = bisect.bisect_left(self.items, (weight - reach, -1)), bisect.bisect_right(self.items, (weight + reach, len(self.rows)))
        nearby = sorted(index for _, index in self.items[low:high])
        if not nearby:
            return None
        if not pictures:
            return self.rows[nearby[0]], 0
        stacked = np.stack([self.bits[index] for index in nearby])  # (N, pictures, bytes)
        apart = np.max([distances(picture.fingerprint, stacked[:, i]) for i, picture in enumerate(pictures)], axis=0)  # (N,)
        near = np.flatnonzero(apart <= self.limit)
        return (self.rows[nearby[near[0]]], int(apart[near[0]])) if len(near) else None

    def add(self, row: RawRow, pictures: Sequence[Picture]) -> None:
        bisect.insort(self.items, (sum(picture.weight for picture in pictures), len(self.rows)))
        self.rows.append(row)
        self.bits.append(np.array([np.frombuffer(picture.fingerprint, np.uint8) for picture in pictures]))


def _size(picture: Picture | None) -> tuple[int, int] | None:
    return (picture.width, picture.height) if picture else None


def without_near_duplicates(rows: Sequence[Candidate], *, distance: int) -> tuple[list[Candidate], list[Rejection]]:
    """The first of the rows of a split with the same normalised prompt and near-identical pictures is kept.

    Near-identical: source and target each differ from the kept row's by at most `distance` bits of their fingerprints.
    """
    groups: defaultdict[tuple[Any, ...], _Neighbours] = defaultdict(lambda: _Neighbours(distance))
    kept, rejected = [], []
    for candidate in rows:
        group = groups[candidate.row.split, normalise(candidate.row.prompt), _size(candidate.source), _size(candidate.target)]
        pictures = [picture for picture in (candidate.source, candidate.target) if picture]
        if found := group.find(pictures):
            detail = f"{found[1]} bits from {where(found[0])}, more than {distance} wanted (near_duplicate_distance)"
            rejected.append(reject(candidate.row, "near duplicate", detail))
        else:
            group.add(candidate.row, pictures)
            kept.append(candidate)
    return kept, rejected


def without_leakage(rows: Sequence[Candidate], *, distance: int) -> tuple[list[Candidate], list[Rejection]]:
    """Training rows that give away what is scored are rejected; evaluation rows all stay.

    A T2I row leaks when its normalised prompt is scored; an edit when an instruction and a near-identical source are scored together; any row when one of
    its images is, pixel for pixel, an image of an evaluation row. Images of one flat colour (what remains when the only thing is removed) give nothing away.
    """
    prompts: dict[str, RawRow] = {}
    images: dict[str, RawRow] = {}
    edits: defaultdict[tuple[Any, ...], _Neighbours] = defaultdict(lambda: _Neighbours(distance))
    for candidate in rows:
        if candidate.row.split != "eval":
            continue
        for picture in (candidate.source, candidate.target):
            if picture and not picture.flat:
                images.setdefault(picture.sha256, candidate.row)
        if candidate.source:
            edits[normalise(candidate.row.prompt), _size(candidate.source)].add(candidate.row, [candidate.source])
        else:
            prompts.setdefault(normalise(candidate.row.prompt), candidate.row)
    kept, rejected = [], []
    for candidate in rows:
        if candidate.row.split == "train" and (detail := _leak(candidate, prompts, images, edits)):
            rejected.append(reject(candidate.row, "leakage", detail))
        else:
            kept.append(candidate)
    return kept, rejected


def _leak(candidate: Candidate, prompts: Mapping[str, RawRow], images: Mapping[str, RawRow], edits: Mapping[tuple[Any, ...], _Neighbours]) -> str | None:
    prompt = normalise(candidate.row.prompt)
    if not candidate.source and prompt in prompts:
        return f"the prompt is scored in {where(prompts[prompt])}"
    for name, picture in (("source", candidate.source), ("target", candidate.target)):
        if picture and picture.sha256 in images:
            return f"the {name} image is an image of {where(images[picture.sha256])}"
    scored = edits.get((prompt, _size(candidate.source)))
    if candidate.source and scored and (found := scored.find([candidate.source])):
        return f"the instruction and a source {found[1]} bits away are scored in {where(found[0])}"
    return None


# --- balance -----------------------------------------------------------------------------------------------------------------


def train_counts(rows: Sequence[Candidate]) -> Counter[str]:
    return Counter(candidate.row.capability for candidate in rows if candidate.row.split == "train")


def balanced(rows: Sequence[Candidate], *, max_ratio: float) -> tuple[list[Candidate], list[Rejection]]:
    """No capability keeps more training rows than `max_ratio` times the smallest one's (of those that have any).

    Which rows go depends on their SHA-256 alone: not on their order, and not on what else is there.
    """
    counts = train_counts(rows)
    if not counts:
        return list(rows), []
    smallest = min(counts, key=lambda name: (counts[name], name))
    cap = int(max_ratio * counts[smallest])
    dropped: set[str] = set()
    for capability in counts:
        ordered = sorted((c.sha256, c.row.id) for c in rows if c.row.split == "train" and c.row.capability == capability)
        dropped.update(name for _, name in ordered[cap:])
    kept, rejected = [], []
    for candidate in rows:
        if candidate.row.split == "train" and candidate.row.id in dropped:
            capability = candidate.row.capability
            detail = f"{capability} has {counts[capability]} training rows, {cap} are kept: {max_ratio:g} x {counts[smallest]} of {smallest} (max_ratio)"
            rejected.append(reject(candidate.row, "balance", detail))
        else:
            kept.append(candidate)
    return kept, rejected


def require_minimum(rows: Sequence[Candidate], rejected: Sequence[Rejection], minimum: Mapping[str, int]) -> None:
    """Raises UserErrors that names each capability with too few training rows left, and what most rows were rejected for."""
    counts = train_counts(rows)
    short = [
        f"{name}: {counts[name]} training rows are left, the minimum is {least} (minimum_train.{name})"
        for name, least in minimum.items()
        if counts[name] < least
    ]
    if short:
        raise UserErrors("too few examples after curation", [*short, *_reasons(rejected)])


def _reasons(rejected: Sequence[Rejection]) -> list[str]:
    groups: defaultdict[str, list[Rejection]] = defaultdict(list)
    for rejection in rejected:
        groups[rejection.reason].append(rejection)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"rejected, {reason}: {len(group)} rows, the first {group[0].origin} row {group[0].row}: {group[0].detail}" for reason, group in ordered]


# --- the whole chain ---------------------------------------------------------------------------------------------------------


def curate(
    raw: str | Path,
    out: str | Path,
    options: Options,
    *,
    vocabulary: Collection[str] | None = None,
    accept: Callable[[Path, list[Example]], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads the folder `raw`, applies every filter and writes the folder `out`, whole or not at all. Returns the summary.

    Equal input gives equal bytes. `accept(folder, examples)` looks at the finished folder before it takes its place: what it returns becomes the summary's
    `validation`, what it raises leaves `out` as it was. Raises UserError(s) for unreadable manifests and for too few examples.
    """
    raw, out = Path(raw), Path(out)
    manifests = read_manifests(raw)
    with atomic_folder(out) as folder:
        images = folder / IMAGES_FOLDER
        images.mkdir()
        kept, rejected, steps = _apply(manifests, raw, images, options, vocabulary, progress)
        if not kept:
            raise UserErrors(f"{raw}: no row of {manifests.count} is left after curation", _reasons(rejected))
        require_minimum(kept, rejected, options.minimum_train)
        used = {f"{picture.sha256}.png" for candidate in kept for picture in (candidate.source, candidate.target) if picture}
        for path in images.iterdir():
            if path.name not in used:
                path.unlink()
        examples = [_example(candidate) for candidate in kept]
        write_examples(folder, examples)
        _write_rejected(folder / REJECTED_FILE, rejected)
        summary = _summary(manifests, kept, rejected, steps, len(used))
        if accept:
            summary["validation"] = accept(folder, examples)
        write_json(folder / SUMMARY_FILE, summary)
    return summary


def _apply(
    manifests: Manifests, raw: Path, images: Path, options: Options, vocabulary: Collection[str] | None, progress: Progress | None
) -> tuple[list[Candidate], list[Rejection], list[dict[str, Any]]]:
    """The filters in order. Also returns what each of them did."""
    rejected = list(manifests.rejected)
    steps = [{"filter": "manifests", "rows": manifests.count, "kept": len(manifests.rows), "rejected": len(rejected)}]

    def note(name: str, kept: list[Any], refused: list[Rejection]) -> list[Any]:
        rejected.extend(refused)
        steps.append({"filter": name, "rows": len(kept) + len(refused), "kept": len(kept), "rejected": len(refused)})
        return kept

    def save(name: str, content: bytes) -> None:
        path = images / f"{name}.png"
        if not path.exists():
            path.write_bytes(content)

    rows: list[RawRow] = note("known_tasks", *known_tasks(manifests.rows))
    rows = note("unique_ids", *unique_ids(rows))
    rows = note("usable_prompts", *usable_prompts(rows, max_words=options.max_prompt_words, vocabulary=vocabulary))
    rows = note("consistent_sources", *consistent_sources(rows))
    rows = note("scorable", *scorable(rows))
    found: list[Candidate] = note("decoded", *decoded(rows, raw, options, save=save, progress=progress))
    found = note("without_exact_duplicates", *without_exact_duplicates(found))
    found = note("without_near_duplicates", *without_near_duplicates(found, distance=options.near_duplicate_distance))
    found = note("without_leakage", *without_leakage(found, distance=options.near_duplicate_distance))
    found = note("balanced", *balanced(found, max_ratio=options.max_ratio))
    if len(found) + len(rejected) != manifests.count:
        raise RuntimeError(f"curation lost rows: {len(found)} kept + {len(rejected)} rejected of {manifests.count} read")
    return found, sorted(rejected, key=lambda rejection: (rejection.origin, rejection.row)), steps


def _example(candidate: Candidate) -> Example:
    row = candidate.row
    source, target = (f"{IMAGES_FOLDER}/{picture.sha256}.png" if picture else None for picture in (candidate.source, candidate.target))
    return Example(row.id, row.split, row.capability, row.category, row.prompt, source, target, row.record, row.origin, row.row, candidate.sha256)


def _write_rejected(path: Path, rejected: Sequence[Rejection]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Rejection)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rejection) for rejection in rejected)


def _summary(manifests: Manifests, kept: Sequence[Candidate], rejected: Sequence[Rejection], steps: list[dict[str, Any]], images: int) -> dict[str, Any]:
    rows = Counter([row.origin for row in manifests.rows] + [rejection.origin for rejection in manifests.rejected])
    capabilities = Counter((candidate.row.capability, candidate.row.split) for candidate in kept)
    categories = Counter((candidate.row.category, candidate.row.split) for candidate in kept)
    return {
        "rows": manifests.count,
        "kept": len(kept),
        "rejected": len(rejected),
        "images": images,
        "manifests": dict(sorted(rows.items())),
        "ignored_columns": manifests.ignored_columns,
        "reasons": dict(sorted(Counter(rejection.reason for rejection in rejected).items())),
        "filters": steps,
        "capabilities": {name: {split: capabilities[name, split] for split in SPLITS} for name in BUCKETS},
        "categories": {name: {split: categories[name, split] for split in SPLITS} for name in CAPABILITIES["t2i"].categories + CAPABILITIES["edit"].categories},
    }
