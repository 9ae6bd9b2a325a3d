"""From one row an image to the scorecard: which rows belong to a set, what they average to, how far two models lie
apart.

The micro world and the real benchmarks pass through here alike. A set that is incomplete, repeated or mixed is refused:
a mean over it would look like any other."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd

from benchmarks.scores import statistics
from benchmarks.scores.statistics import Bootstrap, Comparison, Groups, Metric
from data.errors import UserError, UserErrors
from data.files import atomic_file, digest, read_json, write_json
from data.records import BENCHMARKS, CAPABILITIES, GEDIT_CATEGORIES, HEADLINES, RETENTION, Example

SCORES_FILE = "scores.parquet"
STATUSES = ("ok", "unparseable", "refused", "api_error", "missing_image", "bad_image")
MINIMUM_COVERAGE = 0.99  # below this share of judged samples, over all categories, no headline is given
HIGHEST = BENCHMARKS["gedit"].highest
# keys of identities/BENCHMARK: scores are comparable only where they are equal
SCORED_WITH = ("evaluator", "judge", "prompts", "thresholds")
BENCHMARK_OF = {name: capability.benchmark for capability in CAPABILITIES.values() for name in capability.categories}
BENCHMARK_OF |= {name: "gedit" for name in GEDIT_CATEGORIES if name not in BENCHMARK_OF}  # of no capability of ours

Key = tuple[str, int]  # an image of a category: the example's id, and which of its samples
Expected = Mapping[str, set[Key]]  # category -> every image that must be scored


@dataclass(frozen=True)
class ExampleScore:
    """One image's values with the image that earned them.

    `values` maps a metric to a number: {"correct"} for GenEval, {"O", "sc", "pq", "exact"} for GEdit."""

    model: str
    benchmark: str  # "geneval" or "gedit"
    category: str
    example_id: str
    k: int  # which of the prompt's samples
    seed: int  # that made the image
    values: dict[str, float]
    reasons: tuple[str, ...] = ()  # why it is not perfect
    image: str = ""  # path relative to the results folder
    status: str = "ok"  # one of STATUSES; without a score unless ok

    @property
    def key(self) -> Key:
        return self.example_id, self.k

    @property
    def primary(self) -> float:
        """The value that the benchmark averages; NaN where the row has none."""
        return self.values.get(BENCHMARKS[self.benchmark].value, math.nan)


@dataclass(frozen=True)
class Scorecard:
    """A model's metrics by path; `benchmarks` says on what they were measured, `identities` what was measured, `cost`
    what an image takes: {"steps", "evaluations_per_image", "base": the same of the base as users run it}."""

    model: str
    benchmarks: dict[str, dict[str, Any]]
    identities: dict[str, Any]
    metrics: dict[str, Metric]
    cost: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"model", "benchmarks", "identities", "metrics": {path: {"mean", "stderr", "low", "high", "n"}}, "cost"}."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Scorecard:
        """Raises UserError for missing keys, or a metric that is incomplete or not finite."""
        try:
            metrics = {str(path): Metric.from_json(metric) for path, metric in value["metrics"].items()}
            known = value["model"], dict(value["benchmarks"]), dict(value["identities"]), metrics
            card = cls(*known, dict(value.get("cost", {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            needs = "it needs model, benchmarks, identities and metrics, each with mean, stderr, low, high and n"
            raise UserError(f"scorecard: {error!r}; {needs}: run the score stage again") from error
        broken = [path for path, metric in metrics.items() if not all(map(math.isfinite, astuple(metric)))]
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


def all_paths(cards: Mapping[str, Scorecard]) -> list[str]:
    """Every metric path, in the order in which the scorecards first name it."""
    return list(dict.fromkeys(path for card in cards.values() for path in card.metrics))


# --- rows -------------------------------------------------------------------------------------------------------------


def write_scores(folder: str | Path, scores: Sequence[ExampleScore]) -> None:
    """Writes `scores.parquet` into `folder`, whole or not at all; values and reasons are kept as JSON text."""
    frame = pd.DataFrame(map(asdict, scores), columns=[field.name for field in fields(ExampleScore)])
    frame["values"] = [json.dumps(values, sort_keys=True, allow_nan=False) for values in frame["values"]]
    frame["reasons"] = frame["reasons"].map(json.dumps)
    with atomic_file(Path(folder) / SCORES_FILE) as temporary:
        frame.astype({"k": "int64", "seed": "int64"}).to_parquet(temporary, index=False)


def read_scores(folder: str | Path) -> list[ExampleScore]:
    """Raises UserError when the folder holds no readable `scores.parquet`."""
    path = Path(folder) / SCORES_FILE
    try:
        rows: list[dict[str, Any]] = pd.read_parquet(path).to_dict("records")  # type: ignore[assignment]
        texts = [{"values": json.loads(row["values"]), "reasons": tuple(json.loads(row["reasons"]))} for row in rows]
        return [ExampleScore(**{**row, **read}) for row, read in zip(rows, texts, strict=True)]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the score stage first") from error
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable table of scores ({error}); run the score stage again") from error


# --- what must be there -----------------------------------------------------------------------------------------------


def expected_scores(examples: Iterable[Example], samples: int | Mapping[str, int] = 1) -> dict[str, set[Key]]:
    """category -> {(example id, k)} for `samples` images a prompt, one number for all or one a benchmark."""
    expected: dict[str, set[Key]] = {}
    for example in examples:
        number = samples if isinstance(samples, int) else samples[BENCHMARK_OF[example.category]]
        expected.setdefault(example.category, set()).update((example.id, k) for k in range(number))
    return expected


def _some(keys: Iterable[Key]) -> str:
    """The first few (id, k), sorted, and how many more."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(f"{name} (k={k})" for name, k in ordered[:3]) + more


