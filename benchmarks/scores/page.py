"""What a reviewer reads: one HTML page that needs nothing beside it, and PNG sheets of images and scores.

Every figure on the page is a link to the images that earned it, as far as their rows are given, worst first. Images are
embedded: small ones as they are, larger ones as thumbnails; the browser draws only what is in view, so that a page of
thousands opens at once.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from benchmarks.geneval.confusion import Confusion, color_confusion, count_confusion
from benchmarks.scores.figures import COLORS, _all_paths
from benchmarks.scores.scorecard import BENCHMARK_OF, MACRO, PRIMARY, ExampleScore, Scorecard
from benchmarks.scores.statistics import Metric
from data.errors import UserError
from data.files import explain, write_text
from data.records import CAPABILITIES

THUMBNAIL, CLOSE_UP = 112, 320  # px, longest side: among all images, and among the worst and best
CHAMPION = "<!-- champion -->"  # where `add_champion` puts its section
MOST_IMAGES = 4000  # on a page: beyond them further models' values are links to the images' files, and the page says so
AS_IT_IS = 4096  # bytes up to which a small file is embedded unchanged
STYLE = """
:root{color-scheme:light}
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;padding:0 1rem 3rem;max-width:72rem;color:#1b1b1b;background:#fff}
h1{font-size:1.5rem;margin-bottom:.3rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}h4{font-size:.9rem;margin:.8rem 0 .3rem;font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.9rem;margin:.6rem 0 1rem}
a{color:#0b57a4;text-decoration:none}a:hover{text-decoration:underline}td a,svg a{color:inherit}td a{border-bottom:1px dotted #777}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child,td.text{text-align:left}td.text{white-space:normal;min-width:12rem}thead th{border-bottom:2px solid #888}
.sticky th:first-child,.sticky td:first-child{position:sticky;left:0;background:#fff;max-width:9rem;overflow:hidden;text-overflow:ellipsis}
tr.first td{font-weight:600}small{color:#555;font-weight:400}p.note{color:#444;font-size:.9rem;max-width:60rem}
.bars{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:.4rem 1.6rem}
.tables{display:flex;flex-wrap:wrap;gap:1rem 3rem}td.hit{background:#dcefe4}td.miss{background:#fbe3dc}td.zero{color:#aaa}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,16rem),1fr));gap:.8rem}
.card{border:1px solid #ddd;border-radius:.4rem;padding:.6rem;font-size:.85rem;overflow-wrap:anywhere}.card p{margin:.35rem 0}
.row{display:flex;gap:.3rem}.card figure{margin:0;flex:1 1 0;min-width:0;max-width:11rem}.card figcaption{color:#555;font-size:.75rem}
.card img{width:100%;aspect-ratio:1;object-fit:contain;border:1px solid #ccc;background:#f4f4f4;box-sizing:border-box}
.worst{border-left:4px solid #d55e00}.best{border-left:4px solid #009e73}
.good{color:#00633f}.bad{color:#a3320b}
.all{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.4rem,1fr));gap:.5rem;padding:0 2px 6px}
.all{content-visibility:auto;contain-intrinsic-size:auto 60rem}
.links{display:flex;flex-wrap:wrap;gap:.2rem .6rem;font-size:.8rem;content-visibility:auto;contain-intrinsic-size:auto 9rem}
.few{grid-template-columns:repeat(auto-fill,minmax(5.2rem,1fr))}
.one{border:1px solid #e2e2e2;border-radius:.3rem;padding:.3rem;font-size:.72rem;line-height:1.3;overflow-wrap:anywhere}
.one{content-visibility:auto;contain-intrinsic-size:auto 9rem}
.one:target{outline:3px solid #0072b2}.one img{max-width:48%;width:4.2rem;height:4.2rem;object-fit:contain;background:#f4f4f4}
img.small{image-rendering:pixelated}
svg{width:100%;height:auto;display:block}details{margin-top:1rem}summary{cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem .8rem}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:40rem){body{padding:0 .7rem 2rem}dl{grid-template-columns:1fr}dt{font-weight:600}th,td{padding:.25rem .4rem}}
"""


# --- images -----------------------------------------------------------------------------------------------------------


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such image, though a score names it; run the score stage again") from error
    except OSError as error:
        raise explain(error, file) from error


def thumbnail(file: Path, longest: int) -> tuple[str, bool]:
    """(data URI of an image at most `longest` px on its longest side, whether it is embedded as it is). Raises
    UserError for a missing or unreadable file.
    """
    content = _read(file)
    kind = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg", b"RIFF": "webp"}.get(content[:4])
    try:
        with Image.open(io.BytesIO(content)) as image:
            if kind and len(content) <= AS_IT_IS and max(image.size) <= longest:
                return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", True
            shown = image.convert("RGB")
            shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            shown.save(buffer, format="WEBP", quality=62, method=2)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: not a readable image ({error})") from error
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", False


def _thumbnails(files: Iterable[tuple[Path, int]]) -> dict[tuple[Path, int], tuple[str, bool]]:
    """Every (file, longest side) once, several at a time: decoding leaves the interpreter free."""
    wanted = list(dict.fromkeys(files))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(wanted, pool.map(lambda pair: thumbnail(*pair), wanted), strict=True))


class _Images:
    """The page's images by file and size, so that each is read and encoded once."""

    def __init__(self, wanted: Iterable[tuple[Path, int]]) -> None:
        self._known = _thumbnails(wanted)

    def tag(self, file: Path, longest: int, caption: str) -> str:
        uri, as_it_is = self._known[file, longest]
        small = ' class="small"' if as_it_is else ""
        return f'<img{small} loading="lazy" decoding="async" src="{uri}" alt="{escape(caption)}">'


# --- figures ----------------------------------------------------------------------------------------------------------


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def _highest(path: str) -> float:
    """The top of a metric's scale."""
    return PRIMARY[path.split("/")[0]][1] if path.split("/")[0] in PRIMARY else 1.0


def _digits(path: str) -> int:
    return 2 if path.startswith("gedit/") else 3


class _Places:
    """Where on the page (or on another one) the images behind a figure stand."""

    def __init__(self, models: Mapping[str, Iterable[str]], pages: Mapping[str, str]) -> None:
        self._shown = {name: list(dict.fromkeys(categories)) for name, categories in models.items()}
        self._pages = pages

    def anchor(self, model: str, category: str) -> str:
        return f"m{list(self._shown).index(model)}-{_slug(category)}"

    def link(self, model: str, path: str) -> str | None:
        """The address of the images behind a model's metric; None where no row is at hand."""
        benchmark, _, name = path.partition("/")
        if benchmark == "retention":
            capability = CAPABILITIES.get(name)
            wanted = list(capability.categories) if capability else []
        else:
            wanted = (
                [category for category, of in BENCHMARK_OF.items() if of == benchmark]
                if path in MACRO.values()
                else [name]
            )
        first = next((category for category in self._shown.get(model, ()) if category in wanted), None)
        if first is not None:
            return f"#{self.anchor(model, first)}"
        return self._pages.get(model)


def _linked(text: str, address: str | None) -> str:
    return f'<a href="{escape(address)}">{text}</a>' if address else text


def _cell(path: str, metric: Metric | None, address: str | None) -> str:
    if metric is None:
        return "<td>-</td>"
    digits = _digits(path)
    mean = _linked(f"{metric.mean:.{digits}f}", address)
    return f"<td>{mean}<br><small>[{metric.low:.{digits}f}, {metric.high:.{digits}f}] n={metric.n}</small></td>"


def _table(cards: Mapping[str, Scorecard], paths: Sequence[str], places: _Places) -> str:
    """Models down, metrics across; the first model is the candidate."""
    head = "".join(f"<th>{escape(path)}</th>" for path in paths)
    rows = [
        f'<tr class="{"first" if index == 0 else ""}"><td>{escape(name)}</td>'
        f"{''.join(_cell(path, card.metrics.get(path), places.link(name, path)) for path in paths)}</tr>"
        for index, (name, card) in enumerate(cards.items())
    ]
    return f'<div class="wide sticky"><table><thead><tr><th>model</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _bars(cards: Mapping[str, Scorecard], path: str, places: _Places) -> str:
    """One metric as horizontal bars with interval whiskers, an inline SVG."""
    known = [
        (index, name, card.metrics[path]) for index, (name, card) in enumerate(cards.items()) if path in card.metrics
    ]
    left, right, row = 108, 272, 18
    scale = (right - left) / max(_highest(path), *(metric.high for _, _, metric in known))
    parts = []
    for line, (index, name, metric) in enumerate(known):
        y, color = line * row + 3, COLORS[index % len(COLORS)]
        low, high, end = (left + max(0.0, value) * scale for value in (metric.low, metric.high, metric.mean))
        bar = f'<text x="{left - 6}" y="{y + 10}" text-anchor="end">{escape(name if len(name) <= 17 else name[:16] + "…")}</text>'
        bar += f'<rect x="{left}" y="{y}" width="{end - left:.1f}" height="12" fill="{color}"/>'
        bar += f'<path d="M{low:.1f} {y + 6}H{high:.1f}M{low:.1f} {y + 3}v6M{high:.1f} {y + 3}v6" stroke="#111" fill="none"/>'
        bar += f'<text x="{right + 6}" y="{y + 10}">{metric.mean:.{_digits(path)}f}</text>'
        parts.append(_linked(bar, places.link(name, path)))
    label = ", ".join(f"{name} {metric.mean:.{_digits(path)}f}" for _, name, metric in known)
    return (
        f'<div><h3>{escape(path)}</h3><svg viewBox="0 0 310 {len(known) * row + 4}" font-size="11" font-family="sans-serif" role="img" '
        f'aria-label="{escape(label)}"><path d="M{left} 0V{len(known) * row + 2}" stroke="#888"/>{"".join(parts)}</svg></div>'
    )


def _differences(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Paired differences, those that exclude 0 in colour."""
    head = "<tr><th>metric</th><th>this</th><th>minus</th><th>difference</th><th>interval</th><th>p</th><th>prompts</th><th>unlike</th></tr>"
    lines: dict[bool, list[str]] = {True: [], False: []}
    for row in comparisons:
        digits, mark = _digits(row["path"]), "good" if row["low"] > 0 else "bad" if row["high"] < 0 else ""
        lines[row["path"] in MACRO.values()].append(
            f'<tr><td>{escape(row["path"])}</td><td>{escape(row["a"])}</td><td>{escape(row["b"])}</td><td class="{mark}">{row["difference"]:+.{digits}f}</td>'
            f"<td>[{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]</td><td>{row['p']:.3g}</td><td>{row['n']}</td><td>{row['discordant']}</td></tr>"
        )
    tables = {
        macro: f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(found)}</tbody></table></div>'
        for macro, found in lines.items()
        if found
    }
    rest = f"<details><summary>By category</summary>{tables[False]}</details>" if False in tables else ""
    return tables.get(True, "") + rest


def _confusion(title: str, asked: str, table: Confusion, numbers: bool) -> str:
    """Asked down, found across; every number leads to the first of its images."""
    if not table:
        return ""
    found = {name for row in table.values() for name in row}
    columns = sorted(found, key=int) if numbers else [*table, *sorted(found - table.keys())]
    lines = []
    for name, row in table.items():
        cells = []
        for column in columns:
            members = row.get(column, [])
            mark = "zero" if not members else "hit" if column == name else "miss"
            cells.append(
                f'<td class="{mark}">{_linked(str(len(members)), f"#e{members[0]}" if members else None)}</td>'
            )
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    head = f"<tr><th>{escape(asked)} / found</th>{''.join(f'<th>{escape(name)}</th>' for name in columns)}</tr>"
    return f'<div><h3>{escape(title)}</h3><div class="wide"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div></div>'


# --- rows and their images --------------------------------------------------------------------------------------------


def _values(score: ExampleScore) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in score.values.items()) or score.status


def _primary(score: ExampleScore) -> float:
    return score.values.get(PRIMARY[score.benchmark][0], -1.0)  # a failed judgement comes before the worst score


def _has_image(score: ExampleScore) -> bool:
    return bool(score.image) and score.status not in ("missing_image", "bad_image")


def extremes(scores: Sequence[ExampleScore], count: int) -> tuple[list[ExampleScore], list[ExampleScore]]:
    """The `count` worst and best rows of a category, no row in both; ties go by id, so the choice does not depend on
    the rows' order.
    """
    ordered = sorted(scores, key=lambda score: (_primary(score), score.example_id, score.k))
    worst = ordered[: min(count, (len(ordered) + 1) // 2)]
    best = [score for score in reversed(ordered) if score not in worst][:count]
    return worst, best


def _figure(images: _Images, file: Path, longest: int, caption: str) -> str:
    return f"<figure>{images.tag(file, longest, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _card(
    score: ExampleScore,
    which: str,
    place: int,
    prompt: str,
    folder: Path,
    beside: Sequence[tuple[str, Path]],
    images: _Images,
) -> str:
    figures = [_figure(images, file, CLOSE_UP, caption) for caption, file in beside]
    figures += [_figure(images, folder / score.image, CLOSE_UP, score.model)] if _has_image(score) else []
    reasons = "<br>".join(escape(reason) for reason in score.reasons) or "nothing to object to"
    row = f"{score.example_id} k={score.k} seed={score.seed}"
    return (
        f'<div class="card {which}"><div class="row">{"".join(figures)}</div><p><b>{escape(prompt)}</b></p>'
        f"<p>{which}: {escape(_values(score))}</p><p>{reasons}</p>"
        f'<small><a href="#e{place}">{escape(row)}</a></small></div>'
    )


def _one(
    score: ExampleScore, name: str, prompt: str, source: Path | None, folder: Path, page: Path, images: _Images | None
) -> str:
    """A row among all: its value, its image (with the source of an edit), what was asked and what is wrong; without
    `images` the value alone, a link.
    """
    primary = PRIMARY[score.benchmark]
    value = f"{score.values[primary[0]]:.3g}" if score.status == "ok" else score.status
    mark = "good" if _primary(score) >= 0.9 * primary[1] else "bad" if _primary(score) <= 0.5 * primary[1] else ""
    pictures = images.tag(source, THUMBNAIL, "source") if source and images else ""
    text = f'<b class="{mark}">{escape(value)}</b>'
    if _has_image(score):
        address = quote(os.path.relpath(folder / score.image, page.parent))
        if images is None:
            return f'<a href="{address}">{text}</a>'
        pictures += f'<a href="{address}">{images.tag(folder / score.image, THUMBNAIL, prompt)}</a>'
    if source is None and not name:  # another model's: the number and the picture are enough
        return f'<div class="one">{pictures}<br>{text}</div>'
    sample = f" k={score.k}" if score.k else ""
    return f'<div class="one" id="{name}">{pictures}<br>{text}{sample} {escape(prompt)}<br><small>{escape("; ".join(score.reasons))}</small></div>'


def _rows(scores: Iterable[ExampleScore], prompts: Mapping[str, str]) -> str:
    head = "<tr><th>category</th><th>example</th><th>k</th><th>seed</th><th>values</th><th>prompt</th><th>reasons</th><th>image</th></tr>"
    lines = [
        f"<tr><td>{escape(score.category)}</td><td>{escape(score.example_id)}</td><td>{score.k}</td><td>{score.seed}</td><td>{escape(_values(score))}</td>"
        f'<td class="text">{escape(prompts[score.example_id])}</td><td class="text">{escape("; ".join(score.reasons))}</td><td>{escape(score.image)}</td></tr>'
        for score in scores
    ]
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _facts(card: Scorecard) -> str:
    facts: dict[str, Any] = {
        **{f"benchmark {name}": value for name, value in card.benchmarks.items()},
        **card.identities,
    }
    return (
        "<dl>"
        + "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
        + "</dl>"
    )


def _in_order(scores: Sequence[ExampleScore]) -> list[ExampleScore]:
    categories = list(BENCHMARK_OF)
    return sorted(scores, key=lambda score: (categories.index(score.category), score.example_id, score.k))


def _worst_first(members: Sequence[tuple[int, ExampleScore]]) -> list[tuple[int, ExampleScore]]:
    return sorted(members, key=lambda pair: (_primary(pair[1]), pair[0]))


# --- the page ---------------------------------------------------------------------------------------------------------


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
    records: Mapping[str, Mapping[str, Any]] | None = None,
    others: Mapping[str, tuple[str | Path, Sequence[ExampleScore]]] | None = None,
    pages: Mapping[str, str] | None = None,
    comparisons: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Writes one self-contained HTML page, whole or not at all.

    `cards` maps a name to its scorecard: the candidate first, then champion, teachers, base, the ends of the scale.
    `scores` are the candidate's rows;
    `prompts` holds the prompt of every example id; `folder` is what `ExampleScore.image` is relative to. `images` maps
    an example id to (caption, file) pairs to show beside the candidate's image, of which the one captioned "source"
    stands beside it everywhere. `files` names the scores files of all models.
    `records` holds GenEval's records for the confusion tables. `others` maps further models of `cards` to (folder,
    rows) whose images are shown, too; `pages` maps models to the address of a page of their own. `comparisons` are
    paired differences ({"a", "b", "path", "difference", "low", "high", "p", "n", "discordant"}); `notes` are sentences
    below the headline. Raises UserError for a missing image or prompt.
    """
    if not cards:
        raise UserError(f"{path_html}: a report needs at least the candidate's scorecard")
    unknown = sorted({score.example_id for score in scores} - prompts.keys())
    if unknown:
        raise UserError(
            f"{path_html}: {len(unknown)} scored examples have no prompt, e.g. {unknown[:3]}; pass the examples that were scored"
        )
    page, folder, beside = Path(path_html), Path(folder), images or {}
    name, candidate = next(iter(cards.items()))
    rows = {name: (folder, _in_order(scores))}
    further = {
        other: (Path(place), _in_order(theirs))
        for other, (place, theirs) in (others or {}).items()
        if other in cards and other != name
    }
    rows |= further
    drawn = {name}  # whose images stand on the page itself
    for other, (_, theirs) in further.items():
        if sum(len(rows[model][1]) for model in drawn) + len(theirs) <= MOST_IMAGES:
            drawn.add(other)
    places = _Places(
        {model: [score.category for score in ordered] for model, (_, ordered) in rows.items()}, pages or {}
    )
    paths = _all_paths(cards)
    headline = [path for path in paths if path in MACRO.values()] + [
        path for path in paths if path.startswith("retention/")
    ]
    ordered = rows[name][1]
    numbered = list(enumerate(ordered))
    groups = {
        category: [pair for pair in numbered if pair[1].category == category]
        for category in dict.fromkeys(score.category for score in ordered)
    }
    chosen = {category: extremes([score for _, score in members], per_category) for category, members in groups.items()}
    sources = {example: file for example, pairs in beside.items() for caption, file in pairs if caption == "source"}

    close_ups = [score for pair in chosen.values() for scores_ in pair for score in scores_]
    wanted = [(file, CLOSE_UP) for score in close_ups for _, file in beside.get(score.example_id, ())]
    wanted += [(folder / score.image, CLOSE_UP) for score in close_ups if _has_image(score)]
    wanted += [
        (place / score.image, THUMBNAIL)
        for model, (place, members) in rows.items()
        for score in members
        if model in drawn and _has_image(score)
    ]
    wanted += [(sources[score.example_id], THUMBNAIL) for score in ordered if score.example_id in sources]
    shown = _Images(wanted)

    place_of = {(score.category, score.example_id, score.k): place for place, score in numbered}
    examples = []
    for category, pair in chosen.items():
        inner = "".join(
            _card(
                score, which, place_of[key], prompts[score.example_id], folder, beside.get(score.example_id, ()), shown
            )
            for which, members in zip(("worst", "best"), pair, strict=True)
            for score in members
            for key in [(score.category, score.example_id, score.k)]
        )
        examples.append(f'<h3>{escape(category)}</h3><div class="cards">{inner}</div>')
    everything = []
    for model, (place, members) in rows.items():
        everything.append(f"<h3>{escape(model)}</h3>")
        own, inside = model == name, shown if model in drawn else None
        for category in dict.fromkeys(score.category for score in members):
            inner = "".join(
                _one(
                    score,
                    f"e{index}" if own else "",
                    prompts.get(score.example_id, ""),
                    sources.get(score.example_id) if own else None,
                    place,
                    page,
                    inside,
                )
                for index, score in _worst_first([pair for pair in enumerate(members) if pair[1].category == category])
            )
            anchor = places.anchor(model, category)
            kind = "all" if own else "all few" if inside else "links"
            everything.append(
                f'<h4 id="{anchor}">{escape(model)}, {escape(category)}</h4><div class="{kind}">{inner}</div>'
            )
    if rows.keys() - drawn:
        left = ", ".join(model for model in rows if model not in drawn)
        everything.append(
            f'<p class="note">The values of {escape(left)} are links to their images: the page would hold more than {MOST_IMAGES} images.</p>'
        )
    counts = _confusion("How many things", "asked", count_confusion(ordered, records or {}), True)
    colors = _confusion("Which colour", "asked", color_confusion(ordered, records or {}), False)
    parts: list[tuple[str, str, str]] = [
        (
            "headline",
            "Headline",
            _table(cards, headline, places)
            + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
            + CHAMPION,
        ),
        (
            "categories",
            "By category",
            '<div class="bars">' + "".join(_bars(cards, path, places) for path in paths) + "</div>",
        ),
        ("differences", "Paired differences", _differences(comparisons) if comparisons else ""),
        ("confusion", "Asked and found", f'<div class="tables">{counts}{colors}</div>' if counts or colors else ""),
        ("figures", "All figures", _table(cards, paths, places)),
        ("examples", "Worst and best images", "".join(examples)),
        ("images", "All images, worst first", "".join(everything)),
        ("facts", "What was scored", _facts(candidate)),
    ]
    intro = (
        f"<p>Candidate: <b>{escape(candidate.model)}</b>. Below each mean: its interval and the number of prompts. GenEval counts 0 to 1, GEdit 0 to 10; "
        "retention is the candidate's mean over the teacher's on that teacher's own categories. A figure leads to its images, an image to its file where the "
        "page lies beside it.</p>"
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        intro,
        "<nav>" + "".join(f'<a href="#{key}">{text}</a>' for key, text, content in parts if content) + "</nav>",
    ]
    body += [f'<h2 id="{key}">{text}</h2>{content}' for key, text, content in parts if content]
    body.append(
        f"<h2>Rows</h2><p>The candidate's figures are means of these {len(ordered)} rows."
        + (f" All models' rows: {escape(', '.join(files))}." if files else "")
        + f"</p><details><summary>Show the rows</summary>{_rows(ordered, prompts)}</details>"
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_text(path_html, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n')


def add_champion(
    page: str,
    candidate: Scorecard,
    champion: Scorecard,
    version: str,
    comparison: Mapping[str, Mapping[str, float]] | None,
    folder: str,
    champion_page: str | None = None,
) -> str:
    """The page with a section that sets the candidate against the reigning champion, below its headline: the champion
    is known only after the page is made.

    `comparison` maps a metric path to the paired difference {"difference", "low", "high", "p", "n"}; None where the two
    were not scored on the same images.
    `folder` is where the page's files lie as seen from the new page's place ("score/"); `champion_page` the address of
    the champion's own page, where the images behind its figures are. Raises UserError for a page without a place for
    the section.
    """
    if CHAMPION not in page:
        raise UserError("the report page has no place for the champion; run the score stage again")
    paths = [path for path in candidate.metrics if path in champion.metrics]
    shown = [
        category for category in BENCHMARK_OF if f'id="m0-{_slug(category)}"' in page
    ]  # the candidate is the page's first model
    places = _Places({"": shown}, {})
    head = (
        "<tr><th>metric</th><th>candidate</th>"
        + f"<th>champion, version {escape(version)}</th><th>difference</th><th>p</th></tr>"
    )
    lines = []
    for path in paths:
        digits, row = _digits(path), (comparison or {}).get(path)
        at = places.link("", path)
        cells = _cell(path, candidate.metrics[path], at) + _cell(
            path, champion.metrics[path], _within(champion_page, at)
        )
        if row is None:
            cells += "<td>-</td><td>-</td>"
        else:
            mark = "good" if row["low"] > 0 else "bad" if row["high"] < 0 else ""
            interval = f"<small>[{row['low']:+.{digits}f}, {row['high']:+.{digits}f}] n={row['n']}</small>"
            cells += f'<td class="{mark}">{row["difference"]:+.{digits}f}<br>{interval}</td><td>{row["p"]:.3g}</td>'
        lines.append(f'<tr class="{"first" if path in MACRO.values() else ""}"><td>{escape(path)}</td>{cells}</tr>')
    note = (
        ""
        if comparison
        else '<p class="note">The two were not scored on the same images with the same seeds, so no paired difference is given.</p>'
    )
    section = f'<h3>Against the champion</h3><div class="wide sticky"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>{note}'
    moved = re.sub(r'href="(?!#|[a-z]+:)', f'href="{folder}', page)
    return moved.replace(CHAMPION, section, 1)


def _within(page: str | None, anchor: str | None) -> str | None:
    """The anchor on another page of this kind, where the candidate comes first too; one that is shown inside MLflow's
    pages has no anchors.
    """
    return page if page is None or anchor is None or "#" in page else page + anchor
