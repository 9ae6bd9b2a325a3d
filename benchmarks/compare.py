"""`python -m benchmarks compare`: scorecards beside the paper's rows, and under them what differs, because numbers of
different protocols are not comparable.

The paper's rows are data (`paper.yaml`). Its GEdit average is over six of the eleven categories, so a scorecard's
average over the same six stands beside it.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.scores.scorecard import Scorecard, check_same_evaluator, read_scorecard
from data.errors import UserError
from data.files import write_text
from data.records import GEDIT_CATEGORIES, HEADLINES
from data.yaml_files import read_yaml

PAPER_FILE = Path(__file__).with_name("paper.yaml")
FORMATS = ("text", "markdown", "csv")
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Value:
    """One cell: a mean with its standard error where one is known."""

    mean: float
    stderr: float | None = None


@dataclass(frozen=True)
class Row:
    name: str
    values: dict[str, Value]  # by column


def load_paper(path: Path = PAPER_FILE) -> dict[str, Any]:
    return read_yaml(path)


def overall_of_counts(correct: Sequence[int], sizes: Sequence[int]) -> float:
    """GenEval's Overall from the correct images of each task: the mean of the tasks' shares."""
    return sum(count / size for count, size in zip(correct, sizes, strict=True)) / len(sizes)


def columns_of(paper: Mapping[str, Any]) -> list[str]:
    """The table's columns, in the paper's order: each benchmark's average, then its tasks."""
    return [
        HEADLINES["gedit"],
        *(f"gedit/{name}" for name in paper["gedit"]["tasks"]),
        HEADLINES["geneval"],
        *(f"geneval/{name}" for name in paper["geneval"]["tasks"]),
    ]


def paper_rows(paper: Mapping[str, Any]) -> list[Row]:
    """The paper's rows. Averages are recomputed from the tasks where those are given; standard errors of shares are
    binomial.
    """
    sizes, tasks = paper["geneval"]["tasks"], paper["gedit"]["tasks"]
    rows = []
    for row in paper["rows"]:
        values: dict[str, Value] = {}
        geneval, gedit = row.get("geneval", {}), row.get("gedit", {})
        if "correct" in geneval:
            shares = {name: count / size for (name, size), count in zip(sizes.items(), geneval["correct"], strict=True)}
            errors = {name: math.sqrt(share * (1.0 - share) / sizes[name]) for name, share in shares.items()}
            values |= {f"geneval/{name}": Value(share, errors[name]) for name, share in shares.items()}
            error = math.sqrt(sum(value**2 for value in errors.values())) / len(errors)
            values[HEADLINES["geneval"]] = Value(overall_of_counts(geneval["correct"], list(sizes.values())), error)
        elif geneval:
            values[HEADLINES["geneval"]] = Value(geneval["overall"])
        if "scores" in gedit:
            values |= {f"gedit/{name}": Value(score) for name, score in zip(tasks, gedit["scores"], strict=True)}
        if gedit:
            values[HEADLINES["gedit"]] = Value(gedit["average"])
        rows.append(Row(f"paper, {row['name']}", values))
    return rows


def scorecard_row(name: str, card: Scorecard, paper: Mapping[str, Any]) -> Row:
    """A scorecard's values in the paper's columns; an average stands there only where the card has every task that the
    paper averages over.
    """
    values: dict[str, Value] = {}
    for benchmark in ("gedit", "geneval"):
        tasks = [f"{benchmark}/{task}" for task in paper[benchmark]["tasks"]]
        known = {path: card.metrics[path] for path in tasks if path in card.metrics}
        values |= {path: Value(metric.mean, metric.stderr) for path, metric in known.items()}
        if len(known) == len(tasks):
            error = math.sqrt(sum(metric.stderr**2 for metric in known.values())) / len(known)
            values[HEADLINES[benchmark]] = Value(sum(metric.mean for metric in known.values()) / len(known), error)
    return Row(name, values)


# --- what differs -----------------------------------------------------------------------------------------------------


def _identity(card: Scorecard, benchmark: str) -> Mapping[str, Any]:
    """What a scorecard of real images says of its evaluation; empty for the micro world's, whose evaluation is
    exact.
    """
    value = card.identities.get(benchmark)
    return value if isinstance(value, Mapping) else {}