def _row_fault(score: ExampleScore, benchmark: str) -> str | None:
    if score.benchmark != benchmark:
        return f"benchmark = {score.benchmark!r}, but the category belongs to {benchmark!r}"
    if score.status not in STATUSES:
        return f"status = {score.status!r}; choose one of {list(STATUSES)}"
    if score.status != "ok" and score.values:
        return f"status = {score.status!r} but values {score.values}; a failed judgement has none"
    name, highest = BENCHMARKS[benchmark].value, BENCHMARKS[benchmark].highest
    if score.status == "ok" and not 0.0 <= score.primary <= highest:
        return f"{name} = {score.values.get(name)}; a number from 0 to {highest:g} is needed"
    return None


def _category_faults(members: Sequence[ExampleScore], category: str, wanted: set[Key]) -> list[str]:
    """Faults of the rows of one category; `check_complete` says which."""
    counts = Counter(score.key for score in members)
    wrong = {
        f"of {len(wanted)} images are missing": wanted - counts.keys(),
        "images are not part of the set": counts.keys() - wanted,
        "images are scored more than once": {key for key, count in counts.items() if count > 1},
    }
    faults = [] if wanted else ["nothing is expected; leave the category out or give it examples"]
    faults += [f"{len(keys)} {text}: {_some(keys)}" for text, keys in wrong.items() if keys]
    rows = [(score, _row_fault(score, BENCHMARK_OF.get(category, score.benchmark))) for score in members]
    broken = [f"{score.example_id} (k={score.k}): {fault}" for score, fault in rows if fault]
    faults += broken[:3] + ([f"{len(broken) - 3} more rows with such faults"] if len(broken) > 3 else [])
    failed = _failed(members)
    if members and failed.total() == len(members):
        faults.append(f"{_without_score(members)}; an average over nothing does not exist: judge them again")
    return faults


def _failed(scores: Sequence[ExampleScore]) -> Counter[str]:
    return Counter(score.status for score in scores if score.status != "ok")


def _without_score(scores: Sequence[ExampleScore]) -> str:
    failed = _failed(scores)
    return f"{failed.total()} of {len(scores)} images have no score ({dict(failed)})"


def bounds(scores: Sequence[ExampleScore]) -> tuple[float, float]:
    """A benchmark's macro average had its images without a score earned 0, and had they earned the highest; equal where
    every image has one."""
    columns = ["category", "example", "value"]
    frame = pd.DataFrame([(row.category, row.example_id, row.primary) for row in scores], columns=columns)
    keys, highest = columns[:2], BENCHMARKS[scores[0].benchmark].highest
    filled = (frame.fillna({"value": value}).groupby(keys)["value"].mean() for value in (0.0, highest))
    low, high = (float(prompts.groupby("category").mean().mean()) for prompts in filled)
    return low, high


