"""What a reviewer reads: one HTML page that needs nothing beside it.

Every figure on the page is a link to the images that earned it, as far as their rows are given, worst first. Images
are embedded: small ones as they are, larger ones as thumbnails; the browser draws only what is in view, so that a page
of thousands opens at once. Here the values are prepared; the markup stands in `templates/`.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from benchmarks.geneval.confusion import Confusion, color_confusion, count_confusion
from benchmarks.scores.figures import COLORS
from benchmarks.scores.scorecard import BENCHMARK_OF, MACRO, PRIMARY, ExampleScore, Scorecard, all_paths
from data.errors import UserError
from data.files import explain, write_text
from data.pages import render
from data.records import CAPABILITIES

THUMBNAIL, CLOSE_UP = 112, 320  # px, longest side: among all images, and among the worst and best
CHAMPION = "<!-- champion -->"  # where `add_champion` puts its section; the template writes it
MOST_IMAGES = 4000  # on a page: beyond them further models' values are links to the images' files, and the page says so
AS_IT_IS = 4096  # bytes up to which a small file is embedded unchanged
BAR_LEFT, BAR_RIGHT, BAR_LINE = 108, 272, 18  # px of the bars' drawing: where they begin and end, and a line's height


@dataclass(frozen=True)
class Report:
    """What a page shows.

    `cards` maps a name to its scorecard: the candidate first, then champion, teachers, base, the ends of the scale.
    `scores` are the candidate's rows; `prompts` holds the prompt of every example id; `folder` is what
    `ExampleScore.image` is relative to. `images` maps an example id to (caption, file) pairs to show beside the
    candidate's image, of which the one captioned "source" stands beside it everywhere. `files` names the scores files
    of all models. `records` holds GenEval's records for the confusion tables. `others` maps further models of `cards`
    to (folder, rows) whose images are shown, too; `pages` maps models to the address of a page of their own.
    `comparisons` are paired differences ({"a", "b", "path", "difference", "low", "high", "p", "n", "discordant"});
    `notes` are sentences below the headline.
    """

    cards: Mapping[str, Scorecard]
    scores: Sequence[ExampleScore]
    prompts: Mapping[str, str]
    folder: Path
    images: Mapping[str, Sequence[tuple[str, Path]]] = field(default_factory=dict)
    title: str = "Scores of the distilled student"
    per_category: int = 2
    files: Sequence[str] = ()
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    others: Mapping[str, tuple[Path, Sequence[ExampleScore]]] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)
    comparisons: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


# --- images -----------------------------------------------------------------------------------------------------------


class Thumbnail(NamedTuple):
    uri: str
    small: bool  # embedded as it is


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such image, though a score names it; run the score stage again") from error
    except OSError as error:
        raise explain(error, file) from error


def thumbnail(file: Path, longest: int) -> Thumbnail:
    """An image as a data URI, at most `longest` px on its longest side.

    Raises UserError for a missing or unreadable file.
    """
    content = _read(file)
    kind = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg", b"RIFF": "webp"}.get(content[:4])
    try:
        with Image.open(io.BytesIO(content)) as image:
            if kind and len(content) <= AS_IT_IS and max(image.size) <= longest:
                return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", True)
            shown = image.convert("RGB")
            shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            shown.save(buffer, format="WEBP", quality=62, method=2)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: not a readable image ({error})") from error
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", False)


Thumbnails = Mapping[tuple[Path, int], Thumbnail]  # by file and longest side


def _thumbnails(files: Iterable[tuple[Path, int]]) -> Thumbnails:
    """Every (file, longest side) once, several at a time: decoding leaves the interpreter free."""
    wanted = list(dict.fromkeys(files))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(wanted, pool.map(lambda pair: thumbnail(*pair), wanted), strict=True))


# --- figures ----------------------------------------------------------------------------------------------------------


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def _digits(path: str) -> int:
    return 2 if path.startswith("gedit/") else 3


class _Places:
    """Where on the page (or on another page) the images behind a figure stand."""

    def __init__(self, models: Mapping[str, Iterable[str]], pages: Mapping[str, str]) -> None:
        self._shown = {name: list(dict.fromkeys(categories)) for name, categories in models.items()}
        self._pages = pages

    def anchor(self, model: str, category: str) -> str:
        return f"m{list(self._shown).index(model)}-{_slug(category)}"

    def link(self, model: str, path: str) -> str | None:
        """The address of the images behind a model's metric; None where no row is at hand."""
        benchmark, _, name = path.partition("/")
        wanted: Collection[str] = [name]
        if benchmark == "retention":
            wanted = CAPABILITIES[name].categories if name in CAPABILITIES else ()
        elif path in MACRO.values():
            wanted = [category for category, of in BENCHMARK_OF.items() if of == benchmark]
        first = next((category for category in self._shown.get(model, ()) if category in wanted), None)
        return self._pages.get(model) if first is None else f"#{self.anchor(model, first)}"


