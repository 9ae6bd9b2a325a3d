"""`python -m tasks plan`: what params.yaml or a preset would run: stages, what is cached, evaluations, time, memory,
and weights that are missing.

Evaluations count single samples through the network, as the loop's counter does; a backward costs about 1 more with an
adapter, 2 more when all parameters train. Times follow from the rate that this project's last run of the same network
measured, else from floating-point operations; the output says which.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import stats

from data.errors import UserError
from data.files import read_json
from data.randomness import numpy_generator
from data.records import CAPABILITIES, read_examples
from data.sources import SOURCES
from data.yaml_files import read_yaml
from model.families import FAMILIES
from model.fields import composed
from model.fields.base import Sampler
from model.methods import METHODS
from model.networks.student import Sampled
from model.rollout import QUERY_BIAS
from model.route import Route, asked_of, drawn_in
from tasks.checks.preflight import check_all, evaluators
from tasks.environment import TEACHERS
from tasks.params.presets import preset_file
from tasks.params.reading import PARAMS_FILE, load_params
from tasks.params.sections import SHARED
from tasks.stages.absorb import STUDENT
from tasks.stages.contract import STAGES, load_stage
from tasks.training.metrics import read_metrics, speed_file
from tasks.weights.assembly import addresses
from tasks.weights.sources import availability, cached

GUIDED = 2  # evaluations of a field under classifier-free guidance
GPU_RATE = 790e12  # operations a second of an H100 in bf16 matrices, as measured
GPU_SHARE = 0.4  # of GPU_RATE, that a whole step reaches
CPU_RATE = 2e10  # operations a second of a core in fp32
ADAM, GRADIENT, VALUE = 8, 4, 4  # bytes of a trained fp32 parameter: two moments, gradient, itself


@dataclass(frozen=True)
class Work:
    """What a stage runs through the network: evaluations, None where they cannot be known yet; and by capability those
    that take time, `costs` with what the backwards take. `note` says from what they follow."""

    note: str
    evaluations: int | None = 0
    counts: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)


def query_distribution(steps: int, bias: str) -> np.ndarray:
    """P(j), j = 0 .. steps - 1: of min(floor(u N), N - 1) with u ~ Beta of the named bias. Exact."""
    return np.diff(stats.beta(*QUERY_BIAS[bias]).cdf(np.arange(steps + 1) / steps))


def expected_index(steps: int, bias: str, count: int = 1) -> float:
    """E[max of `count` distinct query indices]: the length of the rollout that reaches them all. Exact for one and for
    all of them, else the mean of a hundred thousand draws."""
    chances = query_distribution(steps, bias)
    if count == 1 or count >= steps:
        return float(np.arange(steps) @ chances) if count == 1 else steps - 1.0
    # Clocks that ring after exponential times of these rates ring in the order of draws without replacement.
    rings = numpy_generator(0, 0, 0, "expected_index").exponential(size=(100_000, steps)) / chances
    return float(np.argpartition(rings, count - 1)[:, :count].max(axis=1).mean())


def step_cost(params: Any, teacher: float, method: str, states: str, query_states: int) -> tuple[float, int]:
    """Expected evaluations of a trained sample and how many have a backward; `teacher`: those of a teacher's answer."""
    reached = expected_index(params.rollout_steps, params.query, query_states) if states == "on_policy" else 0.0
    return METHODS[method].cost(params.rollout_steps, reached, teacher, query_states)


def measured_rate(project: Path, family: str) -> float | None:
    """Network evaluations a second in the last distillation of this family on this machine, or None."""
    folder = project / "checkpoints" / "student"
    try:
        if read_json(folder / "student.json").get("backbone") != family:
            return None
        speed = speed_file(project, folder)
        lines = read_metrics(speed) if speed else []
        seconds = {line["step"]: line["value"] for line in lines if line["name"] == "seconds"}
        with open(folder / "steps.csv", newline="") as file:
            count = sum(float(row["evaluations"]) for row in csv.DictReader(file) if int(row["step"]) in seconds)
    except (UserError, OSError, KeyError, ValueError):
        return None
    total = sum(seconds.values())
    return count / total if total > 0 and count > 0 else None


