"""Duplicates and leakage: equal rows by hash, similar rows by perceptual distance, rows that give away a scored one."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.curation.filters import Candidate, normalise, sift, where
from data.errors import RowFault
from data.images import Picture, distances
from data.manifests import RawRow, Rejection
from data.records import HELD_OUT, SPLITS


def without_exact_duplicates(rows: Sequence[Candidate]) -> tuple[list[Candidate], list[Rejection]]:
    """The first of a split's rows with equal prompt and equal pixels is kept."""
    first: dict[tuple[str, str], Candidate] = {}

    def check(candidate: Candidate) -> Candidate:
        earlier = first.setdefault((candidate.row.split, candidate.sha256), candidate)
        if earlier is not candidate:
            raise RowFault("exact duplicate", f"of {where(earlier.row)}")
        return candidate

    return sift(rows, check)


class _Neighbours:
    """Finds a known row whose pictures are all within `limit` bits.

    Only rows with nearly the same number of set bits are compared: no other row can be within the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: list[tuple[int, int]] = []  # (weight, index), sorted
        self.rows: list[RawRow] = []
        self.bits: list[np.ndarray] = []  # (pictures, bytes)

    def find(self, pictures: Sequence[Picture]) -> tuple[RawRow, int] | None:
        """The first added row that is near, and its distance in bits (that of the picture that differs most)."""
        weight = sum(picture.weight for picture in pictures)
        reach = self.limit * max(len(pictures), 1)
        low = bisect.bisect_left(self.items, (weight - reach, -1))
        high = bisect.bisect_right(self.items, (weight + reach, len(self.rows)))
        nearby = sorted(index for _, index in self.items[low:high])
        if not nearby:
            return None
        if not pictures:
            return self.rows[nearby[0]], 0
        stacked = np.stack([self.bits[index] for index in nearby])  # (N, pictures, bytes)
        by_picture = [distances(picture.fingerprint, stacked[:, i]) for i, picture in enumerate(pictures)]
        apart = np.max(by_picture, axis=0)  # (N,)
        near = np.flatnonzero(apart <= self.limit)
        return (self.rows[nearby[near[0]]], int(apart[near[0]])) if len(near) else None

    def add(self, row: RawRow, pictures: Sequence[Picture]) -> None:
        bisect.insort(self.items, (sum(picture.weight for picture in pictures), len(self.rows)))
        self.rows.append(row)
        self.bits.append(np.array([np.frombuffer(picture.fingerprint, np.uint8) for picture in pictures]))


def _size(picture: Picture | None) -> tuple[int, int] | None:
    return (picture.width, picture.height) if picture else None


def without_near_duplicates(rows: Sequence[Candidate], *, distance: int) -> tuple[list[Candidate], list[Rejection]]:
    """The first of a split's rows with the same normalised prompt and near-identical pictures is kept.

    Near-identical: source and target each differ from the kept row's by at most `distance` bits of their fingerprints.
    """
    groups: defaultdict[tuple[Any, ...], _Neighbours] = defaultdict(lambda: _Neighbours(distance))

    def check(candidate: Candidate) -> Candidate:
        row, source, target = candidate.row, candidate.source, candidate.target
        group = groups[row.split, normalise(row.prompt), _size(source), _size(target)]
        pictures = [picture for picture in (source, target) if picture]
        if near := group.find(pictures):
            detail = f"{near[1]} bits from {where(near[0])}, more than {distance} wanted (near_duplicate_distance)"
            raise RowFault("near duplicate", detail)
        group.add(row, pictures)
        return candidate

    return sift(rows, check)


class _Scored:
    """What rows of the held-out splits ask for and show, so that no row of an earlier split gives it away."""

    def __init__(self, distance: int) -> None:
        self.prompts: dict[str, RawRow] = {}
        self.images: dict[str, RawRow] = {}
        self.edits: defaultdict[tuple[Any, ...], _Neighbours] = defaultdict(lambda: _Neighbours(distance))

    def add(self, candidate: Candidate) -> None:
        for picture in (candidate.source, candidate.target):
            if picture and not picture.flat:
                self.images.setdefault(picture.sha256, candidate.row)
        if candidate.source:
            edits = self.edits[normalise(candidate.row.prompt), _size(candidate.source)]
            edits.add(candidate.row, [candidate.source])
        else:
            self.prompts.setdefault(normalise(candidate.row.prompt), candidate.row)

    def check(self, candidate: Candidate) -> Candidate:
        """Raises RowFault for a row that gives away an added one."""
        if detail := self._leak(candidate):
            raise RowFault("leakage", detail)
        return candidate

    def _leak(self, candidate: Candidate) -> str | None:
        prompt = normalise(candidate.row.prompt)
        if not candidate.source and prompt in self.prompts:
            return f"the prompt is scored in {where(self.prompts[prompt])}"
        for name, picture in (("source", candidate.source), ("target", candidate.target)):
            if picture and picture.sha256 in self.images:
                return f"the {name} image is an image of {where(self.images[picture.sha256])}"
        scored = self.edits.get((prompt, _size(candidate.source)))
        if candidate.source and scored and (near := scored.find([candidate.source])):
            return f"the instruction and a source {near[1]} bits away are scored in {where(near[0])}"
        return None


def without_leakage(rows: Sequence[Candidate], *, distance: int) -> tuple[list[Candidate], list[Rejection]]:
    """Rows that give away a row of a later split are rejected: train those of dev and eval, dev those of eval, whose
    own rows all stay.

    A T2I row leaks when its normalised prompt is scored; an edit when an instruction and a near-identical source are
    scored together; any row when one of its images is, pixel for pixel, an image of a scored row. Images of one flat
    colour (what remains when the only thing is removed) give nothing away.
    """
    scored, rejected, left = _Scored(distance), [], set[str]()
    for split in reversed(SPLITS):
        kept, refused = sift((item for item in rows if item.row.split == split), scored.check)
        for item in kept if split in HELD_OUT else ():
            scored.add(item)
        rejected += refused
        left |= {item.row.id for item in kept}
    return [item for item in rows if item.row.id in left], rejected
