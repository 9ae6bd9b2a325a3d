"""Stage `encode`: prompts and images of train and dev, encoded once. Training loads no text encoder or codec."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
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
from data.records import BUCKETS, CATEGORIES, Example, read_examples
from model.backbones import Backbone, check_sizes
from model.checkpoint import read_tensors, write_tensors
from model.examples import EDIT_PROMPTS, PROMPTS
from model.fields.base import Prompts
from model.networks.teachers import BASE, load_base, read_records
from model.pixels import as_images
from tasks.params.sections import BackboneParams

CACHE = Path("runs/encode")
ENCODED = ("train", "dev")  # the splits: training reads one, its validations the other
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
Size = tuple[int, int]  # width, height in px
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Params:
    """Section `encode`. `batch`: prompts or images at once. `cache`: keep encodings in runs/encode for later data."""

    backbone: BackboneParams
    batch: Positive
    cache: bool


# --- what was encoded before ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Encoded prompts and pictures, a file each, named by the digest of all inputs; without a folder, none."""

    folder: Path | None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tensors | None:
        if self.folder is None or not self._path(key).exists():
            return None
        try:
            return read_tensors(self._path(key))
        except UserError:  # cut short by a full disk or a crash: encode it again
            self._path(key).unlink(missing_ok=True)
            return None

    def put(self, key: str, tensors: Tensors) -> None:
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


# --- what is encoded --------------------------------------------------------------------------------------------------


def _rows_of(prompts: Prompts) -> list[Tensors]:
    """The tensors of each prompt, unpadded."""
    if prompts.segments is None or prompts.lengths is None:
        pairs = zip(prompts.embeds, prompts.pooled, strict=True)
        return [{"embeds": embeds, "pooled": pooled} for embeds, pooled in pairs]
    rows = zip(prompts.embeds, prompts.pooled, prompts.lengths.tolist(), prompts.segments, strict=True)
    return [{"embeds": embeds[:length], "pooled": pooled, "segments": parts} for embeds, pooled, length, parts in rows]


def _by_shape(latents: list[torch.Tensor], name: str) -> Tensors:
    """A stack for each shape, rows in their order: NAME.HxW."""
    stacks: dict[str, list[torch.Tensor]] = {}
    for value in latents:
        stacks.setdefault(f"{name}.{value.shape[1]}x{value.shape[2]}", []).append(value)
    return {key: torch.stack(values) for key, values in stacks.items()}