def _coverage_faults(scores: Sequence[ExampleScore], expected: Expected) -> list[str]:
    """Of each benchmark with too few scores over all of its categories: where they are missing, and what they could
    do."""
    faults = []
    for benchmark in HEADLINES:
        rows = [row for row in scores if row.category in expected and row.benchmark == benchmark]
        if _failed(rows).total() <= (1.0 - MINIMUM_COVERAGE) * len(rows):
            continue
        for name in expected:
            members = [row for row in rows if row.category == name]
            faults += [f"{name}: {_without_score(members)}"] if _failed(members) else []
        low, high = bounds(rows)
        what = f"the average would be {low:.4g} or {high:.4g} had they earned 0 or the highest"
        needs = f"at least {MINIMUM_COVERAGE:.0%} must have one: judge them again"
        faults.append(f"{benchmark}: {_without_score(rows)}; {what}; {needs}")
    return faults


def check_complete(scores: Sequence[ExampleScore], expected: Expected, *, allow_partial: bool = False) -> None:
    """Raises UserErrors unless the rows are one model's, one for each expected (category, id, k) and no other, with
    usable values.

    Fewer than MINIMUM_COVERAGE of a benchmark's images with a score are a fault unless `allow_partial`; none at all in
    a category always is."""
    unknown = [name for name in expected if name not in BENCHMARK_OF]
    faults = [f"category {name!r} is unknown; choose of {sorted(BENCHMARK_OF)}" for name in unknown]
    models = sorted({score.model for score in scores})
    if len(models) > 1:
        faults.append(f"rows of {len(models)} models are mixed: {models}; summarise one at a time")
    members: dict[str, list[ExampleScore]] = {}
    for score in scores:
        members.setdefault(score.category, []).append(score)
    foreign = sorted(members.keys() - expected.keys())
    faults += [f"{name}: {len(members[name])} rows of a category that is not part of the set" for name in foreign]
    for name, wanted in expected.items():
        faults += [f"{name}: {fault}" for fault in _category_faults(members.get(name, []), name, wanted)]
    faults += [] if allow_partial else _coverage_faults(scores, expected)
    if not expected:
        faults.append("nothing is expected; give at least one category")
    if faults:
        whose = models[0] if len(models) == 1 else "several models" if models else "no model"
        raise UserErrors(f"scores of {whose} cannot be summarised:", faults)


# --- averages ---------------------------------------------------------------------------------------------------------


def _groups(scores: Sequence[ExampleScore], categories: Iterable[str]) -> Groups:
    """category -> (n,): the mean primary value of each prompt's images that have one, sorted by example id."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in categories}
    for score in sorted(scores, key=lambda score: score.key):
        if score.status == "ok" and score.category in values:
            values[score.category].setdefault(score.example_id, []).append(score.primary)
    return {name: np.array([float(np.mean(images)) for images in prompts.values()]) for name, prompts in values.items()}


def _paired_groups(
    a: Sequence[ExampleScore], b: Sequence[ExampleScore], categories: Iterable[str]
) -> tuple[Groups, Groups]:
    """Prompt means of both models over the images that have a score in both, rows in the same order."""
    scored = [{(score.category, score.key) for score in scores if score.status == "ok"} for scores in (a, b)]
    both, names = scored[0] & scored[1], list(categories)
    first, second = ([score for score in scores if (score.category, score.key) in both] for scores in (a, b))
    return _groups(first, names), _groups(second, names)


def _binary(scores: Sequence[ExampleScore], category: str) -> bool:
    """Whether the category has one image a prompt, each 0 or 1."""
    names = [score.example_id for score in scores if score.category == category]
    return BENCHMARKS[BENCHMARK_OF[category]].value == "correct" and len(set(names)) == len(names)


def _paths(expected: Expected) -> dict[str, tuple[str, ...]]:
    """metric path -> its categories: a benchmark's macro average, then its categories in the order of `expected`."""
    paths: dict[str, tuple[str, ...]] = {}
    for benchmark, headline in HEADLINES.items():
        members = tuple(category for category in expected if BENCHMARK_OF[category] == benchmark)
        if members:
            paths |= {headline: members} | {f"{benchmark}/{category}": (category,) for category in members}
    return paths


def summarise(
    scores: Sequence[ExampleScore], *, expected: Expected, allow_partial: bool = False, **how: Unpack[Bootstrap]
) -> dict[str, Metric]:
    """metric path -> Metric for the categories of `expected`: geneval in [0, 1], gedit in [0, 10]; n counts prompts.

    Raises UserErrors for a set that is incomplete, repeated or mixed."""
    check_complete(scores, expected, allow_partial=allow_partial)
    groups, metrics = _groups(scores, expected), {}
    for path, (category, *others) in _paths(expected).items():
        if path in HEADLINES.values():
            members = {name: groups[name] for name in (category, *others)}
            metrics[path] = statistics.macro_metric(members, **how)
        else:
            binary = _binary(scores, category)
            metrics[path] = statistics.category_metric(groups[category], category=category, binary=binary, **how)
    return metrics


