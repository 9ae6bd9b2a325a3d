"""From raw replies to win rates: a pure function of a folder of judgements, which asks nobody.

A contest is asked about in both orders. A model wins it where both say so; a verdict that changes with the order is a
tie. A failed judgement is a status and never a tie. A judge that prefers a place to an image would call everything a
tie, so one that leans too far is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.judge.asking import Answers
from benchmarks.judge.reading import FIRST_WINS, SECOND_WINS, TIE, Outcome
from benchmarks.judge.wording import PairWording
from benchmarks.pairwise.card import EVEN, WIN_RATE, Pairwise, Standing
from benchmarks.pairwise.contests import Contest, Job, job_key, orders, read_manifest
from benchmarks.pairwise.davidson import strengths
from benchmarks.scores.scorecard import MINIMUM_COVERAGE
from benchmarks.scores.statistics import Groups, Metric, macro_metric, sign_test
from benchmarks.store import read_settings
from data.errors import UserError, UserErrors
from data.files import digest

Pair = tuple[str, str]
ENDS = (1.0, 0.5, 0.0)  # of a contest for the pair's first model: won, tied, lost


@dataclass(frozen=True)
class Result:
    """How a contest of two models ended. `ends` (of ENDS, for the pair's first model) has one a repeat that both orders
    answered, and is empty unless the status is ok; `turned` of them changed with the order. `answers` are as the judge
    gave them, of either order: FIRST_WINS, TIE or SECOND_WINS."""

    contest: Contest
    status: str
    ends: tuple[float, ...] = ()
    turned: int = 0
    answers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Judged:
    """Everything that a folder of pairwise judgements holds, read and checked."""

    about: dict[str, Any]  # the manifest without its contests
    identity: dict[str, Any]  # of the judge
    answered_by: str
    results: dict[Pair, list[Result]]

    @property
    def models(self) -> list[str]:
        """The first is the candidate."""
        return list(self.about["models"])


Said = Callable[[Job], Outcome | None]  # None: not answered yet


def _result(contest: Contest, pair: Pair, repeats: int, said: Said) -> Result:
    """Of a contest whose questions are all answered."""
    if contest.status_of(pair) != "ok":
        return Result(contest, contest.status_of(pair))
    if contest.same(pair):
        return Result(contest, "ok", (TIE,))
    ends, answers, failed, turned = [], [], [], 0
    for repeat in range(repeats):
        both = [one for job in orders(contest, pair, repeat) if (one := said(job)) is not None]
        failed += [one.status for one in both if one.status != "ok"]
        given = [one.scores[0] for one in both if one.status == "ok"]
        if len(given) < 2:
            continue
        answers += given
        agree = given[0] == FIRST_WINS + SECOND_WINS - given[1]
        ends.append(given[0] if agree else TIE)
        turned += not agree
    return Result(contest, "ok" if ends else next(iter(failed), ""), tuple(ends), turned, tuple(answers))


def read_judged(folder: Path, wording: PairWording) -> Judged:
    """Reads a folder of judgements; `wording` must be the one it was made with. Raises UserErrors for questions that
    have no answer yet, and for a run that several models answered."""
    about, contests = read_manifest(folder)
    identity = read_settings(folder)["judge"]
    if identity["wording"] != wording.identity():
        names = f"the {identity['wording']['name']!r} wording, not with this {wording.name!r} one"
        raise UserError(f"{folder}: was judged with {names}; give the same --wording")
    stored, repeats = Answers(folder), about["repeats"]

    def said(job: Job) -> Outcome | None:
        return stored.outcome(job_key(job, identity, wording), job.kind)

    pairs = combinations(about["models"], 2)
    results = {pair: [_result(contest, pair, repeats, said) for contest in contests] for pair in pairs}
    return Judged({**about, "contests": len(contests)}, identity, stored.answered_by(), results)


# --- win rates --------------------------------------------------------------------------------------------------------


def _table(results: Sequence[Result]) -> pd.DataFrame:
    """A row a contest: category, example, value (NaN without a verdict), and the shares of its ends."""
    rows = []
    for result in results:
        shares = [result.ends.count(end) / len(result.ends) for end in ENDS] if result.ends else [np.nan] * len(ENDS)
        value = float(np.mean(result.ends)) if result.ends else np.nan
        rows.append((result.contest.category, result.contest.example_id, value, *shares))
    return pd.DataFrame(rows, columns=["category", "example", "value", "won", "tied", "lost"])


def _by_prompt(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Category -> example -> mean value of its contests that have one."""
    means = table.dropna().groupby(["category", "example"], as_index=False)["value"].mean()
    return {str(name): dict(zip(rows["example"], rows["value"].tolist())) for name, rows in means.groupby("category")}


def _bounds(table: pd.DataFrame) -> tuple[float, float]:
    filled = (table.fillna({"value": value}).groupby(["category", "example"])["value"].mean() for value in (0.0, 1.0))
    low, high = (float(prompts.groupby("category").mean().mean()) for prompts in filled)
    return low, high


def _metrics(values: dict[str, dict[str, float]], **bootstrap: Any) -> dict[str, Metric]:
    groups: Groups = {name: np.array([one for _, one in sorted(rows.items())]) for name, rows in values.items()}
    paths = {f"pairwise/{name}": macro_metric({name: rows}, **bootstrap) for name, rows in groups.items()}
    return {WIN_RATE: macro_metric(groups, **bootstrap), **paths}


def _standing(results: Sequence[Result], highest_lean: float, allow_partial: bool, **bootstrap: Any) -> Standing:
    """Of the pair's first model. Raises UserErrors for too few verdicts and for a judge that leans."""
    table, answers = _table(results), [answer for result in results for answer in result.answers]
    statuses = dict(sorted(Counter(result.status for result in results).items()))
    coverage, bounds = statuses.get("ok", 0) / len(results), _bounds(table)
    lean = float(np.mean(answers)) * 2 - 1 if answers else 0.0
    values = _by_prompt(table)
    faults = [f"{name}: no contest has a verdict" for name in sorted(set(table["category"]) - set(values))]
    if coverage < MINIMUM_COVERAGE and not allow_partial:
        needs = f"at least {MINIMUM_COVERAGE:.0%} are needed: judge the rest, or allow a partial result"
        what = f"the win rate would be {bounds[0]:.3f} or {bounds[1]:.3f} had the rest been lost or won"
        faults.append(
            f"{statuses.get('ok', 0)} of {len(results)} contests have a verdict ({statuses}); {needs}; {what}"
        )
    if abs(lean) > highest_lean:
        place = "first" if lean > 0 else "second"
        advice = "what it prefers is the place and not the image: take another judge, or allow more (--highest-lean)"
        faults.append(f"the judge leans {abs(lean):.3f} to the {place} place, more than {highest_lean:g}; {advice}")
    if faults:
        raise UserErrors("no win rate:", faults)
    prompts = np.array([value for rows in values.values() for value in rows.values()])
    verdicts = sum(len(result.ends) for result in results)
    return Standing(
        metrics=_metrics(values, **bootstrap),
        values=values,
        **{name: float(table[name].mean()) for name in ("won", "tied", "lost")},
        p=sign_test(prompts - EVEN),
        turned=sum(result.turned for result in results) / verdicts,
        lean=lean,
        coverage=coverage,
        statuses=statuses,
        bounds=bounds,
    )


def _counts(results: dict[Pair, list[Result]]) -> dict[str, np.ndarray]:
    """Category -> (prompts, pairs, 3): won, tied and lost, a prompt's contests together one; zeros where a pair has no
    verdict on a prompt."""
    tables = [
        _table(found).groupby(["category", "example"])[["won", "tied", "lost"]].mean() for found in results.values()
    ]
    cube = np.stack([table.fillna(0.0).to_numpy() for table in tables], axis=1)
    categories = tables[0].index.get_level_values("category")
    return {str(name): cube[categories == name] for name in categories.unique()}


def pairwise(judged: Judged, *, highest_lean: float, allow_partial: bool, **bootstrap: Any) -> Pairwise:
    """The candidate's win rates and all models' strengths. `bootstrap`: seed, resamples and confidence. Raises
    UserErrors with every pair that has no win rate: too few verdicts, or a judge that leans to a place."""
    candidate, *others = judged.models
    against, faults = {}, []
    for other in others:
        try:
            how = {"highest_lean": highest_lean, "allow_partial": allow_partial, **bootstrap}
            against[other] = _standing(judged.results[candidate, other], **how)
        except UserErrors as error:
            faults += [f"{candidate} against {other}: {fault}" for fault in error.faults]
    if faults:
        raise UserErrors("pairwise judgements make no win rate:", faults)
    index = {name: place for place, name in enumerate(judged.models)}
    pairs = [(index[a], index[b]) for a, b in judged.results]
    contests = [result.contest for result in judged.results[candidate, others[0]]]
    about = [[one.example_id, one.k, one.category, one.instruction, one.source_sha256] for one in contests]
    made_with = judged.about["made_with"]
    seeds = {made_with[name].get("seed") for name in judged.models}
    identity = {
        "judge": {**judged.identity, "answered_by": judged.answered_by},
        "repeats": judged.about["repeats"],
        "set": judged.about["set"],
        "prompts": digest(about),
        "images": made_with,
        "same_noise": len(seeds) == 1 and None not in seeds,
    }
    found = strengths(_counts(judged.results), pairs, judged.models, **bootstrap)
    return Pairwise(candidate, identity, against, found)
