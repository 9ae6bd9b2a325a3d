"""How fast a distillation step is, beside the step without its savings: `python -m benchmarks.speed --case micro`.

Both paths run in one process, in turn (plain, fast, plain, fast, ...), on the same weights, examples and draws, whole
optimizer steps each; their losses are compared as they go. Peak memory, counted in tensors, is taken before that, of
each path alone. Nothing passes or fails on time.

The plain path (model/plain.py) is what the method's reference implementation does: batches of one, all rollout steps,
recomputation always, a network for every teacher. An evaluation is one network forward on one sample, the backward not
counted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import commands
from data.errors import UserError
from data.files import write_json
from model.backbones import Backbone
from model.backbones.sizes import SD35_MEDIUM, SIZES, NetworkSize, random_backbone
from model.checkpoint import Ema
from model.compute.execution import Execution, blocks_of, fit, moved, prepare_networks, recompute_blocks, rollout_ready
from model.compute.optimizer import build_optimizer
from model.compute.settings import ExecutionParams
from model.distill import distill
from model.examples import Bucket
from model.fields import Layers
from model.fields.base import Condition, VelocityField
from model.methods import danceopd
from model.networks.network import NetworkField, add_adapter
from model.networks.student import STUDENT, Student
from model.plain import accumulate_plain, own_networks
from model.randomness import torch_generator
from model.rollout import euler_grid
from model.route import Route
from model.setup import Setup, teacher_sampler, with_fields
from model.step import LoopParams, Step

ALTERNATIONS = 5
MICRO, MICRO_CHORD, SD3_14M, SD35_M, ZIMAGE = "micro", "micro-chord", "sd3-14m", "sd35-m", "zimage"
PATHS = ("plain", "fast")
ROWS = 8  # distinct random examples


@dataclass(frozen=True)
class Case:
    """One configuration. `rank` 0 trains all parameters, with teachers that are networks of their own; else teachers
    and student are adapters on one base.

    `budget`: bytes that the fast path may spend on a micro-batch's activations; None takes its share of the free
    memory. `field`: layers over every teacher, as a route has them.
    """

    name: str
    size: NetworkSize
    resolution: int | None  # px; None: the size's own
    rank: int
    teachers: int
    batch: int
    rollout_steps: int
    query: str
    optimizer: str
    execution: ExecutionParams
    budget: int | None
    field: Layers = field(default_factory=dict)


FP32 = ExecutionParams("auto", 1, 0, 8, "fp32", "none", "auto", "auto", "auto", False)
BF16 = ExecutionParams("cuda", 1, 0, 8, "bf16", "none", "auto", "auto", "auto", False)
MB = 1 << 20


def sd3_size(width: int, layers: int, edge: int, tokens: int) -> NetworkSize:
    """An SD3 of 16 latent channels, patches of 2 and heads of at most 64, on latents of edge x edge."""
    heads = max(1, width // 64)
    config = SD35_MEDIUM | {
        "sample_size": edge,
        "num_layers": layers,
        "attention_head_dim": width // heads,
        "num_attention_heads": heads,
        "joint_attention_dim": width,
        "caption_projection_dim": width,
        "pooled_projection_dim": width,
        "pos_embed_max_size": edge,
        "dual_attention_layers": (),
    }
    return NetworkSize("sd3", config, tokens)


def sd3_case(name: str, size: NetworkSize, rank: int, batch: int, budget: int | None, steps: int = 16) -> Case:
    """With two teachers, adapters unless `rank` is 0."""
    return Case(name, size, None, rank, 2, batch, steps, "low", "adamw", FP32, budget)


def _micro(_: int) -> Case:
    size = sd3_size(96, 6, 3, 8)
    cells = {"patch_size": 1, "in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "num_attention_heads": 3}
    execution = replace(FP32, rollout_batch=0)
    size = replace(size, config=size.config | cells)
    return Case(MICRO, size, None, 0, 2, 64, 8, "uniform", "muon", execution, None)


def _micro_chord(_: int) -> Case:
    """Guidance and sixteen steps into four, in one pass."""
    return replace(_micro(0), name=MICRO_CHORD, rollout_steps=4, field={"guidance": 2.0, "steps": 4})


def _sd3_14m(_: int) -> Case:
    # 32 x 32 latents in patches of 2 are 256 image tokens; CLIP's 77 of text.
    case = sd3_case(SD3_14M, sd3_size(256, 6, 32, 77), 32, 8, 29 * MB)
    return replace(case, execution=replace(FP32, compile="rollout"))


def _published(name: str, teachers: int) -> Callable[[int], Case]:
    return lambda resolution: Case(name, SIZES[name], resolution, 128, teachers, 8, 16, "low", "adamw", BF16, None)


CASES: dict[str, Callable[[int], Case]] = {
    MICRO: _micro,
    MICRO_CHORD: _micro_chord,
    SD3_14M: _sd3_14m,
    SD35_M: _published(SD35_M, 2),
    ZIMAGE: _published(ZIMAGE, 4),
}
ON_CUDA = (SD35_M, ZIMAGE)


# --- one path of a case -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A path that is ready to run: `steps` yields whole optimizer steps."""

    student: Student
    bucket: Bucket
    execution: Execution
    steps: Any


