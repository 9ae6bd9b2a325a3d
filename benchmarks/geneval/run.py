"""GenEval on a folder of images: detect (all that a verdict could need, stored once), then verdict and summary
(arithmetic on what is stored).

Detection is slow and its results are kept by address: image bytes, record, detector and classifier. The verdict is a
function of them and of the thresholds, so thresholds can be swept without the networks, and a run that was killed ends
with the same bytes as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.geneval import prompts, rules, shapes
from benchmarks.geneval.images import (
    SUITE,
    ImageSet,
    Item,
    Records,
    canonical,
    example_id,
    image_seed,
    read_pixels,
    some,
)
from benchmarks.parallel import batches, device_of, each
from benchmarks.scores.scorecard import ExampleScore, Scorecard, scorecard, write_scorecard, write_scores
from benchmarks.store import SETTINGS_FILE, claim, open_shard, read_results, read_settings, result_key, shard_name
from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_file, write_json, write_text
from data.microworld import World
from data.progress import progress

DETECTIONS, VERDICT = "detections", "verdict"  # folders of results
RESULTS_FILE, SUMMARY_FILE, SCORECARD_FILE = "results.jsonl", "summary.json", "scorecard.json"
UNKNOWN_SEED = -1  # of images made elsewhere
# from here a port of the detector may stand in for the reference
ACCEPTED_IMAGES, ACCEPTED_AGREEMENT, ACCEPTED_DIFFERENCE = 2000, 0.97, 0.01

Pictures = Sequence[tuple[str, Mapping[str, Any]]]  # path relative to the folder of images, record
Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """Which networks look at the images, and where, as section `benchmark` of params.yaml has it.

    `detector` and `classifier` are folders or names on the hub (`classifier` may be empty where no record has a
    colour), `device` is torch's. `batch` images pass a network together, in `workers` processes of this machine or in
    those of the dask `scheduler`."""

    detector: str
    classifier: str
    device: str
    batch: int = 8
    workers: int = 1
    scheduler: str = ""


@dataclass(frozen=True)
class _Batch:
    """What a worker needs: images, their records, and the evaluator with the identity that it must have there too."""

    images: tuple[np.ndarray, ...]
    records: tuple[Mapping[str, Any], ...]
    evaluator: Evaluator
    identity: Row


# --- detect -----------------------------------------------------------------------------------------------------------


def _identity(evaluator: Evaluator) -> Row:
    if evaluator.detector in PARSERS:
        return {"detector": PARSERS[evaluator.detector].identity(), "classifier": None}
    from benchmarks.geneval.colors import classifier_identity
    from benchmarks.geneval.detector import detector_identity

    classifier = classifier_identity(evaluator.classifier) if evaluator.classifier else None
    return {"detector": detector_identity(evaluator.detector), "classifier": classifier}


_identity_here = lru_cache(maxsize=4)(_identity)  # a worker reads the weights once


@dataclass(frozen=True)
class Parser:
    """A detector without networks: what results name it, and what it sees in an image (H, W, 3) uint8."""

    identity: Callable[[], Row]
    parse: Callable[[np.ndarray], Sequence[rules.Detection]]


def _micro_identity() -> Row:
    return {"architecture": "micro", "world": json.loads(json.dumps(asdict(World())))}


PARSERS = {"micro": Parser(_micro_identity, lambda image: shapes.detect(World(), image).things)}  # by --detector


def evaluator_identity(evaluator: Evaluator, records: Records) -> Row:
    """What every result names. Raises UserError for a model that is not there, or records with colours and no
    classifier."""
    if evaluator.detector not in PARSERS and not evaluator.classifier and any(map(color_counts, records)):
        advice = f"name the colour classifier too (--classifier, a folder or {rules.CLASSIFIER})"
        raise UserError(f"the prompt set asks for colours: {advice}")
    return _identity(evaluator)


def color_counts(record: Mapping[str, Any]) -> dict[str, int]:
    """Class -> how many of its most confident detections need their colour."""
    counts: dict[str, int] = {}
    for clause in record["include"]:
        if "color" in clause:
            counts[clause["class"]] = max(counts.get(clause["class"], 0), clause["count"])
    return counts


def _stored(thing: Any, color: str | None, **more: Any) -> Row:
    return {"class": thing.class_name, "score": thing.score, "box": list(thing.box), "color": color, **more}


def _network_detections(batch: _Batch) -> list[list[Row]]:
    from benchmarks.geneval.colors import classify, load_classifier
    from benchmarks.geneval.detector import detect, encode_mask, load_detector

    device = device_of(batch.evaluator.device)
    results = []
    every = detect(load_detector(batch.evaluator.detector, device), batch.images)
    for image, record, instances in zip(batch.images, batch.records, every, strict=True):
        chosen = []
        for name, count in color_counts(record).items():
            chosen += rules.ranked(instance for instance in instances if instance.class_name == name)[:count]
        colors = {}
        if chosen:
            classifier = load_classifier(batch.evaluator.classifier, device)
            colors = dict(zip(chosen, classify(classifier, image, chosen), strict=True))
        results.append([_stored(found, colors.get(found), mask=encode_mask(found.mask)) for found in instances])
    return results


def evaluate(batch: _Batch) -> list[Row]:
    """A row an image: {"size": [H, W], "detections": [{"class", "score", "box", "color", "mask"}, ...]}, most
    confident first. Runs in a worker."""
    if batch.evaluator.detector in PARSERS:
        parse = PARSERS[batch.evaluator.detector].parse
        detections = [[_stored(thing, thing.color) for thing in parse(image)] for image in batch.images]
    elif _identity_here(batch.evaluator) != batch.identity:
        fault = "a worker has other weights than this machine; give all machines the same files"
        raise UserError(f"detector {batch.evaluator.detector}: {fault}")
    else:
        detections = _network_detections(batch)
    pairs = zip(batch.images, detections, strict=True)
    return [{"size": list(image.shape[:2]), "detections": of_image} for image, of_image in pairs]


def _keys(root: Path, pictures: Pictures, identity: Row) -> list[str]:
    return [
        result_key("geneval/detections", image=sha256_file(root / path), record=record, evaluator=identity)
        for path, record in pictures
    ]


def detect_images(images: ImageSet, out: Path, evaluator: Evaluator, shard: tuple[int, int] = (0, 1)) -> dict[str, int]:
    """Detects what the images show and keeps it below `out`/detections; images that are known there are not evaluated
    again.

    Returns {"images", "kept", "detected"}. Raises UserError for networks that are not the folder's or cannot be loaded.
    """
    identity = evaluator_identity(evaluator, images.records)
    claim(out / DETECTIONS, {"suite": SUITE, "prompts": prompts.set_digest(images.records), "evaluator": identity})
    counts, _ = _detect(images.root, out / DETECTIONS, images.pictures, evaluator, identity, shard)
    return {"images": len(images.items), **counts}


def _detect(
    root: Path, folder: Path, pictures: Pictures, evaluator: Evaluator, identity: Row, shard: tuple[int, int] = (0, 1)
) -> tuple[dict[str, int], list[Any]]:
    """Stores what the evaluator sees in the pictures below `folder`. Returns {"kept", "detected"} and every picture's
    row, None for another shard's."""
    keys = _keys(root, pictures, identity)
    known = read_results(folder)
    dealt = batches(list(zip(keys, pictures, strict=True)), evaluator.batch)[shard[0] :: shard[1]]
    # A batch is evaluated as a whole even where a killed run left a part of it: what a network makes of an image may
    # depend on the batch in the last bits.
    todo = [members for members in dealt if any(key not in known for key, _ in members)]

    def prepared(members: tuple[tuple[str, tuple[str, Mapping[str, Any]]], ...]) -> _Batch:
        paths, records = zip(*(picture for _, picture in members), strict=True)
        return _Batch(tuple(read_pixels(root / path) for path in paths), records, evaluator, identity)

    total = sum(map(len, todo))
    with open_shard(folder, shard_name(shard)) as results, progress("detect: images", total) as advance:

        def done(index: int, rows: list[Row]) -> None:
            fresh = {key: row for (key, _), row in zip(todo[index], rows, strict=True) if key not in known}
            known.update(fresh)
            results.append_all(fresh)
            advance(len(rows))

        each(evaluate, todo, prepared, done, workers=evaluator.workers, scheduler=evaluator.scheduler)
    return {"kept": sum(map(len, dealt)) - total, "detected": total}, [known.get(key) for key in keys]


