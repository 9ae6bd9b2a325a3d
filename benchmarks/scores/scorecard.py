"""From one row an image to the scorecard: which rows belong to a set, what they average to, how far two models lie
apart.

The micro world and the real benchmarks pass through here alike. A set that is incomplete, repeated or mixed is refused:
a mean over it would look like any other.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.scores.statistics import (
    Comparison,
    Groups,
    category_metric,
    compare_paired,
    macro_metric,
    over_training_seeds,
    retention,
)
from benchmarks.scores.statistics import Metric as Metric
from data.errors import UserError, UserErrors
from data.files import atomic_file, digest, read_json, write_json
from data.records import CAPABILITIES, GEDIT_CATEGORIES, Example

SCORES_FILE = "scores.parquet"
PRIMARY = {
    "geneval": ("correct", 1.0),
    "gedit": ("O", 10.0),
}  # benchmark -> the value that is averaged, and its highest
SCORED_WITH = (
    "evaluator",
    "judge",
    "prompts",
    "thresholds",
)  # keys of identities/BENCHMARK: scores are comparable only where they are equal
MACRO = {"geneval": "geneval/overall", "gedit": "gedit/average"}
BENCHMARK_OF = {
    category: capability.benchmark for capability in CAPABILITIES.values() for category in capability.categories
}


BENCHMARK_OF |= dict.fromkeys(
    (category for category in GEDIT_CATEGORIES if category not in BENCHMARK_OF), "gedit"
)  # those that no capability of ours is for


Expected = Mapping[str, set[tuple[str, int]]]  # category -> every (example id, k) that must be scored


@dataclass(frozen=True)
class ExampleScore:
    """One image's values with the image that earned them. `values` maps a metric to a number: {"correct"} for GenEval,
    {"O", "sc", "pq", "exact"} for GEdit.
    """

    model: str
    benchmark: str  # "geneval" or "gedit"
    category: str
    example_id: str
    k: int  # which of the prompt's samples
    seed: int  # that made the image
    values: dict[str, float]
    reasons: tuple[str, ...] = ()  # why it is not perfect
    image: str = ""  # path relative to the results folder
    status: str = "ok"  # one of benchmarks.scores.scorecard.STATUSES; without a score unless ok


@dataclass(frozen=True)
class Scorecard:
    """A model's metrics by path, with what they were measured on (`benchmarks`) and what was measured
    (`identities`).
    """

    model: str
    benchmarks: dict[str, dict[str, Any]]
    identities: dict[str, Any]
    metrics: dict[str, Metric]

    def to_json(self) -> dict[str, Any]:
        """{"model", "benchmarks", "identities", "metrics": {path: {"mean", "stderr", "low", "high", "n"}}}."""
        metrics = {path: asdict(metric) for path, metric in self.metrics.items()}
        return {"model": self.model, "benchmarks": self.benchmarks, "identities": self.identities, "metrics": metrics}

    @classmethod
    def from_json(cls, value: Any) -> Scorecard:
        """Raises UserError for missing keys, or a metric that is incomplete or not finite."""
        try:
            metrics = {
                str(path): Metric(
                    float(metric["mean"]),
                    float(metric["stderr"]),
                    float(metric["low"]),
                    float(metric["high"]),
                    int(metric["n"]),
                )
                for path, metric in value["metrics"].items()
            }
            card = cls(value["model"], dict(value["benchmarks"]), dict(value["identities"]), metrics)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            needs = "it needs model, benchmarks, identities and metrics, each with mean, stderr, low, high and n: run the score stage again"
            raise UserError(f"scorecard: {error!r}; {needs}") from error
        broken = [
            path
            for path, metric in metrics.items()
            if not all(map(math.isfinite, (metric.mean, metric.stderr, metric.low, metric.high)))
        ]
        if broken:
            raise UserError(f"scorecard of {card.model}: metrics {broken} are not finite; run the score stage again")
        return card


def write_scorecard(path: str | Path, card: Scorecard) -> None:
    write_json(path, card.to_json())


def read_scorecard(path: str | Path) -> Scorecard:
    """Raises UserError, naming the file, when it is missing or not a scorecard."""
    try:
        return Scorecard.from_json(read_json(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


# --- rows -------------------------------------------------------------------------------------------------------------


def write_scores(folder: str | Path, scores: Sequence[ExampleScore]) -> None:
    """Writes `scores.parquet` into `folder`, whole or not at all; values and reasons are kept as JSON text."""
    rows = [
        {
            **asdict(score),
            "values": json.dumps(score.values, sort_keys=True, allow_nan=False),
            "reasons": json.dumps(list(score.reasons)),
        }
        for score in scores
    ]
    frame = pd.DataFrame(rows, columns=[field.name for field in fields(ExampleScore)]).astype(
        {"k": "int64", "seed": "int64"}
    )
    with atomic_file(Path(folder) / SCORES_FILE) as temporary:
        frame.to_parquet(temporary, index=False)


def read_scores(folder: str | Path) -> list[ExampleScore]:
    """Raises UserError when the folder holds no readable `scores.parquet`."""
    path = Path(folder) / SCORES_FILE
    try:
        rows: list[dict[str, Any]] = pd.read_parquet(path).to_dict("records")  # type: ignore[assignment]
        return [
            ExampleScore(**{**row, "values": json.loads(row["values"]), "reasons": tuple(json.loads(row["reasons"]))})
            for row in rows
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the score stage first") from error
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable table of scores ({error}); run the score stage again") from error


# --- what must be there -----------------------------------------------------------------------------------------------


def expected_scores(
    examples: Iterable[Example], samples: int | Mapping[str, int] = 1
) -> dict[str, set[tuple[str, int]]]:
    """category -> {(example id, k)} for `samples` images a prompt, one number for all or one a benchmark."""
    expected: dict[str, set[tuple[str, int]]] = {}
    for example in examples:
        number = samples if isinstance(samples, int) else samples[BENCHMARK_OF[example.category]]
        expected.setdefault(example.category, set()).update((example.id, k) for k in range(number))
    return expected


def _some(keys: Iterable[tuple[str, int]]) -> str:
    """The first few (id, k), sorted, and how many more."""
    ordered = sorted(keys)
    return ", ".join(f"{key[0]} (k={key[1]})" for key in ordered[:3]) + (
        f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    )


def _row_faults(score: ExampleScore, benchmark: str) -> list[str]:
    where = f"{score.category} {score.example_id} (k={score.k})"
    name, highest = PRIMARY[benchmark]
    if score.benchmark != benchmark:
        return [f"{where}: benchmark = {score.benchmark!r}, but the category belongs to {benchmark!r}"]
    if score.status not in STATUSES:
        return [f"{where}: status = {score.status!r}; choose one of {list(STATUSES)}"]
    if score.status != "ok":
        return (
            [f"{where}: status = {score.status!r} but values {score.values}; a failed judgement has none"]
            if score.values
            else []
        )
    value = score.values.get(name, math.nan)
    return (
        []
        if 0.0 <= value <= highest
        else [f"{where}: {name} = {score.values.get(name)}; a number from 0 to {highest:g} is needed"]
    )


def check_complete(scores: Sequence[ExampleScore], expected: Expected, *, allow_partial: bool = False) -> None:
    """Raises UserErrors unless the rows are one model's, one for each expected (category, id, k) and no other, with
    usable values.

    Fewer than MINIMUM_COVERAGE of a category with a score are a fault unless `allow_partial`; none at all always is.
    """
    faults = [
        f"category {category!r} is unknown; choose of {sorted(BENCHMARK_OF)}"
        for category in expected
        if category not in BENCHMARK_OF
    ]
    models = sorted({score.model for score in scores})
    if len(models) > 1:
        faults.append(f"rows of {len(models)} models are mixed: {models}; summarise one at a time")
    foreign = Counter(score.category for score in scores if score.category not in expected)
    faults += [
        f"{category}: {count} rows of a category that is not part of the set"
        for category, count in sorted(foreign.items())
    ]
    for category, wanted in expected.items():
        members = [score for score in scores if score.category == category]
        counts = Counter((score.example_id, score.k) for score in members)
        missing, extra = wanted - counts.keys(), counts.keys() - wanted
        repeated = {key for key, count in counts.items() if count > 1}
        if not wanted:
            faults.append(f"{category}: nothing is expected; leave the category out or give it examples")
        if missing:
            faults.append(f"{category}: {len(missing)} of {len(wanted)} images are missing: {_some(missing)}")
        if extra:
            faults.append(f"{category}: {len(extra)} images are not part of the set: {_some(extra)}")
        if repeated:
            faults.append(f"{category}: {len(repeated)} images are scored more than once: {_some(repeated)}")
        broken = [
            fault for score in members for fault in _row_faults(score, BENCHMARK_OF.get(category, score.benchmark))
        ]
        faults += broken[:3] + (
            [f"{category}: {len(broken) - 3} more rows with such faults"] if len(broken) > 3 else []
        )
        failed = Counter(score.status for score in members if score.status != "ok")
        highest = len(members) - 1 if allow_partial else (1.0 - MINIMUM_COVERAGE) * len(members)
        if members and failed.total() > highest:
            bound = f"at least {MINIMUM_COVERAGE:.0%} must: judge them again"
            faults.append(
                f"{category}: {failed.total()} of {len(members)} images have no score ({dict(failed)}); {bound}"
            )
    if not expected:
        faults.append("nothing is expected; give at least one category")
    if faults:
        raise UserErrors(
            f"scores of {models[0] if len(models) == 1 else 'several models' if models else 'no model'} cannot be summarised:",
            faults,
        )


# --- averages ---------------------------------------------------------------------------------------------------------


def _prompt_means(scores: Sequence[ExampleScore]) -> dict[str, dict[str, float]]:
    """category -> example id -> mean primary value over the prompt's images that have one; ids sorted."""
    values: dict[str, dict[str, list[float]]] = {}
    for score in sorted(scores, key=lambda score: (score.example_id, score.k)):
        if score.status == "ok":
            values.setdefault(score.category, {}).setdefault(score.example_id, []).append(
                score.values[PRIMARY[score.benchmark][0]]
            )
    return {
        category: {name: float(np.mean(of_prompt)) for name, of_prompt in prompts.items()}
        for category, prompts in values.items()
    }