def identity_of(expected: Expected) -> dict[str, dict[str, Any]]:
    """What was scored: benchmark -> {"n": prompts, "images": images, "digest": of every (category, id, k)}."""
    identities = {}
    for benchmark in HEADLINES:
        members = {name: sorted(keys) for name, keys in expected.items() if BENCHMARK_OF.get(name) == benchmark}
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
    **how: Unpack[Bootstrap],
) -> Scorecard:
    """The model's metrics and retention/CAPABILITY against each capability's teacher, over that capability's
    categories.

    `teacher_scores` maps a capability to its teacher's rows on the same examples (rows of other categories are
    ignored). Raises UserErrors for an incomplete, repeated or mixed set, of the student or a teacher; UserError for an
    unknown capability or one of which nothing is expected."""
    metrics = summarise(scores, expected=expected, **how)
    for capability, rows in teacher_scores.items():
        if capability not in CAPABILITIES:
            raise UserError(f"retention: capability {capability!r} is unknown; choose one of {list(CAPABILITIES)}")
        categories = CAPABILITIES[capability].categories
        scored = {name: expected[name] for name in categories if name in expected}
        if not scored:
            nothing = f"no example of {list(categories)} is expected; add some or drop this teacher"
            raise UserError(f"{RETENTION}{capability}: {nothing}")
        rows = [row for row in rows if row.category in scored]
        check_complete(rows, scored)
        metrics[f"{RETENTION}{capability}"] = statistics.retention(*_paired_groups(scores, rows, scored), **how)
    return Scorecard(model, identity_of(expected), dict(identities), metrics)


def compare(
    a_scores: Sequence[ExampleScore], b_scores: Sequence[ExampleScore], *, expected: Expected, **how: Unpack[Bootstrap]
) -> dict[str, Comparison]:
    """metric path -> model a minus model b, paired by (example id, k).

    Raises UserErrors when either set is incomplete, repeated or mixed; UserError when both models' images of one
    (example id, k) came from different seeds."""
    check_complete(a_scores, expected)
    check_complete(b_scores, expected)
    seeds = {(score.category, score.key): score.seed for score in a_scores}
    unlike = [score.key for score in b_scores if seeds[score.category, score.key] != score.seed]
    if unlike:
        fault = f"{len(unlike)} images were made from different seeds: {_some(unlike)}"
        raise UserError(f"paired comparison: {fault}; sample both models with the same seeds")
    comparisons = {}
    for path, categories in _paths(expected).items():
        binary = all(_binary(a_scores, category) for category in categories)
        pair = _paired_groups(a_scores, b_scores, categories)
        comparisons[path] = statistics.compare_paired(*pair, binary=binary, **how)
    return comparisons


def check_same_evaluator(cards: Mapping[str, Scorecard]) -> None:
    """Raises UserErrors when scorecards of one table were made with different detectors, judges or prompt sets; cards
    that name none are left out.

    A scorecard of real images says under identities/BENCHMARK what scored it: "evaluator" (or "judge") and "prompts".
    """
    faults = []
    for benchmark, key in product(HEADLINES, SCORED_WITH):
        kinds: dict[str, list[str]] = {}
        for name, card in cards.items():
            identity = card.identities.get(benchmark)
            if isinstance(identity, Mapping) and identity.get(key) is not None:
                kinds.setdefault(json.dumps(identity[key], sort_keys=True), []).append(name)
        if len(kinds) > 1:
            models = "; ".join(", ".join(names) for names in kinds.values())
            faults.append(f"{benchmark}: {len(kinds)} different values of {key} ({models})")
    if faults:
        text = "these scorecards cannot stand in one table, their numbers mean different things:"
        raise UserErrors(text, [*faults, "score them with the same evaluator"])


def over_trainings(
    trainings: Sequence[Sequence[ExampleScore]], *, expected: Expected, **how: Unpack[Bootstrap]
) -> dict[str, Metric]:
    """metric path -> Metric over several trainings of one recipe, each scored on the whole set.

    Raises UserErrors for an incomplete set, UserError for fewer than three trainings."""
    for scores in trainings:
        check_complete(scores, expected)
    return {
        path: statistics.over_training_seeds([_groups(scores, categories) for scores in trainings], **how)
        for path, categories in _paths(expected).items()
    }