@torch.no_grad()
def _spread(values: Sequence[torch.Tensor], size: float, seed: int) -> None:
    for slot, value in enumerate(values):
        normal = torch.randn(value.shape, generator=torch_generator(seed, 0, slot, "spread"))
        value += moved(size * normal, value.device).to(value.dtype)


def build(case: Case, device: torch.device, seed: int) -> tuple[Student, dict[str, VelocityField], Bucket]:
    """Student, teachers that differ from it, and random examples; equal for equal seeds."""
    dtype = torch.bfloat16 if case.execution.precision == "bf16" else torch.float32

    def base() -> Backbone:
        return random_backbone(case.size, device=device, dtype=dtype, resolution=case.resolution, seed=seed)

    backbone = base()
    network = backbone.network.requires_grad_(not case.rank)
    teachers: dict[str, VelocityField] = {}
    for number in range(case.teachers):
        name, field = f"teacher{number}", NetworkField(backbone, network if case.rank else base().network)
        if case.rank:
            adapter = add_adapter(backbone, network, name, case.rank, case.rank, seed)
            _spread([value for key, value in adapter.items() if "lora_B" in key], 0.05, seed + number)
            field = replace(field, adapter=name)
        else:
            _spread(list(field.network.parameters()), 0.02, seed + number)
        teachers[name] = field
    if not case.rank:
        return (
            Student(backbone, network, None, dict(network.named_parameters())),
            teachers,
            _examples(case, backbone, seed),
        )
    trained = add_adapter(backbone, network, STUDENT, case.rank, case.rank, seed)
    return Student(backbone, network, STUDENT, trained), teachers, _examples(case, backbone, seed)


def _examples(case: Case, backbone: Backbone, seed: int) -> Bucket:
    """Random prompts of the family's widths and T2I rows of the case's latent shape."""

    def normal(*shape: int, purpose: str) -> torch.Tensor:
        return torch.randn(shape, generator=torch_generator(seed, 0, 0, purpose))

    config, tokens = dict(backbone.network.config), case.size.tokens
    width, pooled_width = (
        config.get("joint_attention_dim") or config["cap_feat_dim"],
        config.get("pooled_projection_dim", 0),
    )
    embeds, pooled = normal(ROWS, tokens, width, purpose="embeds"), normal(ROWS, pooled_width, purpose="pooled")
    segments = None if pooled_width else torch.full((ROWS, 1), tokens)
    target = torch.zeros(1, *backbone.latent_shape).expand(ROWS, -1, -1, -1)  # its shape is all that is asked of it
    empty = torch.zeros_like(embeds[0]), torch.zeros_like(pooled[0])
    last = None if segments is None else segments[0]
    return Bucket(torch.arange(ROWS), embeds, pooled, *empty, None, target, segments, last)


