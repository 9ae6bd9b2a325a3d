"""A pipeline small enough for a test: untrained networks that differ from one another, two dozen examples, encoded by
the stage itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.params import JudgeParams
from data.files import write_json
from data.microworld import World, example, render
from data.randomness import numpy_generator
from data.records import GENEVAL_TAGS, GLOBAL_EDITS, LOCAL_EDITS, Example, write_examples
from data.yaml_files import read_yaml
from model.backbones import Backbone
from model.backbones.micro import MicroBackbone, MicroSize
from model.fields.base import Condition
from model.networks.network import add_adapter
from model.networks.teachers import BASE, read_records, save_teacher
from model.pixels import as_images
from model.randomness import noise_for, torch_generator
from model.step import LoopParams
from tasks.environment import PROJECT
from tasks.params.reading import PARAMS_FILE, fill_section
from tasks.params.sections import BackboneParams, MicroParams
from tasks.stages import encode as encoding

WORLD = World(shapes=("circle", "square", "triangle"), backgrounds=("white", "gray", "black"))
WIDTH, LAYERS, HEADS, CHANNELS, SHIFT = 32, 2, 2, 8, 1.0
LOCAL_RANK, LOCAL_ALPHA = 4, 8  # alpha / rank = 2, so that a forgotten alpha shows
EACH = 8  # examples a bucket, of train and of dev
EXECUTION: dict[str, Any] = {
    "device": "cpu",
    "processes": 1,
    "micro_batch": 0,
    "rollout_batch": 0,
    "precision": "fp32",
    "compile": "none",
    "attention": "auto",
    "checkpointing": "auto",
    "merge_rollout": "auto",
    "shard_base": False,
}
NOBODY: JudgeParams = fill_section(JudgeParams, "judge", read_yaml(PROJECT / PARAMS_FILE), [])
ROUTES = [
    {"capability": "t2i", "teacher": BASE, "weight": 1.0},
    {"capability": "local_edit", "teacher": "local", "weight": 1.0},
    {"capability": "global_edit", "teacher": "global", "weight": 1.0},
]


@dataclass(frozen=True)
class Tiny:
    """Folders: `teachers` holds base, local (an adapter) and global (a full checkpoint)."""

    curated: Path
    teachers: Path
    encoded: Path


def new_backbone(seed: int = 0) -> MicroBackbone:
    backbone = MicroBackbone.new(WORLD.vocabulary, MicroSize(WORLD.grid, WIDTH, LAYERS, HEADS, CHANNELS), SHIFT, seed)
    backbone.codec.fit(as_images(np.stack([draw("two_object", row)[2] for row in range(16)])))
    backbone.freeze()
    return backbone


def draw(category: str, row: int, split: str = "train") -> tuple[dict[str, Any], np.ndarray | None, np.ndarray]:
    """Record, source picture and target picture of one example."""
    record, source, target = example(WORLD, numpy_generator(0, row, 0, f"tiny/{category}"), category, split)
    return record, None if source is None else render(WORLD, source), render(WORLD, target)


@torch.no_grad()
def disturb(values: Mapping[str, torch.Tensor], size: float, seed: int) -> None:
    """Adds normal noise of deviation `size` in place."""
    for slot, value in enumerate(values.values()):
        value += size * torch.randn(value.shape, generator=torch_generator(seed, 0, slot, "disturb"))


def save_teachers(folder: Path) -> None:
    base: dict[str, Any] = {"name": BASE, "capability": "t2i", "kind": "base", "base_sha256": None}
    save_teacher(folder / BASE, new_backbone(), new_backbone().network, **base)
    backbone = MicroBackbone.load(folder / BASE)
    sha256 = read_records(folder)[BASE].sha256
    network = copy.deepcopy(backbone.network)
    disturb(dict(network.named_parameters()), 0.1, seed=1)
    whole: dict[str, Any] = {"name": "global", "capability": "global_edit", "kind": "full", "base_sha256": sha256}
    save_teacher(folder / "global", backbone, network, **whole)
    adapter = add_adapter(backbone, backbone.network, "local", LOCAL_RANK, LOCAL_ALPHA, seed=2)
    disturb({name: value for name, value in adapter.items() if "lora_B" in name}, 0.5, seed=2)
    local: dict[str, Any] = {"name": "local", "capability": "local_edit", "kind": "adapter", "base_sha256": sha256}
    save_teacher(folder / "local", backbone, backbone.network, **local)


def save_curated(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    examples = []
    categories = {"t2i": GENEVAL_TAGS, "local_edit": LOCAL_EDITS, "global_edit": GLOBAL_EDITS}
    for split, bucket, row in product(("train", "dev"), categories, range(EACH)):
        category = categories[bucket][row % len(categories[bucket])]
        name = f"{bucket}-{row}" if split == "train" else f"{split}-{bucket}-{row}"
        record, *pictures = draw(category, row, split)
        paths: dict[str, str] = {}
        for part, picture in zip(("source", "target"), pictures, strict=True):
            if picture is not None:
                paths[part] = f"images/{name}-{part}.png"
                Image.fromarray(picture).save(folder / paths[part])
        known: dict[str, Any] = {**paths, "record": record, "origin": "tiny", "row": row + 1}
        examples.append(Example(name, split, bucket, category, record["prompt"], **known))
    write_examples(folder, examples)


def build(root: Path) -> Tiny:
    tiny = Tiny(root / "curated", root / "teachers", root / "encoded")
    save_teachers(tiny.teachers)
    save_curated(tiny.curated)
    encoding.encode(
        encoding.Params(
            BackboneParams("micro", MicroParams(WIDTH, LAYERS, HEADS, CHANNELS), None), batch=8, cache=False
        ),
        curated=tiny.curated,
        teachers=tiny.teachers,
        out=tiny.encoded,
    )
    return tiny


def condition_of(backbone: Backbone, prompts: list[str], edits: bool = False) -> Condition:
    """A condition of the prompts, with a random source where `edits`."""
    with torch.no_grad():
        embeds, pooled = backbone.encode_prompt(prompts)
        empty_embeds, empty_pooled = backbone.encode_prompt([""])
    source = noise_for(3, 0, range(len(prompts)), backbone.latent_shape, "source") if edits else None
    return Condition(embeds, pooled, empty_embeds[0], empty_pooled[0], source)


PROMPTS = [
    "a photo of a red circle on a white background",
    "a photo of two blue squares",
    "make the circle green",
    "a photo",
]


def probe(field: Any, backbone: Backbone, edits: bool = True) -> torch.Tensor:
    """The field's velocities at four fixed states, for comparing two fields."""
    condition = condition_of(backbone, PROMPTS, edits)
    with torch.no_grad():
        result: torch.Tensor = field(
            noise_for(4, 0, range(4), backbone.latent_shape), torch.tensor([1.0, 0.7, 0.3, 0.05]), condition
        )
    return result


