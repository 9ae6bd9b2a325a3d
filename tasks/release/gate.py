"""The gate: rules over the candidate's and the champion's scorecards. Passed or not, and every rule with its numbers.

`judge` is pure. `judge_files(project, params)` reads `reports/scorecard.json`, `reports/score/scores.parquet`,
`dvc.lock` and the champion's scores from the registry, and writes `reports/verdict.json`:

    {"passed": bool, "rules": [{"rule": str, "passed": bool, "value": number|str|null, "bound": number|str|null,
"reason": str}]}

A missing, NaN or infinite number never passes. A value equal to its floor does. Every rule is evaluated: a refusal
names all its reasons at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

from benchmarks.scores.scorecard import MINIMUM_COVERAGE
from data.bounds import Count, OneOf, Positive, Share
from data.errors import UserError
from data.files import digest, read_json, write_json
from data.records import CAPABILITIES, HEADLINES, CapabilityName
from tasks.registry import versions
from tasks.release.provenance import CHECKPOINT_FOLDER, SCORECARD_FILE, VALIDATE_FILE, provenance

NO_CHAMPION = "none"
# its value is the version that the candidate was compared with: promotion refuses a verdict on any other
CHAMPION_RULE = "regression/champion"
SCORECARD_RULE = "provenance/scorecard"  # its value ties the verdict to the bytes of one scorecard
WEIGHTS_RULE = "provenance/weights"  # the same for the checkpoint folder
SCORES_FILE = "reports/score/scores.parquet"
VERDICT_FILE = "reports/verdict.json"


def expected_paths(capabilities: Sequence[str]) -> list[str]:
    """Metric paths on which a student with these capabilities must have been scored: headlines, categories,
    retentions.
    """
    paths: dict[str, None] = {}
    for name in capabilities:
        capability = CAPABILITIES[name]
        paths[HEADLINES[capability.benchmark]] = None
        paths.update(dict.fromkeys(f"{capability.benchmark}/{category}" for category in capability.categories))
    paths.update(dict.fromkeys(f"retention/{name}" for name in capabilities))
    return list(paths)


PATHS = expected_paths(list(CAPABILITIES))
MetricPath = Annotated[str, OneOf(PATHS)]


@dataclass(frozen=True)
class Params:
    """Section `gate` of params.yaml.

    `capabilities`: what the student must be able to do; their retentions and their benchmarks' paths have to be there.
    `floors`: metric path -> lowest mean that passes. `retention`: lowest student / teacher ratio, for each capability.
    `compared`: metric paths on which the candidate may not fall behind the champion: a fall counts when the two-sided
    (1 - `alpha`) interval of candidate - champion, of `resamples` paired bootstraps, lies below zero. `min_prompts`:
    benchmark -> lowest n of its headline metric. `allow_dirty`: tracked files may differ from the commit (recorded in
    the registry all the same). `allow_unversioned`: no git revision or no dvc.lock is acceptable.
    `allow_benchmark_change`: the champion was scored on another benchmark or sampling: start a new line, do not refuse.
    """

    capabilities: tuple[CapabilityName, ...]
    floors: dict[MetricPath, float]
    retention: float
    compared: tuple[MetricPath, ...]
    alpha: Share
    resamples: Positive
    seed: int
    min_prompts: dict[Annotated[str, OneOf(HEADLINES)], Count]
    allow_dirty: bool
    allow_unversioned: bool
    allow_benchmark_change: bool

    def faults(self) -> list[str]:
        """Cross-field faults, one sentence each."""
        known = ", ".join(CAPABILITIES)
        return [] if self.capabilities else [f"capabilities: empty; name at least one of {known}"]


@dataclass(frozen=True)
class Rule:
    """One rule's outcome; `value` and `bound` are finite numbers, texts or None."""

    rule: str
    passed: bool
    value: float | str | None
    bound: float | str | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "passed": self.passed,
            "value": self.value,
            "bound": self.bound,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Verdict:
    rules: tuple[Rule, ...]

    @property
    def passed(self) -> bool:
        """No rules is no proof: an empty verdict does not pass."""
        return bool(self.rules) and all(rule.passed for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "rules": [rule.to_json() for rule in self.rules]}