def start(case: Case, path: str, device: torch.device, seed: int, steps: int) -> Running:
    """The path before its first step. The plain one has a network for every teacher and recomputes every block."""
    student, teachers, bucket = build(case, device, seed)
    prepare_networks(case.execution, device, student.network, student.parameters.values(), [])
    execution = _fitted(case, student, bucket, device)
    if path == "plain":
        blocks, teachers = len(blocks_of(student.network)), own_networks(teachers)
        execution = replace(execution, merged=False, compiled_rollout=False, recompute=blocks)
        recompute_blocks(student.network, blocks)
    params = LoopParams(
        steps=steps,
        batch=case.batch,
        learning_rate=2e-4,
        optimizer=case.optimizer,
        schedule="constant",
        warmup=0,
        decay_from=1.0,
        ema=0.0,
        clip=1.0,
        max_gradient_norm=0.0,
        rollout_steps=case.rollout_steps,
        query=case.query,
        states="on_policy",
        routing="hard",
        query_states=1,
    )
    named = zip(("t2i", "local_edit", "global_edit", "edit"), teachers, strict=False)
    listed = [Route(capability, name, 1.0, dict(case.field)) for capability, name in named]
    routes, fields = with_fields(listed, teachers, dict.fromkeys(teachers, teacher_sampler(student.backbone)))
    optimizers = build_optimizer(params.optimizer, student.parameters.items(), params.learning_rate, student.backbone)
    buckets = {route.capability: bucket for route in routes.routes}
    setup = Setup(student, fields, buckets, routes, params, euler_grid(case.rollout_steps), seed, execution)
    ema, method = Ema(dict(student.parameters), 0.0), danceopd.METHOD
    loop = distill(
        setup, optimizers, ema, method=replace(method, compute=accumulate_plain) if path == "plain" else method
    )
    return Running(student, bucket, execution, loop)


def _fitted(case: Case, student: Student, bucket: Bucket, device: torch.device) -> Execution:
    def row() -> torch.Tensor:
        return student.field(*_rows(bucket, 1, device))

    return fit(case.execution, device, student.network, row, case.batch, case.budget)


def _compile(case: Case, device: torch.device, seed: int) -> float:
    """Seconds of the first rollouts, of many rows and of one, where they are compiled: a kernel made for one row serves
    no other number."""
    if case.execution.compile != "rollout":
        return 0.0
    running = start(case, "fast", device, seed, 0)
    begun = time.perf_counter()
    with torch.no_grad(), rollout_ready(running.student.network, running.student.adapter, running.execution):
        for rows in (2, 1):
            running.student.field(*_rows(running.bucket, rows, device))
    _wait(device)
    return time.perf_counter() - begun


