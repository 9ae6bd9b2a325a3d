"""The encoded examples of a capability, in the form that the loops draw from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from data.errors import UserError, UserErrors
from data.files import read_json, sha256_file
from data.records import BUCKETS, CAPABILITIES
from model.checkpoint import read_tensors
from model.fields.base import Condition

Rows = torch.Tensor | Sequence[torch.Tensor]  # one tensor where all rows share a shape, else a tensor a row


@dataclass(frozen=True)
class Bucket:
    """A capability's encoded examples of one split.

    Row i has the prompt prompts[i] of the tables embeds (P, L, D), or P tensors (L_p, D) where prompts differ in
    length, and pooled (P, D'). segments (P, S) counts the tokens of each prompt's parts, None where all prompts have L
    tokens. source and target hold latents (C, H, W) a row, shapes[i] is row i's.
    """

    prompts: torch.Tensor
    embeds: Rows
    pooled: torch.Tensor
    empty_embeds: torch.Tensor
    empty_pooled: torch.Tensor
    source: Rows | None
    target: Rows | None
    segments: torch.Tensor | None = None
    empty_segments: torch.Tensor | None = None
    shapes: tuple[tuple[int, int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def shape_of(self, row: int) -> tuple[int, int, int] | None:
        """The latents' shape (C, H, W) of one row; None where only the backbone knows it: T2I without pictures."""
        if self.shapes is not None:
            return self.shapes[row]
        for latents in (self.target, self.source):
            if latents is not None:
                return cast(tuple[int, int, int], tuple(latents[row].shape))
        return None

    def at(self, rows: Sequence[int]) -> Condition:
        """The condition of these rows, which must share one latent shape where they have a source."""
        picked = self.prompts[list(rows)]
        source = None if self.source is None else at_rows(self.source, rows)
        pooled, empty = self.pooled[picked], (self.empty_embeds, self.empty_pooled)
        if self.segments is None:
            return Condition(cast(torch.Tensor, self.embeds)[picked], pooled, *empty, source)
        segments = self.segments[picked]
        embeds = torch.nn.utils.rnn.pad_sequence([self.embeds[int(prompt)] for prompt in picked], batch_first=True)
        return Condition(embeds, pooled, *empty, source, segments.sum(1), segments, self.empty_segments)

    def targets(self, rows: Sequence[int]) -> torch.Tensor:
        """The clean target latents (B, C, H, W) of rows that share a shape. Raises UserError where the data has
        none."""
        if self.target is None:
            raise UserError(
                "states = 'off_policy' needs target images in the data, and this bucket has rows without; "
                "add them or query on-policy"
            )
        return at_rows(self.target, rows)

    def only(self, rows: Sequence[int]) -> Bucket:
        """The bucket of these rows, in this order."""
        source, target = (
            None if latents is None else [latents[row] for row in rows] for latents in (self.source, self.target)
        )
        shapes = self.shapes and tuple(self.shapes[row] for row in rows)
        return replace(self, prompts=self.prompts[list(rows)], source=source, target=target, shapes=shapes)


def at_rows(latents: Rows, rows: Sequence[int]) -> torch.Tensor:
    """(B, C, H, W). Raises UserError when the rows differ in shape: a batch holds one shape."""
    if isinstance(latents, torch.Tensor):
        return latents[list(rows)]
    picked = [latents[row] for row in rows]
    shapes = {tuple(row.shape) for row in picked}
    if len(shapes) > 1:
        raise UserError(f"examples: rows of shapes {sorted(shapes)} in one batch; group rows by Bucket.shape_of")
    return torch.stack(picked)


PROMPTS = "prompts"
EDIT_PROMPTS = "edit_prompts"  # where a family's edits read their prompts in another form
REMEDIES = {"train": "add examples or remove the route", "dev": "add rows of split dev, or set validate_every: 0"}


def _rows(file: dict[str, torch.Tensor], name: str) -> Rows | None:
    """The latents of a bucket's file, row by row as its `shapes` say; one tensor where all rows share a shape."""
    stacks = {key.removeprefix(f"{name}."): value for key, value in file.items() if key.startswith(f"{name}.")}
    if len(stacks) < 2:
        return next(iter(stacks.values()), None)
    left = {key: iter(value) for key, value in stacks.items()}
    return [next(left[f"{height}x{width}"]) for _, height, width in file["shapes"].tolist()]


def _joined(files: list[dict[str, torch.Tensor]], name: str) -> Rows | None:
    latents = [rows for file in files if (rows := _rows(file, name)) is not None]
    if len(latents) < len(files):
        return None
    stacks = [rows for rows in latents if isinstance(rows, torch.Tensor)]
    if len(stacks) == len(files) and len({stack.shape[1:] for stack in stacks}) == 1:
        return torch.cat(stacks)
    return [row for rows in latents for row in rows]


def load_buckets(encoded: Path, capabilities: Iterable[str], base_sha256: str) -> dict[str, Bucket]:
    """The encoded training examples by capability; "edit" joins both edit buckets.

    Raises UserErrors for capabilities without examples, or encodings made with another base.
    """
    return {name: bucket for name, (bucket, _) in _load(encoded, "train", capabilities, base_sha256).items()}


def load_held_out(encoded: Path, capabilities: Iterable[str], base_sha256: str, count: int) -> dict[str, Bucket]:
    """Up to `count` examples of the dev split by capability, spread over its categories; without targets.

    Raises as load_buckets does.
    """
    buckets = _load(encoded, "dev", capabilities, base_sha256)
    return {name: bucket.only(_spread(categories, count)) for name, (bucket, categories) in buckets.items()}


def _spread(categories: Sequence[int], count: int) -> list[int]:
    """`count` rows: the first of every category, then the second of every category, and so on."""
    seen, turns = Counter[int](), []
    for row, category in enumerate(categories):
        turns.append((seen[category], category, row))
        seen[category] += 1
    return [row for _, _, row in sorted(turns)[:count]]


def _load(
    encoded: Path, split: str, capabilities: Iterable[str], base_sha256: str
) -> dict[str, tuple[Bucket, list[int]]]:
    """By capability the bucket of a split and each row's category, as its index in CATEGORIES."""
    facts = read_json(encoded / "encoded.json")
    if facts["base_sha256"] != base_sha256:
        other = facts["base_sha256"][:12]
        raise UserError(
            f"{encoded}: encoded with another base ({other}, now {base_sha256[:12]}); run the encode stage again"
        )
    examples = facts["examples"][split]
    members = {name: [bucket for bucket in _buckets_of(name) if examples[bucket]] for name in capabilities}
    if missing := [name for name, found in members.items() if not found]:
        known = f"{encoded} has {examples}; {REMEDIES[split]}"
        faults = [f"route {name}: no example of it in the {split} split; {known}" for name in missing]
        raise UserErrors("routes without examples", faults)
    paths = {name: encoded / split / f"{name}.safetensors" for name in (PROMPTS, EDIT_PROMPTS)}
    tables = {name: read_tensors(path) for name, path in paths.items() if path.exists()}
    loaded = {}
    for name, found in members.items():
        files = [read_tensors(encoded / split / f"{bucket}.safetensors") for bucket in found]
        loaded[name] = _bucket(files, name, tables), [i for file in files for i in file["categories"].tolist()]
    return loaded


def _buckets_of(capability: str) -> list[str]:
    wanted = set(CAPABILITIES[capability].categories)
    return [name for name in BUCKETS if wanted.issuperset(CAPABILITIES[name].categories)]


def _bucket(
    files: list[dict[str, torch.Tensor]], capability: str, tables: dict[str, dict[str, torch.Tensor]]
) -> Bucket:
    table = tables[EDIT_PROMPTS if EDIT_PROMPTS in tables and CAPABILITIES[capability].is_edit else PROMPTS]
    segments = table.get("segments")
    return Bucket(
        torch.cat([file["prompts"] for file in files]),
        table["embeds"] if segments is None else table["embeds"].split(segments.sum(1).tolist()),
        table["pooled"],
        table["empty_embeds"],
        table["empty_pooled"],
        _joined(files, "source"),
        _joined(files, "target"),
        segments,
        table.get("empty_segments"),
        tuple((int(c), int(h), int(w)) for file in files for c, h, w in file["shapes"].tolist()),
    )


def encoded_fingerprint(encoded: Path) -> dict[str, str]:
    """SHA-256 of every file, to bind a training state to its data."""
    return {path.relative_to(encoded).as_posix(): sha256_file(path) for path in sorted(encoded.rglob("*.safetensors"))}
