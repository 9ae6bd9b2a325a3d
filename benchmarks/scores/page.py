"""What a reviewer reads: one HTML page that needs no other file.

Every figure is a link to the images that earned it, as far as their rows are given, worst first. Images are embedded:
small ones as they are, larger ones as thumbnails; the browser draws only what is in view, so that a page of thousands
opens at once. Here the values are prepared; the markup stands in `templates/`."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from benchmarks.scores.figures import COLORS
from benchmarks.scores.scorecard import BENCHMARK_OF, ExampleScore, Scorecard, all_paths
from data.errors import UserError
from data.files import explain, write_text
from data.pages import render
from data.records import BENCHMARKS, CAPABILITIES, HEADLINES, RETENTION

THUMBNAIL, CLOSE_UP = 112, 320  # px, longest side: among all images, and among the worst and best
CHAMPION = "<!-- champion -->"  # where `add_champion` puts its section; the template writes it
MOST_IMAGES = 4000  # on a page: beyond them further models' values are links to the images' files, and the page says so
AS_IT_IS = 4096  # bytes up to which a small file is embedded unchanged
BAR_LEFT, BAR_RIGHT, BAR_LINE = 108, 272, 18  # px of the bars' drawing: where they begin and end, and a line's height


@dataclass(frozen=True)
class Report:
    """What a page shows."""

    cards: Mapping[str, Scorecard]  # by name: the candidate first, then teachers, base, the ends of the scale
    scores: Sequence[ExampleScore]  # the candidate's rows
    prompts: Mapping[str, str]  # of every example id
    folder: Path  # what `ExampleScore.image` is relative to
    # example id -> (caption, file) of images beside the candidate's; one captioned "source" stands there everywhere
    images: Mapping[str, Sequence[tuple[str, Path]]] = field(default_factory=dict)
    title: str = "Scores of the distilled student"
    per_category: int = 2  # worst and best images
    files: Sequence[str] = ()  # the scores files of all models
    # what was asked against what was detected: {"title", "columns", "rows": {asked: {column: places in `scores`}}}
    confusions: Sequence[Mapping[str, Any]] = ()
    # further models of `cards` whose images are shown: their folder and rows
    others: Mapping[str, tuple[Path, Sequence[ExampleScore]]] = field(default_factory=dict)
    # paired differences: {"a", "b", "path", "difference", "low", "high", "p", "n", "discordant"}
    comparisons: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()  # sentences below the headline
    # quality against cost: a figure's PNG, and its points {"model", "steps", "evaluations_per_image", "path", "mean"}
    curve: Path | None = None
    points: Sequence[Mapping[str, Any]] = ()


# --- images -----------------------------------------------------------------------------------------------------------


class Thumbnail(NamedTuple):
    uri: str
    small: bool  # embedded as it is


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(file: Path, longest: int) -> Thumbnail:
    """An image as a data URI, at most `longest` px on its longest side.

    Raises UserError for a missing or unreadable file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such image, though a score names it; run the score stage again") from error
    except OSError as error:
        raise explain(error, file) from error
    kind = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg", b"RIFF": "webp"}.get(content[:4])
    try:
        with Image.open(io.BytesIO(content)) as image:
            if kind and len(content) <= AS_IT_IS and max(image.size) <= longest:
                return Thumbnail(_uri(kind, content), True)
            shown = image.convert("RGB")
            shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            shown.save(buffer, format="WEBP", quality=62, method=2)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: not a readable image ({error})") from error
    return Thumbnail(_uri("webp", buffer.getvalue()), False)


def _thumbnails(files: Iterable[tuple[Path, int]]) -> dict[tuple[Path, int], Thumbnail]:
    """Every (file, longest side) once, several at a time: decoding leaves the interpreter free."""
    wanted = list(dict.fromkeys(files))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(wanted, pool.map(lambda pair: thumbnail(*pair), wanted), strict=True))


# --- figures ----------------------------------------------------------------------------------------------------------


def _anchor(model: int, category: str) -> str:
    return f"m{model}-{re.sub(r'[^A-Za-z0-9]+', '-', category).strip('-')}"