def _cell(card: Scorecard, path: str, address: str | None) -> dict[str, Any]:
    return {"metric": card.metrics.get(path), "digits": _digits(path), "address": address}


def _table(cards: Mapping[str, Scorecard], paths: Sequence[str], places: _Places) -> dict[str, Any]:
    """Models down, metrics across; the first model is the candidate."""
    rows = {name: [_cell(card, path, places.link(name, path)) for path in paths] for name, card in cards.items()}
    return {"paths": paths, "rows": rows}


def _bars(cards: Mapping[str, Scorecard], path: str, places: _Places) -> dict[str, Any]:
    """A metric of every model as a bar with its interval; lengths in px of the drawing."""
    known = {
        name: (place, card.metrics[path]) for place, (name, card) in enumerate(cards.items()) if path in card.metrics
    }
    highest = PRIMARY.get(path.split("/")[0], ("", 1.0))[1]
    scale = (BAR_RIGHT - BAR_LEFT) / max(highest, *(metric.high for _, metric in known.values()))
    bars = []
    for line, (name, (place, metric)) in enumerate(known.items()):
        low, high, end = (BAR_LEFT + max(0.0, value) * scale for value in (metric.low, metric.high, metric.mean))
        shape = {"top": line * BAR_LINE + 3, "color": COLORS[place % len(COLORS)], "low": low, "high": high, "end": end}
        bars.append({"name": name, "mean": metric.mean, "address": places.link(name, path), **shape})
    frame = {"left": BAR_LEFT, "right": BAR_RIGHT, "height": len(bars) * BAR_LINE}
    return {"path": path, "digits": _digits(path), "bars": bars, **frame}


def _difference(row: Mapping[str, Any]) -> dict[str, Any]:
    """A paired difference; its mark says whether it excludes 0."""
    return {
        **row,
        "digits": _digits(row["path"]),
        "mark": "good" if row["low"] > 0 else "bad" if row["high"] < 0 else "",
    }


def _confusion(title: str, table: Confusion, numbers: bool) -> dict[str, Any]:
    """Asked down, detected across; every number leads to the first of its images."""
    detected = {name for row in table.values() for name in row}
    columns = sorted(detected, key=int) if numbers else [*table, *sorted(detected - table.keys())]
    rows = {
        name: [
            {"members": members, "mark": "zero" if not members else "hit" if column == name else "miss"}
            for column in columns
            for members in [row.get(column, [])]
        ]
        for name, row in table.items()
    }
    return {"title": title, "columns": columns, "rows": rows}


# --- rows and their images --------------------------------------------------------------------------------------------


def _values(score: ExampleScore) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in score.values.items()) or score.status


def _primary(score: ExampleScore) -> float:
    """0 is the lowest score, 1 the highest; a failed judgement comes before the worst score."""
    name, highest = PRIMARY[score.benchmark]
    return score.values.get(name, -highest) / highest


def failed(score: ExampleScore) -> bool:
    """Whether a row counts as a failure: it has no score, or at most half of the highest."""
    return _primary(score) <= 0.5


def _has_image(score: ExampleScore) -> bool:
    return bool(score.image) and score.status not in ("missing_image", "bad_image")


