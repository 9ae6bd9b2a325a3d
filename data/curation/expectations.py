"""The curated set's promises, as a Great Expectations suite, and its Data Docs, readable without a network.

Great Expectations takes many seconds to import, so it is imported only where a suite is run.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from data.curation.filters import Options, count_words, normalise
from data.errors import UserErrors
from data.files import atomic_folder, sha256_file
from data.manifests import ID_PATTERN
from data.pages import render
from data.records import BUCKETS, CAPABILITIES, CATEGORIES, COLUMNS, SPLITS, Example

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation


SUITE = "curated"
FIRST_ROWS = 5  # ids named per failure
COMPUTED = "task prompt_words source_as_needed images_intact shortest_edge longest_edge prompt_in_other_split"
TABLE_COLUMNS = [*(name for name in COLUMNS if name != "record"), *COMPUTED.split()]


@dataclass(frozen=True)
class Outcome:
    """An expectation's result. `rows` counts the rows at fault, `ids` are the first of them; `observed` is the value
    that an expectation of the whole table saw."""

    name: str
    meaning: str
    type: str
    success: bool
    rows: int
    ids: list[str]
    observed: str

    def fault(self) -> str:
        seen = f"{self.rows} rows, the first {', '.join(self.ids)}" if self.rows else f"observed {self.observed}"
        return f"{self.name} ({self.meaning}; {self.type}): {seen}"


def validate_curated(
    examples: Sequence[Example], options: Options, docs: str | Path, *, folder: str | Path
) -> dict[str, Any]:
    """Runs the suite over the examples of the curated `folder` and replaces `docs`, on success and on failure.

    `docs` holds `index.html` and `index.md` (every expectation with its outcome), `validation.html` and `suite.html`
    (Great Expectations' pages). Returns {"success", "evaluated", "successful", "suite", "expectations": [fields of
    Outcome]}. Raises UserErrors that names each failed expectation, the number of rows and the first ids.
    """
    docs = Path(docs)
    frame = table_of(examples, Path(folder))
    with atomic_folder(docs) as pages, tempfile.TemporaryDirectory(prefix="expectations-") as scratch:
        outcomes = _run(frame, options, Path(scratch), pages)
        _write_index(pages, outcomes, len(frame))
    failed = [outcome for outcome in outcomes if not outcome.success]
    if failed:
        number = f"{len(failed)} of {len(outcomes)} expectations (all of them: {docs / 'index.html'})"
        raise UserErrors(f"the curated set fails {number}", [outcome.fault() for outcome in failed])
    counts = {"success": True, "evaluated": len(outcomes), "successful": len(outcomes)}
    return {**counts, "suite": SUITE, "expectations": [asdict(outcome) for outcome in outcomes]}


# --- what is promised -------------------------------------------------------------------------------------------------


def table_of(examples: Sequence[Example], folder: Path) -> pd.DataFrame:
    """A row per example: its columns without the record, and the computed columns that the suite judges."""
    t2i = [example for example in examples if example.capability == "t2i"]
    prompts = {split: {normalise(example.prompt) for example in t2i if example.split == split} for split in SPLITS}
    rows = []
    for example in examples:
        sizes = [_size_if_intact(folder / path) for path in (example.source, example.target) if path]
        known = [size for size in sizes if size]
        prompt, others = (
            normalise(example.prompt),
            (known for split, known in prompts.items() if split != example.split),
        )
        is_edit = CAPABILITIES[example.capability].is_edit if example.capability in CAPABILITIES else None
        computed = {
            "task": f"{example.capability}/{example.category}",
            "prompt_words": count_words(example.prompt),
            "source_as_needed": is_edit == (example.source is not None),
            "images_intact": len(known) == len(sizes),
            "shortest_edge": min((min(size) for size in known), default=None),
            "longest_edge": max((max(size) for size in known), default=None),
            "prompt_in_other_split": example.capability == "t2i" and any(prompt in known for known in others),
        }
        rows.append({**vars(example), **computed})
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def _size_if_intact(path: Path) -> tuple[int, int] | None:
    """(width, height) in px of a file named by the SHA-256 of its bytes; None when it is missing or altered."""
    try:
        if sha256_file(path) != path.stem:
            return None
        with Image.open(path, formats=("PNG",)) as image:
            return image.size
    except (OSError, SyntaxError):
        return None


def expectations(options: Options, splits: Collection[str]) -> dict[str, tuple[str, Expectation]]:
    """name -> (meaning, expectation) of everything a curated set must hold that has rows of these `splits`.

    An empty table fulfils all of them but `row_count`.
    """
    import great_expectations.expectations as gxe

    def matches(column: str, regex: str) -> Expectation:
        return gxe.ExpectColumnValuesToMatchRegex(column=column, regex=regex)

    def among(column: str, values: Sequence[Any]) -> Expectation:
        return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=list(values))

    def between(column: str, least: int | None, most: int | None = None) -> Expectation:
        return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most)

    tasks = [f"{name}/{category}" for name in BUCKETS for category in CAPABILITIES[name].categories]
    words, shortest, longest = options.max_prompt_words, options.min_edge, options.max_edge
    minima = {"train": options.minimum_train, "eval": options.minimum_eval}
    if "dev" in splits:  # a folder may bring none
        minima["dev"] = options.minimum_eval
    least = max(1, sum(sum(minimum.values()) for minimum in minima.values()))
    columns = gxe.ExpectTableColumnsToMatchSet(column_set=TABLE_COLUMNS, exact_match=True)
    no_twins = gxe.ExpectCompoundColumnsToBeUnique(column_list=["split", "sha256"])
    manifests = matches("origin", r".+\.(?:csv|jsonl|parquet)$")
    suite: dict[str, tuple[str, Expectation]] = {
        "columns": ("the table has exactly its columns", columns),
        "row_count": (f"at least {least} rows", gxe.ExpectTableRowCountToBeBetween(min_value=least)),
        "id_form": ("every row has an id that can name a file", matches("id", f"^{ID_PATTERN.pattern}$")),
        "id_unique": ("no id is used twice", gxe.ExpectColumnValuesToBeUnique(column="id")),
        "sha256_form": ("sha256 is 64 hexadecimal digits", matches("sha256", "^[0-9a-f]{64}$")),
        "sha256_unique": ("no two rows of a split are equal", no_twins),
        "provenance": ("every row names its manifest", manifests),
        "provenance_row": ("rows of a manifest count from 1", between("row", 1)),
        "split_known": ("split is train, dev or eval", among("split", SPLITS)),
        "capability_known": ("capability is one of three", among("capability", BUCKETS)),
        "category_known": ("category is a GenEval tag or a GEdit task", among("category", CATEGORIES)),
        "category_fits": ("category belongs to its capability", among("task", tasks)),
        "prompt_given": ("every row has a prompt", matches("prompt", r"\S")),
        "prompt_length": (f"1 to {words} words", between("prompt_words", 1, words)),
        "source_as_needed": ("edits have a source image and T2I has none", among("source_as_needed", [True])),
        "images_intact": ("image files exist and their bytes give their names", among("images_intact", [True])),
        "image_size_min": (f"edges of {shortest} px or more", between("shortest_edge", shortest)),
        "image_size_max": (f"edges of {longest} px or less", between("longest_edge", None, longest)),
        "no_leakage": ("no T2I prompt is in two splits", among("prompt_in_other_split", [False])),
    }
    for split, minimum in minima.items():
        for name, count in minimum.items():
            rows = {"row_condition": f'capability == "{name}" and split == "{split}"', "condition_parser": "pandas"}
            enough = gxe.ExpectTableRowCountToBeBetween(min_value=count, **rows)
            suite[f"count_{name}_{split}"] = f"at least {count} {split} rows of {name}", enough
    return suite


# --- running it -------------------------------------------------------------------------------------------------------


def _run(frame: pd.DataFrame, options: Options, scratch: Path, pages: Path) -> list[Outcome]:
    """Great Expectations keeps its state in `scratch`; its two pages go to `pages`."""
    import great_expectations as gx
    from great_expectations.checkpoint import UpdateDataDocsAction

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    promised = expectations(options, set(frame["split"]))
    context = gx.get_context(mode="file", project_root_dir=scratch)
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    site = scratch / "site"
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site)}
    builders = {"class_name": "SiteBuilder", "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"}}
    context.add_data_docs_site(SUITE, {**builders, "store_backend": store})
    asset = context.data_sources.add_pandas(SUITE).add_dataframe_asset("examples")
    batch = asset.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(gx.ExpectationSuite(name=SUITE))
    for name, (meaning, expectation) in promised.items():
        expectation.description, expectation.meta = f"{name}: {meaning}", {"name": name}
        suite.add_expectation(expectation)
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=SUITE, data=batch, suite=suite))
    checkpoint = gx.Checkpoint(
        name=SUITE,
        validation_definitions=[definition],
        actions=[UpdateDataDocsAction(name="docs", site_names=[SUITE])],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
    )
    (result,) = checkpoint.run(batch_parameters={"dataframe": frame}).run_results.values()
    outcomes = {outcome.name: outcome for outcome in (_outcome(item, promised) for item in result.results)}
    if set(outcomes) != set(promised):  # a suite that evaluates nothing passes: never take that for success
        raise RuntimeError(f"Great Expectations evaluated {sorted(outcomes)} of {sorted(promised)}")
    _copy_pages(site, pages)
    return [outcomes[name] for name in promised]


def _outcome(item: Any, promised: dict[str, tuple[str, Expectation]]) -> Outcome:
    name, kind = item.expectation_config.meta["name"], item.expectation_config.type
    result, broken = item.result, item.exception_info
    rows = int(result.get("unexpected_count") or 0)
    ids = [str(entry["id"]) for entry in result.get("partial_unexpected_index_list") or []]
    observed = str(result.get("observed_value", ""))
    if not result:  # the expectation itself broke
        first = next(iter(broken.values()), None)
        observed = str((first if isinstance(first, dict) else broken).get("exception_message"))
    return Outcome(name, promised[name][0], kind, bool(item.success), rows, ids[:FIRST_ROWS], observed)


# --- pages that need no network ---------------------------------------------------------------------------------------


def _offline(page: str) -> str:
    """A page of Great Expectations in a plain style, without what it loads from elsewhere (scripts, fonts, logos)."""
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r"<(?:link|img|source)\b[^>]*>", "", page)
    page = re.sub(r"<style\b.*?</style>", "", page, flags=re.DOTALL)
    page = re.sub(r"<p>[^<]*newsletter.*?</p>", "", page, flags=re.DOTALL)
    # Equal data must give equal pages: remove the time of the run and the random names of folded parts.
    page = re.sub(r'(aria-current="page">Validations / [^/<]*) /[^<]*<', r"\1<", page)
    cell = r'<tr>\s*<td id="[^"]*-collapse-item-\d+-cell-\d+-1"'
    page = re.sub(cell + r"(?:(?!</?tr).)*>(?:Run Time|ge_load_time)<.*?</tr>", "", page, flags=re.DOTALL)
    page = re.sub(r"(-collapse-body)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"\1", page)
    page = re.sub(r'href="(?:\.\./)+index\.html"', 'href="index.html"', page)
    page = re.sub(r'href="[^"]*expectations/' + SUITE + r'\.html"', 'href="suite.html"', page)
    return page.replace("</head>", render("data/offline_style.html.j2"), 1)


def _copy_pages(site: Path, pages: Path) -> None:
    """Great Expectations writes one page per run and per suite; here there is one of each."""
    (validation,) = (site / "validations").rglob("*.html")
    for source, name in ((validation, "validation.html"), (site / "expectations" / f"{SUITE}.html", "suite.html")):
        (pages / name).write_text(_offline(source.read_text(encoding="utf-8")), encoding="utf-8")


def _write_index(pages: Path, outcomes: Sequence[Outcome], count: int) -> None:
    good = sum(outcome.success for outcome in outcomes)
    title, headline = "Curated data: validation", f"{good} of {len(outcomes)} expectations hold on {count} rows"
    columns = ("expectation", "meaning", "outcome", "rows at fault", "first ids", "observed")
    rows = []
    for o in outcomes:
        seen = (str(o.rows), ", ".join(o.ids), "" if o.rows else o.observed)
        rows.append((o.success, (o.name, o.meaning, "holds" if o.success else "FAILS", *seen)))
    cells = [[value.replace("|", "\\|").replace("\n", " ") for value in row] for _, row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]
    (pages / "index.md").write_text("\n".join([f"# {title}", "", f"{headline}.", "", *lines, ""]), encoding="utf-8")
    page = render("data/expectations.html.j2", title=title, headline=headline, columns=columns, rows=rows)
    (pages / "index.html").write_text(page, encoding="utf-8")