def finite(value: Any) -> float | None:
    """The value as a finite Python float; None for anything else (None, NaN, infinity, a text, a bool). NumPy scalars
    are numbers.
    """
    if value is None or isinstance(value, (bool, str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    inner = value.get(key) if isinstance(value, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _mean(card: Any, path: str) -> float | None:
    return finite(_mapping(_mapping(card, "metrics"), path).get("mean"))


def _at_least(name: str, value: float | None, bound: float, what: str) -> Rule:
    if value is None:
        return Rule(name, False, None, float(bound), f"{what} is missing or not a finite number")
    word = "reaches" if value >= bound else "is below"
    return Rule(name, value >= bound, value, float(bound), f"{what} = {value:.4g} {word} {bound:.4g}")


def _floors(params: Params, candidate: Mapping[str, Any]) -> Iterator[Rule]:
    for path, floor in params.floors.items():
        yield _at_least(f"floor/{path}", _mean(candidate, path), floor, path)


def _retention(params: Params, candidate: Mapping[str, Any]) -> Iterator[Rule]:
    """Those asked for, and any other that was measured: a weak teacher's score cannot be left out of the list."""
    measured = [
        path.removeprefix("retention/") for path in _mapping(candidate, "metrics") if path.startswith("retention/")
    ]
    for name in dict.fromkeys([*params.capabilities, *measured]):
        yield _at_least(
            f"retention/{name}", _mean(candidate, f"retention/{name}"), params.retention, f"student / teacher on {name}"
        )


def _completeness(params: Params, candidate: Mapping[str, Any]) -> Iterator[Rule]:
    expected = expected_paths(params.capabilities)
    metrics = _mapping(candidate, "metrics")
    faulty = []
    for path in expected:
        metric = _mapping(metrics, path)
        absent = [key for key in ("mean", "low", "high", "n") if finite(metric.get(key)) is None]
        if absent:
            faulty.append(f"{path} ({'missing' if path not in metrics else 'no finite ' + ', '.join(absent)})")
        elif finite(metric["n"]) < 1:  # type: ignore[operator]
            faulty.append(f"{path} (n = {metric['n']})")
    whole = len(expected) - len(faulty)
    reason = f"incomplete: {'; '.join(faulty)}" if faulty else f"all {len(expected)} metrics are present"
    yield Rule("complete/metrics", not faulty, whole, len(expected), reason)
    for benchmark, least in params.min_prompts.items():
        path = HEADLINES[benchmark]
        if path in expected or path in metrics:
            yield _at_least(f"complete/n/{benchmark}", finite(_mapping(metrics, path).get("n")), least, f"n of {path}")
    for benchmark in HEADLINES:
        scored = _mapping(_mapping(candidate, "identities"), benchmark)
        if "coverage" in scored:  # of a judge, who may have left images without a score
            what = f"{benchmark}: the lowest share of a category's images with a score"
            yield _at_least(f"complete/coverage/{benchmark}", finite(scored["coverage"]), MINIMUM_COVERAGE, what)


def _benchmarks_of(params: Params) -> list[str]:
    return list(dict.fromkeys(CAPABILITIES[name].benchmark for name in params.capabilities))


def _identity(card: Any, name: str) -> str | None:
    """The digest of a benchmark (its prompts, seeds and rules, and the networks or the judge that scored it) or of the
    sampling; None when unknown.
    """
    from benchmarks.scores.scorecard import SCORED_WITH

    identities = _mapping(card, "identities")
    found = (
        identities.get("sampling") if name == "sampling" else _mapping(_mapping(card, "benchmarks"), name).get("digest")
    )
    scored = {key: value for key, value in _mapping(identities, name).items() if key in SCORED_WITH}
    if found and scored:
        found = {"examples": found, **scored}
    if isinstance(found, Mapping) and found:  # settings rather than their digest
        found = digest(found)
    return found if isinstance(found, str) and found else None


def _identities(params: Params, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None) -> Iterator[Rule]:
    """Scores are comparable only on the same prompts, seeds, rules and sampling."""
    for name in [*_benchmarks_of(params), "sampling"]:
        rule, ours, theirs = f"identity/{name}", _identity(candidate, name), _identity(champion, name)
        if ours is None:
            yield Rule(
                rule, False, None, theirs, f"the scorecard holds no digest of {name}: what was measured is unknown"
            )
        elif theirs is None or ours == theirs:
            yield Rule(
                rule,
                True,
                ours,
                theirs,
                f"the same {name} as the champion's"
                if theirs
                else f"{name} is identified; no champion was scored on it",
            )
        elif params.allow_benchmark_change:
            yield Rule(
                rule, True, ours, theirs, f"another {name} than the champion's, allowed by gate.allow_benchmark_change"
            )
        else:
            remedy = "score both on one, or set gate.allow_benchmark_change: true"
            yield Rule(rule, False, ours, theirs, f"another {name} than the champion's: not comparable; {remedy}")


def _difference(
    candidate: Any, champion: Any, path: str, comparison: Mapping[str, Any] | None, alpha: float
) -> tuple[float, float, str] | None:
    """candidate - champion as (difference, upper end of its interval, method); None when it cannot be told.

    Paired over the same examples where possible, otherwise from the two standard errors (independent samples).
    """
    if comparison is not None and path in comparison:
        paired = comparison[path]
        difference, high = finite(paired.get("difference")), finite(paired.get("high"))
        return None if difference is None or high is None else (difference, high, "paired")
    ours, theirs = _mapping(_mapping(candidate, "metrics"), path), _mapping(_mapping(champion, "metrics"), path)
    means, errors = (
        [finite(ours.get("mean")), finite(theirs.get("mean"))],
        [finite(ours.get("stderr")), finite(theirs.get("stderr"))],
    )
    if means[0] is None or means[1] is None or errors[0] is None or errors[1] is None:
        return None
    difference = means[0] - means[1]
    return difference, difference + NormalDist().inv_cdf(1 - alpha / 2) * math.hypot(errors[0], errors[1]), "unpaired"


def _regression(
    params: Params,
    candidate: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    comparison: Mapping[str, Any] | None,
) -> Iterator[Rule]:
    if champion is None:
        yield Rule(CHAMPION_RULE, True, NO_CHAMPION, None, "there is no champion yet")
        return
    version = str(champion.get("version", "unknown"))
    yield Rule(CHAMPION_RULE, True, version, None, f"compared with champion version {version}")
    card = _mapping(champion, "scorecard")
    changed = [
        name for name in [*_benchmarks_of(params), "sampling"] if _identity(candidate, name) != _identity(card, name)
    ]
    for path in params.compared:
        rule, level = f"regression/{path}", f"{100 * (1 - params.alpha):g} % interval"
        if path not in _mapping(card, "metrics"):
            yield Rule(rule, True, _mean(candidate, path), None, f"the champion was never scored on {path}")
        elif changed and params.allow_benchmark_change and _mean(candidate, path) is not None:
            yield Rule(
                rule,
                True,
                None,
                0.0,
                f"not compared: {', '.join(changed)} changed, allowed by gate.allow_benchmark_change",
            )
        elif (found := _difference(candidate, card, path, comparison, params.alpha)) is None:
            yield Rule(
                rule,
                False,
                None,
                0.0,
                f"{path} cannot be compared with the champion's: a number is missing or not finite",
            )
        else:
            difference, high, method = found
            fallen = high < 0
            word = "lies below zero: worse than the champion" if fallen else "reaches zero: no regression shown"
            yield Rule(
                rule,
                not fallen,
                difference,
                0.0,
                f"candidate - champion = {difference:+.4g}, upper end of the {method} {level} {high:+.4g} {word}",
            )


def _digests(value: Any) -> bool:
    """A digest, or a non-empty mapping of digests."""
    if isinstance(value, Mapping):
        return bool(value) and all(_digests(inner) for inner in value.values())
    return isinstance(value, str) and bool(value.strip())


def _provenance(params: Params, candidate: Mapping[str, Any], provenance: Mapping[str, Any]) -> Iterator[Rule]:
    sha, changed = provenance.get("git.sha"), list(provenance.get("git.changed") or [])
    if not provenance.get("git.known") or not sha:
        reason = f"no git revision ({provenance.get('git.reason') or 'not a git repository'})"
        yield Rule(
            "provenance/git",
            params.allow_unversioned,
            None,
            None,
            reason + (", allowed by gate.allow_unversioned" if params.allow_unversioned else ""),
        )
    elif changed or provenance.get("git.dirty"):
        names = ", ".join(changed[:5]) + (" ..." if len(changed) > 5 else "")
        remedy = "allowed by gate.allow_dirty" if params.allow_dirty else "commit them or set gate.allow_dirty: true"
        yield Rule(
            "provenance/git",
            params.allow_dirty,
            len(changed),
            0.0,
            f"at {sha[:12]} with {len(changed)} changed tracked files ({names}): {remedy}",
        )
    else:
        yield Rule("provenance/git", True, 0.0, 0.0, f"clean at {sha[:12]}")
    for rule, key, what in (
        ("provenance/params", "params.sha256", "params.yaml"),
        ("provenance/data", "dvc.curated.md5", "data/curated in dvc.lock"),
    ):
        value = provenance.get(key)
        excused = rule == "provenance/data" and params.allow_unversioned
        reason = (
            f"{what} is recorded"
            if value
            else f"no digest of {what}" + (", allowed by gate.allow_unversioned" if excused else "")
        )
        yield Rule(rule, bool(value) or excused, value or None, None, reason)
    identities = _mapping(candidate, "identities")
    absent = [name for name in ("base", "teachers", "student") if not _digests(identities.get(name))]
    reason = (
        f"the scorecard holds no digest of: {', '.join(absent)}"
        if absent
        else "base, teachers and student are identified"
    )
    yield Rule("provenance/models", not absent, 3.0 - len(absent), 3.0, reason)
    files = _mapping(provenance, "files")
    for rule, path in (
        (SCORECARD_RULE, SCORECARD_FILE),
        ("provenance/validate", VALIDATE_FILE),
        (WEIGHTS_RULE, CHECKPOINT_FOLDER),
    ):
        now, recorded = _mapping(files, path).get("now"), _mapping(files, path).get("recorded")
        if now is None:
            yield Rule(rule, False, None, recorded, f"{path} does not exist")
        elif recorded is None:
            remedy = (
                ", allowed by gate.allow_unversioned" if params.allow_unversioned else "; run the stages with dvc repro"
            )
            yield Rule(rule, params.allow_unversioned, now, None, f"{path} is not recorded in dvc.lock{remedy}")
        else:
            reason = (
                "is the one in dvc.lock"
                if now == recorded
                else "is not the one in dvc.lock: it changed after its stage ran; run dvc repro"
            )
            yield Rule(rule, now == recorded, now, recorded, f"{path} {reason}")


def judge(
    params: Params,
    candidate: Mapping[str, Any],
    *,
    champion: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
) -> Verdict:
    """Applies every rule.

    candidate: a scorecard, {"model", "benchmarks", "identities", "metrics": {path: {"mean", "stderr", "low", "high",
    "n"}}}.
    champion: {"version": str, "scorecard": the same} or None. provenance: `tasks.release.provenance.provenance`.
    comparison: metric path -> {"difference" (candidate - champion), "high", ...}, paired over the same examples at
    confidence 1 - alpha; None if unpaired.
    """
    card = _mapping(champion, "scorecard") if champion is not None else None
    return Verdict(
        (
            *_floors(params, candidate),
            *_retention(params, candidate),
            *_regression(params, candidate, champion, comparison),
            *_completeness(params, candidate),
            *_identities(params, candidate, card),
            *_provenance(params, candidate, provenance),
        )
    )


def rule_value(verdict: Mapping[str, Any], name: str) -> Any:
    """The value of a verdict's rule; None when it has no such rule."""
    return next((rule["value"] for rule in verdict["rules"] if rule["rule"] == name), None)


def has_passed(verdict: Mapping[str, Any]) -> bool:
    """Whether a verdict says yes: by its own word and by every one of its rules."""
    return (
        bool(verdict["rules"])
        and verdict.get("passed") is True
        and all(rule["passed"] is True for rule in verdict["rules"])
    )


def paired_with(
    project: Path, params: Params, candidate: Mapping[str, Any], champion: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Paired comparison of the two models' per-example scores; None when they were not scored on the same set."""
    theirs = champion.get("scores")
    ours = project / SCORES_FILE
    names = [*_benchmarks_of(params), "sampling"]
    if (
        theirs is None
        or not ours.is_file()
        or any(_identity(candidate, name) != _identity(champion["scorecard"], name) for name in names)
    ):
        return None
    from benchmarks.scores.scorecard import compare, read_scores

    mine = [score for score in read_scores(ours.parent) if score.model == candidate.get("model")]
    other = [score for score in read_scores(Path(theirs).parent) if score.model == champion["scorecard"].get("model")]
    if not mine or not other:
        return None
    expected: dict[str, set[tuple[str, int]]] = {}
    for score in mine:
        expected.setdefault(score.category, set()).add((score.example_id, score.k))
    found = compare(
        mine, other, expected=expected, seed=params.seed, resamples=params.resamples, confidence=1 - params.alpha
    )
    return {
        path: {"difference": one.difference, "low": one.low, "high": one.high, "p": one.p, "n": one.n}
        for path, one in found.items()
    }


def judge_files(project: Path, params: Params) -> dict[str, Any]:
    """Judges `reports/scorecard.json` of the project against the registry's champion and writes `reports/verdict.json`,
    which is also returned.

    Raises UserError when the scorecard is missing or the registry cannot be read: no verdict is better than one without
    the champion.
    """
    project = Path(project).resolve()
    candidate = read_json(project / SCORECARD_FILE)
    if not isinstance(candidate, dict) or not isinstance(candidate.get("metrics"), dict):
        raise UserError(f"{project / SCORECARD_FILE}: not a scorecard (no `metrics`); run the score stage again")
    champion = versions.champion(project)
    comparison = paired_with(project, params, candidate, champion) if champion else None
    verdict = judge(
        params, candidate, champion=champion, provenance=provenance(project), comparison=comparison
    ).to_json()
    write_json(project / VERDICT_FILE, verdict)
    return verdict