@dataclass(frozen=True)
class Size:
    """The network. `per_rank`: parameters of a rank-1 adapter; `tokens`: of a T2I sample."""

    parameters: int
    per_rank: int
    tokens: int
    width: int
    blocks: int


def size_of(params: Mapping[str, Any], project: Path) -> Size:
    """From shapes alone: of the family's base where it is here, else of the published network."""
    from model.networks.adapters import linear_modules
    from model.networks.network import own_layers

    settings, made = params["distill"].backbone, _backbone(params, project)
    shapes, config = linear_modules(made.network), dict(made.network.config)
    if settings.pretrained is None:
        _, height, width = made.latent_shape
    else:
        height = width = settings.pretrained.resolution // made.pixels_per_latent
    patch = made.size_multiple // made.pixels_per_latent
    return Size(
        parameters=sum(value.numel() for value in made.network.parameters()),
        per_rank=sum(sum(shapes[name]) for name in own_layers(made)),
        tokens=(height // patch) * (width // patch) + FAMILIES[settings.name].text_tokens,
        width=int(config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]),
        blocks=int(config.get("n_layers") or config["num_layers"]),
    )


def _backbone(params: Mapping[str, Any], project: Path) -> Any:
    from model.backbones import family_of, load_backbone

    settings, sources = params["distill"].backbone, params["teachers"].sources
    base = (cached(sources["base"].uri, project) if "base" in sources else None) or project / TEACHERS / "base"
    if (base / "model_index.json").is_file() and family_of(base) == settings.name:
        return load_backbone(base, need=())
    if settings.micro is not None:
        from model.backbones.micro import MicroBackbone, MicroSize

        world, m = params["collect"].world, settings.micro
        size = MicroSize(world.grid, m.width, m.layers, m.heads, m.latent_channels)
        return MicroBackbone.new(world.vocabulary, size, shift=1.0, seed=0)
    from model.backbones.sizes import SIZES, random_backbone

    return random_backbone(SIZES[str(FAMILIES[settings.name].size)], device="meta")


def forward_operations(size: Size, family: str, resolution: int, edit: bool) -> float:
    """Floating-point operations of a forward: 2 parameters tokens + 4 tokens^2 width blocks (attention)."""
    known = FAMILIES[family]
    if resolution in known.tera:
        return known.tera[resolution][edit] * 1e12
    tokens = size.tokens * (known.images_of_edit if edit else 1)
    return 2.0 * size.parameters * tokens + 4.0 * tokens**2 * size.width * size.blocks


@dataclass(frozen=True)
class Speed:
    """Turns evaluations into seconds, by the rate that was measured here (evaluations a second), else by operations."""

    rate: float | None
    size: Size
    family: str
    resolution: int  # pixels

    @property
    def basis(self) -> str:
        if self.rate:
            return f"{self.rate:.1f} evaluations/s, measured by the last run here"
        if FAMILIES[self.family].size is None:
            return f"from operations at {CPU_RATE / 1e9:.0f} GF/s: one core"
        return f"from operations at {GPU_SHARE:.0%} of {GPU_RATE / 1e12:.0f} TF/s: one H100"

    def seconds(self, work: Work) -> float | None:
        if not work.counts:
            return None
        if self.rate:  # of evaluations, in steps with their backwards
            return sum(work.counts.values()) / self.rate
        edits = {name: CAPABILITIES[name].is_edit for name in work.costs}
        operations = {edit: forward_operations(self.size, self.family, self.resolution, edit) for edit in (False, True)}
        total = sum(count * operations[edits[name]] for name, count in work.costs.items())
        return total / (CPU_RATE if FAMILIES[self.family].size is None else GPU_RATE * GPU_SHARE)


def waiting_memory(params: Mapping[str, Any], size: Size, kinds: Mapping[str, str]) -> float:
    """GB of the offloaded teachers, which wait in the host's memory; 0 without `offload`."""
    backbone, full = params["distill"].backbone, list(kinds.values()).count("full")
    return full * size.parameters * backbone.bytes_a_weight / 1e9 if backbone.offload else 0.0


