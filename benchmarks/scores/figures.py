"""Figures: grids of samples, strips of edits, bars with intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.scores.scorecard import Scorecard, all_paths
from data.errors import UserError
from data.files import atomic_file
from data.records import BENCHMARKS, HEADLINES, RETENTION

STRIPS_A_LINE = 2
# told apart without red and green
COLORS: tuple[str, ...] = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
COLORS += ("#d55e00", "#8c8c8c", "#4d4d4d", "#f0e442", "#661100")


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def _bare(axes: Axes, title: str) -> None:
    """A plot from 0 up without a frame at its top and right."""
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_ylim(bottom=0.0)
    axes.spines[["top", "right"]].set_visible(False)


def sample_grid(images: Sequence[np.ndarray], titles: Sequence[str], path: str | Path, columns: int = 6) -> None:
    """A PNG sheet of images (H, W, 3) uint8 with their titles.

    Raises UserError for none, or another number of titles."""
    if not images or len(images) != len(titles):
        given = f"{len(images)} images with {len(titles)} titles"
        raise UserError(f"{path}: {given}; give one title an image and at least one image")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(textwrap.fill(title, 24, break_long_words=False, break_on_hyphens=False), fontsize=7)
    _save(figure, path)


def edit_strips(
    sources: Sequence[np.ndarray],
    teachers: Sequence[np.ndarray],
    students: Sequence[np.ndarray],
    prompts: Sequence[str],
    path: str | Path,
) -> None:
    """A PNG sheet with two edits a line: source, teacher, student, each (H, W, 3) uint8, under the instruction.

    Raises UserError for unequal or empty lists."""
    lengths = {"sources": len(sources), "teachers": len(teachers), "students": len(students), "prompts": len(prompts)}
    if len(set(lengths.values())) > 1 or not prompts:
        raise UserError(f"{path}: lists of lengths {lengths}; give one of each an edit and at least one edit")
    lines = math.ceil(len(prompts) / STRIPS_A_LINE)
    figure = Figure(figsize=(4.6 * STRIPS_A_LINE, 1.75 * lines), layout="constrained")
    grid = figure.subplots(lines, 3 * STRIPS_A_LINE, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    edits = zip(grid.reshape(-1, 3), prompts, zip(sources, teachers, students, strict=True), strict=False)
    for row, prompt, images in edits:
        for axes, name, image in zip(row, ("source", "teacher", "student"), images, strict=True):
            axes.set_axis_on()
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(name, fontsize=7)
        row[1].set_title(prompt, fontsize=8)
    _save(figure, path)


def scorecard_plot(scorecards: Mapping[str, Scorecard], path: str | Path) -> None:
    """A PNG of every metric of every model with its interval, one panel a benchmark.

    Raises UserError when there is no metric at all."""
    groups: dict[str, list[str]] = {prefix: [] for prefix in (*(f"{name}/" for name in BENCHMARKS), RETENTION)}
    for metric in all_paths(scorecards):
        groups.setdefault(f"{metric.partition('/')[0]}/", []).append(metric)
    panels = [panel for panel in groups.values() if panel]
    if not panels:
        raise UserError(f"{path}: no metric to draw; pass at least one scorecard with metrics")
    figure = Figure(figsize=(10, 3.4 * len(panels)), layout="constrained")
    color_of = {name: COLORS[index % len(COLORS)] for index, name in enumerate(scorecards)}
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        present = {name: card.metrics for name, card in scorecards.items() if not card.metrics.keys().isdisjoint(panel)}
        width = min(0.3, 0.8 / len(present))
        for index, (name, metrics) in enumerate(present.items()):
            known = [(place, metrics[metric]) for place, metric in enumerate(panel) if metric in metrics]
            x = np.array([place for place, _ in known]) + (index - (len(present) - 1) / 2) * width
            means = [metric.mean for _, metric in known]
            spread = np.array([(metric.mean - metric.low, metric.high - metric.mean) for _, metric in known])
            whiskers = {"yerr": spread.T.clip(min=0.0), "error_kw": {"elinewidth": 0.8, "capsize": 1.5}}
            axes.bar(x, means, width, label=name, color=color_of[name], **whiskers)
        axes.set_xticks(range(len(panel)), [metric.split("/")[1].replace("_", "_\n") for metric in panel], fontsize=8)
        axes.set_xlim(-0.6, len(panel) - 0.4)
        _bare(axes, f"{panel[0].split('/')[0]} (mean and interval)")
    handles = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: bars for pair in handles for bars, label in zip(*pair, strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(6, len(entries)), fontsize=8)
    _save(figure, path)


def cost_curves(points: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """A PNG of quality against cost, one panel a benchmark: {"model", "steps", "evaluations_per_image", "path", "mean",
    "low", "high"}, a line for each model, labelled with its steps."""
    panels = [headline for headline in HEADLINES.values() if any(point["path"] == headline for point in points)]
    figure = Figure(figsize=(10, 3.6 * len(panels)), layout="constrained")
    models = list(dict.fromkeys(point["model"] for point in points))
    for axes, headline in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        for model, color in zip(models, cycle(COLORS), strict=False):
            table = pd.DataFrame([point for point in points if (point["model"], point["path"]) == (model, headline)])
            if table.empty:
                continue
            spread = np.array([table["mean"] - table["low"], table["high"] - table["mean"]]).clip(min=0.0)
            x, style = table["evaluations_per_image"], {"capsize": 2, "elinewidth": 0.8, "marker": "o", "markersize": 4}
            axes.errorbar(x, table["mean"], yerr=spread, label=model, color=color, **style)
            for at, mean, steps in zip(x, table["mean"], table["steps"], strict=True):
                offset = {"xytext": (4, -9), "textcoords": "offset points"}
                axes.annotate(str(steps), (at, mean), fontsize=7, color=color, **offset)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("network evaluations an image (beside each point: Euler steps)", fontsize=8)
        _bare(axes, f"{headline} against cost (mean and interval)")
        axes.legend(fontsize=8)
    _save(figure, path)


def training_curves(steps: Mapping[str, Path], path: str | Path) -> None:
    """A PNG of the loss and the gradient norm by step of several trainings, with their running means over a twentieth.

    `steps` maps a training to its steps.csv (columns step, loss, gradient_norm); without steps its panels are empty.
    Raises UserError for a missing file."""
    missing = [str(file) for file in steps.values() if not file.is_file()]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}; run the stage that trains it again")
    columns = {"loss": "loss", "gradient_norm": "gradient norm"}
    figure = Figure(figsize=(10, 3.0 * len(steps)), layout="constrained")
    grid = figure.subplots(len(steps), len(columns), squeeze=False)
    for row, (name, file) in zip(grid, steps.items(), strict=True):
        table = pd.read_csv(file)
        for axes, (column, label) in zip(row, columns.items(), strict=True):
            mean = table[column].rolling(max(1, len(table) // 20), min_periods=1).mean()
            axes.plot(table["step"], table[column], color=COLORS[4], linewidth=0.6)
            axes.plot(table["step"], mean, color=COLORS[0], linewidth=1.5)
            _bare(axes, f"{name}, {label} by step (thick: running mean)")
    _save(figure, path)
