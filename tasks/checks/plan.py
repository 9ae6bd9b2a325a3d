"""`python -m tasks plan`: what params.yaml or a preset would run: stages, what is cached, evaluations, time, memory,
and weights that are missing.

Evaluations count single samples through the network, as the loop's counter does; a backward costs about one more with
an adapter, two more when all parameters train. Times come from the rate that this project's last run of the same
network measured, or else from floating-point operations; which, is said.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import stats

from data.errors import UserError
from data.files import read_json
from data.records import CAPABILITIES
from data.yaml_files import read_yaml
from model.fields import composed
from model.methods import METHODS
from model.rollout import QUERY_BIAS
from tasks.checks.preflight import check_all, evaluators
from tasks.params.presets import preset_file
from tasks.params.reading import PARAMS_FILE, load_params
from tasks.params.sections import SHARED
from tasks.stages.contract import STAGES, load_stage
from tasks.training.metrics import read_metrics, speed_file
from tasks.weights.assembly import addresses
from tasks.weights.sources import availability, cached

TEACHERS = Path("data/teachers")
GUIDED = 2  # evaluations of a field under classifier-free guidance
# Floating-point operations of one forward of one sample, 1e12 (T2I, edit) by resolution; Z-Image with 128 and 160 text
# tokens.
ZIMAGE_TERA = {512: (13.7, 27.4), 1024: (56.6, 128.8)}
GPU_RATE, GPU_SHARE = (
    790e12,
    0.4,
)  # one H100: bf16 matrices per second in practice, and the share of it that a whole step reaches
CPU_RATE = 2e10  # one core in fp32
ADAM, GRADIENT, VALUE = 8, 4, 4  # bytes of one trained fp32 parameter: two moments, gradient, itself


@dataclass(frozen=True)
class Row:
    """One stage. `evaluations` and `seconds` are None where they cannot be known yet, 0 where no network runs; `note`
    says from what they follow.
    """

    stage: str
    state: str
    evaluations: int | None
    seconds: float | None
    note: str


def query_distribution(steps: int, bias: str) -> np.ndarray:
    """P(j), j = 0 .. steps - 1: of min(floor(u N), N - 1) with u ~ Beta of the named bias. Exact."""
    return np.diff(stats.beta(*QUERY_BIAS[bias]).cdf(np.arange(steps + 1) / steps))


def expected_index(steps: int, bias: str, count: int = 1) -> float:
    """E[max of `count` independent query indices]: the length of the rollout that reaches them all."""
    cumulative = np.cumsum(query_distribution(steps, bias)) ** count
    return float(np.sum(1.0 - cumulative[:-1]))


def step_cost(params: Any, teacher: float, method: str, states: str, query_states: int) -> tuple[float, int]:
    """Expected network evaluations of one trained sample, and how many have a backward; `teacher`: evaluations of one
    answer of the teacher's field.
    """
    reached = expected_index(params.rollout_steps, params.query, query_states) if states == "on_policy" else 0.0
    return METHODS[method].cost(params.rollout_steps, reached, teacher, query_states)


def forwards(cost: tuple[float, int], trainable: str) -> float:
    """A step's cost in forwards: a backward counts as one where an adapter trains, else as two."""
    return cost[0] + cost[1] * (1.0 if trainable == "adapter" else 2.0)


def _sections(path: Path) -> dict[str, Any]:
    return {name: load_params(load_stage(name).params, name, path) for name in STAGES}


def _images(params: Mapping[str, Any], project: Path) -> tuple[dict[str, int] | None, str]:
    """Held-out images by capability: of the micro world by params, of a folder by what was curated from it."""
    collect = params["collect"]
    if collect.source == "microworld":
        counts = collect.evaluation
    elif (project / "data/curated/summary.json").is_file():
        from data.records import read_examples

        categories = [
            example.category for example in read_examples(project / "data/curated") if example.split == "eval"
        ]
        counts = {category: categories.count(category) for category in set(categories)}
    else:
        return None, "depends on the data: curate it first"
    each = params["validate"].sampling.images_per_prompt
    return {
        name: each * sum(counts.get(category, 0) for category in one.categories)
        for name, one in CAPABILITIES.items()
        if name != "edit"
    }, ""


