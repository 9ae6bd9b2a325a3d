"""What a reviewer reads: one HTML page that needs nothing beside it, and PNG sheets of images and scores.

Every figure on the page comes from rows listed on the same page (the candidate's) or in the scores files that it names; images are embedded, drawn as they are.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.scorecard import BENCHMARK_OF, MACRO, PRIMARY, ExampleScore, Scorecard
from benchmarks.statistics import Metric
from data.errors import UserError
from data.files import atomic_file, explain, write_text

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#4d4d4d", "#f0e442", "#661100")  # tell apart without red and green
STRIPS_A_LINE = 2
STYLE = """
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;padding:0 1rem 3rem;max-width:64rem;color:#1b1b1b;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child,td.text{text-align:left}td.text{white-space:normal;min-width:12rem}thead th{border-bottom:2px solid #888}
tr.first td{font-weight:600}small{color:#555;font-weight:400}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.8rem}
.card{border:1px solid #ddd;border-radius:.4rem;padding:.6rem;font-size:.85rem;overflow-wrap:anywhere}
.card img{image-rendering:pixelated;width:6rem;height:6rem;object-fit:contain;border:1px solid #ccc;margin-right:.3rem}
.card figure{display:inline-block;margin:0}.card figcaption{color:#555;font-size:.75rem}
svg{width:100%;max-width:40rem;height:auto;display:block}details{margin-top:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem .8rem}dd{margin:0;overflow-wrap:anywhere}
"""


def _highest(path: str) -> float:
    """The top of a metric's scale."""
    return PRIMARY[path.split("/")[0]][1] if path.split("/")[0] in PRIMARY else 1.0


def _digits(path: str) -> int:
    return 2 if path.startswith("gedit/") else 3


def _cell(path: str, metric: Metric | None) -> str:
    if metric is None:
        return "<td>-</td>"
    digits = _digits(path)
    return f"<td>{metric.mean:.{digits}f}<br><small>[{metric.low:.{digits}f}, {metric.high:.{digits}f}] n={metric.n}</small></td>"


def _all_paths(cards: Mapping[str, Scorecard]) -> list[str]:
    """Every metric path, in the order in which the scorecards first name it."""
    return list(dict.fromkeys(path for card in cards.values() for path in card.metrics))


def _table(cards: Mapping[str, Scorecard], paths: Sequence[str]) -> str:
    """Models down, metrics across; the first model is the candidate."""
    head = "".join(f"<th>{escape(path)}</th>" for path in paths)
    rows = [
        f'<tr class="{"first" if index == 0 else ""}"><td>{escape(name)}</td>{"".join(_cell(path, card.metrics.get(path)) for path in paths)}</tr>'
        for index, (name, card) in enumerate(cards.items())
    ]
    return f'<div class="wide"><table><thead><tr><th>model</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _bars(cards: Mapping[str, Scorecard], path: str) -> str:
    """One metric as horizontal bars with interval whiskers, an inline SVG."""
    known = [(index, name, card.metrics[path]) for index, (name, card) in enumerate(cards.items()) if path in card.metrics]
    left, right, row = 128, 372, 18
    scale = (right - left) / max(_highest(path), *(metric.high for _, _, metric in known))
    parts = []
    for line, (index, name, metric) in enumerate(known):
        y, color = line * row + 3, COLORS[index % len(COLORS)]
        low, high, end = (left + max(0.0, value) * scale for value in (metric.low, metric.high, metric.mean))
        parts.append(f'<text x="{left - 6}" y="{y + 10}" text-anchor="end">{escape(name if len(name) <= 20 else name[:19] + "…")}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{end - left:.1f}" height="12" fill="{color}"/>')
        parts.append(f'<path d="M{low:.1f} {y + 6}H{high:.1f}M{low:.1f} {y + 3}v6M{high:.1f} {y + 3}v6" stroke="#111" fill="none"/>')
        parts.append(f'<text x="{right + 6}" y="{y + 10}">{metric.mean:.{_digits(path)}f}</text>')
    label = ", ".join(f"{name} {metric.mean:.{_digits(path)}f}" for _, name, metric in known)
    return (
        f'<h3>{escape(path)}</h3><svg viewBox="0 0 420 {len(known) * row + 4}" font-size="11" font-family="sans-serif" role="img" '
        f'aria-label="{escape(label)}"><path d="M{left} 0V{len(known) * row + 2}" stroke="#888"/>{"".join(parts)}</svg>'
    )


def _data_uri(file: Path) -> str:
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such image, though a score names it; run the score stage again") from error
    except OSError as error:
        raise explain(error, file) from error
    kind = "jpeg" if file.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _figure(file: Path, caption: str) -> str:
    return f'<figure><img src="{_data_uri(file)}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _values(score: ExampleScore) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in score.values.items()) or score.status


def _primary(score: ExampleScore) -> float:
    return score.values.get(PRIMARY[score.benchmark][0], -1.0)  # a failed judgement comes before the worst score


def extremes(scores: Sequence[ExampleScore], count: int) -> tuple[list[ExampleScore], list[ExampleScore]]:
    """The `count` worst and best rows of a category, no row in both; ties go by id, so the choice does not depend on the rows' order."""
    ordered = sorted(scores, key=lambda score: (_primary(score), score.example_id, score.k))
    worst = ordered[: min(count, (len(ordered) + 1) // 2)]
    best = [score for score in reversed(ordered) if score not in worst][:count]
    return worst, best


def _card(score: ExampleScore, prompt: str, folder: Path, images: Mapping[str, Sequence[tuple[str, Path]]]) -> str:
    figures = [_figure(file, caption) for caption, file in images.get(score.example_id, ())]
    figures += [_figure(folder / score.image, score.model)] if score.image and score.status not in ("missing_image", "bad_image") else []
    reasons = "<br>".join(escape(reason) for reason in score.reasons) or "nothing to object to"
    row = f"{score.example_id} k={score.k} seed={score.seed}"
    return (
        f'<div class="card">{"".join(figures)}<p><b>{escape(prompt)}</b></p><p>{escape(_values(score))}</p><p>{reasons}</p><small>{escape(row)}</small></div>'
    )


def _rows(scores: Iterable[ExampleScore], prompts: Mapping[str, str]) -> str:
    head = "<tr><th>category</th><th>example</th><th>k</th><th>seed</th><th>values</th><th>prompt</th><th>reasons</th><th>image</th></tr>"
    lines = [
        f"<tr><td>{escape(score.category)}</td><td>{escape(score.example_id)}</td><td>{score.k}</td><td>{score.seed}</td><td>{escape(_values(score))}</td>"
        f'<td class="text">{escape(prompts[score.example_id])}</td><td class="text">{escape("; ".join(score.reasons))}</td><td>{escape(score.image)}</td></tr>'
        for score in scores
    ]
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _facts(card: Scorecard) -> str:
    facts: dict[str, Any] = {**{f"benchmark {name}": value for name, value in card.benchmarks.items()}, **card.identities}
    return "<dl>" + "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()) + "</dl>"


def write_report(
    path_html: str | Path,
    *,
    cards: Mapping[str, Scorecard],
    scores: Sequence[ExampleScore],
    prompts: Mapping[str, str],
    folder: str | Path,
    images: Mapping[str, Sequence[tuple[str, Path]]] | None = None,
    title: str = "Scores of the distilled student",
    per_category: int = 2,
    files: Sequence[str] = (),
) -> None:
    """Writes one self-contained HTML page, whole or not at all.

    `cards` maps a name to its scorecard: the candidate first, then teachers, base, ground-truth ceiling, shuffled floor. `scores` are the candidate's rows;
    `prompts` holds the prompt of every example id; `folder` is what `ExampleScore.image` is relative to. `images` maps an example id to (caption, file) pairs
    to show beside the candidate's image (source, teacher). `files` names the scores files of all models. Raises UserError for a missing image or prompt.
    """
    if not cards:
        raise UserError(f"{path_html}: a report needs at least the candidate's scorecard")
    unknown = sorted({score.example_id for score in scores} - prompts.keys())
    if unknown:
        raise UserError(f"{path_html}: {len(unknown)} scored examples have no prompt, e.g. {unknown[:3]}; pass the examples that were scored")
    candidate = next(iter(cards.values()))
    paths = _all_paths(cards)
    headline = [path for path in paths if path in MACRO.values()] + [path for path in paths if path.startswith("retention/")]
    ordered = sorted(scores, key=lambda score: (list(BENCHMARK_OF).index(score.category), score.example_id, score.k))
    examples = []
    for category in dict.fromkeys(score.category for score in ordered):
        worst, best = extremes([score for score in ordered if score.category == category], per_category)
        for name, chosen in (("worst", worst), ("best", best)):
            cards_html = "".join(_card(score, prompts[score.example_id], Path(folder), images or {}) for score in chosen)
            examples.append(f'<h3>{escape(category)}: {name}</h3><div class="cards">{cards_html}</div>')
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Candidate: <b>{escape(candidate.model)}</b>. Below each mean: its interval and the number of prompts. GenEval counts 0 to 1, GEdit 0 to 10; "
        "retention is the candidate's mean over the teacher's on that teacher's own categories.</p>",
        "<h2>Headline</h2>" + _table(cards, headline),
        "<h2>By category</h2>" + "".join(_bars(cards, path) for path in paths),
        "<h2>All figures</h2>" + _table(cards, paths),
        "<h2>Worst and best images</h2>" + "".join(examples),
        "<h2>What was scored</h2>" + _facts(candidate),
        f"<h2>Rows</h2><p>The candidate's figures are means of these {len(ordered)} rows."
        + (f" All models' rows: {escape(', '.join(files))}." if files else "")
        + f"</p><details><summary>Show the rows</summary>{_rows(ordered, prompts)}</details>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_text(path_html, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>\n')


# --- PNG sheets -------------------------------------------------------------------------------------------------------------


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def _wrap(text: str, width: int) -> str:
    """Breaks a title at spaces into lines of at most `width` characters where words allow."""
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [*lines, word]
    return "\n".join(line for line in lines if line)


def sample_grid(images: Sequence[np.ndarray], titles: Sequence[str], path: str | Path, columns: int = 6) -> None:
    """A PNG sheet of images (H, W, 3) uint8 with their titles. Raises UserError for none, or another number of titles."""
    if not images or len(images) != len(titles):
        raise UserError(f"{path}: {len(images)} images with {len(titles)} titles; give one title an image and at least one image")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(_wrap(title, 24), fontsize=7)
    _save(figure, path)


def edit_strips(
    sources: Sequence[np.ndarray], teachers: Sequence[np.ndarray], students: Sequence[np.ndarray], prompts: Sequence[str], path: str | Path
) -> None:
    """A PNG sheet with two edits a line: source, teacher, student, each (H, W, 3) uint8, under the instruction. Raises UserError for unequal or empty lists."""
    lengths = {"sources": len(sources), "teachers": len(teachers), "students": len(students), "prompts": len(prompts)}
    if len(set(lengths.values())) > 1 or not prompts:
        raise UserError(f"{path}: lists of lengths {lengths}; give one of each an edit and at least one edit")
    lines = math.ceil(len(prompts) / STRIPS_A_LINE)
    figure = Figure(figsize=(4.6 * STRIPS_A_LINE, 1.75 * lines), layout="constrained")
    grid = figure.subplots(lines, 3 * STRIPS_A_LINE, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, prompt in enumerate(prompts):
        line, first = divmod(place, STRIPS_A_LINE)
        row = grid[line, 3 * first : 3 * first + 3]
        for axes, name, image in zip(row, ("source", "teacher", "student"), (sources[place], teachers[place], students[place]), strict=True):
            axes.set_axis_on()
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(name, fontsize=7)
        row[1].set_title(prompt, fontsize=8)
    _save(figure, path)


def scorecard_plot(scorecards: Mapping[str, Scorecard], path: str | Path) -> None:
    """A PNG of every metric of every model with its interval, one panel a benchmark. Raises UserError when there is no metric at all."""
    paths = _all_paths(scorecards)
    panels = [[path for path in paths if path.startswith(f"{kind}/")] for kind in ("geneval", "gedit", "retention")]
    panels = [panel for panel in panels if panel]
    if not panels:
        raise UserError(f"{path}: no metric to draw; pass at least one scorecard with metrics")
    figure = Figure(figsize=(10, 3.4 * len(panels)), layout="constrained")
    color_of = {name: COLORS[index % len(COLORS)] for index, name in enumerate(scorecards)}
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        present = {name: card.metrics for name, card in scorecards.items() if any(metric in card.metrics for metric in panel)}
        width = min(0.3, 0.8 / len(present))
        for index, (name, metrics) in enumerate(present.items()):
            known = [(place, metrics[metric]) for place, metric in enumerate(panel) if metric in metrics]
            x = np.array([place for place, _ in known]) + (index - (len(present) - 1) / 2) * width
            means = np.array([metric.mean for _, metric in known])
            spread = np.array([[metric.mean - metric.low, metric.high - metric.mean] for _, metric in known]).T.clip(min=0.0)
            axes.bar(x, means, width, yerr=spread, label=name, color=color_of[name], error_kw={"elinewidth": 0.8, "capsize": 1.5})
        axes.set_xticks(range(len(panel)), [metric.split("/")[1].replace("_", "_\n") for metric in panel], fontsize=8)
        axes.set_title(f"{panel[0].split('/')[0]} (mean and interval)", fontsize=9, loc="left")
        axes.set_ylim(bottom=0.0)
        axes.set_xlim(-0.6, len(panel) - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
    entries = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(6, len(entries)), fontsize=8)
    _save(figure, path)
