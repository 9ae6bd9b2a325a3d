"""`python -m benchmarks compare`: scorecards beside the paper's rows, and under them what differs, because numbers of
different protocols are not comparable.

The paper's rows are data (`paper.yaml`). Its GEdit average is over six of the eleven categories, so a scorecard's
average over the same six stands beside it."""

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
from data.files import write_text
from data.records import GEDIT_CATEGORIES, HEADLINES
from data.yaml_files import read_yaml

BENCHMARKS = ("gedit", "geneval")  # in the order of the paper's columns
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Value:
    """A mean with its standard error, where that is known."""

    mean: float
    stderr: float | None = None


@dataclass(frozen=True)
class Row:
    name: str
    values: dict[str, Value]  # by column


def load_paper() -> dict[str, Any]:
    return read_yaml(Path(__file__).with_name("paper.yaml"))


def overall_of_counts(correct: Sequence[int], sizes: Sequence[int]) -> float:
    """GenEval's Overall from the correct images of each task: the mean of the tasks' shares."""
    return sum(count / size for count, size in zip(correct, sizes, strict=True)) / len(sizes)


def _paths(benchmark: str, paper: Mapping[str, Any]) -> list[str]:
    return [f"{benchmark}/{task}" for task in paper[benchmark]["tasks"]]


def columns_of(paper: Mapping[str, Any]) -> list[str]:
    """The table's columns, in the paper's order: each benchmark's average, then its tasks."""
    return [column for benchmark in BENCHMARKS for column in (HEADLINES[benchmark], *_paths(benchmark, paper))]


