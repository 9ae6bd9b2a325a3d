"""The gate: rules over the candidate's and the champion's scorecards. Passed or not, and every rule with its numbers.

`judge` is pure. `judge_files(project, params)` reads `reports/scorecard.json`, `reports/score/scores.parquet`,
`dvc.lock` and the champion's scores from the registry, and writes `reports/verdict.json`, a `Verdict`.

A missing, NaN or infinite number never passes. A value equal to its floor does. Every rule is evaluated: a refusal
names all its reasons at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

from benchmarks.scores.scorecard import MINIMUM_COVERAGE, SCORED_WITH, compare, read_scores
from data.bounds import Count, OneOf, Positive, Share
from data.errors import UserError
from data.files import digest, read_json, write_json
from data.records import CAPABILITIES, HEADLINES, CapabilityName
from tasks.registry import versions
from tasks.release.provenance import CHECKPOINT_FOLDER, SCORECARD_FILE, VALIDATE_FILE, provenance

NO_CHAMPION = "none"
EVAL = "eval"
# its value is the version that the candidate was compared with: promotion refuses a verdict on any other
CHAMPION_RULE = "regression/champion"
SCORECARD_RULE = "provenance/scorecard"  # its value ties the verdict to the bytes of one scorecard
WEIGHTS_RULE = "provenance/weights"  # the same for the checkpoint folder
SCORES_FILE = "reports/score/scores.parquet"
VERDICT_FILE = "reports/verdict.json"


def expected_paths(capabilities: Sequence[str]) -> list[str]:
    """Metric paths on which such a student must have been scored: headlines, categories, retentions."""
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


@dataclass(frozen=True)
class Verdict:
    rules: tuple[Rule, ...]

    @property
    def passed(self) -> bool:
        """No rules is no proof: an empty verdict does not pass."""
        return bool(self.rules) and all(rule.passed for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "rules": [asdict(rule) for rule in self.rules]}


def finite(value: Any) -> float | None:
    """The value as a finite Python float (NumPy scalars too); None for None, NaN, infinity, a text, a bool."""
    if value is None or isinstance(value, (bool, str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _mapping(value: Any, *keys: str) -> Mapping[str, Any]:
    """What lies under the keys; empty where anything on the way is missing or no mapping."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _number(card: Any, path: str, key: str) -> float | None:
    return finite(_mapping(card, "metrics", path).get(key))


def _at_least(name: str, value: float | None, bound: float, what: str) -> Rule:
    if value is None:
        return Rule(name, False, None, float(bound), f"{what} is missing or not a finite number")
    word = "reaches" if value >= bound else "is below"
    return Rule(name, value >= bound, value, float(bound), f"{what} = {value:.4g} {word} {bound:.4g}")


def _floors(params: Params, candidate: Mapping[str, Any]) -> Iterator[Rule]:
    for path, floor in params.floors.items():
        yield _at_least(f"floor/{path}", _number(candidate, path, "mean"), floor, path)


def _retention(params: Params, candidate: Mapping[str, Any]) -> Iterator[Rule]:
    """Of the capabilities, and any other that was measured: a weak teacher's score cannot be left out of the list."""
    measured = [path for path in _mapping(candidate, "metrics") if path.startswith("retention/")]
    for path in dict.fromkeys([*(f"retention/{name}" for name in params.capabilities), *measured]):
        what = f"student / teacher on {path.removeprefix('retention/')}"
        yield _at_least(path, _number(candidate, path, "mean"), params.retention, what)


def _completeness(params: Params, candidate: Mapping[str, Any]) -> Iterator[Rule]:
    expected, metrics = expected_paths(params.capabilities), _mapping(candidate, "metrics")
    faulty = []
    for path in expected:
        absent = [key for key in ("mean", "low", "high", "n") if _number(candidate, path, key) is None]
        if absent:
            faulty.append(f"{path} ({'missing' if path not in metrics else 'no finite ' + ', '.join(absent)})")
        elif metrics[path]["n"] < 1:
            faulty.append(f"{path} (n = {metrics[path]['n']})")
    whole = len(expected) - len(faulty)
    reason = f"incomplete: {'; '.join(faulty)}" if faulty else f"all {len(expected)} metrics are present"
    yield Rule("complete/metrics", not faulty, whole, len(expected), reason)
    for benchmark, least in params.min_prompts.items():
        path = HEADLINES[benchmark]
        if path in expected or path in metrics:
            yield _at_least(f"complete/n/{benchmark}", _number(candidate, path, "n"), least, f"n of {path}")
    for benchmark in HEADLINES:
        scored = _mapping(candidate, "identities", benchmark)
        if "coverage" in scored:  # of a judge, who may have left images without a score
            what = f"{benchmark}: the lowest share of a category's images with a score"
            yield _at_least(f"complete/coverage/{benchmark}", finite(scored["coverage"]), MINIMUM_COVERAGE, what)


def _compared_things(params: Params) -> list[str]:
    """What must be the same for two scores to be comparable: the benchmarks, and the sampling."""
    return [*dict.fromkeys(CAPABILITIES[name].benchmark for name in params.capabilities), "sampling"]


