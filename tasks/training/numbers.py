"""A step and a run in numbers, for metrics files and the stage's summary."""

from __future__ import annotations

import resource
from typing import Any

import torch

from model.instruments import binned
from model.setup import Setup
from model.step import Step
from tasks.training.metrics import Metrics, read_metrics


def step_metrics(step: Step, batch: int) -> dict[str, float]:
    named: dict[str, float] = {}
    losses, levels, states = step.losses, step.levels, len(step.levels) // batch
    names = [route.capability for route in step.plan.routes for _ in range(states)]
    for capability in dict.fromkeys(names):
        theirs = [index for index, name in enumerate(names) if name == capability]
        bins = binned([losses[index] for index in theirs], [levels[index] for index in theirs])
        named |= {f"loss/{capability}/{name}": value for name, value in bins.items()}
    named |= {f"gradient_norm/{step.route}": step.gradient_norm, "learning_rate": step.learning_rate}
    return named | {"evaluations_per_sample": step.evaluations / batch, "floor_per_sample": step.floor / batch}


def step_speed(step: Step, batch: int, device: torch.device) -> dict[str, float]:
    rate = batch / max(step.seconds, 1e-9)
    return {"seconds": step.seconds, "samples_per_second": rate, "memory_bytes": float(peak_memory(device))}


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's largest resident size, or on CUDA the largest sum of its tensors."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def summary(setup: Setup, rows: list[dict[str, Any]], ended: str, speed: Metrics) -> dict[str, Any]:
    """What the stage tells at its end of a run with these rows of steps.csv."""
    batch, last = setup.params.batch, rows[-len(rows) // 10 :] if rows else []
    samples = max(batch * len(rows), 1)
    seconds = [line["value"] for line in read_metrics(speed.path) if line["name"] == "seconds"]
    return {
        "steps": len(rows),
        **({"ended": ended} if ended else {}),
        "loss, last tenth": round(sum(row["loss"] for row in last) / max(len(last), 1), 5),
        **({"samples per second": round(batch * len(seconds) / max(sum(seconds), 1e-9), 1)} if seconds else {}),
        "evaluations per sample": round(sum(row["evaluations"] for row in rows) / samples, 4),
        "floor per sample": round(sum(row["floor"] for row in rows) / samples, 4),
        "micro-batch": setup.execution.micro_batch,
        "peak memory, GB": round(peak_memory(setup.execution.device) / 1e9, 2),
        "trainable parameters": sum(parameter.numel() for parameter in setup.student.parameters.values()),
    }