def _named(evaluator: Any) -> str:
    """A detector's or judge's name out of its identity."""
    if not isinstance(evaluator, Mapping):
        return str(evaluator) if evaluator else NOT_STATED
    return str(evaluator.get("answered_by") or evaluator.get("model") or evaluator.get("detector") or dict(evaluator))


def _sampling(card: Scorecard) -> tuple[Any, Any] | None:
    """(steps, guidance) that a scorecard names, None where it names none."""
    made = [_identity(card, benchmark).get("images", {}).get("sampler") for benchmark in ("gedit", "geneval")]
    sampler = next((one for one in made if isinstance(one, Mapping)), None)
    if sampler is not None:
        return sampler.get("steps", NOT_STATED), sampler.get("guidance", NOT_STATED)
    own = card.identities.get("sampling")
    return (
        (own.get("steps", NOT_STATED), card.identities.get("guidance", NOT_STATED))
        if isinstance(own, Mapping)
        else None
    )


def _geneval_differences(card: Scorecard, paper: Mapping[str, Any]) -> list[str]:
    about, theirs, identity = card.benchmarks["geneval"], paper["geneval"], _identity(card, "geneval")
    found = []
    sizes = {task: card.metrics[f"geneval/{task}"].n for task in theirs["tasks"] if f"geneval/{task}" in card.metrics}
    if sizes != theirs["tasks"]:
        mine = "/".join(str(sizes.get(task, 0)) for task in theirs["tasks"])
        found.append(
            f"GenEval prompts: {about['n']} ({mine} a task), the paper {sum(theirs['tasks'].values())} ({'/'.join(map(str, theirs['tasks'].values()))})"
        )
    each = about["images"] / about["n"]
    if each != theirs["images_per_prompt"]:
        found.append(f"GenEval images per prompt: {each:g}, the paper {theirs['images_per_prompt']}")
    found.append(
        f"GenEval detector: {_named(identity.get('evaluator'))}, the paper's {theirs['detector'] or NOT_STATED}"
    )
    return found


def _gedit_differences(card: Scorecard, paper: Mapping[str, Any]) -> list[str]:
    about, theirs = _identity(card, "gedit"), paper["gedit"]
    found = []
    mine = [category for category in GEDIT_CATEGORIES if f"gedit/{category}" in card.metrics]
    extra, missing = (
        [name for name in mine if name not in theirs["tasks"]],
        [name for name in theirs["tasks"] if name not in mine],
    )
    if missing:
        found.append(f"GEdit categories: {missing} were not scored, so there is no average over the paper's six")
    if extra:
        own = f"the scorecard's own average is {card.metrics[HEADLINES['gedit']].mean:.3f}"
        found.append(
            f"GEdit categories: {len(mine)}, the paper {len(theirs['tasks'])}; the table averages over the paper's, {own}"
        )
    sizes = {task: card.metrics[f"gedit/{task}"].n for task in theirs["tasks"] if f"gedit/{task}" in card.metrics}
    if sizes != theirs["tasks"]:
        found.append(
            f"GEdit samples in those categories: {sum(sizes.values())}, the paper {sum(theirs['tasks'].values())}"
        )
    if about.get("language", theirs["language"]) != theirs["language"]:
        found.append(f"GEdit language: {about['language']}, the paper {theirs['language']}")
    rows = {"full": "full set", "paper": "full set", "intersection": "intersection"}.get(
        about.get("subset", ""), NOT_STATED
    )
    found.append(f"GEdit rows: {rows}, the paper's {theirs['subset'] or NOT_STATED}")
    judge = about.get("judge")
    wording = (
        f" (wording {judge['wording']['name']}, {about['repeats']} judgement(s) an image)"
        if isinstance(judge, Mapping) and "wording" in judge
        else ""
    )
    found.append(f"GEdit judge: {_named(judge)}{wording}, the paper's {theirs['judge'] or NOT_STATED}")
    if about.get("coverage", 1.0) < 1.0:
        found.append(f"GEdit coverage: {about['coverage']:.1%} of the samples have a score")
    return found


