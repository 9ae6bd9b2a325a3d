"""GenEval on a folder of images: detect (all that a verdict could need, stored once), then verdict and summary
(arithmetic on what is stored).

Detection is slow and its results are kept by address: image bytes, record, detector and classifier. The verdict is a
function of them and of the thresholds, so thresholds can be swept without the networks, and a run that was killed ends
with the same bytes as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.geneval import shapes
from benchmarks.geneval.images import SUITE, Item, canonical, example_id, image_seed, read_images, read_pixels, some
from benchmarks.geneval.prompts import is_official, read_jsonl, set_digest
from benchmarks.geneval.rules import OFFICIAL, Detection, Thresholds, Verdict, parse_record, surviving, verdict
from benchmarks.parallel import batches, device_of, each
from benchmarks.scores.scorecard import ExampleScore, Scorecard, scorecard, write_scorecard, write_scores
from benchmarks.store import SETTINGS_FILE, claim, open_shard, read_results, read_settings, result_key, shard_name
from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_file, write_json, write_text
from data.microworld import MICRO, World
from data.progress import progress

DETECTIONS, VERDICT = "detections", "verdict"  # folders of results
RESULTS_FILE, SUMMARY_FILE, SCORECARD_FILE = "results.jsonl", "summary.json", "scorecard.json"
UNKNOWN_SEED = -1  # of images made elsewhere
# from here a port of the detector may stand in for the reference
ACCEPTED_IMAGES, ACCEPTED_AGREEMENT, ACCEPTED_DIFFERENCE = 2000, 0.97, 0.01

Records = Sequence[Mapping[str, Any]]
Pictures = Sequence[tuple[str, Mapping[str, Any]]]  # path relative to the folder of images, record
Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """Which networks look at the images, and where, as section `benchmark` of params.yaml has it.

    `detector` and `classifier` are folders or names on the hub (`classifier` may be empty where no record has a
    colour), `device` is torch's. `batch` images pass a network together, in `workers` processes of this machine or in
    those of the dask `scheduler`.
    """

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
    if evaluator.detector == MICRO:
        world = json.loads(json.dumps(asdict(World())))
        return {"detector": {"architecture": MICRO, "world": world}, "classifier": None}
    from benchmarks.geneval.colors import classifier_identity
    from benchmarks.geneval.detector import detector_identity

    classifier = classifier_identity(evaluator.classifier) if evaluator.classifier else None
    return {"detector": detector_identity(evaluator.detector), "classifier": classifier}


_identity_here = lru_cache(maxsize=4)(_identity)  # a worker reads the weights once


def evaluator_identity(evaluator: Evaluator, records: Records) -> Row:
    """What every result names. Raises UserError for a model that is not there, or records with colours and no
    classifier."""
    if evaluator.detector != MICRO and not evaluator.classifier and any(map(color_counts, records)):
        advice = "name the colour classifier too (--classifier, a folder or openai/clip-vit-large-patch14)"
        raise UserError(f"the prompt set asks for colours: {advice}")
    return _identity(evaluator)


@lru_cache(maxsize=1)
def _loaded_detector(source: str, device: str) -> Any:
    from benchmarks.geneval.detector import load_detector, self_test

    detector = load_detector(source, device)
    self_test(detector)
    return detector


@lru_cache(maxsize=1)
def _loaded_classifier(source: str, device: str) -> Any:
    from benchmarks.geneval.colors import load_classifier

    return load_classifier(source, device)


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
    from benchmarks.geneval.colors import classify
    from benchmarks.geneval.detector import detect, encode_mask

    device = device_of(batch.evaluator.device)
    results = []
    every = detect(_loaded_detector(batch.evaluator.detector, device), batch.images)
    for image, record, instances in zip(batch.images, batch.records, every, strict=True):
        chosen = []
        for name, count in color_counts(record).items():
            chosen += [instance for instance in instances if instance.class_name == name][:count]
        colors = {}
        if chosen:
            classifier = _loaded_classifier(batch.evaluator.classifier, device)
            colors = dict(zip(chosen, classify(classifier, image, chosen), strict=True))
        results.append([_stored(found, colors.get(found), mask=encode_mask(found.mask)) for found in instances])
    return results


def evaluate(batch: _Batch) -> list[Row]:
    """A row an image: {"size": [H, W], "detections": [{"class", "score", "box", "color", "mask"}, ...]}, most
    confident first. Runs in a worker."""
    if batch.evaluator.detector == MICRO:
        things = (shapes.detect(World(), image).things for image in batch.images)
        detections = [[_stored(thing, thing.color) for thing in of_image] for of_image in things]
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


def detect_images(
    root: Path,
    out: Path,
    records: Records,
    evaluator: Evaluator,
    *,
    samples: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, int]:
    """Detects what the set's images show and keeps it below `out`/detections; images that are known there are not
    evaluated again.

    Returns {"images", "kept", "detected"}. Raises UserErrors for an incomplete set, UserError for networks that are not
    the folder's or cannot be loaded.
    """
    items = read_images(root, records, samples)
    identity = evaluator_identity(evaluator, records)
    claim(out / DETECTIONS, {"suite": SUITE, "prompts": set_digest(records), "evaluator": identity})
    pictures = [(item.path, item.record) for item in items]
    counts, _ = _detect(root, out / DETECTIONS, pictures, evaluator, identity, shard)
    return {"images": len(items), **counts}


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


def _detections(row: Row) -> dict[str, list[Detection]]:
    by_class: dict[str, list[Detection]] = {}
    for value in row["detections"]:
        x0, y0, x1, y1 = value["box"]
        detection = Detection(value["class"], value["color"], value["score"], (x0, y0, x1, y1))
        by_class.setdefault(detection.class_name, []).append(detection)
    return by_class


def stored_detections(
    root: Path, out: Path, records: Records, samples: int | None = None
) -> tuple[list[Item], list[Row]]:
    """Every image of the set with its stored row. Raises UserErrors where a set is incomplete, was detected for other
    prompts, or not to its end."""
    items = read_images(root, records, samples)
    folder = out / DETECTIONS
    settings = read_settings(folder)
    if settings.get("prompts") != set_digest(records):
        advice = "give the same --prompts as then, or detect into another folder"
        raise UserError(f"{folder}: its detections were made for another prompt set; {advice}")
    known = read_results(folder)
    keys = _keys(root, [(item.path, item.record) for item in items], settings["evaluator"])
    missing = [item.path for item, key in zip(items, keys, strict=True) if key not in known]
    if missing:
        fault = f"{len(missing)} of {len(items)} images have no detections: {some(missing)}"
        raise UserError(f"{folder}: {fault}; run the detect step to its end (every shard of it)")
    return items, [known[key] for key in keys]


def _official_row(item: Item, outcome: Verdict, survivors: Mapping[str, Sequence[Detection]]) -> Row:
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
    prompts = frame.groupby("metadata")["correct"].any()
    tags = frame.groupby("tag", sort=False)["correct"].agg(score="mean", correct="sum", images="size")
    return {
        "images": len(frame),
        "prompts": len(prompts),
        "correct_images": float(frame["correct"].mean()),
        "correct_prompts": float(prompts.mean()),
        "tags": tags.to_dict("index"),
        "overall": float(tags["score"].mean()),
    }


def _check_colors(item: Item, survivors: Mapping[str, Sequence[Detection]]) -> None:
    """Where overlaps are dropped, a detection that was not classified may come to the front."""
    for name, count in color_counts(item.record).items():
        if any(thing.color is None for thing in survivors.get(name, ())[:count]):
            fault = f"a {name} without a classified colour is among the first {count} under these thresholds"
            raise UserError(f"{item.path}: {fault}; use --max-overlap 1")


def judge_images(
    root: Path,
    out: Path,
    records: Records,
    *,
    model: str,
    to: Path | None = None,
    thresholds: Thresholds = OFFICIAL,
    samples: int | None = None,
    **intervals: Any,
) -> Scorecard:
    """Verdicts from stored detections, written below `to` (default `out`/verdict): results.jsonl (the reference's
    per-image file), scores.parquet, summary.json and scorecard.json. A pure function of images, detections and
    arguments: run again it writes the same bytes.

    `intervals`: seed, resamples and confidence, as `scorecard` takes them. Raises UserErrors for an incomplete or
    repeated set, UserError where the detector saw nothing in any image.
    """
    items, rows = stored_detections(root, out, records, samples)
    to = out / VERDICT if to is None else to
    found = [_detections(row) for row in rows]
    pairs = zip(items, found, strict=True)
    seen = [surviving(parse_record(item.record), detections, thresholds) for item, detections in pairs]
    if not any(things for survivors in seen for things in survivors.values()):
        fault = f"the detector saw nothing above the threshold in any of {len(items)} images"
        raise UserError(f"{out}: {fault}; its weights or the images are wrong")
    # how the images were made, where the folder says it
    made = read_json(root / SETTINGS_FILE) if (root / SETTINGS_FILE).exists() else None
    base = (made or {}).get("seed")
    official, scores = [], []
    for item, detections, survivors in zip(items, found, seen, strict=True):
        _check_colors(item, survivors)
        outcome = verdict(item.record, detections, thresholds)
        official.append(_official_row(item, outcome, survivors))
        seed = UNKNOWN_SEED if base is None else image_seed(item.index, item.k, int(base))
        tag, values = item.record["tag"], {"correct": float(outcome.correct)}
        scores.append(
            ExampleScore(model, SUITE, tag, item.example_id, item.k, seed, values, outcome.reasons, item.path)
        )
    identity = {
        "prompts": set_digest(records),
        "set": "official" if is_official(records) else "custom",
        "images_per_prompt": len(items) // len(records),
        "evaluator": read_settings(out / DETECTIONS)["evaluator"],
        "thresholds": asdict(thresholds),
        "images": made,
    }
    expected = expected_of(records, len(items) // len(records))
    card = scorecard(model, scores, {}, expected, {SUITE: identity}, **intervals)
    write_text(to / RESULTS_FILE, "".join(json.dumps(row) + "\n" for row in official))
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


def judge_pictures(root: Path, store: Path, pictures: Pictures, evaluator: Evaluator) -> tuple[list[Verdict], Row]:
    """Verdicts of pictures in any layout, in order, and the evaluator's identity: for a stage that has drawn them
    itself. What was seen is kept below `store`, so that a stage that was killed does not evaluate equal images twice.

    Raises UserError as `detect_images` does.
    """
    records = [record for _, record in pictures]
    identity = evaluator_identity(evaluator, records)
    folder = store / digest(identity)[:16]
    claim(folder, {"suite": SUITE, "evaluator": identity})
    _, rows = _detect(root, folder, pictures, evaluator, identity)
    return [verdict(record, _detections(row)) for record, row in zip(records, rows, strict=True)], identity


# --- two detectors ----------------------------------------------------------------------------------------------------


def _checked(row: Any) -> Row:
    json.loads(row["metadata"])
    return {**row, "filename": str(row["filename"]), "tag": row["tag"], "correct": bool(row["correct"])}


def read_official_rows(path: Path) -> list[Row]:
    """A per-image file of this project or of the reference. Raises UserErrors naming every line at fault."""
    rows, faults = read_jsonl(path, _checked, "give a results.jsonl")
    if faults or not rows:
        raise UserErrors(f"{path}: not a per-image result file:", faults or ["it is empty"])
    return rows


def agreement(ours: Path, reference: Path) -> dict[str, Any]:
    """How two evaluators judged the same images: agreeing share, difference of the overall score, and by tag [both
    right, only ours, only theirs, both wrong].

    "accepted" says whether ours may stand in for the reference (the ACCEPTED_ constants). Raises UserErrors for unlike
    sets.
    """
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
