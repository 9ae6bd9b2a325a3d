"""Stage `teachers`: trains the base and the specialists on the micro world, or puts together those that `sources`
names.

Frozen in dvc.yaml: the micro world's trained weights travel with the repository, and others are fetched knowingly, by
running the stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from data.bounds import Count, NotNegative, OneOf, Positive
from data.errors import UserError
from data.files import atomic_folder, digest, sha256_file
from data.microworld import TEACHING, World, example, render
from data.progress import progress
from data.randomness import numpy_generator
from data.records import CATEGORIES, CapabilityName
from model.backbones.micro import MicroBackbone, MicroSize
from model.checkpoint import Ema, load_state, load_training, save_state, training_tensors
from model.compute.optimizer import build_optimizer
from model.fields.base import Condition
from model.flow_matching import FlowMatchingParams, Trainee, train
from model.networks.network import add_adapter
from model.networks.teachers import BASE, save_teacher, weights_file
from model.pixels import as_images
from tasks.params.sections import BackboneParams
from tasks.training.metrics import RUNS, write_table
from tasks.weights.assembly import SourceParams, assemble, source_faults

NOTED = 50  # steps between two rows of training.csv


@dataclass(frozen=True)
class TeacherParams:
    """One teacher. `mix`: category -> relative share of its training examples; `examples`: how many.

    `kind`: "base", "full" or "adapter" (then of `rank`, with alpha = rank).
    """

    capability: CapabilityName
    kind: Literal["base", "full", "adapter"]
    rank: Count
    examples: Positive
    mix: dict[Annotated[str, OneOf(CATEGORIES)], NotNegative]
    training: FlowMatchingParams


@dataclass(frozen=True)
class Params:
    """Section `teachers`: either `teachers`, trained here, or `sources`, brought along; the other is empty.

    `shift` is the trained scheduler's, `codec_examples` the pictures that the linear codec is fitted to; neither
    matters to `sources`, whose files say.
    """

    world: World
    backbone: BackboneParams
    seed: int
    shift: float
    codec_examples: Positive
    save_every: Positive
    teachers: dict[str, TeacherParams]
    sources: dict[str, SourceParams]

    def faults(self) -> list[str]:
        if self.sources:
            both = "teachers: must be empty ({}) where sources names teachers, and sources where they are trained here"
            return ([both] if self.teachers else []) + source_faults(self.sources)
        faults = [] if BASE in self.teachers else [f"teachers: {BASE!r} is missing; every specialist starts from it"]
        for name, teacher in self.teachers.items():
            if (teacher.kind == "base") != (name == BASE):
                faults.append(
                    f'teachers.{name}.kind = {teacher.kind!r}: must be "base" for {BASE!r} '
                    'and "full" or "adapter" for the others'
                )
        return faults

    def home(self) -> Path:
        """Where finished teachers and states of these numbers lie."""
        shared = [asdict(self.world), asdict(self.backbone), self.seed, self.shift, self.codec_examples]
        return RUNS / f"teachers-{digest(shared)[:12]}"

    def fingerprint(self, name: str) -> str:
        """Of all that decides a teacher: its numbers and those of the base that it starts from."""
        return digest({BASE: asdict(self.teachers[BASE]), name: asdict(self.teachers[name])})

    def finished(self, name: str) -> Path:
        return self.home() / f"{name}-{self.fingerprint(name)[:12]}" / "finished"


def _pick(rng: np.random.Generator, mix: Mapping[str, float]) -> str:
    shares = np.array(list(mix.values()))
    return list(mix)[int(rng.choice(len(mix), p=shares / shares.sum()))]


def _draw(
    world: World, mix: dict[str, float], count: int, seed: int, purpose: str
) -> tuple[list[str], np.ndarray | None, np.ndarray]:
    """Prompts, sources (None when no category edits) and targets of `count` examples that teachers may learn from."""
    prompts, sources, targets = [], [], []
    for index in range(count):
        rng = numpy_generator(seed, index, 0, purpose)
        record, source, target = example(world, rng, _pick(rng, mix), TEACHING)
        prompts.append(record["prompt"])
        targets.append(render(world, target))
        if source is not None:
            sources.append(render(world, source))
    if sources and len(sources) != count:
        raise UserError("teachers: a mix must hold either T2I tags or edit categories, not both")
    return prompts, np.stack(sources) if sources else None, np.stack(targets)


def _fit_codec(backbone: MicroBackbone, world: World, params: Params) -> float:
    """On pictures of every category, the styled ones often enough to be kept; returns the share of variance lost."""
    mix = {category: 6.0 if category == "style_change" else 1.0 for category in CATEGORIES}
    pictures = []
    for index in range(params.codec_examples):
        category = _pick(numpy_generator(params.seed, index, 1, "codec"), mix)
        _, _, target = example(world, numpy_generator(params.seed, index, 0, "codec"), category, TEACHING)
        pictures.append(render(world, target))
    return backbone.codec.fit(as_images(np.stack(pictures)))


def _new_backbone(world: World, params: Params) -> MicroBackbone:
    micro = params.backbone.micro
    if micro is None:
        raise UserError(
            f"backbone.name = {params.backbone.name!r}: this stage trains the micro network only; "
            "published checkpoints are brought, not trained"
        )
    size = MicroSize(world.grid, micro.width, micro.layers, micro.heads, micro.latent_channels)
    backbone = MicroBackbone.new(world.vocabulary, size, params.shift, params.seed)
    lost = _fit_codec(backbone, world, params)
    print(f"codec: {micro.latent_channels} components lose {100 * lost:.2f} % of the pixel variance", flush=True)
    return backbone


@dataclass(frozen=True)
class _Data:
    """A teacher's training examples: tokens of the prompts, latents of sources (None without edits) and of targets."""

    backbone: MicroBackbone
    tokens: torch.Tensor
    source: torch.Tensor | None
    x_0: torch.Tensor

    def at(self, rows: list[int]) -> tuple[Condition, torch.Tensor]:
        text = self.backbone.text
        embeds, pooled = text(self.tokens[rows])
        empty_embeds, empty_pooled = text(text.tokens([""]))
        source = None if self.source is None else self.source[rows]
        return Condition(embeds, pooled, empty_embeds[0], empty_pooled[0], source), self.x_0[rows]


