"""The curated set's promises, as a Great Expectations suite, and its Data Docs, readable without a network.

Great Expectations takes many seconds to import, so it is imported only where a suite is run.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from data.curation.filters import BUCKETS, Options, count_words, normalise
from data.errors import UserErrors
from data.files import atomic_folder, sha256_file
from data.manifests import ID_PATTERN
from data.pages import render
from data.records import CAPABILITIES, COLUMNS, SPLITS, Example

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation


SUITE = "curated"
FIRST_ROWS = 5  # ids named per failure


@dataclass(frozen=True)
class Outcome:
    """One expectation's result. `rows` counts the rows at fault, `ids` are the first of them; `observed` is what a
    whole-table expectation saw.
    """

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
    """Runs the suite over the examples of the curated `folder` and builds Data Docs into `docs`, replaced as a whole,
    on success and on failure.

    `docs` then holds `index.html` and `index.md` (every expectation with its outcome), `validation.html` and
    `suite.html` (Great Expectations' own pages). Returns {"success", "evaluated", "successful", "suite",
    "expectations": [{"name", "meaning", "type", "success", "rows", "ids", "observed"}]}. Raises UserErrors that names
    each failed expectation, the count and the first rows' ids.
    """
    docs = Path(docs)
    frame = table_of(examples, Path(folder))
    with atomic_folder(docs) as pages, tempfile.TemporaryDirectory(prefix="expectations-") as scratch:
        outcomes = _run(frame, options, Path(scratch), pages)
        _write_index(pages, outcomes, len(frame))
    failed = [outcome for outcome in outcomes if not outcome.success]
    if failed:
        title = (
            f"the curated set fails {len(failed)} of {len(outcomes)} expectations (all of them: {docs / 'index.html'})"
        )
        raise UserErrors(title, [outcome.fault() for outcome in failed])
    return {
        "success": True,
        "evaluated": len(outcomes),
        "successful": len(outcomes) - len(failed),
        "suite": SUITE,
        "expectations": [asdict(outcome) for outcome in outcomes],
    }


# --- what is promised -------------------------------------------------------------------------------------------------


def table_of(examples: Sequence[Example], folder: Path) -> pd.DataFrame:
    """The examples' own columns (without the record) and what is computed from them, as Great Expectations judges
    columns.
    """
    prompts = {
        split: {
            normalise(example.prompt) for example in examples if example.capability == "t2i" and example.split == split
        }
        for split in SPLITS
    }
    rows = []
    for example in examples:
        sizes = [_size_if_intact(folder / path) for path in (example.source, example.target) if path]
        known = [size for size in sizes if size]
        other = prompts["eval" if example.split == "train" else "train"]
        is_edit = CAPABILITIES[example.capability].is_edit if example.capability in CAPABILITIES else None
        rows.append(
            {
                **{name: getattr(example, name) for name in COLUMNS if name != "record"},
                "task": f"{example.capability}/{example.category}",
                "prompt_words": count_words(example.prompt),
                "source_as_needed": is_edit == (example.source is not None),
                "images_intact": len(known) == len(sizes),
                "shortest_edge": min((min(size) for size in known), default=None),
                "longest_edge": max((max(size) for size in known), default=None),
                "prompt_in_other_split": example.capability == "t2i" and normalise(example.prompt) in other,
            }
        )
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


TABLE_COLUMNS = [
    *(name for name in COLUMNS if name != "record"),
    "task",
    "prompt_words",
    "source_as_needed",
    "images_intact",
    "shortest_edge",
    "longest_edge",
    "prompt_in_other_split",
]


def _size_if_intact(path: Path) -> tuple[int, int] | None:
    """(width, height) in pixels of a file whose name is the SHA-256 of its bytes; None when it is missing or
    altered.
    """
    try:
        if sha256_file(path) != path.stem:
            return None
        with Image.open(path, formats=("PNG",)) as image:
            return image.size
    except (OSError, SyntaxError):
        return None


def expectations(options: Options) -> dict[str, tuple[str, Expectation]]:
    """name -> (meaning, expectation) of everything a curated set must hold. None of them passes on an empty table
    alone: `row_count` fails there.
    """
    import great_expectations.expectations as gxe

    tasks = [f"{name}/{category}" for name in BUCKETS for category in CAPABILITIES[name].categories]
    categories = [category for name in BUCKETS for category in CAPABILITIES[name].categories]
    words = options.max_prompt_words
    least = max(1, sum(options.minimum_train.values()) + sum(options.minimum_eval.values()))
    suite: dict[str, tuple[str, Expectation]] = {
        "columns": (
            "the table has exactly its columns",
            gxe.ExpectTableColumnsToMatchSet(column_set=TABLE_COLUMNS, exact_match=True),
        ),
        "row_count": (f"at least {least} rows", gxe.ExpectTableRowCountToBeBetween(min_value=least)),
        "id_form": (
            "every row has an id that can name a file",
            gxe.ExpectColumnValuesToMatchRegex(column="id", regex=f"^{ID_PATTERN.pattern}$"),
        ),
        "id_unique": ("no id is used twice", gxe.ExpectColumnValuesToBeUnique(column="id")),
        "sha256_form": (
            "sha256 is 64 hexadecimal digits",
            gxe.ExpectColumnValuesToMatchRegex(column="sha256", regex="^[0-9a-f]{64}$"),
        ),
        "sha256_unique": (
            "no two rows of a split are equal",
            gxe.ExpectCompoundColumnsToBeUnique(column_list=["split", "sha256"]),
        ),
        "provenance": (
            "every row names its manifest",
            gxe.ExpectColumnValuesToMatchRegex(column="origin", regex=r".+\.(?:csv|jsonl|parquet)$"),
        ),
        "provenance_row": (
            "rows of a manifest count from 1",
            gxe.ExpectColumnValuesToBeBetween(column="row", min_value=1),
        ),
        "split_known": (
            "split is train or eval",
            gxe.ExpectColumnValuesToBeInSet(column="split", value_set=list(SPLITS)),
        ),
        "capability_known": (
            "capability is one of three",
            gxe.ExpectColumnValuesToBeInSet(column="capability", value_set=list(BUCKETS)),
        ),
        "category_known": (
            "category is a GenEval tag or a GEdit task",
            gxe.ExpectColumnValuesToBeInSet(column="category", value_set=categories),
        ),
        "category_fits": (
            "category belongs to its capability",
            gxe.ExpectColumnValuesToBeInSet(column="task", value_set=tasks),
        ),
        "prompt_given": ("every row has a prompt", gxe.ExpectColumnValuesToMatchRegex(column="prompt", regex=r"\S")),
        "prompt_length": (
            f"1 to {words} words",
            gxe.ExpectColumnValuesToBeBetween(column="prompt_words", min_value=1, max_value=words),
        ),
        "source_as_needed": (
            "edits have a source image and T2I has none",
            gxe.ExpectColumnValuesToBeInSet(column="source_as_needed", value_set=[True]),
        ),
        "images_intact": (
            "image files exist and their bytes give their names",
            gxe.ExpectColumnValuesToBeInSet(column="images_intact", value_set=[True]),
        ),
        "image_size_min": (
            f"edges of {options.min_edge} px or more",
            gxe.ExpectColumnValuesToBeBetween(column="shortest_edge", min_value=options.min_edge),
        ),
        "image_size_max": (
            f"edges of {options.max_edge} px or less",
            gxe.ExpectColumnValuesToBeBetween(column="longest_edge", max_value=options.max_edge),
        ),
        "no_leakage": (
            "no T2I prompt is both trained and scored",
            gxe.ExpectColumnValuesToBeInSet(column="prompt_in_other_split", value_set=[False]),
        ),
    }
    for split, minimum in (("train", options.minimum_train), ("eval", options.minimum_eval)):
        for name, count in minimum.items():
            condition = f'capability == "{name}" and split == "{split}"'
            suite[f"count_{name}_{split}"] = (
                f"at least {count} {split} rows of {name}",
                gxe.ExpectTableRowCountToBeBetween(min_value=count, row_condition=condition, condition_parser="pandas"),
            )
    return suite


# --- running it -------------------------------------------------------------------------------------------------------


def _run(frame: pd.DataFrame, options: Options, scratch: Path, pages: Path) -> list[Outcome]:
    """Great Expectations keeps its state in `scratch`; its two pages go to `pages`."""
    import great_expectations as gx
    from great_expectations.checkpoint import UpdateDataDocsAction

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    promised = expectations(options)
    context = gx.get_context(mode="file", project_root_dir=scratch)
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    site = scratch / "site"
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site)}
    context.add_data_docs_site(
        SUITE,
        {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": store,
        },
    )
    batch = (
        context.data_sources.add_pandas(SUITE)
        .add_dataframe_asset("examples")
        .add_batch_definition_whole_dataframe("all")
    )
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
    found = item.result
    rows = int(found.get("unexpected_count") or 0)
    ids = [str(entry["id"]) for entry in found.get("partial_unexpected_index_list") or []]
    observed = str(found.get("observed_value", ""))
    if not found:  # the expectation itself broke
        broken = next(iter(item.exception_info.values()), None)
        observed = str(
            broken.get("exception_message")
            if isinstance(broken, dict)
            else item.exception_info.get("exception_message")
        )
    return Outcome(name, promised[name][0], kind, bool(item.success), rows, ids[:FIRST_ROWS], observed)


# --- pages that need no network ---------------------------------------------------------------------------------------


def _offline(page: str) -> str:
    """One of Great Expectations' pages without what it loads from elsewhere (styles, scripts, fonts, logos), in a plain
    style of its own.
    """
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r"<(?:link|img|source)\b[^>]*>", "", page)
    page = re.sub(r"<style\b.*?</style>", "", page, flags=re.DOTALL)
    page = re.sub(r"<p>[^<]*newsletter.*?</p>", "", page, flags=re.DOTALL)
    # Equal data gives equal pages: they tell neither when this was run nor the random names of folded parts.
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


def _write_index(pages: Path, outcomes: Sequence[Outcome], rows: int) -> None:
    good = sum(outcome.success for outcome in outcomes)
    headline = f"{good} of {len(outcomes)} expectations hold on {rows} rows"
    columns = ("expectation", "meaning", "outcome", "rows at fault", "first ids", "observed")
    cells = [
        (
            o.name,
            o.meaning,
            "holds" if o.success else "FAILS",
            str(o.rows),
            ", ".join(o.ids),
            o.observed if not o.rows else "",
        )
        for o in outcomes
    ]
    table = [
        columns,
        ["---"] * len(columns),
        *([value.replace("|", "\\|").replace("\n", " ") for value in row] for row in cells),
    ]
    lines = ["# Curated data: validation", "", headline + ".", "", *(f"| {' | '.join(row)} |" for row in table)]
    (pages / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    marked = [(outcome.success, row) for outcome, row in zip(outcomes, cells, strict=True)]
    page = render(
        "data/expectations.html.j2", title="Curated data: validation", headline=headline, columns=columns, rows=marked
    )
    (pages / "index.html").write_text(page, encoding="utf-8")