def extremes(scores: Sequence[ExampleScore], count: int) -> tuple[list[ExampleScore], list[ExampleScore]]:
    """The `count` worst and best rows of a category, no row in both, and no row of the highest score among the worst.

    Ties go by id, so the choice does not depend on the rows' order.
    """
    ordered = sorted(scores, key=lambda score: (_primary(score), score.example_id, score.k))
    worst = [score for score in ordered[: min(count, (len(ordered) + 1) // 2)] if _primary(score) < 1.0]
    best = [score for score in reversed(ordered) if score not in worst][:count]
    return worst, best


def _in_order(scores: Sequence[ExampleScore]) -> list[ExampleScore]:
    categories = list(BENCHMARK_OF)
    return sorted(scores, key=lambda score: (categories.index(score.category), score.example_id, score.k))


def _by_category(ordered: Sequence[ExampleScore]) -> dict[str, list[tuple[int, ExampleScore]]]:
    """Category -> (place among all rows, row)."""
    groups: dict[str, list[tuple[int, ExampleScore]]] = {}
    for place, score in enumerate(ordered):
        groups.setdefault(score.category, []).append((place, score))
    return groups


class _Page:
    """A report's rows in their order, and which of their images the page holds."""

    def __init__(self, path: Path, report: Report) -> None:
        self.report, self.path = report, path
        self.name = next(iter(report.cards))
        others = {name: rows for name, rows in report.others.items() if name in report.cards and name != self.name}
        models = {self.name: (report.folder, report.scores), **others}
        self.rows = {name: (folder, _in_order(scores)) for name, (folder, scores) in models.items()}
        self.drawn: list[str] = []  # models whose images stand on the page itself: always the candidate's
        count = 0
        for name, (_, scores) in self.rows.items():
            if not self.drawn or count + len(scores) <= MOST_IMAGES:
                self.drawn.append(name)
                count += len(scores)
        self.places = _Places(
            {name: [row.category for row in rows] for name, (_, rows) in self.rows.items()}, report.pages
        )
        pairs = {example: dict(shown) for example, shown in report.images.items()}
        self.sources = {example: shown["source"] for example, shown in pairs.items() if "source" in shown}
        self.groups = _by_category(self.rows[self.name][1])
        self.chosen = {
            category: extremes([score for _, score in members], report.per_category)
            for category, members in self.groups.items()
        }
        self.thumbnails = _thumbnails(self._wanted())

    def _wanted(self) -> Iterable[tuple[Path, int]]:
        for score in (score for pair in self.chosen.values() for scores in pair for score in scores):
            yield from ((file, CLOSE_UP) for _, file in self.report.images.get(score.example_id, ()))
            if _has_image(score):
                yield self.report.folder / score.image, CLOSE_UP
        for name in self.drawn:
            folder, scores = self.rows[name]
            yield from ((folder / score.image, THUMBNAIL) for score in scores if _has_image(score))
        scored = {score.example_id for score in self.report.scores}
        yield from ((file, THUMBNAIL) for example, file in self.sources.items() if example in scored)

    def _card(self, place: int, score: ExampleScore, kind: str) -> dict[str, Any]:
        """A row among the worst and best: with its image and what stands beside it, large."""
        beside = list(self.report.images.get(score.example_id, ()))
        beside += [(score.model, self.report.folder / score.image)] if _has_image(score) else []
        pictures = [(self.thumbnails[file, CLOSE_UP], caption) for caption, file in beside]
        kind = "failure" if failed(score) else kind
        text = {"prompt": self.report.prompts[score.example_id], "values": _values(score)}
        return {"score": score, "kind": kind, "place": place, "pictures": pictures, **text}

    def examples(self) -> list[dict[str, Any]]:
        """Each category's failures in number, and its worst and best rows."""
        found = []
        for category, members in self.groups.items():
            place_of = {(score.example_id, score.k): place for place, score in members}
            cards = [
                self._card(place_of[score.example_id, score.k], score, kind)
                for kind, scores in zip(("lowest", "best"), self.chosen[category], strict=True)
                for score in scores
            ]
            failures = sum(failed(score) for _, score in members)
            found.append({"category": category, "failures": failures, "count": len(members), "cards": cards})
        return found

    def _entry(self, model: str, place: int, score: ExampleScore) -> dict[str, Any]:
        """A row among all: its value and its image; the candidate's with what was asked, and an edit's source."""
        share, folder, candidate = _primary(score), self.rows[model][0], model == self.name
        image = folder / score.image if _has_image(score) else None
        source = self.sources.get(score.example_id) if candidate else None
        return {
            "value": f"{score.values[PRIMARY[score.benchmark][0]]:.3g}" if score.status == "ok" else score.status,
            "mark": "good" if share >= 0.9 else "bad" if failed(score) else "",
            "address": quote(os.path.relpath(image, self.path.parent)) if image else None,
            "image": self.thumbnails[image, THUMBNAIL] if image and model in self.drawn else None,
            "source": self.thumbnails[source, THUMBNAIL] if source else None,
            "prompt": self.report.prompts.get(score.example_id, ""),
            "place": place if candidate else None,
            "score": score,
        }

    def everything(self) -> dict[str, list[dict[str, Any]]]:
        """Model -> its categories with all of their rows, worst first."""
        found: dict[str, list[dict[str, Any]]] = {}
        for model, (_, scores) in self.rows.items():
            kind = "all" if model == self.name else "all few" if model in self.drawn else "links"
            found[model] = []
            for category, members in _by_category(scores).items():
                worst_first = sorted(members, key=lambda pair: (_primary(pair[1]), pair[0]))
                entries = [self._entry(model, place, score) for place, score in worst_first]
                anchor = self.places.anchor(model, category)
                found[model].append({"category": category, "anchor": anchor, "kind": kind, "entries": entries})
        return found

    def confusions(self) -> list[dict[str, Any]]:
        ordered, records = self.rows[self.name][1], self.report.records
        counts = _confusion("How many things", count_confusion(ordered, records), True)
        colors = _confusion("Which colour", color_confusion(ordered, records), False)
        return [table for table in (counts, colors) if table["rows"]]


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
    paths, candidate = all_paths(cards), cards[page.name]
    macros = [path for path in paths if path in MACRO.values()]
    headline = macros + [path for path in paths if path.startswith("retention/")]
    differences = [_difference(row) for row in report.comparisons]
    facts = {**{f"benchmark {name}": value for name, value in candidate.benchmarks.items()}, **candidate.identities}
    text = render(
        "benchmarks/report.html.j2",
        report=report,
        title=report.title,
        candidate=candidate.model,
        headline=_table(cards, headline, page.places),
        figures=_table(cards, paths, page.places),
        bars=[_bars(cards, path, page.places) for path in paths],
        differences=[row for row in differences if row["path"] in MACRO.values()],
        differences_by_category=[row for row in differences if row["path"] not in MACRO.values()],
        confusions=page.confusions(),
        examples=page.examples(),
        everything=page.everything(),
        left_out=[model for model in page.rows if model not in page.drawn],
        most_images=MOST_IMAGES,
        facts=facts,
        rows=[(score, _values(score), report.prompts[score.example_id]) for score in page.rows[page.name][1]],
    )
    write_text(path_html, text)


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
    UserError for a page without a place for the section.
    """
    if CHAMPION not in page:
        raise UserError("the report page has no place for the champion; run the score stage again")
    # the candidate is the page's first model
    places = _Places({"": [category for category in BENCHMARK_OF if f'id="m0-{_slug(category)}"' in page]}, {})
    lines = []
    for path in (path for path in candidate.metrics if path in champion.metrics):
        row, address = (comparison or {}).get(path), places.link("", path)
        theirs = _cell(champion, path, _within(champion_page, address))
        difference = _difference({"path": path, **row}) if row else None
        first = path in MACRO.values()
        lines.append((path, first, _cell(candidate, path, address), theirs, difference))
    section = render("benchmarks/champion.html.j2", version=version, lines=lines, paired=bool(comparison))
    moved = re.sub(r'href="(?!#|[a-z]+:)', f'href="{folder}', page)
    return moved.replace(CHAMPION, section, 1)


def _within(page: str | None, anchor: str | None) -> str | None:
    """The anchor on another page of this kind, where the candidate comes first too; MLflow's pages have no anchors."""
    return page if page is None or anchor is None or "#" in page else page + anchor
