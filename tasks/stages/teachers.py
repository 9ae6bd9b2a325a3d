"""Stage `teachers`: trains the base and the specialists on the micro world, or puts together those that `sources`
names.

Frozen in dvc.yaml: the micro world's trained weights travel with the repository, and others are fetched knowingly, by
running the stage.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from data.bounds import Count, NotNegative, OneOf, Positive
from data.errors import UserError
from data.files import atomic_file, atomic_folder, digest, sha256_file
from data.microworld import World, example, render
from data.progress import progress
from data.randomness import numpy_generator
from data.records import CAPABILITIES, CATEGORIES, CapabilityName
from model.backbones.micro import MicroBackbone, MicroSize
from model.checkpoint import Ema, load_state, save_state
from model.compute.optimizer import build_optimizer
from model.fields.base import Condition
from model.flow_matching import FlowMatchingParams, Trainee, train
from model.networks.network import add_adapter
from model.networks.teachers import BASE, save_teacher, weights_file
from model.pixels import as_images
from tasks.params.sections import BackboneParams
from tasks.weights.assembly import SourceParams, assemble, source_faults

RUNS = Path("runs")


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
        found = [] if BASE in self.teachers else [f"teachers: {BASE!r} is missing; every specialist starts from it"]
        for name, teacher in self.teachers.items():
            if (teacher.kind == "base") != (name == BASE):
                found.append(
                    f'teachers.{name}.kind = {teacher.kind!r}: must be "base" for {BASE!r} and "full" or "adapter" for the others'
                )
        return found


def _draw(
    world: World, mix: dict[str, float], count: int, seed: int, purpose: str
) -> tuple[list[str], np.ndarray | None, np.ndarray]:
    """Prompts, sources (None when no category edits) and targets of `count` examples of the train split."""
    categories, shares = list(mix), np.array(list(mix.values()))
    prompts, sources, targets = [], [], []
    for index in range(count):
        rng = numpy_generator(seed, index, 0, purpose)
        record, source, target = example(
            world, rng, categories[int(rng.choice(len(categories), p=shares / shares.sum()))], "train"
        )
        prompts.append(record["prompt"])
        sources.append(None if source is None else render(world, source))
        targets.append(render(world, target))
    edits = [source for source in sources if source is not None]
    if edits and len(edits) != count:
        raise UserError("teachers: a mix must hold either T2I tags or edit categories, not both")
    return prompts, np.stack(edits) if edits else None, np.stack(targets)


def _fit_codec(backbone: MicroBackbone, world: World, params: Params) -> float:
    """On pictures of every category, the styled ones often enough to be kept; returns the share of variance lost."""
    mix = {
        category: 6.0 if category == "style_change" else 1.0
        for capability in CAPABILITIES.values()
        for category in capability.categories
    }
    pictures = [
        render(
            world,
            example(
                world, numpy_generator(params.seed, index, 0, "codec"), _weighted(mix, params.seed, index), "train"
            )[2],
        )
        for index in range(params.codec_examples)
    ]
    return backbone.codec.fit(as_images(np.stack(pictures)))


def _weighted(mix: dict[str, float], seed: int, index: int) -> str:
    shares = np.array(list(mix.values()))
    return list(mix)[int(numpy_generator(seed, index, 1, "codec").choice(len(mix), p=shares / shares.sum()))]


def _new_backbone(world: World, params: Params) -> MicroBackbone:
    p = params.backbone.micro
    if p is None:
        raise UserError(
            f"backbone.name = {params.backbone.name!r}: this stage trains the micro network only; published checkpoints are brought, not trained"
        )
    size = MicroSize(world.grid, p.width, p.layers, p.heads, p.latent_channels)
    backbone = MicroBackbone.new(world.vocabulary, size, params.shift, params.seed)
    lost = _fit_codec(backbone, world, params)
    print(f"codec: {p.latent_channels} components lose {100 * lost:.2f} % of the pixel variance", flush=True)
    return backbone


def _batches(
    backbone: MicroBackbone, world: World, teacher: TeacherParams, seed: int, name: str
) -> Callable[[list[int]], tuple[Condition, torch.Tensor]]:
    prompts, sources, targets = _draw(world, teacher.mix, teacher.examples, seed, f"teachers/{name}")
    with torch.no_grad():
        x_0 = backbone.encode_image(as_images(targets))
        source = None if sources is None else backbone.encode_image(as_images(sources))
    tokens, empty = backbone.text.tokens(prompts), backbone.text.tokens([""])

    def batch_at(rows: list[int]) -> tuple[Condition, torch.Tensor]:
        embeds, pooled = backbone.text(tokens[rows])
        empty_embeds, empty_pooled = backbone.text(empty)
        return Condition(
            embeds, pooled, empty_embeds[0], empty_pooled[0], None if source is None else source[rows]
        ), x_0[rows]

    return batch_at


def _train(
    name: str,
    teacher: TeacherParams,
    backbone: MicroBackbone,
    world: World,
    params: Params,
    state: Path,
    fingerprint: str,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains one teacher, resuming from `state`; returns its network, holding the EMA weights, and the curve."""
    if teacher.kind == "adapter":
        network, named = (
            backbone.network,
            add_adapter(backbone, backbone.network, name, teacher.rank, teacher.rank, params.seed),
        )
    else:
        network = backbone.network
        named = {f"transformer.{key}": value for key, value in network.named_parameters()}
        if teacher.kind == "base":
            named |= {f"text_encoder.{key}": value for key, value in backbone.text.named_parameters()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    optimizers = build_optimizer(teacher.training.optimizer, named.items(), teacher.training.learning_rate, backbone)
    ema, start, curve = Ema(named, teacher.training.ema), 0, []
    found = load_state(state, fingerprint)
    if found:
        tensors, record = found
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(tensors[f"trainable.{key}"])
                ema.shadow[key].copy_(tensors[f"ema.{key}"])
        optimizers.load_tensors(
            {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
        )
        ema.updates, start, curve = record["updates"], record["step"], record["curve"]
        print(f"{name}: goes on at step {start}", flush=True)
    batch_at = _batches(backbone, world, teacher, params.seed, name)
    recent: list[float] = []
    with progress(f"teacher {name}", teacher.training.steps - start) as advance:
        trainee = Trainee(backbone, network, named, optimizers, ema)
        for step in train(trainee, batch_at, teacher.examples, teacher.training, params.seed, start):
            recent.append(step.loss)
            advance(loss=step.loss)
            done = step.index + 1
            if done % 50 == 0 or done == teacher.training.steps:
                curve.append(
                    {
                        "teacher": name,
                        "step": done,
                        "loss": sum(recent) / len(recent),
                        "gradient_norm": step.gradient_norm,
                    }
                )
                recent.clear()
            if done % params.save_every == 0 or done == teacher.training.steps:
                tensors = {f"trainable.{k}": v for k, v in named.items()} | {
                    f"ema.{k}": v for k, v in ema.shadow.items()
                }
                save_state(
                    state,
                    done,
                    tensors | {f"optimizer.{k}": v for k, v in optimizers.tensors().items()},
                    {"fingerprint": fingerprint, "updates": ema.updates, "curve": curve},
                )
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(ema.shadow[key])
            parameter.requires_grad_(False)
    return network, curve


def _write_curve(path: Path, curve: list[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ["teacher", "step", "loss", "gradient_norm"])
        writer.writeheader()
        writer.writerows(curve)


def teachers(params: Params, *, out: Path) -> dict[str, Any]:
    """Trains every teacher of params.yaml, or fetches and checks those of `sources`, and writes them to `out`.

    Training takes tens of minutes on two cores; killed, the same command goes on where it stopped. So does a fetch.
    """
    if params.sources:
        return assemble(params.sources, out, Path.cwd())
    world = params.world
    home = (
        RUNS
        / f"teachers-{digest([asdict(params.world), asdict(params.backbone), params.seed, params.shift, params.codec_examples])[:12]}"
    )
    summary: dict[str, Any] = {}
    names = [BASE, *(name for name in params.teachers if name != BASE)]
    for name in names:
        teacher = params.teachers[name]
        wanted: dict[str, Any] = {BASE: asdict(params.teachers[BASE]), name: asdict(teacher)}
        fingerprint = digest(wanted)
        finished = home / f"{name}-{fingerprint[:12]}" / "finished"
        if not finished.exists():
            backbone = (
                _new_backbone(world, params)
                if name == BASE
                else MicroBackbone.load(
                    home / f"{BASE}-{digest({BASE: asdict(params.teachers[BASE])})[:12]}" / "finished"
                )
            )
            network, curve = _train(name, teacher, backbone, world, params, finished.parent / "state", fingerprint)
            base_weights = (
                None
                if name == BASE
                else sha256_file(
                    weights_file(
                        home / f"{BASE}-{digest({BASE: asdict(params.teachers[BASE])})[:12]}" / "finished", "base"
                    )
                )
            )
            with atomic_folder(finished) as temporary:
                save_teacher(
                    temporary,
                    backbone,
                    network,
                    name=name,
                    capability=teacher.capability,
                    kind=teacher.kind,
                    base_sha256=base_weights,
                )
                _write_curve(temporary / "training.csv", curve)
        summary[name] = sha256_file(weights_file(finished, teacher.kind))[:12]
    with atomic_folder(out) as temporary:
        for name in names:
            wanted = {BASE: asdict(params.teachers[BASE]), name: asdict(params.teachers[name])}
            shutil.copytree(home / f"{name}-{digest(wanted)[:12]}" / "finished", temporary / name)
    return summary
