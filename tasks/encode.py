"""Stage `encode`: prompts, source and target images of the training split, encoded once. Training never loads the text encoder or the codec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import UserError
from data.files import atomic_folder, read_json, sha256_file, write_json
from data.records import CAPABILITIES, Example, read_examples
from model.backbones import Backbone
from model.backbones.micro import read_tensors
from model.checkpoint import write_tensors
from model.distill import Bucket
from model.teachers import BASE, load_base, read_records
from tasks.pictures import as_images, read_picture
from tasks.progress import progress

BUCKETS = ("t2i", "local_edit", "global_edit")


@dataclass(frozen=True)
class Params:
    """Section `encode`. `batch`: prompts or images at once."""

    batch: int

    def faults(self) -> list[str]:
        return [f"batch = {self.batch}: expected 1 or more"] if self.batch < 1 else []


@torch.no_grad()
def _latents(backbone: Backbone, paths: list[str], curated: Path, batch: int) -> torch.Tensor:
    """Latents (n, C, h, w) of curated pictures, each read once however often it occurs."""
    distinct = list(dict.fromkeys(paths))
    chunks = [distinct[first : first + batch] for first in range(0, len(distinct), batch)]
    encoded = torch.cat([backbone.encode_image(as_images(np.stack([read_picture(curated / path) for path in chunk]))) for chunk in chunks])
    place = {path: row for row, path in enumerate(distinct)}
    return encoded[[place[path] for path in paths]]


def _bucket(backbone: Backbone, examples: list[Example], prompt_rows: dict[str, int], curated: Path, batch: int) -> dict[str, torch.Tensor]:
    tensors = {"prompts": torch.tensor([prompt_rows[example.prompt] for example in examples], dtype=torch.int64)}
    is_edit = CAPABILITIES[examples[0].capability].is_edit
    without = [example for example in examples if is_edit and not example.source]
    if without:  # it would train as T2I without a word
        raise UserError(
            f"{curated}: {len(without)} edits have no source image, the first is {without[0].id} "
            f"({without[0].origin}, row {without[0].row}); run the curate stage again"
        )
    for part in ("source", "target") if is_edit else ("target",):
        paths = [getattr(example, part) for example in examples]
        if all(paths):
            tensors[part] = _latents(backbone, paths, curated, batch)
    return tensors


@torch.no_grad()
def encode(params: Params, *, curated: Path, teachers: Path, out: Path) -> dict[str, Any]:
    """Writes prompts.safetensors, a bucket per capability and encoded.json (with the base's hash) to `out`."""
    backbone, base = load_base(teachers), read_records(teachers)[BASE]
    examples = [example for example in read_examples(curated) if example.split == "train"]
    if not examples:
        raise UserError(f"{curated}: no example of the train split; nothing can be trained on")
    prompts = sorted({example.prompt for example in examples})
    with atomic_folder(out) as folder, progress("encode: prompts and images", len(prompts) + len(examples)) as advance:
        chunks = []
        for first in range(0, len(prompts), params.batch):
            chunks.append(backbone.encode_prompt(prompts[first : first + params.batch]))
            advance(len(prompts[first : first + params.batch]))
        empty_embeds, empty_pooled = backbone.encode_prompt([""])
        table = {
            "embeds": torch.cat([c[0] for c in chunks]),
            "pooled": torch.cat([c[1] for c in chunks]),
            "empty_embeds": empty_embeds[0],
            "empty_pooled": empty_pooled[0],
        }
        write_tensors(folder / "prompts.safetensors", table)
        rows = {prompt: row for row, prompt in enumerate(prompts)}
        counts = {}
        for capability in BUCKETS:
            chosen = [example for example in examples if example.capability == capability]
            counts[capability] = len(chosen)
            if chosen:
                write_tensors(folder / f"{capability}.safetensors", _bucket(backbone, chosen, rows, curated, params.batch))
            advance(len(chosen))
        write_json(folder / "encoded.json", {"base_sha256": base.sha256, "prompts": len(prompts), "examples": counts})
    return {"prompts": len(prompts), **counts}


def load_buckets(encoded: Path, capabilities: Iterable[str], base_sha256: str) -> dict[str, Bucket]:
    """The encoded training examples by capability; "edit" joins both edit buckets.

    Raises UserError for a capability without examples, or encodings made with another base.
    """
    facts = read_json(encoded / "encoded.json")
    if facts["base_sha256"] != base_sha256:
        raise UserError(f"{encoded}: encoded with another base ({facts['base_sha256'][:12]}, now {base_sha256[:12]}); run the encode stage again")
    table = read_tensors(encoded / "prompts.safetensors")
    buckets = {}
    for capability in capabilities:
        members = [name for name in BUCKETS if set(CAPABILITIES[name].categories) <= set(CAPABILITIES[capability].categories) and facts["examples"].get(name)]
        if not members:
            raise UserError(f"route {capability}: no training example of it in {encoded} (have {facts['examples']}); add examples or remove the route")
        parts = [read_tensors(encoded / f"{name}.safetensors") for name in members]
        joined = {key: torch.cat([part[key] for part in parts]) if all(key in part for part in parts) else None for key in ("prompts", "source", "target")}
        assert joined["prompts"] is not None
        buckets[capability] = Bucket(
            joined["prompts"], table["embeds"], table["pooled"], table["empty_embeds"], table["empty_pooled"], joined["source"], joined["target"]
        )
    return buckets


def encoded_fingerprint(encoded: Path) -> dict[str, str]:
    """SHA-256 of every file, to bind a training state to its data."""
    return {path.name: sha256_file(path) for path in sorted(encoded.glob("*.safetensors"))}