@torch.no_grad()
def _data(backbone: MicroBackbone, world: World, teacher: TeacherParams, seed: int, name: str) -> _Data:
    prompts, sources, targets = _draw(world, teacher.mix, teacher.examples, seed, f"teachers/{name}")
    source = None if sources is None else backbone.encode_image(as_images(sources))
    return _Data(backbone, backbone.text.tokens(prompts), source, backbone.encode_image(as_images(targets)))


def _trained(backbone: MicroBackbone, teacher: TeacherParams, name: str, seed: int) -> dict[str, Any]:
    """The parameters that train, by name."""
    if teacher.kind == "adapter":
        named = add_adapter(backbone, backbone.network, name, teacher.rank, teacher.rank, seed)
    else:
        named = {f"transformer.{key}": value for key, value in backbone.network.named_parameters()}
    if teacher.kind == "base":
        named |= {f"text_encoder.{key}": value for key, value in backbone.text.named_parameters()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    return named


def _train(name: str, backbone: MicroBackbone, world: World, params: Params) -> list[dict[str, Any]]:
    """Trains one teacher into `backbone`, resuming where it last saved, and returns the curve; the EMA's weights
    stay."""
    teacher, state, fingerprint = (
        params.teachers[name],
        params.finished(name).parent / "state",
        params.fingerprint(name),
    )
    numbers, named = teacher.training, _trained(backbone, teacher, name, params.seed)
    optimizers = build_optimizer(numbers.optimizer, named.items(), numbers.learning_rate, backbone)
    ema, start, curve, recent = Ema(named, numbers.ema), 0, list[dict[str, Any]](), list[float]()
    if saved := load_state(state, fingerprint):
        tensors, record = saved
        load_training(tensors, named, ema, optimizers)
        ema.updates, start, curve = record["updates"], record["step"], record["curve"]
        print(f"{name}: goes on at step {start}", flush=True)
    data, trainee = (
        _data(backbone, world, teacher, params.seed, name),
        Trainee(backbone, backbone.network, named, optimizers, ema),
    )
    steps = train(trainee, data.at, teacher.examples, numbers, params.seed, start)
    with progress(f"teacher {name}", numbers.steps - start) as advance:
        for step in steps:
            recent.append(step.loss)
            advance(loss=step.loss)
            done = step.index + 1
            if done % NOTED == 0 or done == numbers.steps:
                mean = sum(recent) / len(recent)
                curve.append({"teacher": name, "step": done, "loss": mean, "gradient_norm": step.gradient_norm})
                recent.clear()
            if done % params.save_every == 0 or done == numbers.steps:
                record = {"fingerprint": fingerprint, "updates": ema.updates, "curve": curve}
                save_state(state, done, training_tensors(named, ema, optimizers), record)
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(ema.shadow[key])
            parameter.requires_grad_(False)
    return curve


def _make(name: str, world: World, params: Params) -> None:
    """Trains a teacher and writes its finished folder."""
    teacher, base = params.teachers[name], params.finished(BASE)
    backbone = _new_backbone(world, params) if name == BASE else MicroBackbone.load(base)
    curve = _train(name, backbone, world, params)
    facts = {"name": name, "capability": teacher.capability, "kind": teacher.kind}
    base_sha256 = None if name == BASE else sha256_file(weights_file(base, "base"))
    with atomic_folder(params.finished(name)) as folder:
        save_teacher(folder, backbone, backbone.network, **facts, base_sha256=base_sha256)
        write_table(folder / "training.csv", ("teacher", "step", "loss", "gradient_norm"), curve)


def teachers(params: Params, *, out: Path) -> dict[str, Any]:
    """Trains every teacher of params.yaml, or fetches and checks those of `sources`, and writes them to `out`.

    Training takes tens of minutes on two cores; killed, the same command goes on where it stopped. So does a fetch.
    """
    if params.sources:
        return assemble(params.sources, out, Path.cwd())
    world, summary = params.world, {}
    for name in [BASE, *(name for name in params.teachers if name != BASE)]:
        finished = params.finished(name)
        if not finished.exists():
            _make(name, world, params)
        summary[name] = sha256_file(weights_file(finished, params.teachers[name].kind))[:12]
    with atomic_folder(out) as folder:
        for name in summary:
            shutil.copytree(params.finished(name), folder / name)
    return summary
