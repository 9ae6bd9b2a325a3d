"""From raw manifests to the curated set: a chain of pure filters, each of which returns what it keeps and what it
rejects, with the reason.

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

from data.curation.duplicates import without_exact_duplicates, without_leakage, without_near_duplicates
from data.curation.filters import (
    BUCKETS,
    Candidate,
    Options,
    Progress,
    consistent_sources,
    decoded,
    known_tasks,
    reject,
    scorable,
    unique_ids,
    usable_prompts,
)
from data.errors import UserErrors
from data.files import atomic_folder, write_json
from data.manifests import Manifests, RawRow, Rejection, read_manifests
from data.records import CAPABILITIES, SPLITS, Example, write_examples

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
    cap = int(max_ratio * counts[smallest])
    dropped: set[str] = set()
    for capability in counts:
        ordered = sorted(
            (c.sha256, c.row.id) for c in rows if c.row.split == "train" and c.row.capability == capability
        )
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
    """Raises UserErrors that names each capability with too few training rows left, and what most rows were rejected
    for.
    """
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
    return [
        f"rejected, {reason}: {len(group)} rows, the first {group[0].origin} row {group[0].row}: {group[0].detail}"
        for reason, group in ordered
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
    """Reads the folder `raw`, applies every filter and writes the folder `out`, whole or not at all. Returns the
    summary.

    Equal input gives equal bytes. `accept(folder, examples)` looks at the finished folder before it takes its place:
    what it returns becomes the summary's
    `validation`, what it raises leaves `out` as it was. Raises UserError(s) for unreadable manifests and for too few
    examples.
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
        used = {
            f"{picture.sha256}.png" for candidate in kept for picture in (candidate.source, candidate.target) if picture
        }
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
    manifests: Manifests,
    raw: Path,
    images: Path,
    options: Options,
    vocabulary: Collection[str] | None,
    progress: Progress | None,
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
        raise RuntimeError(
            f"curation lost rows: {len(found)} kept + {len(rejected)} rejected of {manifests.count} read"
        )
    return found, sorted(rejected, key=lambda rejection: (rejection.origin, rejection.row)), steps


def _example(candidate: Candidate) -> Example:
    row = candidate.row
    source, target = (
        f"{IMAGES_FOLDER}/{picture.sha256}.png" if picture else None for picture in (candidate.source, candidate.target)
    )
    return Example(
        row.id,
        row.split,
        row.capability,
        row.category,
        row.prompt,
        source,
        target,
        row.record,
        row.origin,
        row.row,
        candidate.sha256,
    )


def _write_rejected(path: Path, rejected: Sequence[Rejection]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Rejection)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rejection) for rejection in rejected)


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
        "categories": {
            name: {split: categories[name, split] for split in SPLITS}
            for name in CAPABILITIES["t2i"].categories + CAPABILITIES["edit"].categories
        },
    }