def _identity(card: Any, name: str) -> str | None:
    """The digest of the sampling, or of a benchmark and the networks or judge that scored it; None if unknown."""
    identities = _mapping(card, "identities")
    value = identities.get(name) if name == "sampling" else _mapping(card, "benchmarks", name).get("digest")
    scored = {key: setting for key, setting in _mapping(identities, name).items() if key in SCORED_WITH}
    if value and scored:
        value = {"examples": value, **scored}
    if isinstance(value, Mapping) and value:  # settings rather than their digest
        value = digest(value)
    return value if isinstance(value, str) and value else None


def _split(candidate: Mapping[str, Any]) -> Rule:
    """Numbers may be chosen on the dev split, so that only scores of the eval split are reported."""
    split = _mapping(candidate, "identities", "sampling").get("split")
    remedy = "set sampling.split: eval, and score again"
    reason = "drawn on eval" if split == EVAL else f"drawn on {split or 'a split that it does not name'}; {remedy}"
    return Rule("identity/split", split == EVAL, split and str(split), EVAL, f"the scorecard was {reason}")


def _identities(params: Params, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None) -> Iterator[Rule]:
    """Scores are comparable only on the same prompts, seeds, rules and sampling."""
    yield _split(candidate)
    for name in _compared_things(params):
        ours, theirs = _identity(candidate, name), _identity(champion, name)
        passed, other = ours is not None, f"another {name} than the champion's"
        if ours is None:
            reason = f"the scorecard holds no digest of {name}: what was measured is unknown"
        elif theirs is None:
            reason = f"{name} is identified; no champion was scored on it"
        elif ours == theirs:
            reason = f"the same {name} as the champion's"
        elif params.allow_benchmark_change:
            reason = f"{other}, allowed by gate.allow_benchmark_change"
        else:
            remedy = "score both on the same, or set gate.allow_benchmark_change: true"
            passed, reason = False, f"{other}: not comparable; {remedy}"
        yield Rule(f"identity/{name}", passed, ours, theirs, reason)


def _difference(
    candidate: Any, champion: Any, path: str, paired: Mapping[str, Any] | None, alpha: float
) -> tuple[float, float, str] | None:
    """candidate - champion as (difference, upper end of its interval, method); None when it cannot be told.

    Paired over the same examples where possible, otherwise from the two standard errors (independent samples).
    """
    if paired is not None:
        difference, high = finite(paired.get("difference")), finite(paired.get("high"))
        return None if difference is None or high is None else (difference, high, "paired")
    ours, theirs = _number(candidate, path, "mean"), _number(champion, path, "mean")
    our_error, their_error = _number(candidate, path, "stderr"), _number(champion, path, "stderr")
    if ours is None or theirs is None or our_error is None or their_error is None:
        return None
    half = NormalDist().inv_cdf(1 - alpha / 2) * math.hypot(our_error, their_error)
    return ours - theirs, ours - theirs + half, "unpaired"


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
    changed = [name for name in _compared_things(params) if _identity(candidate, name) != _identity(card, name)]
    for path in params.compared:
        rule, mean = f"regression/{path}", _number(candidate, path, "mean")
        difference = _difference(candidate, card, path, (comparison or {}).get(path), params.alpha)
        if path not in _mapping(card, "metrics"):
            yield Rule(rule, True, mean, None, f"the champion was never scored on {path}")
        elif changed and params.allow_benchmark_change and mean is not None:
            reason = f"not compared: {', '.join(changed)} changed, allowed by gate.allow_benchmark_change"
            yield Rule(rule, True, None, 0.0, reason)
        elif difference is None:
            reason = f"{path} cannot be compared with the champion's: a number is missing or not finite"
            yield Rule(rule, False, None, 0.0, reason)
        else:
            value, high, method = difference
            interval = f"upper end of the {method} {100 * (1 - params.alpha):g} % interval {high:+.4g}"
            word = "lies below zero: worse than the champion" if high < 0 else "reaches zero: no regression shown"
            yield Rule(rule, high >= 0, value, 0.0, f"candidate - champion = {value:+.4g}, {interval} {word}")