def memory(params: Mapping[str, Any], size: Size, kinds: Mapping[str, str]) -> dict[str, float]:
    """What lies on the device in training, in GB, activations aside: micro-batches are cut to what is left for them.

    Of offloaded teachers only the weights of a single teacher count: they visit the device in turn.
    """
    distill, backbone = params["distill"], params["distill"].backbone
    base, adapter = size.parameters * backbone.bytes_a_weight, distill.rank * size.per_rank
    full, adapters = (list(kinds.values()).count(kind) for kind in ("full", "adapter"))
    trained = adapter if distill.trainable == "adapter" else size.parameters
    sizes = {
        "base": base,
        "full-checkpoint teachers": (min(full, 1) if backbone.offload else full) * base,
        "adapter teachers (rank taken as the student's)": adapters * adapter * VALUE,
        "student: values, gradients, moments, average": trained * (VALUE + GRADIENT + ADAM + VALUE),
    }
    return {name: value / 1e9 for name, value in sizes.items() if value}


def stage_states(project: Path, same_params: Mapping[str, bool]) -> dict[str, str]:
    """Stage -> "cached", "runs: why" or "frozen". `same_params`: whether its sections are those in force."""
    from tasks.running.repro import stream

    ended = stream([sys.executable, "-m", "dvc", "status", "--json"], project, lambda _: None)
    text = next((line for line in reversed(ended.lines) if line.startswith("{")), None)
    if ended.status or text is None:
        return dict.fromkeys(STAGES, "unknown: dvc status failed here")
    status, states, upstream = json.loads(text), {}, ""
    for name in STAGES:
        if name == "teachers":  # frozen: never rerun by dvc
            states[name] = "frozen" + (": not fetched" if not (project / TEACHERS).is_dir() else "")
            continue
        changes = [change for change in status.get(name, []) if isinstance(change, dict)]
        deps = [path for change in changes for path in change.get("changed deps", {})]
        reasons = {
            f"after {upstream}": bool(upstream),
            "params": not same_params[name] or any(path.endswith("params.yaml") for path in deps),
            "code": any(path.endswith(".py") for path in deps),
            "inputs": any("." not in path for path in deps),
        }
        why = [reason for reason, holds in reasons.items() if holds]
        if not why and any("changed outs" in change for change in changes):
            why = ["outputs are missing or changed"]
        states[name] = f"runs: {', '.join(why)}" if why else "cached"
        upstream = upstream or (name if why else "")
    return states


# --- the work of the stages -------------------------------------------------------------------------------------------


def _training(samples: int, cost: tuple[float, int], trainable: str, shares: Mapping[str, float], note: str) -> Work:
    """`samples` of a step's cost, dealt by capability. A backward counts as a forward for an adapter, else as two."""
    forward, backward = cost[0], cost[1] * (1.0 if trainable == "adapter" else 2.0)

    def dealt(total: float) -> dict[str, float]:
        return {name: total * share / sum(shares.values()) for name, share in shares.items()}

    counts, costs = dealt(samples * forward), dealt(samples * (forward + backward))
    return Work(f"{samples} samples of {forward:.2f} evaluations{note}", round(samples * forward), counts, costs)


def _asked(routes: Sequence[Route], family: str, student: int | None = None) -> dict[str, float]:
    """Evaluations of a network that an answer of each route's field takes, by capability; `student`: the steps in which
    the teacher of that name is drawn."""
    network: Any = SimpleNamespace(evaluations=1)
    known, usual = dict.fromkeys(asked_of(routes), network), Sampler(FAMILIES[family].steps, 1.0)
    samplers = {STUDENT: Sampler(student or usual.steps, 1.0)}
    return {
        route.capability: composed(network, route.field, known, samplers.get(route.teacher, usual)).evaluations
        for route in routes
    }


def _distillation(params: Any) -> Work:
    routes = params.routing.routes
    asked, shares = _asked(routes, params.backbone.name), {route.capability: route.weight for route in routes}
    mean = sum(asked[name] * share for name, share in shares.items()) / sum(shares.values())
    different = {route.asked: asked[route.capability] for route in routes}
    teacher = float(sum(different.values())) if params.routes_taken == "soft" else mean
    cost = step_cost(params, teacher, params.method, params.states, params.query_states)
    samples = params.steps * params.batch if METHODS[params.method].compute else 0
    index = f"E[j] = {expected_index(params.rollout_steps, params.query):.2f} of N = {params.rollout_steps}"
    return _training(samples, cost, params.trainable, shares, f" ({index}, {params.query}); {params.method}")