# --- verdict ----------------------------------------------------------------------------------------------------------


def _detections(path: str, row: Row) -> dict[str, list[rules.Detection]]:
    """The stored row of the picture at `path`. Raises UserError, naming it, for an impossible detection."""
    by_class: dict[str, list[rules.Detection]] = {}
    for value in row["detections"]:
        x0, y0, x1, y1 = value["box"]
        try:
            detection = rules.Detection(value["class"], value["color"], value["score"], (x0, y0, x1, y1))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        by_class.setdefault(detection.class_name, []).append(detection)
    return by_class


def stored_detections(images: ImageSet, out: Path) -> list[Row]:
    """Every image's stored row. Raises UserError where the set was detected for other prompts, or not to its end."""
    folder = out / DETECTIONS
    settings = read_settings(folder)
    if settings.get("prompts") != prompts.set_digest(images.records):
        advice = "give the same --prompts as then, or detect into another folder"
        raise UserError(f"{folder}: its detections were made for another prompt set; {advice}")
    known = read_results(folder)
    keys = _keys(images.root, images.pictures, settings["evaluator"])
    missing = [item.path for item, key in zip(images.items, keys, strict=True) if key not in known]
    if missing:
        fault = f"{len(missing)} of {len(keys)} images have no detections: {some(missing)}"
        raise UserError(f"{folder}: {fault}; run the detect step to its end (every shard of it)")
    return [known[key] for key in keys]