def loop_params(**changes: Any) -> LoopParams:
    numbers: dict[str, Any] = {
        "steps": 4,
        "batch": 4,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "schedule": "linear",
        "warmup": 0,
        "decay_from": 1.0,
        "ema": 0.0,
        "clip": 1.0,
        "max_gradient_norm": 0.0,
        "rollout_steps": 8,
        "query": "low",
        "states": "on_policy",
        "routing": "hard",
        "query_states": 1,
    }
    return LoopParams(**{**numbers, **changes})


def write_params(path: Path, **changes: Any) -> Path:
    """A params.yaml with the sections that the distill stage reads."""
    section: dict[str, Any] = {
        "method": "danceopd",
        "query_states": 1,
        "seed": 0,
        "start": "merged",
        "trainable": "all",
        "rank": 4,
        "alpha": 4,
        "save_every": 2,
        "steps": 4,
        "batch": 8,
        "learning_rate": 1.0e-3,
        "optimizer": "muon",
        "warmup": 1,
        "decay_from": 0.5,
        "ema": 0.9,
        "clip": 1.0,
        "rollout_steps": 16,
        "query": "low",
        "schedule": "linear",
        "states": "on_policy",
        "routes_taken": "hard",
        "resume_from": "",
        "accept_changed": [],
        "keep_every": 0,
        "validate_every": 0,
        "patience": 0,
        "cosine_every": 0,
        "held_out": 0,
        "max_gradient_norm": 0.0,
    }
    backbone = {
        "name": "micro",
        "micro": {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "latent_channels": CHANNELS},
        "pretrained": None,
    }
    execution = {key: changes.pop(key, value) for key, value in EXECUTION.items()}
    sections = {
        "backbone": backbone,
        "routing": {"routes": ROUTES},
        "execution": execution,
        "distill": {**section, **changes},
    }
    write_json(path, sections)
    return path