def measured_rate(project: Path, family: str) -> float | None:
    """Network evaluations a second, as the last distillation of this family on this machine counted them; None where
    there is none.
    """
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
    """The network: parameters, those of a rank-1 adapter (sum of in + out over its layers), tokens of a T2I sample,
    width and blocks.
    """

    parameters: int
    per_rank: int
    tokens: int
    width: int
    blocks: int


def size_of(params: Mapping[str, Any], project: Path) -> Size:
    """From shapes alone: of the base that `teachers.sources` names, or of the one among the teachers, where it is here
    and the family's; else of the published network."""
    from model.backbones import family_of, load_backbone
    from model.networks.adapters import linear_modules
    from model.networks.network import own_layers

    backbone = params["distill"].backbone
    sources = params["teachers"].sources
    base = (cached(sources["base"].uri, project) if "base" in sources else None) or project / TEACHERS / "base"
    if (base / "model_index.json").is_file() and family_of(base) == backbone.name:
        made: Any = load_backbone(base, need=())
    elif backbone.name == "micro":
        from model.backbones.micro import MicroBackbone

        world, m = params["collect"].world.world(), backbone.micro
        made = MicroBackbone.new(world.vocabulary, world.grid, m.width, m.layers, m.heads, m.latent_channels, 1.0, 0)
    else:
        from model.backbones.sizes import SIZES, random_backbone

        made = random_backbone(SIZES["zimage" if backbone.name == "zimage" else "sd35-m"], device="meta")
    shapes, layers = linear_modules(made.network), own_layers(made)
    if backbone.pretrained is None:
        _, h, w = made.latent_shape
    else:
        h = w = backbone.pretrained.resolution // made.pixels_per_latent
    patch = made.size_multiple // made.pixels_per_latent
    config = dict(made.network.config)
    width = int(config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"])
    text = 128 if backbone.name == "zimage" else 8 if backbone.name == "micro" else 333
    blocks = int(config.get("n_layers") or config["num_layers"])
    count = sum(value.numel() for value in made.network.parameters())
    return Size(count, sum(sum(shapes[name]) for name in layers), (h // patch) * (w // patch) + text, width, blocks)


def forward_operations(size: Size, family: str, resolution: int, edit: bool) -> float:
    """Floating-point operations of one forward of one sample: 2 per parameter and token, and 4 tokens^2 width per block
    for the attention.
    """
    if family == "zimage" and resolution in ZIMAGE_TERA:
        return ZIMAGE_TERA[resolution][edit] * 1e12
    tokens = size.tokens * (2 if edit and family == "zimage" else 1)  # the others read the source beside the noise
    return 2.0 * size.parameters * tokens + 4.0 * tokens**2 * size.width * size.blocks


def waiting_memory(params: Mapping[str, Any], size: Size, kinds: Mapping[str, str]) -> float:
    """GB of the offloaded teachers, which wait in the host's memory; 0 without `offload`."""
    b = params["distill"].backbone
    full = sum(kind == "full" for kind in kinds.values())
    return full * size.parameters * b.bytes_a_weight / 1e9 if b.offload else 0.0


def memory(params: Mapping[str, Any], size: Size, kinds: Mapping[str, str]) -> dict[str, float]:
    """What lies on the device in training, in GB, activations aside: micro-batches are cut to what is left for them.

    Of offloaded teachers it is the weights of the one that answers: they visit the device in turn.
    """
    p, b = params["distill"], params["distill"].backbone
    width = b.bytes_a_weight
    adapter = p.rank * size.per_rank
    trained = adapter if p.trainable == "adapter" else size.parameters
    full = sum(kind == "full" for kind in kinds.values())
    found = {
        "base": size.parameters * width,
        "full-checkpoint teachers": (min(full, 1) if b.offload else full) * size.parameters * width,
        "adapter teachers (rank taken as the student's)": sum(kind == "adapter" for kind in kinds.values())
        * adapter
        * VALUE,
        "student: values, gradients, moments, average": trained * (VALUE + GRADIENT + ADAM + VALUE),
    }
    return {name: value / 1e9 for name, value in found.items() if value}


def stage_states(project: Path, same_params: Mapping[str, bool]) -> dict[str, str]:
    """Stage -> "cached", "runs: why" or "frozen", by `dvc status`; `same_params`: whether its sections are those in
    force.
    """
    from tasks.running.repro import stream

    ended = stream([sys.executable, "-m", "dvc", "status", "--json"], project, lambda _: None)
    text = next((line for line in reversed(ended.lines) if line.startswith("{")), None)
    if ended.status or text is None:
        return dict.fromkeys(STAGES, "unknown: dvc status failed here")
    status, states, upstream = json.loads(text), {}, ""
    for name in STAGES:
        changes = [change for change in status.get(name, []) if isinstance(change, dict)]
        deps = {path: how for change in changes for path, how in change.get("changed deps", {}).items()}
        if name == "teachers":  # frozen: never rerun by dvc
            states[name] = "frozen" + (": not fetched" if not (project / TEACHERS).is_dir() else "")
            continue
        why = []
        if upstream:
            why.append(f"after {upstream}")
        if not same_params[name] or any(path.endswith("params.yaml") for path in deps):
            why.append("params")
        why += ["code"] if any(path.endswith(".py") for path in deps) else []
        why += ["inputs"] if any("." not in path for path in deps) else []
        if any("changed outs" in change for change in changes) and not why:
            why.append("outputs are missing or changed")
        states[name] = f"runs: {', '.join(why)}" if why else "cached"
        upstream = upstream or (name if why else "")
    return states


def plan(path: Path, project: Path) -> dict[str, Any]:
    """Everything the command prints, as JSON: stages, totals, memory (GB), weights. Raises UserErrors for faults of the
    file.
    """
    check_all(path)
    params, document, force = _sections(path), read_yaml(path), project / PARAMS_FILE
    in_force = read_yaml(force) if force.exists() else {}
    same = {name: all(document.get(key) == in_force.get(key) for key in (name, *SHARED)) for name in STAGES}
    states = stage_states(project, same)
    p, family = params["distill"], params["distill"].backbone.name
    size = size_of(params, project)
    resolution = p.backbone.pretrained.resolution if p.backbone.pretrained else 0
    rate = measured_rate(project, family)
    gpu = family != "micro"
    assumed = GPU_RATE * GPU_SHARE if gpu else CPU_RATE
    basis = (
        f"{rate:.1f} evaluations/s, measured by the last run here"
        if rate
        else (
            f"from operations at {GPU_SHARE:.0%} of {GPU_RATE / 1e12:.0f} TF/s: one H100"
            if gpu
            else f"from operations at {CPU_RATE / 1e9:.0f} GF/s: one core"
        )
    )

    def seconds(counts: Mapping[str, float]) -> float:
        if rate:
            return sum(counts.values()) / rate
        return (
            sum(
                count * forward_operations(size, family, resolution, CAPABILITIES[name].is_edit)
                for name, count in counts.items()
            )
            / assumed
        )

    def split(total: float, shares: Mapping[str, float]) -> dict[str, float]:
        return {name: total * share / sum(shares.values()) for name, share in shares.items()}

    rows: dict[str, Row] = {}
    for name in ("collect", "curate", "encode"):
        rows[name] = Row(
            name,
            states[name],
            0,
            None,
            "no network" if name != "encode" else "text encoders and VAE, once a prompt and picture",
        )
    fetched = params["teachers"].sources
    trained = {name: one.training.steps * one.training.batch for name, one in params["teachers"].teachers.items()}
    note = "fetched and checked" if fetched else "trained once; the weights come with the repository"
    rows["teachers"] = Row("teachers", states["teachers"], 0 if fetched else sum(trained.values()), None, note)
    shares = {route.capability: route.weight for route in p.routing.routes}
    soft = len(p.routing.routes) if p.routes_taken == "soft" else 1
    per, backwards = step_cost(p, float(soft), p.method, p.states, p.query_states)
    cost = forwards((per, backwards), p.trainable)
    samples = p.steps * p.batch if METHODS[p.method].compute else 0
    note = f"{samples} samples of {per:.2f} evaluations (E[j] = {expected_index(p.rollout_steps, p.query):.2f} of N = {p.rollout_steps}, {p.query}); {p.method}"
    rows["distill"] = Row(
        "distill",
        states["distill"],
        round(samples * per),
        seconds(split(samples * (per if rate else cost), shares)),
        note,
    )
    a = params["absorb"]
    weights = sum(field.weight for field in a.fields)
    network: Any = SimpleNamespace(evaluations=1)
    guided = sum(field.weight * composed(network, field.field).evaluations for field in a.fields) / weights
    per, backwards = step_cost(a, guided, "danceopd", "on_policy", 1)
    cost = forwards((per, backwards), p.trainable)
    samples = a.steps * a.batch
    note = f"{samples} samples of {per:.2f} evaluations, the guided teacher {guided:.2f} of them"
    shares = {field.capability: field.weight for field in a.fields}
    rows["absorb"] = Row(
        "absorb",
        states["absorb"],
        round(samples * per),
        seconds(split(samples * (per if rate else cost), shares)),
        note,
    )
    images, why = _images(params, project)
    teachers = {"base", *(route.teacher for route in p.routing.routes)}
    for name, factor in (("validate", len(teachers)), ("score", 2 + GUIDED)):
        sampling = params[name].sampling
        if images is None:
            rows[name] = Row(name, states[name], None, None, why)
            continue
        counts = {capability: factor * count * sampling.steps for capability, count in images.items()}
        if name == "validate":
            counts["t2i"] += GUIDED * images["t2i"] * sampling.steps
        total = sum(counts.values())
        rows[name] = Row(
            name,
            states[name],
            total,
            seconds(counts),
            f"{sum(images.values())} images of {sampling.steps} steps, {factor} times; judges aside",
        )
    known: Mapping[str, Any] = fetched or params["teachers"].teachers
    kinds = {name: known[name].kind for name in teachers if name in known}
    wanted = addresses(fetched)
    networks = evaluators(document, project)
    return {
        "params": str(path),
        "backbone": family,
        "basis": basis,
        "stages": [asdict(rows[name]) for name in STAGES],
        "memory": memory(params, size, kinds),
        "waiting_memory": waiting_memory(params, size, kinds),
        "parameters": size.parameters,
        "weights": [
            {"key": key, "uri": wanted[key], "state": state} for key, state in availability(wanted, project).items()
        ]
        + [{"key": key, "uri": name, "state": state} for key, (name, state) in networks.items()],
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def print_plan(found: Mapping[str, Any]) -> None:
    """As tables; a missing weight is told with how to supply it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table(title=f"{found['params']}: {found['backbone']}, {found['parameters'] / 1e6:.1f} M parameters")
    for column, justify in (
        ("stage", "left"),
        ("state", "left"),
        ("evaluations", "right"),
        ("time", "right"),
        ("what", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in found["stages"]:
        count = "-" if row["evaluations"] is None else f"{row['evaluations']:,}"
        table.add_row(row["stage"], Text(row["state"]), count, _duration(row["seconds"]), Text(row["note"]))
    console.print(table)
    total = sum(row["seconds"] or 0.0 for row in found["stages"] if not row["state"].startswith(("cached", "frozen")))
    console.print(
        f"time    {_duration(total)} for what runs with a network, where known; {found['basis']}",
        markup=False,
        highlight=False,
    )
    parts = ", ".join(f"{name} {value:.2f}" for name, value in found["memory"].items())
    console.print(
        f"memory  {sum(found['memory'].values()):.2f} GB while training, activations aside ({parts})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if found["waiting_memory"]:
        print(f"        {found['waiting_memory']:.2f} GB on the host, of teachers that wait there (offload)")
    for one in found["weights"]:
        remedy = {
            "here": "",
            "to fetch": ": fetched when a run needs it; `python -m tasks check` asks whether it can be",
            "missing": f": put the weights there, or set {one['key']} to where they are (a path, hf://owner/name, s3://bucket/key, models:/name@alias)",
        }[one["state"]]
        console.print(f"weights {one['state']:8} {one['uri']}{remedy}", markup=False, highlight=False, soft_wrap=True)


def cli(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tasks plan", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--preset", default=None, metavar="NAME", help="plan presets/NAME.yaml instead of the params in force"
    )
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(argv))
    path = preset_file(options.preset) if options.preset else options.params
    found = plan(path, Path.cwd())
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_plan(found)
    return 0