def _groups(scores: Sequence[ExampleScore], categories: Iterable[str]) -> Groups:
    means = _prompt_means(scores)
    return {category: np.array(list(means[category].values())) for category in categories}


def _paired_groups(
    a: Sequence[ExampleScore], b: Sequence[ExampleScore], categories: Iterable[str]
) -> tuple[Groups, Groups]:
    """Prompt means of both models over the images that have a score in both, rows in the same order."""
    both = {(s.category, s.example_id, s.k) for s in a if s.status == "ok"} & {
        (s.category, s.example_id, s.k) for s in b if s.status == "ok"
    }
    a, b = ([score for score in scores if (score.category, score.example_id, score.k) in both] for scores in (a, b))
    names = list(categories)
    return _groups(a, names), _groups(b, names)


def _binary(scores: Sequence[ExampleScore], category: str) -> bool:
    """Whether the category has one image a prompt, each 0 or 1."""
    members = [score for score in scores if score.category == category]
    return PRIMARY[BENCHMARK_OF[category]][0] == "correct" and len({score.example_id for score in members}) == len(
        members
    )


def _paths(expected: Expected) -> dict[str, tuple[str, ...]]:
    """metric path -> its categories: each benchmark's macro average first, then its categories in the order of
    `expected`.
    """
    paths: dict[str, tuple[str, ...]] = {}
    for benchmark, macro in MACRO.items():
        members = tuple(category for category in expected if BENCHMARK_OF[category] == benchmark)
        if members:
            paths[macro] = members
            paths.update({f"{benchmark}/{category}": (category,) for category in members})
    return paths