def _link(model: int, categories: Collection[str], path: str) -> str | None:
    """The address of the images behind a metric of the page's model of that number, which has images of `categories`;
    None where there is no image."""
    benchmark, _, name = path.partition("/")
    behind = {name}
    if path.startswith(RETENTION):
        behind = set(CAPABILITIES[name].categories) if name in CAPABILITIES else set()
    elif path in HEADLINES.values():
        behind = {category for category, of in BENCHMARK_OF.items() if of == benchmark}
    return next((f"#{_anchor(model, category)}" for category in categories if category in behind), None)


# --- rows and their images --------------------------------------------------------------------------------------------


def _values(score: ExampleScore) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in score.values.items()) or score.status


def _share(score: ExampleScore) -> float:
    """0 is the lowest score, 1 the highest; -1 is a failed judgement, which comes before the worst score."""
    benchmark = BENCHMARKS[score.benchmark]
    return score.values.get(benchmark.value, -benchmark.highest) / benchmark.highest


def failed(score: ExampleScore) -> bool:
    """Whether a row counts as a failure: it has no score, or at most half of the highest."""
    return _share(score) <= 0.5


def _has_image(score: ExampleScore) -> bool:
    return bool(score.image) and score.status not in ("missing_image", "bad_image")


def extremes(scores: Sequence[ExampleScore], count: int) -> tuple[list[ExampleScore], list[ExampleScore]]:
    """The `count` worst and best rows of a category, no row in both, and no row of the highest score among the worst.

    Ties go by id, so the choice does not depend on the rows' order."""
    ordered = sorted(scores, key=lambda score: (_share(score), score.key))
    worst = [score for score in ordered[: min(count, (len(ordered) + 1) // 2)] if _share(score) < 1.0]
    best = [score for score in reversed(ordered) if score not in worst][:count]
    return worst, best


Groups = dict[str, list[tuple[int, ExampleScore]]]  # category -> (place among all rows, row)


def _grouped(scores: Iterable[ExampleScore]) -> Groups:
    """Rows by category, in the benchmarks' order, then by example and sample."""
    categories, groups = list(BENCHMARK_OF), Groups()
    ordered = sorted(scores, key=lambda score: (categories.index(score.category), score.key))
    for place, score in enumerate(ordered):
        groups.setdefault(score.category, []).append((place, score))
    return groups


class _Page:
    """A report's rows in their order, and which of their images the page holds."""

    def __init__(self, path: Path, report: Report) -> None:
        self.report, self.path = report, path
        self.name = next(iter(report.cards))
        others = {name: rows for name, rows in report.others.items() if name in report.cards and name != self.name}
        self.rows = {self.name: (report.folder, report.scores), **others}
        self.groups = {name: _grouped(scores) for name, (_, scores) in self.rows.items()}
        self.ordered = [score for members in self.groups[self.name].values() for _, score in members]
        self.drawn, self.left_out = [self.name], list[str]()  # models whose images the page holds, and others
        count = len(report.scores)
        for name, (_, scores) in others.items():
            if count + len(scores) > MOST_IMAGES:
                self.left_out.append(name)
                continue
            self.drawn.append(name)
            count += len(scores)
        shown = [(example, *pair) for example, pairs in report.images.items() for pair in pairs]
        self.sources = {example: file for example, caption, file in shown if caption == "source"}
        self.chosen = {
            category: extremes([score for _, score in members], report.per_category)
            for category, members in self.groups[self.name].items()
        }
        self.thumbnails = _thumbnails(self._wanted())

    def link(self, model: str, path: str) -> str | None:
        """The address of the images behind a model's metric; None where no row is at hand."""
        number = list(self.groups).index(model) if model in self.groups else 0
        return _link(number, self.groups.get(model, ()), path)

    def bars(self, path: str) -> dict[str, Any]:
        """A metric of every model as a bar with its interval; lengths in px of the drawing."""
        models = [(name, card.metrics.get(path)) for name, card in self.report.cards.items()]
        known = [(name, color, metric) for (name, metric), color in zip(models, cycle(COLORS)) if metric]
        benchmark = BENCHMARKS.get(path.partition("/")[0])
        highest = max(benchmark.highest if benchmark else 1.0, *(metric.high for _, _, metric in known))
        scale, bars = (BAR_RIGHT - BAR_LEFT) / highest, []
        for line, (name, color, metric) in enumerate(known):
            low, high, end = (BAR_LEFT + max(0.0, value) * scale for value in (metric.low, metric.high, metric.mean))
            shape = {"top": line * BAR_LINE + 3, "color": color, "low": low, "high": high, "end": end}
            bars.append({"name": name, "mean": metric.mean, "address": self.link(name, path), **shape})
        frame = {"left": BAR_LEFT, "right": BAR_RIGHT, "height": len(bars) * BAR_LINE}
        return {"path": path, "bars": bars, **frame}

    def _beside(self, score: ExampleScore) -> list[tuple[str, Path]]:
        """(caption, file) of the images of a row among the worst and best."""
        made = [(score.model, self.report.folder / score.image)] if _has_image(score) else []
        return [*self.report.images.get(score.example_id, ()), *made]

    def _wanted(self) -> Iterable[tuple[Path, int]]:
        """Every image of the page with its longest side."""
        for score in (score for pair in self.chosen.values() for scores in pair for score in scores):
            yield from ((file, CLOSE_UP) for _, file in self._beside(score))
        for folder, scores in (self.rows[name] for name in self.drawn):
            yield from ((folder / score.image, THUMBNAIL) for score in scores if _has_image(score))
        scored = {score.example_id for score in self.report.scores}
        yield from ((file, THUMBNAIL) for example, file in self.sources.items() if example in scored)

    def _card(self, place: int, score: ExampleScore, kind: str) -> dict[str, Any]:
        """A row among the worst and best: with its image and what stands beside it, large."""
        return {
            "score": score,
            "kind": "failure" if failed(score) else kind,
            "place": place,
            "pictures": [(self.thumbnails[file, CLOSE_UP], caption) for caption, file in self._beside(score)],
            "prompt": self.report.prompts[score.example_id],
            "values": _values(score),
        }

    def examples(self) -> list[dict[str, Any]]:
        """Each category's failures in number, and its worst and best rows."""
        shown = []
        for category, members in self.groups[self.name].items():
            place_of = {score.key: place for place, score in members}
            kinds = zip(("lowest", "best"), self.chosen[category], strict=True)
            cards = [self._card(place_of[score.key], score, kind) for kind, scores in kinds for score in scores]
            failures = sum(failed(score) for _, score in members)
            shown.append({"category": category, "failures": failures, "count": len(members), "cards": cards})
        return shown

    def _entry(self, model: str, place: int, score: ExampleScore) -> dict[str, Any]:
        """A row among all: its value and its image; the candidate's with its prompt, and an edit's source."""
        candidate = model == self.name
        image = self.rows[model][0] / score.image if _has_image(score) else None
        source = self.sources.get(score.example_id) if candidate else None
        return {
            "value": f"{score.primary:.3g}" if score.status == "ok" else score.status,
            "mark": "good" if _share(score) >= 0.9 else "bad" if failed(score) else "",
            "address": quote(os.path.relpath(image, self.path.parent)) if image else None,
            "image": self.thumbnails[image, THUMBNAIL] if image and model in self.drawn else None,
            "source": self.thumbnails[source, THUMBNAIL] if source else None,
            "prompt": self.report.prompts.get(score.example_id, ""),
            "place": place if candidate else None,
            "score": score,
        }

    def everything(self) -> dict[str, list[dict[str, Any]]]:
        """Model -> its categories with all of their rows, worst first."""
        shown: dict[str, list[dict[str, Any]]] = {model: [] for model in self.groups}
        for number, (model, groups) in enumerate(self.groups.items()):
            kind = "all" if model == self.name else "all few" if model in self.drawn else "links"
            for category, members in groups.items():
                worst_first = sorted(members, key=lambda pair: (_share(pair[1]), pair[0]))
                entries = [self._entry(model, place, score) for place, score in worst_first]
                about = {"category": category, "anchor": _anchor(number, category), "kind": kind}
                shown[model].append({**about, "entries": entries})
        return shown

    def confusions(self) -> list[dict[str, Any]]:
        """Asked down, detected across; every number leads to the first of its images."""
        place_of = {score.key: place for place, score in enumerate(self.ordered)}
        places = [place_of[score.key] for score in self.report.scores]

        def cells(asked: str, row: Mapping[str, Sequence[int]], columns: Sequence[str]) -> list[dict[str, Any]]:
            marks = ["zero" if not row.get(name) else "hit" if name == asked else "miss" for name in columns]
            members = [sorted(places[index] for index in row.get(name, ())) for name in columns]
            return [{"members": shown, "mark": mark} for shown, mark in zip(members, marks, strict=True)]

        return [
            {**table, "rows": {asked: cells(asked, row, table["columns"]) for asked, row in table["rows"].items()}}
            for table in self.report.confusions
        ]


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(path_html: str | Path, report: Report) -> None:
    """Writes a self-contained HTML page, whole or not at all. Raises UserError for a missing image or prompt."""
    cards = report.cards
    if not cards:
        raise UserError(f"{path_html}: a report needs at least the candidate's scorecard")
    unknown = sorted({score.example_id for score in report.scores} - report.prompts.keys())
    if unknown:
        few = f"{len(unknown)} scored examples have no prompt, e.g. {unknown[:3]}"
        raise UserError(f"{path_html}: {few}; pass the examples that were scored")
    page = _Page(Path(path_html), report)
    paths, candidate, headlines = all_paths(cards), cards[page.name], HEADLINES.values()
    first = [path for path in paths if path in headlines] + [path for path in paths if path.startswith(RETENTION)]
    facts = {**{f"benchmark {name}": value for name, value in candidate.benchmarks.items()}, **candidate.identities}
    sampling = candidate.identities.get("sampling")
    text = render(
        "benchmarks/report.html.j2",
        page=page,
        report=report,
        title=report.title,
        candidate=candidate.model,
        split=sampling.get("split") if isinstance(sampling, Mapping) else None,
        headline=first,
        paths=paths,
        differences=[row for row in report.comparisons if row["path"] in headlines],
        differences_by_category=[row for row in report.comparisons if row["path"] not in headlines],
        confusions=page.confusions(),
        examples=page.examples(),
        most_images=MOST_IMAGES,
        facts=facts,
        rows=[(score, _values(score)) for score in page.ordered],
        curve=_uri("png", report.curve.read_bytes()) if report.curve else "",
        costs=_costs(report.points),
    )
    write_text(path_html, text)


def _costs(points: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int, int], dict[str, Mapping[str, Any]]]:
    """(model, steps, evaluations an image) -> path -> point: a row of the table each."""
    rows: dict[tuple[str, int, int], dict[str, Mapping[str, Any]]] = {}
    for point in points:
        key = point["model"], point["steps"], point["evaluations_per_image"]
        rows.setdefault(key, {})[point["path"]] = point
    return rows


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
    were not scored on the same images. `folder` is where the page's files lie as seen from the new page's place
    ("score/"); `champion_page` the address of the champion's page, where the images behind its figures are. Raises
    UserError for a page without a place for the section."""
    if CHAMPION not in page:
        raise UserError("the report page has no place for the champion; run the score stage again")
    shown = [category for category in BENCHMARK_OF if f'id="{_anchor(0, category)}"' in page]  # 0 is the candidate
    addresses = {path: _link(0, shown, path) for path in candidate.metrics if path in champion.metrics}
    values = {
        "version": version,
        "cards": (candidate, champion),
        "addresses": addresses,
        "champion_page": champion_page,
    }
    section = render(
        "benchmarks/champion.html.j2", **values, differences=comparison or {}, headlines=HEADLINES.values()
    )
    moved = re.sub(r'href="(?!#|[a-z]+:)', f'href="{folder}', page)
    return moved.replace(CHAMPION, section, 1)