def _rows(bucket: Bucket, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    x_t = moved(bucket.targets(list(range(rows))), device)
    return x_t, torch.ones(rows, device=device), moved(bucket.at(list(range(rows))), device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _take(path: Running, device: torch.device) -> tuple[Step, float]:
    """One step and its seconds, the device's work included."""
    _wait(device)
    begun = time.perf_counter()
    step = next(path.steps)
    _wait(device)
    return step, time.perf_counter() - begun


# --- figures ----------------------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, seed: int, alternations: int) -> dict[str, Any]:
    """Both paths in turn: ratios, rates, counted evaluations; the largest relative gap between their losses."""
    paths = {path: start(case, path, device, seed, alternations + 1) for path in PATHS}
    for running in paths.values():  # the first step pays for what is done once
        _take(running, device)
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    counted, floor, gap = 0, 0, 0.0
    for _ in range(alternations):
        losses = {}
        for path in PATHS:
            step, spent = _take(paths[path], device)
            seconds[path].append(spent)
            losses[path] = step.loss
        counted, floor = counted + step.evaluations, floor + step.floor
        gap = max(gap, abs(losses["fast"] - losses["plain"]) / max(abs(losses["plain"]), 1e-12))
    ratios = [plain / fast for plain, fast in zip(seconds["plain"], seconds["fast"], strict=True)]
    samples, fast = case.batch * alternations, paths["fast"]
    weights = {name: value for name, value in fast.student.network.named_parameters() if "lora_" not in name}
    figures = {
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "samples_per_second": {path: case.batch / statistics.median(seconds[path]) for path in PATHS},
        "evaluations_per_sample": counted / samples,
        "floor": floor / samples,
        "alternations": alternations,
        "largest_loss_gap": gap,
        "execution": {
            "micro_batch": fast.execution.micro_batch,
            "rollout_batch": fast.execution.rollout_batch,
            "recomputed_blocks": fast.execution.recompute,
            "compile": case.execution.compile,
        },
        "parameters": sum(value.numel() for value in weights.values()),
    }
    if device.type == "cuda":
        figures |= _utilization(fast, device, samples / sum(seconds["fast"]), floor / samples)
    return figures


def _utilization(path: Running, device: torch.device, rate: float, floor: float) -> dict[str, float]:
    """Model FLOPs over the measured rate of a large bf16 matrix product. A step needs the floor's forwards and a
    backward, which costs one more."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        path.student.field(*_rows(path.bucket, 1, device))
    size, repeats = 8192, 20
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    _wait(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        a @ b
    _wait(device)
    matrix_rate = 2 * size**3 * repeats / (time.perf_counter() - begun)
    forward = float(counter.get_total_flops())
    return {
        "flops_per_forward": forward,
        "matrix_flops_per_second": matrix_rate,
        "flops_utilization": rate * (floor + 1) * forward / matrix_rate,
    }


def peak_bytes(case: Case, path: str, device: torch.device, seed: int) -> int:
    """The largest sum of all tensors alive in two steps of one path, networks included: on CUDA torch's own count, else
    all allocations on the CPU.

    The plain path takes 4 samples a step: it holds one at a time.
    """
    case = replace(case, batch=min(case.batch, 4)) if path == "plain" else case
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _two_steps(case, path, device, seed)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _two_steps(case, path, device, seed)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


def _two_steps(case: Case, path: str, device: torch.device, seed: int) -> None:
    running = start(case, path, device, seed, 2)
    for _ in range(2):  # the second has the optimizer's moments beside the gradients
        _take(running, device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"CPU ({model}), {torch.get_num_threads()} threads"


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    return commands.run(lambda: cli(argv))


def cli(argv: Sequence[str] | None) -> int:
    """Prints a table, writes JSON on request; returns the exit status."""
    about = "A distillation step beside the step without its savings."
    parser = argparse.ArgumentParser("python -m benchmarks.speed", description=about)
    add = parser.add_argument
    cases, large = ", ".join(CASES), " and ".join(ON_CUDA)
    add("--case", nargs="+", required=True, choices=sorted(CASES), metavar="CASE", help=f"one or more of {cases}")
    add("--resolution", type=int, choices=(512, 1024), default=512, help=f"px of {large} (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures here too, by case")
    add("--alternations", type=int, default=ALTERNATIONS, help="timed pairs of steps (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0, help="of torch on the CPU (default: torch's own choice)")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = [name for name in options.case if name in ON_CUDA and device.type != "cuda"]
    if missing:
        names = ", ".join(missing)
        raise UserError(f"speed: {names} needs a CUDA device, and torch finds none; choose {MICRO} or {SD3_14M}")
    if options.alternations < 1:
        raise UserError(f"speed: --alternations {options.alternations}: expected 1 or more")
    results = {name: _figures(name, device, options) for name in options.case}
    if options.json:
        write_json(options.json, results)
    return 0


def _figures(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name](options.resolution)
    compiling = _compile(case, device, options.seed)
    peaks = {}
    for path in PATHS:
        peaks[path] = peak_bytes(case, path, device, options.seed)
        gc.collect()
    found = {
        **measure(case, device, options.seed, options.alternations),
        "compile_seconds": compiling,
        "peak_memory_bytes": peaks,
        "device": device_name(device),
        "seed": options.seed,
        "torch": torch.__version__,
        **({"resolution": options.resolution} if name in ON_CUDA else {}),
    }
    _print(name, found)
    return found


def _print(name: str, found: dict[str, Any]) -> None:
    rates, peaks = found["samples_per_second"], found["peak_memory_bytes"]
    ends = f"{found['ratio_min']:.2f} to {found['ratio_max']:.2f}, {found['alternations']} alternations"
    share = peaks["fast"] / peaks["plain"]
    rows = [
        ("device", found["device"]),
        ("fast / plain", f"{found['ratio_median']:.2f} ({ends})"),
        ("samples a second", f"plain {rates['plain']:.3g}, fast {rates['fast']:.3g}"),
        ("evaluations a sample", f"{found['evaluations_per_sample']:.3f}, floor {found['floor']:.3f}"),
        ("largest loss gap", f"{found['largest_loss_gap']:.1e}"),
        ("peak memory", f"plain {peaks['plain'] / MB:.0f} MiB, fast {peaks['fast'] / MB:.0f} MiB ({share:.2f})"),
    ]
    if found["compile_seconds"]:
        rows.append(("rollouts compiled in", f"{found['compile_seconds']:.0f} s, not counted above"))
    if "flops_utilization" in found and math.isfinite(found["flops_utilization"]):
        rows.append(("FLOPs utilization", f"{found['flops_utilization']:.1%} of the measured matrix rate"))
    print("\n".join(f"{name}: {key} = {text}" for key, text in rows), flush=True)


if __name__ == "__main__":
    sys.exit(main())