def summarise(
    scores: Sequence[ExampleScore],
    *,
    expected: Expected,
    seed: int,
    resamples: int,
    confidence: float,
    allow_partial: bool = False,
) -> dict[str, Metric]:
    """metric path -> Metric for the categories of `expected`: geneval in [0, 1], gedit in [0, 10]; n counts prompts.

    Raises UserErrors for a set that is incomplete, repeated or mixed.
    """
    check_complete(scores, expected, allow_partial=allow_partial)
    groups = _groups(scores, expected)
    metrics = {}
    for path, categories in _paths(expected).items():
        if path in MACRO.values():
            metrics[path] = macro_metric(
                {category: groups[category] for category in categories},
                seed=seed,
                resamples=resamples,
                confidence=confidence,
            )
        else:
            category = categories[0]
            metrics[path] = category_metric(
                groups[category],
                category=category,
                binary=_binary(scores, category),
                seed=seed,
                resamples=resamples,
                confidence=confidence,
            )
    return metrics


def identity_of(expected: Expected) -> dict[str, dict[str, Any]]:
    """What was scored: benchmark -> {"n": prompts, "images": images, "digest": of every (category, id, k)}."""
    identities = {}
    for benchmark in MACRO:
        members = {
            category: sorted(keys) for category, keys in expected.items() if BENCHMARK_OF.get(category) == benchmark
        }
        if members:
            prompts = sum(len({name for name, _ in keys}) for keys in members.values())
            identities[benchmark] = {"n": prompts, "images": sum(map(len, members.values())), "digest": digest(members)}
    return identities