def _absorption(params: Any, trainable: str, first: int | None) -> Work:
    """All phases together; `first`: the steps in which the distilled student is drawn."""
    shares, grids = {route.capability: route.weight for route in params.routes}, (*params.phases, params.rollout_steps)
    forward = 0.0
    for before, phase in zip((first, *grids), map(params.on_grid, grids), strict=False):
        asked = _asked(phase.routes, params.backbone.name, before)
        teacher = sum(asked[name] * share for name, share in shares.items()) / sum(shares.values())
        forward += step_cost(phase, teacher, "danceopd", "on_policy", 1)[0] / len(grids)
    note = f" on grids of {', '.join(map(str, grids))} steps"
    return _training(params.steps * params.batch * len(grids), (forward, 1), trainable, shares, note)


def _images(params: Mapping[str, Any], project: Path) -> dict[str, int] | None:
    """Held-out images by capability: by params, or of a folder by what was curated from it (None before that)."""
    collect, sampling, curated = params["collect"], params["validate"].sampling, project / "data/curated"
    if SOURCES[collect.source].made_to_order:
        held_out = collect.evaluation
    elif (curated / "summary.json").is_file():
        held_out = Counter(example.category for example in read_examples(curated) if example.split == sampling.split)
    else:
        return None
    return {
        name: sampling.images_per_prompt * sum(held_out.get(category, 0) for category in capability.categories)
        for name, capability in CAPABILITIES.items()
        if name != "edit"  # the union of two others
    }


UNKNOWN = Work("depends on the data: curate it first", None)


def _validation(params: Any, images: Mapping[str, int] | None) -> Work:
    """Every teacher draws all images, and its own also with guidance."""
    if images is None:
        return UNKNOWN
    routes, steps = params.routing.routes, params.sampling.steps
    team = {"base": "t2i", **{route.teacher: route.capability for route in reversed(routes)}}
    counts: dict[str, float] = {
        name: steps * count * (len(team) + GUIDED * sum(own in (name, "edit") for own in team.values()))
        for name, count in images.items()
    }
    note = f"{sum(images.values())} images of {steps} steps, {len(team)} times, and guided; judges aside"
    return Work(note, round(sum(counts.values())), counts, counts)


def _scoring(params: Mapping[str, Any], images: Mapping[str, int] | None) -> Work:
    """Both students as they are drawn, and the curve: each of them, and the teachers with and without guidance."""
    if images is None:
        return UNKNOWN
    scoring, distill, absorb = params["score"], params["distill"], params["absorb"]
    usual, curve = scoring.sampling.steps, scoring.curve
    first = drawn_in(distill.routing.routes) or usual
    students = [Sampled(first, distill.guidance), Sampled(drawn_in(absorb.routes) or first, absorb.guidance)]
    an_image = sum(how.evaluations for how in students)
    lines = sum(GUIDED if guidance > 1 else 1 for guidance in (distill.guidance, absorb.guidance)) + 1 + GUIDED
    counts: dict[str, float] = {}
    for name, count in images.items():
        part = min(curve.examples * len(CAPABILITIES[name].categories), count)
        counts[name] = count * an_image + part * lines * sum(curve.steps)
    drawn = " and ".join(str(how.steps) for how in students)
    note = f"{sum(images.values())} images of {drawn} steps, and the curve; judges aside"
    return Work(note, round(sum(counts.values())), counts, counts)


def _work(params: Mapping[str, Any], project: Path) -> dict[str, Work]:
    """Stage -> what it runs through the network."""
    distill, teachers, images = params["distill"], params["teachers"], _images(params, project)
    trained = sum(made.training.steps * made.training.batch for made in teachers.teachers.values())
    bundled = Work("trained once; the weights come with the repository", trained)
    return {
        "collect": Work("no network"),
        "teachers": Work("fetched and checked") if teachers.sources else bundled,
        "curate": Work("no network"),
        "validate": _validation(params["validate"], images),
        "encode": Work("text encoders and VAE, once a prompt and picture"),
        "distill": _distillation(distill),
        "absorb": _absorption(params["absorb"], distill.trainable, drawn_in(distill.routing.routes)),
        "score": _scoring(params, images),
    }