@dataclass(frozen=True)
class _Encoder:
    """Encodes prompts and pictures, `batch` at a time; `encoded` counts those that the cache did not hold."""

    backbone: Backbone
    curated: Path
    cache: Cache
    batch: int
    advance: Advance
    text: dict[str, Any]  # what encoded prompts depend on besides the prompt
    picture: dict[str, Any]  # what latents depend on besides the picture and its size
    encoded: Counter[str] = field(default_factory=lambda: Counter(prompts=0, images=0))

    def _items(self, kind: str, keys: list[str], encode_rows: Callable[[list[int]], list[Tensors]]) -> list[Tensors]:
        """An item a key, from the cache or encoded."""
        items = [self.cache.get(key) for key in keys]
        new = [row for row, item in enumerate(items) if item is None]
        self.encoded[kind] += len(new)
        self.advance(len(keys) - len(new))
        for first in range(0, len(new), self.batch):
            rows = new[first : first + self.batch]
            for row, item in zip(rows, encode_rows(rows), strict=True):
                self.cache.put(keys[row], item)
                items[row] = item
            self.advance(len(rows))
        return [item for item in items if item is not None]

    def prompts(self, prompts: list[str], edits: bool) -> Tensors:
        """The tensors of a prompt table, with the empty prompt's."""

        def encode_rows(rows: list[int]) -> list[Tensors]:
            encoded = _rows_of(self.backbone.encode_prompts([prompts[row] for row in rows], edits))
            return [{name: value.cpu() for name, value in item.items()} for item in encoded]

        form = {**self.text, "edits": edits and self.backbone.edit_prompts}
        items = self._items("prompts", [digest({**form, "prompt": prompt}) for prompt in prompts], encode_rows)
        (empty,) = _rows_of(self.backbone.encode_prompts([""], edits))
        table = {f"empty_{name}": value.cpu() for name, value in empty.items()}
        for name in empty:
            join = torch.cat if name == "embeds" and "segments" in empty else torch.stack
            table[name] = join([item[name] for item in items])
        return table

    def size(self, example: Example) -> Size:
        """The bucket of an example's picture: the source's of an edit, the target's or the usual square of T2I."""
        edge = self.backbone.latent_shape[1] * self.backbone.pixels_per_latent
        path = example.source or example.target
        if path is None:
            return edge, edge
        return bucket_of(*picture_size(self.curated / path), edge, self.backbone.size_multiple)

    def latents(self, paths: list[str], sizes: list[Size]) -> list[torch.Tensor]:
        """Latents (C, h, w) of curated pictures in these sizes, each encoded once however often it occurs."""
        latents: dict[tuple[str, Size], torch.Tensor] = {}
        wanted = list(zip(paths, sizes, strict=True))
        for size in dict.fromkeys(sizes):  # a batch holds one size
            same = list(dict.fromkeys(path for path, other in wanted if other == size))

            def encode_rows(rows: list[int], same: list[str] = same, size: Size = size) -> list[Tensors]:
                pictures = np.stack([fit(read_picture(self.curated / same[row]), size) for row in rows])
                return [{"latents": x.clone()} for x in self.backbone.encode_image(as_images(pictures)).cpu()]

            items = self._items("images", [self._key(path, size) for path in same], encode_rows)
            latents |= {(path, size): item["latents"] for path, item in zip(same, items, strict=True)}
        return [latents[item] for item in wanted]

    def _key(self, path: str, size: Size) -> str:
        if self.cache.folder is None:
            return ""
        return digest({**self.picture, "picture": sha256_file(self.curated / path), "size": list(size)})

    def bucket(self, examples: list[Example], prompt_rows: dict[str, int]) -> Tensors:
        """The tensors of a capability's examples of one split, as model.examples reads them."""
        is_edit = examples[0].is_edit
        without = [example for example in examples if is_edit and not example.source]
        if without:  # it would train as T2I without a word
            place = f"{without[0].id} ({without[0].origin}, row {without[0].row}); run the curate stage again"
            raise UserError(f"{self.curated}: {len(without)} edits have no source image, the first is {place}")
        sizes = [self.size(example) for example in examples]
        check_sizes(self.backbone, set(sizes))
        channels, edge = self.backbone.latent_shape[0], self.backbone.pixels_per_latent
        shapes = [[channels, height // edge, width // edge] for width, height in sizes]
        prompts = [prompt_rows[example.prompt] for example in examples]
        tensors = {
            "prompts": torch.tensor(prompts, dtype=torch.int64),
            "shapes": torch.tensor(shapes, dtype=torch.int64),
            "categories": torch.tensor([CATEGORIES.index(e.category) for e in examples], dtype=torch.int64),
        }
        for part in _parts(examples[0]):
            paths = [getattr(example, part) for example in examples]
            if all(paths):
                tensors |= _by_shape(self.latents(paths, sizes), part)
        return tensors


# --- the stage --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(params: Params, *, curated: Path, teachers: Path, out: Path) -> dict[str, Any]:
    """Writes to `out` a folder a split with a prompt table and a bucket per capability, and encoded.json (what they
    were made with).

    Prompts are stored without padding, pictures as latents in the bucket of their aspect. Raises UserError when there
    is nothing to train on, an edit has no source, or the base cannot read a source.
    """
    base_sha256 = read_records(teachers)[BASE].sha256
    examples = [example for example in read_examples(curated) if example.split in ENCODED]
    if all(example.split != "train" for example in examples):
        raise UserError(f"{curated}: no example of the train split; nothing can be trained on")
    backbone = load_base(teachers, need=("text", "vae"), **params.backbone.loading())
    edits = [example for example in examples if example.is_edit]
    if edits and not backbone.supports_edits:
        number = f"{len(edits)} edits to encode, the first is {edits[0].id}"
        raise UserError(f"{curated}: {number}, but the base reads no source image; take one that does")
    text, picture = _identities(params.backbone, backbone.name, teachers / BASE)
    tables = _tables(backbone, examples)
    count = sum(map(len, tables.values()))
    truncated, sizes = Counter[str](), set[tuple[int, ...]]()
    counts: dict[str, dict[str, int]] = {split: {} for split in ENCODED}
    with atomic_folder(out) as folder, progress("encode: prompts and images", count + _pictures(examples)) as advance:
        encoder = _Encoder(
            backbone, curated, Cache(CACHE if params.cache else None), params.batch, advance, text, picture
        )
        for (split, name), prompts in tables.items():
            (folder / split).mkdir(exist_ok=True)
            if prompts:
                write_tensors(folder / split / f"{name}.safetensors", encoder.prompts(prompts, name == EDIT_PROMPTS))
                truncated.update(backbone.truncated(prompts, name == EDIT_PROMPTS))
        backbone.release("text")
        for split, capability in product(ENCODED, BUCKETS):
            chosen = [example for example in examples if (example.split, example.capability) == (split, capability)]
            counts[split][capability] = len(chosen)
            if chosen:
                table = tables[split, _table(backbone, chosen[0])]
                tensors = encoder.bucket(chosen, {prompt: row for row, prompt in enumerate(table)})
                write_tensors(folder / split / f"{capability}.safetensors", tensors)
                sizes |= set(map(tuple, tensors["shapes"].tolist()))
        facts = {
            "base_sha256": base_sha256,
            "backbone": backbone.name,
            "text_sha256": text["text"],
            "vae_sha256": picture["vae"],
            "batch": params.batch,
            "pretrained": _only(params.backbone, "precision", "resolution", "max_tokens"),
            "prompts": count,
            "examples": counts,
            "truncated": truncated,
            "shapes": sorted(map(list, sizes)),
        }
        write_json(folder / "encoded.json", facts)
    summary: dict[str, Any] = {"prompts": count, **counts["train"], "dev": sum(counts["dev"].values())}
    if truncated:
        summary["truncated prompts"] = dict(truncated)
    if len(sizes) > 1:
        summary["aspect buckets"] = len(sizes)
    return {**summary, "encoded anew": dict(encoder.encoded)} if params.cache else summary


def _identities(section: BackboneParams, family: str, base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What encoded prompts and encoded pictures depend on besides their content."""
    text = {"family": family, "text": parts_digest(base, TEXT_PARTS), **_only(section, "precision", "max_tokens")}
    return text, {"family": family, "vae": parts_digest(base, ["vae"])}


def _only(backbone: BackboneParams, *names: str) -> dict[str, Any]:
    return {} if backbone.pretrained is None else {name: getattr(backbone.pretrained, name) for name in names}


def _table(backbone: Backbone, example: Example) -> str:
    """The table that holds the example's prompt."""
    return EDIT_PROMPTS if backbone.edit_prompts and example.is_edit else PROMPTS


def _tables(backbone: Backbone, examples: list[Example]) -> dict[tuple[str, str], list[str]]:
    """(split, table) -> its prompts in their order."""
    return {
        (split, name): sorted({e.prompt for e in examples if e.split == split and _table(backbone, e) == name})
        for split, name in product(ENCODED, (PROMPTS, EDIT_PROMPTS))
    }


def _parts(example: Example) -> tuple[str, ...]:
    """Which pictures of its bucket are encoded: a validation needs no targets."""
    return (*(("source",) if example.is_edit else ()), *(("target",) if example.split == "train" else ()))


def _pictures(examples: list[Example]) -> int:
    """How many pictures the buckets will encode: each of a bucket's distinct sources, and of its targets, once."""
    return len(
        {
            (example.split, example.capability, part, path)
            for example in examples
            for part in _parts(example)
            if (path := getattr(example, part))
        }
    )