def scorecard(
    model: str,
    scores: Sequence[ExampleScore],
    teacher_scores: Mapping[str, Sequence[ExampleScore]],
    expected: Expected,
    identities: Mapping[str, Any],
    *,
    seed: int,
    resamples: int,
    confidence: float,
) -> Scorecard:
    """The model's metrics and retention/CAPABILITY against each capability's teacher, over that capability's
    categories.

    `teacher_scores` maps a capability to its teacher's rows on the same examples (rows of other categories are
    ignored). Raises UserErrors for an incomplete, repeated or mixed set, of the student or a teacher; UserError for an
    unknown capability or one of which nothing is expected.
    """
    metrics = summarise(scores, expected=expected, seed=seed, resamples=resamples, confidence=confidence)
    for capability, rows in teacher_scores.items():
        if capability not in CAPABILITIES:
            raise UserError(f"retention: capability {capability!r} is unknown; choose one of {list(CAPABILITIES)}")
        own = {category: expected[category] for category in CAPABILITIES[capability].categories if category in expected}
        if not own:
            raise UserError(
                f"retention/{capability}: no example of {list(CAPABILITIES[capability].categories)} is expected; add some or drop this teacher"
            )
        rows = [row for row in rows if row.category in own]
        check_complete(rows, own)
        student, teacher = _paired_groups(scores, rows, own)
        metrics[f"retention/{capability}"] = retention(
            student, teacher, seed=seed, resamples=resamples, confidence=confidence
        )
    return Scorecard(model, identity_of(expected), dict(identities), metrics)


def compare(
    a_scores: Sequence[ExampleScore],
    b_scores: Sequence[ExampleScore],
    *,
    expected: Expected,
    seed: int,
    resamples: int,
    confidence: float,
) -> dict[str, Comparison]:
    """metric path -> model a minus model b, paired by (example id, k).

    Raises UserErrors when either set is incomplete, repeated or mixed; UserError when both models' images of one
    (example id, k) came from different seeds.
    """
    check_complete(a_scores, expected)
    check_complete(b_scores, expected)
    seeds = {(score.category, score.example_id, score.k): score.seed for score in a_scores}
    unlike = [
        (score.example_id, score.k)
        for score in b_scores
        if seeds[score.category, score.example_id, score.k] != score.seed
    ]
    if unlike:
        raise UserError(
            f"paired comparison: {len(unlike)} images were made from different seeds: {_some(unlike)}; sample both models with the same seeds"
        )
    comparisons = {}
    for path, categories in _paths(expected).items():
        a, b = _paired_groups(a_scores, b_scores, categories)
        binary = all(_binary(a_scores, category) for category in categories)
        comparisons[path] = compare_paired(a, b, binary=binary, seed=seed, resamples=resamples, confidence=confidence)
    return comparisons


def check_same_evaluator(cards: Mapping[str, Scorecard]) -> None:
    """Raises UserErrors when scorecards of one table were made with different detectors, judges or prompt sets; cards
    that name none are left out.

    A scorecard of real images says under identities/BENCHMARK what scored it: "evaluator" (or "judge") and "prompts".
    """
    faults = []
    for benchmark in MACRO:
        for key in SCORED_WITH:
            named = {
                name: card.identities.get(benchmark, {}).get(key)
                for name, card in cards.items()
                if isinstance(card.identities.get(benchmark), Mapping)
            }
            kinds: dict[str, list[str]] = {}
            for name, value in named.items():
                if value is not None:
                    kinds.setdefault(json.dumps(value, sort_keys=True), []).append(name)
            if len(kinds) > 1:
                faults.append(
                    f"{benchmark}: {len(kinds)} different values of {key} ({'; '.join(', '.join(names) for names in kinds.values())})"
                )
    if faults:
        raise UserErrors(
            "these scorecards cannot stand in one table, their numbers mean different things:",
            [*faults, "score them with the same evaluator"],
        )


def over_trainings(
    trainings: Sequence[Sequence[ExampleScore]], *, expected: Expected, seed: int, resamples: int, confidence: float
) -> dict[str, Metric]:
    """metric path -> Metric over several trainings of one recipe, each scored on the whole set.

    Raises UserErrors for an incomplete set, UserError for fewer than three trainings.
    """
    for scores in trainings:
        check_complete(scores, expected)
    groups = [_groups(scores, expected) for scores in trainings]
    return {
        path: over_training_seeds(
            [{category: of_training[category] for category in categories} for of_training in groups],
            seed=seed,
            resamples=resamples,
            confidence=confidence,
        )
        for path, categories in _paths(expected).items()
    }


STATUSES = ("ok", "unparseable", "refused", "api_error", "missing_image", "bad_image")
HIGHEST = 10.0
MINIMUM_COVERAGE = 0.99  # below this share of judged samples no headline is given


def all_paths(cards: Mapping[str, Scorecard]) -> list[str]:
    """Every metric path, in the order in which the scorecards first name it."""
    return list(dict.fromkeys(path for card in cards.values() for path in card.metrics))