def differences(card: Scorecard, paper: Mapping[str, Any]) -> list[str]:
    """What in a scorecard's protocol differs from the paper's, or is not stated on either side; from the scorecard's
    own identities alone.
    """
    found = []
    if "geneval" in card.benchmarks:
        found += _geneval_differences(card, paper)
    if "gedit" in card.benchmarks:
        found += _gedit_differences(card, paper)
    sampling, theirs = _sampling(card), paper["sampling"]
    mine = f"{sampling[0]} steps, guidance {sampling[1]}" if sampling else NOT_STATED
    found.append(
        f"sampling: {mine}; the paper {theirs['steps']} steps, guidance {theirs['guidance_edit']:g} (edits) and {theirs['guidance_t2i']:g} (T2I)"
    )
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def _text(value: Value | None, column: str) -> str:
    if value is None:
        return "-"
    digits = 2 if column.startswith("gedit/") else 3
    return f"{value.mean:.{digits}f}" + ("" if value.stderr is None else f" ±{value.stderr:.{digits}f}")


def render(
    rows: Sequence[Row], columns: Sequence[str], notes: Mapping[str, Sequence[str]], style: str, source: str
) -> str:
    """The table and the notes, as text for a terminal, Markdown or CSV (there the notes are comment lines)."""
    remarks = [f"{name}: {note}" for name, found in notes.items() for note in found]
    intro = f"The paper's rows: {source}. ±: standard error over prompts; of the paper's shares the binomial one."
    names = pd.Index([row.name for row in rows], name="model")
    if style == "csv":
        means = {column: [getattr(row.values.get(column), "mean", None) for row in rows] for column in columns}
        errors = {column: [getattr(row.values.get(column), "stderr", None) for row in rows] for column in columns}
        numbers = {
            name: cells for key in columns for name, cells in ((key, means[key]), (f"{key} stderr", errors[key]))
        }
        return pd.DataFrame(numbers, index=names).to_csv() + "".join(f"# {line}\n" for line in (intro, *remarks))
    averages = {HEADLINES["gedit"]: "GEdit avg", HEADLINES["geneval"]: "GenEval"}
    heads = {column: averages.get(column, column.split("/")[1]) for column in columns}
    cells = {column: [_text(row.values.get(column), column) for row in rows] for column in columns}
    table = pd.DataFrame(cells, index=names)
    if style == "markdown":
        lines = [["model", *heads.values()], ["---", *["---:"] * len(heads)], *table.reset_index().to_numpy().tolist()]
        body = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([*body, "", intro, "", "What differs:", "", *(f"- {remark}" for remark in remarks)]) + "\n"
    blocks = []
    for benchmark in ("gedit", "geneval"):  # two tables: a table of both would be wider than a terminal
        part = table[[column for column in columns if column.startswith(f"{benchmark}/")]].rename(columns=heads)
        blocks += [part[(part != "-").any(axis=1)].to_string(index_names=False), ""]
    return "\n".join([*blocks, intro, "What differs:", *(f"- {remark}" for remark in remarks)]) + "\n"


def compare_text(files: Sequence[Path], style: str) -> str:
    """The whole text for some scorecards. Raises UserError(s) for unreadable scorecards, or such as may not share a
    table.
    """
    paper = load_paper()
    cards: dict[str, Scorecard] = {}
    for file in files:
        card = read_scorecard(file)
        name = card.model if card.model not in cards else f"{card.model} ({os.fspath(file)})"
        cards[name] = card
    check_same_evaluator(cards)
    rows = [*paper_rows(paper), *(scorecard_row(name, card, paper) for name, card in cards.items())]
    return render(
        rows,
        columns_of(paper),
        {name: differences(card, paper) for name, card in cards.items()},
        style,
        paper["source"],
    )


def cli(arguments: Sequence[str]) -> int:
    """Prints the table, or writes it to a file; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks compare", description="Scorecards beside the paper's rows, with what differs."
    )
    parser.add_argument(
        "scorecards",
        type=Path,
        nargs="*",
        default=[Path("reports/scorecard.json")],
        metavar="SCORECARD",
        help="default: reports/scorecard.json",
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    if not parsed.scorecards:
        raise UserError("compare: name at least one scorecard")
    text = compare_text(parsed.scorecards, parsed.format)
    if parsed.out:
        write_text(parsed.out, text)
        print(parsed.out)
    else:
        print(text, end="")
    return 0
