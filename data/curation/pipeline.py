"""From raw manifests to the curated set: a chain of pure filters that keep rows or reject them with a reason.

Every row that was read is either kept or listed in `rejected.csv`. Curated: `examples.parquet`, `images/<sha256>.png`
(RGB, upright), `rejected.csv` (origin, row, id, reason, detail) and `summary.json` with the counts.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data.curation import filters
from data.curation.duplicates import without_exact_duplicates, without_leakage, without_near_duplicates
from data.curation.filters import Candidate, Options, Progress, sift
from data.errors import RowFault, UserErrors
from data.files import atomic_folder, write_json
from data.manifests import Manifests, Rejection, read_manifests
from data.records import BUCKETS, CATEGORIES, SPLITS, Example, write_examples

IMAGES_FOLDER = "images"
REJECTED_FILE = "rejected.csv"
SUMMARY_FILE = "summary.json"


# --- balance ----------------------------------------------------------------------------------------------------------


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
    limit = int(max_ratio * counts[smallest])
    dropped: set[str] = set()
    for capability in counts:
        train = (c for c in rows if c.row.split == "train" and c.row.capability == capability)
        dropped.update(name for _, name in sorted((c.sha256, c.row.id) for c in train)[limit:])

    def check(candidate: Candidate) -> Candidate:
        if candidate.row.split == "train" and candidate.row.id in dropped:
            name = candidate.row.capability
            rule = f"{limit} are kept: {max_ratio:g} x {counts[smallest]} of {smallest} (max_ratio)"
            raise RowFault("balance", f"{name} has {counts[name]} training rows, {rule}")
        return candidate

    return sift(rows, check)


def require_minimum(rows: Sequence[Candidate], rejected: Sequence[Rejection], minimum: Mapping[str, int]) -> None:
    """Raises UserErrors that names the capabilities with too few training rows, and why rows were rejected."""
    counts = train_counts(rows)
    short = [
        f"{name}: {counts[name]} training rows are left, the minimum is {least} (minimum_train.{name})"
        for name, least in minimum.items()
        if counts[name] < least
    ]
    if short:
        raise UserErrors("too few examples after curation", [*short, *_reasons(rejected)])


def _reasons(rejected: Sequence[Rejection]) -> list[str]:
    """A line for each reason, the most frequent first."""
    groups: defaultdict[str, list[Rejection]] = defaultdict(list)
    for rejection in rejected:
        groups[rejection.reason].append(rejection)
    return [
        f"rejected, {reason}: {len(group)} rows, the first {group[0].origin} row {group[0].row}: {group[0].detail}"
        for reason, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


# --- the whole chain --------------------------------------------------------------------------------------------------


def curate(
    raw: str | Path,
    out: str | Path,
    options: Options,
    *,
    vocabulary: Collection[str] | None = None,
    accept: Callable[[Path, list[Example]], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads the folder `raw`, applies every filter and writes the folder `out` as a whole. Returns the summary.

    Equal input gives equal bytes. `accept(folder, examples)` judges the finished folder before it takes its place: its
    result becomes the summary's `validation`, its error leaves `out` as it was. Raises UserError(s) for unreadable
    manifests and for too few examples.
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
        used = {f"{picture.sha256}.png" for c in kept for picture in (c.source, c.target) if picture}
        for path in images.iterdir():
            if path.name not in used:
                path.unlink()
        examples = [_example(candidate) for candidate in kept]
        write_examples(folder, examples)
        with (folder / REJECTED_FILE).open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Rejection)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rejected))
        summary = _summary(manifests, kept, rejected, steps, len(used))
        if accept:
            summary["validation"] = accept(folder, examples)
        write_json(folder / SUMMARY_FILE, summary)
    return summary


def _apply(
    manifests: Manifests,
    raw: Path,
    images: Path,
    options: Options,
    vocabulary: Collection[str] | None,
    progress: Progress | None,
) -> tuple[list[Candidate], list[Rejection], list[dict[str, Any]]]:
    """Applies the filters in order: the candidates, the rejections by place, and what each filter did."""
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

    words, distance = options.max_prompt_words, options.near_duplicate_distance
    rows = note("known_tasks", *sift(manifests.rows, filters.known_task))
    rows = note("unique_ids", *filters.unique_ids(rows))
    rows = note("usable_prompts", *filters.usable_prompts(rows, max_words=words, vocabulary=vocabulary))
    rows = note("consistent_sources", *sift(rows, filters.consistent_source))
    rows = note("scorable", *sift(rows, filters.scorable))
    rows = note("decoded", *filters.decoded(rows, raw, options, save=save, progress=progress))
    rows = note("without_exact_duplicates", *without_exact_duplicates(rows))
    rows = note("without_near_duplicates", *without_near_duplicates(rows, distance=distance))
    rows = note("without_leakage", *without_leakage(rows, distance=distance))
    rows = note("balanced", *balanced(rows, max_ratio=options.max_ratio))
    if len(rows) + len(rejected) != manifests.count:
        raise RuntimeError(f"curation lost rows: {len(rows)} kept + {len(rejected)} rejected of {manifests.count} read")
    return rows, sorted(rejected, key=lambda rejection: (rejection.origin, rejection.row)), steps


def _example(candidate: Candidate) -> Example:
    pictures = {"source": candidate.source, "target": candidate.target}
    paths = {name: f"{IMAGES_FOLDER}/{picture.sha256}.png" if picture else None for name, picture in pictures.items()}
    return Example(**{**vars(candidate.row), **paths, "sha256": candidate.sha256})


def _summary(
    manifests: Manifests,
    kept: Sequence[Candidate],
    rejected: Sequence[Rejection],
    steps: list[dict[str, Any]],
    images: int,
) -> dict[str, Any]:
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
        "categories": {name: {split: categories[name, split] for split in SPLITS} for name in CATEGORIES},
    }