def _is_identified(value: Any) -> bool:
    """A digest, or a non-empty mapping of digests."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_identified(inner) for inner in value.values())
    return isinstance(value, str) and bool(value.strip())


def _revision(params: Params, provenance: Mapping[str, Any]) -> Rule:
    sha, changed = provenance.get("git.sha"), list(provenance.get("git.changed") or [])
    if not provenance.get("git.known") or not sha:
        allowed = ", allowed by gate.allow_unversioned" if params.allow_unversioned else ""
        reason = f"no git revision ({provenance.get('git.reason') or 'not a git repository'}){allowed}"
        return Rule("provenance/git", params.allow_unversioned, None, None, reason)
    if not changed and not provenance.get("git.dirty"):
        return Rule("provenance/git", True, 0.0, 0.0, f"clean at {sha[:12]}")
    names = ", ".join(changed[:5]) + (" ..." if len(changed) > 5 else "")
    remedy = "allowed by gate.allow_dirty" if params.allow_dirty else "commit them or set gate.allow_dirty: true"
    reason = f"at {sha[:12]} with {len(changed)} changed tracked files ({names}): {remedy}"
    return Rule("provenance/git", params.allow_dirty, len(changed), 0.0, reason)


def _recorded(params: Params, provenance: Mapping[str, Any], rule: str, path: str) -> Rule:
    """The file that was judged is the one that its stage left, by dvc.lock."""
    now, recorded = (_mapping(provenance, "files", path).get(key) for key in ("now", "recorded"))
    if now is None:
        return Rule(rule, False, None, recorded, f"{path} does not exist")
    if recorded is None:
        allowed = params.allow_unversioned
        remedy = ", allowed by gate.allow_unversioned" if allowed else "; run the stages with dvc repro"
        return Rule(rule, allowed, now, None, f"{path} is not recorded in dvc.lock{remedy}")
    changed = "is not the one in dvc.lock: it changed after its stage ran; run dvc repro"
    reason = "is the one in dvc.lock" if now == recorded else changed
    return Rule(rule, now == recorded, now, recorded, f"{path} {reason}")


def _provenance(params: Params, candidate: Mapping[str, Any], provenance: Mapping[str, Any]) -> Iterator[Rule]:
    yield _revision(params, provenance)
    for rule, key, what, excused in (
        ("provenance/params", "params.sha256", "params.yaml", False),
        ("provenance/data", "dvc.curated.md5", "data/curated in dvc.lock", params.allow_unversioned),
    ):
        value = provenance.get(key) or None
        absent = f"no digest of {what}" + (", allowed by gate.allow_unversioned" if excused else "")
        yield Rule(rule, bool(value) or excused, value, None, f"{what} is recorded" if value else absent)
    identities = _mapping(candidate, "identities")
    unknown = [name for name in ("base", "teachers", "student") if not _is_identified(identities.get(name))]
    reason = f"the scorecard holds no digest of: {', '.join(unknown)}"
    reason = reason if unknown else "base, teachers and student are identified"
    yield Rule("provenance/models", not unknown, 3.0 - len(unknown), 3.0, reason)
    yield _recorded(params, provenance, SCORECARD_RULE, SCORECARD_FILE)
    yield _recorded(params, provenance, "provenance/validate", VALIDATE_FILE)
    yield _recorded(params, provenance, WEIGHTS_RULE, CHECKPOINT_FOLDER)


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
    rules = (
        *_floors(params, candidate),
        *_retention(params, candidate),
        *_regression(params, candidate, champion, comparison),
        *_completeness(params, candidate),
        *_identities(params, candidate, _mapping(champion, "scorecard")),
        *_provenance(params, candidate, provenance),
    )
    return Verdict(rules)


def rule_value(verdict: Mapping[str, Any], name: str) -> Any:
    """The value of a verdict's rule; None when it has no such rule."""
    return next((rule["value"] for rule in verdict["rules"] if rule["rule"] == name), None)


def has_passed(verdict: Mapping[str, Any]) -> bool:
    """Whether a verdict says yes: by its `passed` and by every one of its rules."""
    rules = verdict["rules"]
    return verdict.get("passed") is True and bool(rules) and all(rule["passed"] is True for rule in rules)


def paired_with(
    project: Path, params: Params, candidate: Mapping[str, Any], champion: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Paired comparison of the two models' per-example scores; None when they were not scored on the same set."""
    scores, card = project / SCORES_FILE, champion["scorecard"]
    if champion.get("scores") is None or not scores.is_file():
        return None
    if any(_identity(candidate, name) != _identity(card, name) for name in _compared_things(params)):
        return None
    ours = [score for score in read_scores(scores.parent) if score.model == candidate.get("model")]
    theirs = [score for score in read_scores(Path(champion["scores"]).parent) if score.model == card.get("model")]
    if not ours or not theirs:
        return None
    expected: dict[str, set[tuple[str, int]]] = {}
    for score in ours:
        expected.setdefault(score.category, set()).add((score.example_id, score.k))
    draws, confidence = {"seed": params.seed, "resamples": params.resamples}, 1 - params.alpha
    compared = compare(ours, theirs, expected=expected, confidence=confidence, **draws)
    return {path: asdict(paired) for path, paired in compared.items()}


def judge_files(project: Path, params: Params) -> dict[str, Any]:
    """Judges `reports/scorecard.json` of the project against the registry's champion; writes and returns
    `reports/verdict.json`.

    Raises UserError when the scorecard is missing or the registry cannot be read: no verdict is better than a verdict
    without the champion.
    """
    project = Path(project).resolve()
    candidate = read_json(project / SCORECARD_FILE)
    if not isinstance(candidate, dict) or not isinstance(candidate.get("metrics"), dict):
        raise UserError(f"{project / SCORECARD_FILE}: not a scorecard (no `metrics`); run the score stage again")
    champion = versions.champion(project)
    comparison = paired_with(project, params, candidate, champion) if champion else None
    origin = provenance(project)
    verdict = judge(params, candidate, champion=champion, provenance=origin, comparison=comparison).to_json()
    write_json(project / VERDICT_FILE, verdict)
    return verdict
