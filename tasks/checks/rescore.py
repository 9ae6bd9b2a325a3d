"""`python -m tasks rescore`: one checkpoint scored again on the examples and with the noise of the run it came from.

Not a stage: nothing of the pipeline depends on it. The same weights, examples and seeds give the same scores, so a
difference comes from what changed around them: libraries, drivers, hardware, data.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.scores.scorecard import expected_scores, write_scorecard
from benchmarks.scores.scorecard import scorecard as make_scorecard
from data.files import atomic_folder, read_json
from data.progress import progress
from model.networks.student import RECORD, load_student, sampled
from model.networks.teachers import BASE, load_base, read_records
from tasks.params.reading import PARAMS_FILE, load_params
from tasks.registry.versions import Version, judged_file, opened
from tasks.release import gate
from tasks.release.provenance import SCORECARD_FILE
from tasks.scoring.sampling import Scoring, reference_scores, score_field, to_score
from tasks.stages import score


def rescore(
    params: score.Params, *, curated: Path, teachers: Path, validated: Path, checkpoint: Path, out: Path
) -> dict[str, Any]:
    """Writes `out`: the images and scorecard.json. Returns metric path -> mean.

    Raises UserError for weights that do not fit the base and for a teacher without scores.
    """
    routes, records = params.routing.routes, read_records(teachers)
    loading = params.backbone.loading()
    student = load_student(checkpoint, load_base(teachers, **loading), records[BASE].sha256)
    scorer, evaluation = to_score(params, curated)
    expected = expected_scores(evaluation.examples, params.sampling.images_per_prompt)
    reference = reference_scores(validated, routes)
    own = {route.capability: reference[route.teacher] for route in routes}
    identities: dict[str, Any] = {
        "base": records[BASE].sha256,
        "teachers": {route.teacher: records[route.teacher].sha256 for route in routes},
        "student": read_json(checkpoint / RECORD)["sha256"],
        "sampling": {key: value for key, value in asdict(params.sampling).items() if key != "batch"},
    }
    with atomic_folder(out) as folder:
        with progress("rescore: images", len(evaluation.examples) * params.sampling.images_per_prompt) as advance:
            scoring = Scoring(load_base(teachers, **loading), params.sampling, scorer, folder, advance)
            how = sampled(read_json(checkpoint / RECORD), params.sampling.steps)
            scores = score_field(student.field, evaluation, scoring, model="rescored", how=how)
        identities |= scorer.identity(scores, evaluation.examples)
        card = make_scorecard("rescored", scores, own, expected, identities, **params.bootstrap)
        write_scorecard(folder / "scorecard.json", card)
    return {path: metric.mean for path, metric in card.metrics.items()}


def cli(argv: Sequence[str]) -> int:
    text = "Score one checkpoint again, on this folder's held-out examples."
    parser = argparse.ArgumentParser("python -m tasks rescore", description=text)
    folder: dict[str, Any] = {"type": Path, "required": True, "metavar": "FOLDER"}
    parser.add_argument("--checkpoint", **folder, help="a student as the stages save it")
    parser.add_argument("--out", **folder, help="where images and scorecard.json go")
    parsed = parser.parse_args(list(argv))
    params = load_params(score.Params, "score", Path(PARAMS_FILE))
    folders = {name: Path("data") / name for name in ("curated", "teachers", "validated")}
    for path, mean in rescore(params, **folders, checkpoint=parsed.checkpoint, out=parsed.out).items():
        print(f"rescore: {path} = {mean:.4g}")
    return 0


def registered_scorecard(project: Path, version: Version, folder: Path) -> dict[str, Any]:
    """The scorecard that the version was judged by. Raises UserError when it is not the file registered."""
    with opened(project) as store:
        scorecard: dict[str, Any] = read_json(judged_file(store, version, Path(SCORECARD_FILE).name, folder))
    return scorecard


def drifted(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metrics whose new mean is missing or outside its registered interval, with registered, low, high, now."""
    rows = []
    for path, metric in before["metrics"].items():
        now = gate.finite((after["metrics"].get(path) or {}).get("mean"))
        if now is None or not metric["low"] <= now <= metric["high"]:
            interval = {"low": metric["low"], "high": metric["high"]}
            rows.append({"metric": path, "registered": metric["mean"], **interval, "now": now})
    return rows