def _error_of_mean(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def paper_rows(paper: Mapping[str, Any]) -> list[Row]:
    """The paper's rows. Averages are recomputed from the tasks where those are given; standard errors of shares are
    binomial."""
    sizes = list(paper["geneval"]["tasks"].values())
    rows = []
    for row in paper["rows"]:
        values: dict[str, Value] = {}
        geneval, gedit = row.get("geneval", {}), row.get("gedit", {})
        if "correct" in geneval:
            shares = [count / size for count, size in zip(geneval["correct"], sizes, strict=True)]
            errors = [math.sqrt(share * (1.0 - share) / size) for share, size in zip(shares, sizes, strict=True)]
            values |= dict(zip(_paths("geneval", paper), map(Value, shares, errors), strict=True))
            overall = overall_of_counts(geneval["correct"], sizes)
            values[HEADLINES["geneval"]] = Value(overall, _error_of_mean(errors))
        elif geneval:
            values[HEADLINES["geneval"]] = Value(geneval["overall"])
        if "scores" in gedit:
            values |= dict(zip(_paths("gedit", paper), map(Value, gedit["scores"]), strict=True))
        if gedit:
            values[HEADLINES["gedit"]] = Value(gedit["average"])
        rows.append(Row(f"paper, {row['name']}", values))
    return rows


def scorecard_row(name: str, card: Scorecard, paper: Mapping[str, Any]) -> Row:
    """A scorecard's values in the paper's columns; an average only where the card has every task that the paper
    averages over."""
    values: dict[str, Value] = {}
    for benchmark in BENCHMARKS:
        paths = _paths(benchmark, paper)
        known = {path: card.metrics[path] for path in paths if path in card.metrics}
        values |= {path: Value(metric.mean, metric.stderr) for path, metric in known.items()}
        if len(known) == len(paths):
            mean = sum(metric.mean for metric in known.values()) / len(known)
            values[HEADLINES[benchmark]] = Value(mean, _error_of_mean([metric.stderr for metric in known.values()]))
    return Row(name, values)


def _identity(card: Scorecard, benchmark: str) -> Mapping[str, Any]:
    """What a scorecard of real images says of its evaluation; empty for the micro world's, which is exact."""
    value = card.identities.get(benchmark)
    return value if isinstance(value, Mapping) else {}


def _name(evaluator: Any) -> str:
    """A detector's or judge's name out of its identity."""
    if not isinstance(evaluator, Mapping):
        return str(evaluator) if evaluator else NOT_STATED
    return str(evaluator.get("answered_by") or evaluator.get("model") or evaluator.get("detector") or dict(evaluator))


def _sampling(card: Scorecard) -> str:
    """Steps and guidance that a scorecard names."""
    samplers = [(_identity(card, benchmark).get("images") or {}).get("sampler") for benchmark in BENCHMARKS]
    if isinstance(micro := card.identities.get("sampling"), Mapping):
        samplers.append({**micro, "guidance": card.identities.get("guidance", NOT_STATED)})
    sampler = next((sampler for sampler in samplers if isinstance(sampler, Mapping)), None)
    if sampler is None:
        return NOT_STATED
    return f"{sampler.get('steps', NOT_STATED)} steps, guidance {sampler.get('guidance', NOT_STATED)}"


def _sizes(card: Scorecard, benchmark: str, paper: Mapping[str, Any]) -> dict[str, int]:
    """Task -> prompts, of the paper's tasks that the card has."""
    tasks = paper[benchmark]["tasks"]
    return {task: card.metrics[path].n for task in tasks if (path := f"{benchmark}/{task}") in card.metrics}


def _geneval_differences(card: Scorecard, paper: Mapping[str, Any]) -> list[str]:
    about, theirs, sizes = card.benchmarks["geneval"], paper["geneval"], _sizes(card, "geneval", paper)
    tasks, notes = theirs["tasks"], []
    if sizes != tasks:
        mine, other = ("/".join(str(counts.get(task, 0)) for task in tasks) for counts in (sizes, tasks))
        notes.append(f"GenEval prompts: {about['n']} ({mine} a task), the paper {sum(tasks.values())} ({other})")
    samples = about["images"] / about["n"]
    if samples != theirs["images_per_prompt"]:
        notes.append(f"GenEval images per prompt: {samples:g}, the paper {theirs['images_per_prompt']}")
    detector = _name(_identity(card, "geneval").get("evaluator"))
    return [*notes, f"GenEval detector: {detector}, the paper's {theirs['detector'] or NOT_STATED}"]


def _gedit_differences(card: Scorecard, paper: Mapping[str, Any]) -> list[str]:
    about, theirs, sizes = _identity(card, "gedit"), paper["gedit"], _sizes(card, "gedit", paper)
    tasks, notes = theirs["tasks"], []
    scored = [category for category in GEDIT_CATEGORIES if f"gedit/{category}" in card.metrics]
    if missing := [task for task in tasks if task not in scored]:
        notes.append(f"GEdit categories: {missing} were not scored, so there is no average over the paper's six")
    if set(scored) - set(tasks):
        average = f"the scorecard's own average is {card.metrics[HEADLINES['gedit']].mean:.3f}"
        counts = f"{len(scored)}, the paper {len(tasks)}"
        notes.append(f"GEdit categories: {counts}; the table averages over the paper's, {average}")
    if sizes != tasks:
        counts = f"{sum(sizes.values())}, the paper {sum(tasks.values())}"
        notes.append(f"GEdit samples in those categories: {counts}")
    if about.get("language", theirs["language"]) != theirs["language"]:
        notes.append(f"GEdit language: {about['language']}, the paper {theirs['language']}")
    subsets = {"full": "full set", "paper": "full set", "intersection": "intersection"}
    rows = subsets.get(about.get("subset", ""), NOT_STATED)
    notes.append(f"GEdit rows: {rows}, the paper's {theirs['subset'] or NOT_STATED}")
    judge, wording = about.get("judge"), ""
    if isinstance(judge, Mapping) and "wording" in judge:
        wording = f" (wording {judge['wording']['name']}, {about['repeats']} judgement(s) an image)"
    notes.append(f"GEdit judge: {_name(judge)}{wording}, the paper's {theirs['judge'] or NOT_STATED}")
    if about.get("coverage", 1.0) < 1.0:
        notes.append(f"GEdit coverage: {about['coverage']:.1%} of the samples have a score")
    return notes


def differences(card: Scorecard, paper: Mapping[str, Any]) -> list[str]:
    """What in a scorecard's protocol differs from the paper's, or is not stated on either side; from the scorecard's
    identities alone."""
    notes = _geneval_differences(card, paper) if "geneval" in card.benchmarks else []
    notes += _gedit_differences(card, paper) if "gedit" in card.benchmarks else []
    theirs = paper["sampling"]
    guidance = f"{theirs['guidance_edit']:g} (edits) and {theirs['guidance_t2i']:g} (T2I)"
    return [*notes, f"sampling: {_sampling(card)}; the paper {theirs['steps']} steps, guidance {guidance}"]


def _text(value: Value | None, column: str) -> str:
    if value is None:
        return "-"
    digits = 2 if column.startswith("gedit/") else 3
    return f"{value.mean:.{digits}f}" + ("" if value.stderr is None else f" ±{value.stderr:.{digits}f}")


def render(
    rows: Sequence[Row], columns: Sequence[str], notes: Mapping[str, Sequence[str]], style: str, source: str
) -> str:
    """The table and the notes, as text for a terminal, Markdown or CSV (there the notes are comment lines)."""
    remarks = [f"{name}: {note}" for name, of_card in notes.items() for note in of_card]
    intro = f"The paper's rows: {source}. ±: standard error over prompts; of the paper's shares the binomial one."
    names = pd.Index([row.name for row in rows], name="model")
    if style == "csv":
        cells = {}
        for column in columns:
            for name, field in ((column, "mean"), (f"{column} stderr", "stderr")):
                cells[name] = [getattr(row.values.get(column), field, None) for row in rows]
        return pd.DataFrame(cells, index=names).to_csv() + "".join(f"# {line}\n" for line in (intro, *remarks))
    table = pd.DataFrame({column: [_text(row.values.get(column), column) for row in rows] for column in columns}, names)
    averages = {HEADLINES["gedit"]: "GEdit avg", HEADLINES["geneval"]: "GenEval"}
    heads = {column: averages.get(column, column.split("/")[1]) for column in columns}
    bullets = [f"- {remark}" for remark in remarks]
    if style == "markdown":
        lines = [["model", *heads.values()], ["---", *["---:"] * len(heads)], *table.reset_index().to_numpy().tolist()]
        body = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([*body, "", intro, "", "What differs:", "", *bullets]) + "\n"
    blocks = []
    for benchmark in BENCHMARKS:  # two tables: a table of both would be wider than a terminal
        part = table.filter(regex=f"^{benchmark}/").rename(columns=heads)
        blocks += [part[(part != "-").any(axis=1)].to_string(index_names=False), ""]
    return "\n".join([*blocks, intro, "What differs:", *bullets]) + "\n"


def compare_text(files: Sequence[Path], style: str) -> str:
    """The whole text for some scorecards. Raises UserError(s) for unreadable scorecards, or such as may not share a
    table."""
    paper = load_paper()
    cards: dict[str, Scorecard] = {}
    for file in files:
        card = read_scorecard(file)
        cards[card.model if card.model not in cards else f"{card.model} ({os.fspath(file)})"] = card
    check_same_evaluator(cards)
    rows = [*paper_rows(paper), *(scorecard_row(name, card, paper) for name, card in cards.items())]
    notes = {name: differences(card, paper) for name, card in cards.items()}
    return render(rows, columns_of(paper), notes, style, paper["source"])


def cli(arguments: Sequence[str]) -> int:
    """Prints the table, or writes it to a file; returns the exit status."""
    text = "Scorecards beside the paper's rows, with what differs."
    parser = argparse.ArgumentParser("python -m benchmarks compare", description=text)
    default = Path("reports/scorecard.json")
    parser.add_argument("scorecards", type=Path, nargs="*", default=[default], help=f"default: {default}")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    table = compare_text(given.scorecards, given.format)
    if given.out:
        write_text(given.out, table)
        print(given.out)
    else:
        print(table, end="")
    return 0