def _official_row(item: Item, outcome: rules.Verdict, survivors: Mapping[str, Sequence[rules.Detection]]) -> Row:
    """A line of the reference's per-image file; metadata and details are JSON text in it."""
    details = {name: [[*thing.box, thing.score] for thing in things] for name, things in survivors.items() if things}
    return {
        "filename": item.path,
        "tag": item.record["tag"],
        "prompt": item.record["prompt"],
        "correct": outcome.correct,
        "reason": "\n".join(outcome.reasons),
        "metadata": json.dumps(item.record),
        "details": json.dumps(details),
    }


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reference's summary of its per-image rows: pooled share of images, share of prompts with any correct image,
    share by tag, and their plain mean."""
    frame = pd.DataFrame(rows)
    by_prompt = frame.groupby("metadata")["correct"].any()
    groups = frame.groupby("tag", sort=False)["correct"]
    tags = pd.DataFrame({"score": groups.mean(), "correct": groups.sum(), "images": groups.size()})
    return {
        "images": len(frame),
        "prompts": len(by_prompt),
        "correct_images": float(frame["correct"].mean()),
        "correct_prompts": float(by_prompt.mean()),
        "tags": tags.to_dict("index"),
        "overall": float(tags["score"].mean()),
    }


def _check_colors(item: Item, survivors: Mapping[str, Sequence[rules.Detection]]) -> None:
    """Where overlaps are dropped, a detection that was not classified may come to the front."""
    for name, count in color_counts(item.record).items():
        if any(thing.color is None for thing in survivors.get(name, ())[:count]):
            fault = f"a {name} without a classified colour is among the first {count} under these thresholds"
            raise UserError(f"{item.path}: {fault}; use --max-overlap 1")


def judge_images(
    images: ImageSet,
    out: Path,
    *,
    model: str,
    to: Path | None = None,
    thresholds: rules.Thresholds = rules.OFFICIAL,
    **intervals: Any,
) -> Scorecard:
    """Verdicts from stored detections, written below `to` (default `out`/verdict): results.jsonl (the reference's
    per-image file), scores.parquet, summary.json and scorecard.json. A pure function of images, detections and
    arguments: run again it writes the same bytes.

    `intervals`: seed, resamples and confidence, as `scorecard` takes them. Raises UserError as `stored_detections`
    does, and where the detector saw nothing in any image."""
    to = to or out / VERDICT
    rows = zip(images.items, stored_detections(images, out), strict=True)
    found = [_detections(item.path, row) for item, row in rows]
    records = [rules.parse_record(item.record) for item in images.items]
    seen = [rules.surviving(record, things, thresholds) for record, things in zip(records, found, strict=True)]
    if not any(things for survivors in seen for things in survivors.values()):
        fault = f"the detector saw nothing above the threshold in any of {len(seen)} images"
        raise UserError(f"{out}: {fault}; its weights or the images are wrong")
    # how the images were made, where the folder says it
    made = read_json(file) if (file := images.root / SETTINGS_FILE).exists() else {}
    base = made.get("seed")
    official, scores = [], []
    for item, record, detections, survivors in zip(images.items, records, found, seen, strict=True):
        _check_colors(item, survivors)
        outcome = rules.verdict(record, detections, thresholds)
        official.append(_official_row(item, outcome, survivors))
        seed = UNKNOWN_SEED if base is None else image_seed(item.index, item.k, int(base))
        values = {"correct": float(outcome.correct)}
        place = (item.example_id, item.k, seed)
        scores.append(ExampleScore(model, SUITE, record.tag, *place, values, outcome.reasons, item.path))
    identity = {
        "prompts": prompts.set_digest(images.records),
        "set": prompts.set_name(images.records),
        "images_per_prompt": images.samples,
        "evaluator": read_settings(out / DETECTIONS)["evaluator"],
        "thresholds": asdict(thresholds),
        "images": made or None,
    }
    expected = expected_of(images.records, images.samples)
    card = scorecard(model, scores, {}, expected, {SUITE: identity}, **intervals)
    write_text(to / RESULTS_FILE, prompts.as_jsonl(official))
    write_scores(to, scores)
    write_json(to / SUMMARY_FILE, {**summary_of(official), "identity": identity})
    write_scorecard(to / SCORECARD_FILE, card)
    return card


def expected_of(records: Records, samples: int) -> dict[str, set[tuple[str, int]]]:
    """Tag -> every (example id, k) of a prompt set with `samples` images a prompt."""
    expected: dict[str, set[tuple[str, int]]] = {}
    for index, record in enumerate(records):
        expected.setdefault(record["tag"], set()).update((example_id(index), k) for k in range(samples))
    return expected


def judge_pictures(
    root: Path, store: Path, pictures: Pictures, evaluator: Evaluator
) -> tuple[list[rules.Verdict], Row]:
    """Verdicts of pictures in any layout, in order, and the evaluator's identity: for a stage that has drawn them
    itself. What was seen is kept below `store`, so that a stage that was killed does not evaluate equal images twice.

    Raises UserError as `detect_images` does."""
    records = [record for _, record in pictures]
    identity = evaluator_identity(evaluator, records)
    folder = store / digest(identity)[:16]
    claim(folder, {"suite": SUITE, "evaluator": identity})
    _, rows = _detect(root, folder, pictures, evaluator, identity)
    pairs = zip(pictures, rows, strict=True)
    return [rules.verdict(record, _detections(path, row)) for (path, record), row in pairs], identity


# --- two detectors ----------------------------------------------------------------------------------------------------


def _checked(row: Any) -> Row:
    json.loads(row["metadata"])
    return {**row, "filename": str(row["filename"]), "tag": row["tag"], "correct": bool(row["correct"])}


def read_official_rows(path: Path) -> list[Row]:
    """A per-image file of this project or of the reference. Raises UserErrors naming every line at fault."""
    rows, faults = prompts.read_jsonl(path, _checked, "give a results.jsonl")
    if faults or not rows:
        raise UserErrors(f"{path}: not a per-image result file:", faults or ["it is empty"])
    return rows


def agreement(ours: Path, reference: Path) -> dict[str, Any]:
    """How two evaluators judged the same images: agreeing share, difference of the overall score, and by tag [both
    right, only ours, only theirs, both wrong].

    "accepted" says whether ours may stand in for the reference (the ACCEPTED_ constants). Raises UserErrors for unlike
    sets."""
    a, b = (
        {(canonical(json.loads(row["metadata"])), Path(row["filename"]).name): row for row in read_official_rows(path)}
        for path in (ours, reference)
    )
    if a.keys() != b.keys():
        sides = ((a.keys() - b.keys(), ours), (b.keys() - a.keys(), reference))
        faults = [f"{len(keys)} images only in {path}" for keys, path in sides]
        raise UserErrors("the two files do not hold the same images:", faults)
    tags: dict[str, list[int]] = {}
    for key, row in a.items():
        tags.setdefault(row["tag"], [0, 0, 0, 0])[2 * (not row["correct"]) + (not b[key]["correct"])] += 1
    same = sum(cells[0] + cells[3] for cells in tags.values()) / len(a)
    difference = summary_of(list(a.values()))["overall"] - summary_of(list(b.values()))["overall"]
    accepted = len(a) >= ACCEPTED_IMAGES and same >= ACCEPTED_AGREEMENT and abs(difference) <= ACCEPTED_DIFFERENCE
    return {"images": len(a), "agreement": same, "overall_difference": difference, "tags": tags, "accepted": accepted}