# --- the command ------------------------------------------------------------------------------------------------------


def plan(path: Path, project: Path) -> dict[str, Any]:
    """Everything the command prints, as JSON: stages, totals, memory (GB), weights. Raises UserErrors for faults of the
    file.

    Of a stage `evaluations` and `seconds` are None where they cannot be known yet, 0 where no network runs.
    """
    check_all(path)
    params: dict[str, Any] = {name: load_params(load_stage(name).params, name, path) for name in STAGES}
    document, force = read_yaml(path), project / PARAMS_FILE
    in_force = read_yaml(force) if force.exists() else {}
    same = {name: all(document.get(key) == in_force.get(key) for key in (name, *SHARED)) for name in STAGES}
    states = stage_states(project, same)
    distill, backbone, sources = params["distill"], params["distill"].backbone, params["teachers"].sources
    size = size_of(params, project)
    resolution = backbone.pretrained.resolution if backbone.pretrained else 0
    speed = Speed(measured_rate(project, backbone.name), size, backbone.name, resolution)
    stages = []
    for name, work in _work(params, project).items():
        facts = {"evaluations": work.evaluations, "seconds": speed.seconds(work), "note": work.note}
        stages.append({"stage": name, "state": states[name], **facts})
    known: Mapping[str, Any] = sources or params["teachers"].teachers
    routed = {"base", *(route.teacher for route in distill.routing.routes)}
    kinds = {name: known[name].kind for name in routed if name in known}
    uris = addresses(sources)
    weights = [(key, uris[key], state) for key, state in availability(uris, project).items()]
    weights += [(key, *network) for key, network in evaluators(document, project).items()]
    return {
        "params": str(path),
        "backbone": backbone.name,
        "basis": speed.basis,
        "stages": stages,
        "memory": memory(params, size, kinds),
        "waiting_memory": waiting_memory(params, size, kinds),
        "parameters": size.parameters,
        "weights": [{"key": key, "uri": uri, "state": state} for key, uri, state in weights],
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def print_plan(planned: Mapping[str, Any]) -> None:
    """As a table and lines; a missing weight is told with how to supply it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{planned['params']}: {planned['backbone']}, {planned['parameters'] / 1e6:.1f} M parameters"
    table = Table("stage", "state", "evaluations", "time", "what", title=title)
    table.columns[2].justify = table.columns[3].justify = "right"
    for row in planned["stages"]:
        count = "-" if row["evaluations"] is None else f"{row['evaluations']:,}"
        table.add_row(row["stage"], Text(row["state"]), count, _duration(row["seconds"]), Text(row["note"]))
    Console(width=None if sys.stdout.isatty() else 170).print(table)
    idle = ("cached", "frozen")
    total = sum(row["seconds"] or 0.0 for row in planned["stages"] if not row["state"].startswith(idle))
    print(f"time    {_duration(total)} for what runs with a network, where known; {planned['basis']}")
    sizes = ", ".join(f"{name} {value:.2f}" for name, value in planned["memory"].items())
    print(f"memory  {sum(planned['memory'].values()):.2f} GB while training, activations aside ({sizes})")
    if planned["waiting_memory"]:
        print(f"        {planned['waiting_memory']:.2f} GB on the host, of teachers that wait there (offload)")
    places = "(a path, hf://owner/name, s3://bucket/key, models:/name@alias)"
    for weights in planned["weights"]:
        remedy = {
            "here": "",
            "to fetch": ": fetched when a run needs it; `python -m tasks check` asks whether it can be",
            "missing": f": put the weights there, or set {weights['key']} to where they are {places}",
        }
        print(f"weights {weights['state']:8} {weights['uri']}{remedy[weights['state']]}")


def cli(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tasks plan", description=(__doc__ or "").split("\n\n")[0])
    preset = "plan presets/NAME.yaml instead of the params in force"
    parser.add_argument("--preset", default=None, metavar="NAME", help=preset)
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(argv))
    planned = plan(preset_file(options.preset) if options.preset else options.params, Path.cwd())
    if options.json:
        print(json.dumps(planned, indent=2))
    else:
        print_plan(planned)
    return 0
