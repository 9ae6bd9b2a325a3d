"""Stage `encode`: prompts, source and target images of the training split, encoded once. Training never loads the text
encoder or the codec.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.aspect import bucket_of, fit
from data.bounds import Positive
from data.errors import UserError
from data.files import atomic_folder, digest, sha256_file, write_json
from data.images import picture_size, read_picture
from data.progress import Advance, progress
from data.records import CAPABILITIES, Example, read_examples
from model.backbones import Backbone, check_sizes
from model.backbones.micro import read_tensors
from model.checkpoint import write_tensors
from model.examples import BUCKETS, EDIT_PROMPTS, PROMPTS
from model.fields.base import Prompts
from model.networks.teachers import BASE, load_base, read_records
from model.pixels import as_images
from tasks.params.sections import BackboneParams

CACHE = Path("runs/encode")
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
Size = tuple[int, int]  # width, height in px


@dataclass(frozen=True)
class Params:
    """Section `encode`. `batch`: prompts or images at once. `cache`: keep what was encoded in runs/encode, so that
    changed data encodes only what is new.
    """

    backbone: BackboneParams
    batch: Positive
    cache: bool


# --- what was encoded before ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Encoded prompts and pictures by content: a file an item, named by the digest of what it depends on. `folder` None
    keeps nothing.
    """

    folder: Path | None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        if self.folder is None or not self._path(key).exists():
            return None
        try:
            return read_tensors(self._path(key))
        except UserError:  # cut short by a full disk or a crash: encode it again
            self._path(key).unlink(missing_ok=True)
            return None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.folder is not None:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                write_tensors(temporary, tensors)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


def parts_digest(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over every file of these parts of a pipeline folder: what encodings depend on besides their content."""
    files = [path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return digest([[path.relative_to(folder).as_posix(), sha256_file(path)] for path in files])


def _in_batches(
    keys: Sequence[str],
    cache: Cache,
    encode_rows: Callable[[list[int]], list[dict[str, torch.Tensor]]],
    batch: int,
    advance: Advance,
) -> tuple[list[dict[str, torch.Tensor]], int]:
    """An item a key, from the cache or encoded `batch` at a time; and how many were encoded."""
    found = [cache.get(key) for key in keys]
    new = [row for row, item in enumerate(found) if item is None]
    advance(len(keys) - len(new))
    for first in range(0, len(new), batch):
        rows = new[first : first + batch]
        for row, item in zip(rows, encode_rows(rows), strict=True):
            cache.put(keys[row], item)
            found[row] = item
        advance(len(rows))
    return [item for item in found if item is not None], len(new)


# --- prompts ----------------------------------------------------------------------------------------------------------


def _rows_of(prompts: Prompts) -> list[dict[str, torch.Tensor]]:
    """Every prompt's own tensors, unpadded."""
    if prompts.segments is None or prompts.lengths is None:
        return [
            {"embeds": embeds, "pooled": pooled} for embeds, pooled in zip(prompts.embeds, prompts.pooled, strict=True)
        ]
    rows = zip(prompts.embeds, prompts.pooled, prompts.lengths.tolist(), prompts.segments, strict=True)
    return [
        {"embeds": embeds[:length], "pooled": pooled, "segments": segments} for embeds, pooled, length, segments in rows
    ]


def _table(
    backbone: Backbone, prompts: list[str], edits: bool, cache: Cache, key: dict[str, Any], batch: int, advance: Advance
) -> tuple[dict[str, Any], int]:
    """The tensors of one prompt table, the empty prompt's beside them; and how many prompts were encoded."""

    def encode_rows(rows: list[int]) -> list[dict[str, torch.Tensor]]:
        return [
            {name: value.cpu() for name, value in item.items()}
            for item in _rows_of(backbone.encode_prompts([prompts[row] for row in rows], edits))
        ]

    keys = [digest({**key, "edits": edits and backbone.edit_prompts, "prompt": prompt}) for prompt in prompts]
    items, encoded = _in_batches(keys, cache, encode_rows, batch, advance)
    (empty,) = _rows_of(backbone.encode_prompts([""], edits))
    table = {f"empty_{name}": value.cpu() for name, value in empty.items()}
    for name in empty:
        ragged = name == "embeds" and "segments" in empty
        table[name] = (
            torch.cat([item[name] for item in items]) if ragged else torch.stack([item[name] for item in items])
        )
    return table, encoded


# --- pictures ---------------------------------------------------------------------------------------------------------


def _sizes(backbone: Backbone, example: Example, curated: Path) -> Size:
    """The bucket of an example's picture: the source's of an edit, the target's or the usual square of T2I."""
    edge = backbone.latent_shape[1] * backbone.pixels_per_latent
    path = example.source or example.target
    if path is None:
        return edge, edge
    return bucket_of(*picture_size(curated / path), edge, backbone.size_multiple)


def _latents(
    backbone: Backbone,
    wanted: list[tuple[str, Size]],
    curated: Path,
    cache: Cache,
    key: dict[str, Any],
    batch: int,
    advance: Advance,
) -> tuple[list[torch.Tensor], int]:
    """Latents (C, h, w) of curated pictures in the sizes wanted, each encoded once however often it occurs; and how
    many were encoded.
    """
    distinct = list(dict.fromkeys(wanted))
    done: dict[tuple[str, Size], torch.Tensor] = {}
    encoded = 0
    for size in dict.fromkeys(size for _, size in distinct):  # a batch holds one size
        same = [item for item in distinct if item[1] == size]

        def encode_rows(
            rows: list[int], same: list[tuple[str, Size]] = same, size: Size = size
        ) -> list[dict[str, torch.Tensor]]:
            pictures = np.stack([fit(read_picture(curated / same[row][0]), size) for row in rows])
            return [{"latents": latents.clone()} for latents in backbone.encode_image(as_images(pictures)).cpu()]

        keys = [
            digest({**key, "picture": sha256_file(curated / path), "size": list(size)}) if cache.folder else ""
            for path, _ in same
        ]
        items, new = _in_batches(keys, cache, encode_rows, batch, advance)
        encoded += new
        done |= {item: found["latents"] for item, found in zip(same, items, strict=True)}
    return [done[item] for item in wanted], encoded


def _by_shape(latents: list[torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """One stack a shape, rows in their order: NAME.HxW."""
    stacks: dict[str, list[torch.Tensor]] = {}
    for value in latents:
        stacks.setdefault(f"{name}.{value.shape[1]}x{value.shape[2]}", []).append(value)
    return {key: torch.stack(values) for key, values in stacks.items()}


def _bucket(
    backbone: Backbone,
    examples: list[Example],
    prompt_rows: dict[str, int],
    curated: Path,
    cache: Cache,
    key: dict[str, Any],
    batch: int,
    advance: Advance,
) -> tuple[dict[str, torch.Tensor], int]:
    is_edit = CAPABILITIES[examples[0].capability].is_edit
    without = [example for example in examples if is_edit and not example.source]
    if without:  # it would train as T2I without a word
        raise UserError(
            f"{curated}: {len(without)} edits have no source image, the first is {without[0].id} "
            f"({without[0].origin}, row {without[0].row}); run the curate stage again"
        )
    sizes, encoded = [_sizes(backbone, example, curated) for example in examples], 0
    check_sizes(backbone, set(sizes))
    per = backbone.pixels_per_latent
    tensors = {
        "prompts": torch.tensor([prompt_rows[example.prompt] for example in examples], dtype=torch.int64),
        "shapes": torch.tensor(
            [[backbone.latent_shape[0], height // per, width // per] for width, height in sizes], dtype=torch.int64
        ),
    }
    for part in ("source", "target") if is_edit else ("target",):
        paths = [getattr(example, part) for example in examples]
        if all(paths):
            latents, new = _latents(backbone, list(zip(paths, sizes, strict=True)), curated, cache, key, batch, advance)
            tensors |= _by_shape(latents, part)
            encoded += new
    return tensors, encoded


# --- the stage --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(params: Params, *, curated: Path, teachers: Path, out: Path) -> dict[str, Any]:
    """Writes a prompt table, a bucket per capability and encoded.json (what it was made with) to `out`.

    Prompts are stored without padding, pictures as latents in the bucket of their aspect. Raises UserError when there
    is nothing to train on, an edit has no source, or the base cannot read one.
    """
    base = read_records(teachers)[BASE]
    examples = [example for example in read_examples(curated) if example.split == "train"]
    if not examples:
        raise UserError(f"{curated}: no example of the train split; nothing can be trained on")
    backbone = load_base(teachers, need=("text", "vae"), **params.backbone.loading())
    edits = [example for example in examples if CAPABILITIES[example.capability].is_edit]
    if edits and not backbone.supports_edits:
        raise UserError(
            f"{curated}: {len(edits)} edits to encode, the first is {edits[0].id}, but the base reads no source image; take one that does"
        )
    cache = Cache(CACHE if params.cache else None)
    text = {
        "family": backbone.name,
        "text": parts_digest(teachers / BASE, TEXT_PARTS),
        **_only(params.backbone, "precision", "max_tokens"),
    }
    picture = {"family": backbone.name, "vae": parts_digest(teachers / BASE, ["vae"])}
    tables = {
        PROMPTS: sorted(
            {
                example.prompt
                for example in examples
                if not (backbone.edit_prompts and CAPABILITIES[example.capability].is_edit)
            }
        )
    }
    if backbone.edit_prompts:
        tables[EDIT_PROMPTS] = sorted({example.prompt for example in edits})
    total = sum(map(len, tables.values())) + _pictures(examples)
    with atomic_folder(out) as folder, progress("encode: prompts and images", total) as advance:
        rows: dict[str, dict[str, int]] = {}
        new, truncated = {"prompts": 0, "images": 0}, dict[str, int]()
        for name, prompts in tables.items():
            rows[name] = {prompt: row for row, prompt in enumerate(prompts)}
            if prompts:
                table, encoded = _table(backbone, prompts, name == EDIT_PROMPTS, cache, text, params.batch, advance)
                write_tensors(folder / f"{name}.safetensors", table)
                new["prompts"] += encoded
                for encoder, count in backbone.truncated(prompts, name == EDIT_PROMPTS).items():
                    truncated[encoder] = truncated.get(encoder, 0) + count
        backbone.release("text")
        counts, sizes = {}, set[tuple[int, ...]]()
        for capability in BUCKETS:
            chosen = [example for example in examples if example.capability == capability]
            counts[capability] = len(chosen)
            if chosen:
                known = rows[EDIT_PROMPTS if backbone.edit_prompts and CAPABILITIES[capability].is_edit else PROMPTS]
                tensors, encoded = _bucket(backbone, chosen, known, curated, cache, picture, params.batch, advance)
                write_tensors(folder / f"{capability}.safetensors", tensors)
                sizes |= set(map(tuple, tensors["shapes"].tolist()))
                new["images"] += encoded
        write_json(
            folder / "encoded.json",
            {
                "base_sha256": base.sha256,
                "backbone": backbone.name,
                "text_sha256": text["text"],
                "vae_sha256": picture["vae"],
                "batch": params.batch,
                "pretrained": _only(params.backbone, "precision", "resolution", "max_tokens"),
                "prompts": sum(map(len, tables.values())),
                "examples": counts,
                "truncated": truncated,
                "shapes": sorted(map(list, sizes)),
            },
        )
    summary: dict[str, Any] = {"prompts": sum(map(len, tables.values())), **counts}
    if truncated:
        summary["truncated prompts"] = truncated
    if len(sizes) > 1:
        summary["aspect buckets"] = len(sizes)
    return {**summary, "encoded anew": new} if params.cache else summary


def _only(backbone: BackboneParams, *names: str) -> dict[str, Any]:
    return {} if backbone.pretrained is None else {name: getattr(backbone.pretrained, name) for name in names}


def _pictures(examples: list[Example]) -> int:
    """How many pictures the buckets will encode, each counted once a bucket and part."""
    parts = [
        (example.capability, part, getattr(example, part)) for example in examples for part in ("source", "target")
    ]
    return len({item for item in parts if item[2] and (item[1] == "target" or CAPABILITIES[item[0]].is_edit)})
