"""GenEval on a folder of images: detect (everything a verdict could need, stored once), then verdict and summary
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

from benchmarks.geneval.images import SUITE, Item, example_id, image_seed, read_images, read_pixels
from benchmarks.geneval.prompts import is_official, set_digest
from benchmarks.geneval.rules import OFFICIAL, Detection, Thresholds, Verdict, parse_record, surviving, verdict
from benchmarks.parallel import batches, device_of, each
from benchmarks.scores.scorecard import ExampleScore, Scorecard, scorecard, write_scorecard, write_scores
from benchmarks.store import SETTINGS_FILE, claim, open_shard, read_results, read_settings, result_key, shard_name
from data.errors import UserError, UserErrors
from data.files import digest, read_json, sha256_file, write_json, write_text
from data.microworld import MICRO
from data.progress import progress

DETECTIONS, VERDICT = "detections", "verdict"  # folders of results
RESULTS_FILE, SUMMARY_FILE, SCORECARD_FILE = "results.jsonl", "summary.json", "scorecard.json"
UNKNOWN_SEED = -1  # of images made elsewhere
ACCEPTED_IMAGES, ACCEPTED_AGREEMENT, ACCEPTED_DIFFERENCE = (
    2000,
    0.97,
    0.01,
)  # from here a port of the detector may stand in for the reference


@dataclass(frozen=True)
class Evaluator:
    """Which networks look at the images: folders or names on the hub (`classifier` may be empty where no record asks
    for a colour), and the torch device.
    """

    detector: str
    classifier: str
    device: str


@dataclass(frozen=True)
class _Batch:
    """What a worker needs: pictures, their records, and the evaluator with the identity that it must have over there
    too.
    """

    images: tuple[np.ndarray, ...]
    records: tuple[Mapping[str, Any], ...]
    evaluator: Evaluator
    identity: dict[str, Any]


# --- detect -----------------------------------------------------------------------------------------------------------


def evaluator_identity(evaluator: Evaluator, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every result names. Raises UserError for a model that is not there, or records with colours and no
    classifier.
    """
    colored = any("color" in clause for record in records for clause in record["include"])
    if evaluator.detector == MICRO:
        from data.microworld import World

        return {
            "detector": {"architecture": MICRO, "world": json.loads(json.dumps(asdict(World())))},
            "classifier": None,
        }
    if colored and not evaluator.classifier:
        raise UserError(
            "the prompt set asks for colours: name the colour classifier too (--classifier, a folder or openai/clip-vit-large-patch14)"
        )
    from benchmarks.geneval.colors import classifier_identity
    from benchmarks.geneval.detector import detector_identity

    return {
        "detector": detector_identity(evaluator.detector),
        "classifier": classifier_identity(evaluator.classifier) if evaluator.classifier else None,
    }


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


@lru_cache(maxsize=4)
def _identity_here(evaluator: Evaluator, colored: bool) -> str:
    records = [{"include": [{"color": ""}]}] if colored else []
    return json.dumps(evaluator_identity(evaluator, records), sort_keys=True)


def asked_colors(record: Mapping[str, Any]) -> dict[str, int]:
    """Class -> how many of its most confident detections are asked for their colour."""
    asked: dict[str, int] = {}
    for clause in record["include"]:
        if "color" in clause:
            asked[clause["class"]] = max(asked.get(clause["class"], 0), clause["count"])
    return asked


def _micro_rows(batch: _Batch) -> list[dict[str, Any]]:
    from benchmarks.geneval.shapes import detect as parse
    from data.microworld import World

    world = World()
    rows = []
    for image in batch.images:
        things = parse(world, image).things
        found = [
            {"class": thing.class_name, "score": thing.score, "box": list(thing.box), "color": thing.color}
            for thing in things
        ]
        rows.append({"size": list(image.shape[:2]), "detections": found})
    return rows


def _network_rows(batch: _Batch) -> list[dict[str, Any]]:
    from benchmarks.geneval.colors import classify
    from benchmarks.geneval.detector import detect, encode_mask

    device = device_of(batch.evaluator.device)
    instances = detect(_loaded_detector(batch.evaluator.detector, device), batch.images)
    rows = []
    for image, record, found in zip(batch.images, batch.records, instances, strict=True):
        asked = asked_colors(record)
        chosen = [
            index
            for name, count in asked.items()
            for index in [i for i, one in enumerate(found) if one.class_name == name][:count]
        ]
        colors: dict[int, str] = {}
        if chosen:
            classifier = _loaded_classifier(batch.evaluator.classifier, device)
            colors = dict(zip(chosen, classify(classifier, image, [found[index] for index in chosen]), strict=True))
        detections = [
            {
                "class": one.class_name,
                "score": one.score,
                "box": list(one.box),
                "color": colors.get(index),
                "mask": encode_mask(one.mask),
            }
            for index, one in enumerate(found)
        ]
        rows.append({"size": list(image.shape[:2]), "detections": detections})
    return rows


def evaluate(batch: _Batch) -> list[dict[str, Any]]:
    """One row an image: {"size": [H, W], "detections": [{"class", "score", "box", "color", "mask"}, ...]}, most
    confident first. Runs in a worker.
    """
    if batch.evaluator.detector == MICRO:
        return _micro_rows(batch)
    if _identity_here(batch.evaluator, bool(batch.evaluator.classifier)) != json.dumps(batch.identity, sort_keys=True):
        raise UserError(
            f"detector {batch.evaluator.detector}: a worker has other weights than this machine; give all machines the same files"
        )
    return _network_rows(batch)


def _keys(root: Path, pictures: Sequence[tuple[str, Mapping[str, Any]]], identity: Mapping[str, Any]) -> list[str]:
    return [
        result_key("geneval/detections", image=sha256_file(root / path), record=record, evaluator=identity)
        for path, record in pictures
    ]


def detect_images(
    root: Path,
    out: Path,
    records: Sequence[Mapping[str, Any]],
    evaluator: Evaluator,
    *,
    samples: int | None = None,
    batch: int = 8,
    shard: tuple[int, int] = (0, 1),
    workers: int = 1,
    scheduler: str = "",
) -> dict[str, int]:
    """Detects what the set's images show and keeps it below `out`/detections; images that were looked at before are not
    looked at again.

    Returns {"images", "kept", "detected"}. Raises UserErrors for an incomplete set, UserError for networks that are not
    the folder's or cannot be loaded.
    """
    items = read_images(root, records, samples)
    identity = evaluator_identity(evaluator, records)
    claim(out / DETECTIONS, {"suite": SUITE, "prompts": set_digest(records), "evaluator": identity})
    pictures = [(item.path, item.record) for item in items]
    counts = _look(
        root,
        out / DETECTIONS,
        pictures,
        evaluator,
        identity,
        batch=batch,
        shard=shard,
        workers=workers,
        scheduler=scheduler,
    )
    return {"images": len(items), **counts}


def _look(
    root: Path,
    folder: Path,
    pictures: Sequence[tuple[str, Mapping[str, Any]]],
    evaluator: Evaluator,
    identity: dict[str, Any],
    *,
    batch: int,
    shard: tuple[int, int],
    workers: int,
    scheduler: str,
) -> dict[str, int]:
    """Stores what the evaluator sees in pictures (path relative to `root`, record) below `folder`. Returns {"kept",
    "detected"}.
    """
    keys = _keys(root, pictures, identity)
    known = read_results(folder)
    dealt = batches(list(zip(keys, pictures, strict=True)), batch)[shard[0] :: shard[1]]
    # A batch is evaluated as a whole even where a killed run left a part of it: what a network makes of an image may
    # depend on the batch in the last bits.
    todo = [members for members in dealt if any(key not in known for key, _ in members)]

    def prepared(members: tuple[tuple[str, tuple[str, Mapping[str, Any]]], ...]) -> _Batch:
        return _Batch(
            tuple(read_pixels(root / path) for _, (path, _) in members),
            tuple(record for _, (_, record) in members),
            evaluator,
            identity,
        )

    total = sum(map(len, todo))
    with open_shard(folder, shard_name(shard)) as results, progress("detect: images", total) as advance:

        def done(index: int, rows: list[dict[str, Any]]) -> None:
            fresh = {key: row for (key, _), row in zip(todo[index], rows, strict=True) if key not in known}
            known.update(fresh)
            results.append_all(fresh)
            advance(len(rows))

        each(evaluate, todo, prepared, done, workers=workers, scheduler=scheduler)
    return {"kept": sum(map(len, dealt)) - total, "detected": total}


# --- verdict ----------------------------------------------------------------------------------------------------------


def _detections(row: Mapping[str, Any]) -> dict[str, list[Detection]]:
    found: dict[str, list[Detection]] = {}
    for one in row["detections"]:
        x0, y0, x1, y1 = one["box"]
        found.setdefault(one["class"], []).append(Detection(one["class"], one["color"], one["score"], (x0, y0, x1, y1)))
    return found


def stored_detections(
    root: Path, out: Path, records: Sequence[Mapping[str, Any]], samples: int | None = None
) -> tuple[list[Item], list[dict[str, Any]]]:
    """Every image of the set with its stored row. Raises UserErrors where a set is incomplete, was detected for other
    prompts, or not to its end.
    """
    items = read_images(root, records, samples)
    folder = out / DETECTIONS
    settings = read_settings(folder)
    if settings.get("prompts") != set_digest(records):
        raise UserError(
            f"{folder}: its detections were made for another prompt set; give the same --prompts as then, or detect into another folder"
        )
    known = read_results(folder)
    rows = [known.get(key) for key in _keys(root, [(item.path, item.record) for item in items], settings["evaluator"])]
    missing = [item.path for item, row in zip(items, rows, strict=True) if row is None]
    if missing:
        first = ", ".join(missing[:3])
        raise UserError(
            f"{folder}: {len(missing)} of {len(items)} images have no detections, e.g. {first}; run the detect step to its end (every shard of it)"
        )
    return items, [row for row in rows if row is not None]


def _official_row(
    item: Item, correct: bool, reasons: Sequence[str], seen: Mapping[str, Sequence[Detection]]
) -> dict[str, Any]:
    """A line of the reference's per-image file; metadata and details are JSON text in it."""
    details = {name: [[*one.box, one.score] for one in found] for name, found in seen.items() if found}
    return {
        "filename": item.path,
        "tag": item.record["tag"],
        "prompt": item.record["prompt"],
        "correct": correct,
        "reason": "\n".join(reasons),
        "metadata": json.dumps(item.record),
        "details": json.dumps(details),
    }


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reference's summary of its per-image rows: pooled share of images, share of prompts with any correct image,
    share by tag, and their plain mean.
    """
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(bool(row["correct"]))
        by_prompt[row["metadata"]] = by_prompt.get(row["metadata"], False) or bool(row["correct"])
    return {
        "images": len(rows),
        "prompts": len(by_prompt),
        "correct_images": float(np.mean([row["correct"] for row in rows])),
        "correct_prompts": float(np.mean(list(by_prompt.values()))),
        "tags": {
            tag: {"score": float(np.mean(values)), "correct": sum(values), "images": len(values)}
            for tag, values in by_tag.items()
        },
        "overall": float(np.mean([np.mean(values) for values in by_tag.values()])),
    }


def _check_colors(items: Sequence[Item], seen: Sequence[Mapping[str, Sequence[Detection]]]) -> None:
    """Without overlaps, a detection that nobody classified may come to the front."""
    for item, found in zip(items, seen, strict=True):
        for name, count in asked_colors(item.record).items():
            if any(one.color is None for one in found.get(name, ())[:count]):
                raise UserError(
                    f"{item.path}: a {name} that was not asked for its colour is among the first {count} under these thresholds; use --max-overlap 1"
                )


def judge_images(
    root: Path,
    out: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    model: str,
    to: Path | None = None,
    thresholds: Thresholds = OFFICIAL,
    samples: int | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Scorecard:
    """Verdicts from stored detections, written below `to` (default `out`/verdict): results.jsonl (the reference's
    per-image file), scores.parquet, summary.json and scorecard.json. A pure function of images, detections and
    arguments: run again it writes the same bytes.

    Raises UserErrors for an incomplete or repeated set, UserError where the detector saw nothing in any image.
    """
    items, rows = stored_detections(root, out, records, samples)
    to = out / VERDICT if to is None else to
    found = [_detections(row) for row in rows]
    seen = [surviving(parse_record(item.record), one, thresholds) for item, one in zip(items, found, strict=True)]
    if not any(objects for one in seen for objects in one.values()):
        raise UserError(
            f"{out}: the detector saw nothing above the threshold in any of {len(items)} images; its weights or the images are wrong"
        )
    _check_colors(items, seen)
    outcomes = [verdict(item.record, one, thresholds) for item, one in zip(items, found, strict=True)]
    official = [
        _official_row(item, outcome.correct, outcome.reasons, one)
        for item, outcome, one in zip(items, outcomes, seen, strict=True)
    ]
    settings = _settings_of(root)
    scores = [
        ExampleScore(
            model,
            SUITE,
            item.record["tag"],
            item.example_id,
            item.k,
            _seed_of(item, settings),
            {"correct": float(outcome.correct)},
            outcome.reasons,
            item.path,
        )
        for item, outcome in zip(items, outcomes, strict=True)
    ]
    images_per_prompt = len(items) // len(records)
    identity = {
        "prompts": set_digest(records),
        "set": "official" if is_official(records) else "custom",
        "images_per_prompt": images_per_prompt,
        "evaluator": read_settings(out / DETECTIONS)["evaluator"],
        "thresholds": asdict(thresholds),
        "images": settings,
    }
    card = scorecard(
        model,
        scores,
        {},
        expected_of(records, images_per_prompt),
        {SUITE: identity},
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )
    summary = {**summary_of(official), "identity": identity}
    write_text(to / RESULTS_FILE, "".join(json.dumps(row) + "\n" for row in official))
    write_scores(to, scores)
    write_json(to / SUMMARY_FILE, summary)
    write_scorecard(to / SCORECARD_FILE, card)
    return card


def expected_of(records: Sequence[Mapping[str, Any]], samples: int) -> dict[str, set[tuple[str, int]]]:
    """Tag -> every (example id, k) of a prompt set with `samples` images a prompt."""
    expected: dict[str, set[tuple[str, int]]] = {}
    for index, record in enumerate(records):
        expected.setdefault(record["tag"], set()).update((example_id(index), k) for k in range(samples))
    return expected


def _settings_of(root: Path) -> dict[str, Any] | None:
    """How the images were made, where the folder says it."""
    return read_json(root / SETTINGS_FILE) if (root / SETTINGS_FILE).exists() else None


def _seed_of(item: Item, settings: Mapping[str, Any] | None) -> int:
    base = (settings or {}).get("seed")
    return UNKNOWN_SEED if base is None else image_seed(item.index, item.k, int(base))


def judge_pictures(
    root: Path,
    store: Path,
    pictures: Sequence[tuple[str, Mapping[str, Any]]],
    evaluator: Evaluator,
    *,
    batch: int,
    workers: int,
    scheduler: str,
) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts of pictures in any layout, in order, and the evaluator's identity: for a stage that has drawn them
    itself. `pictures`: (path relative to `root`, record). What was seen is kept below `store`, so that a stage that was
    killed does not look at equal images twice.

    Raises UserError as `detect_images` does.
    """
    records = [record for _, record in pictures]
    identity = evaluator_identity(evaluator, records)
    folder = store / digest(identity)[:16]
    claim(folder, {"suite": SUITE, "evaluator": identity})
    _look(root, folder, pictures, evaluator, identity, batch=batch, shard=(0, 1), workers=workers, scheduler=scheduler)
    known = read_results(folder)
    return [
        verdict(record, _detections(known[key]))
        for key, record in zip(_keys(root, pictures, identity), records, strict=True)
    ], identity


# --- two detectors ----------------------------------------------------------------------------------------------------


def read_official_rows(path: Path) -> list[dict[str, Any]]:
    """A per-image file of this project or of the reference. Raises UserErrors naming every line at fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a results.jsonl") from error
    rows, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(
                {
                    **row,
                    "correct": bool(row["correct"]),
                    "key": (row["metadata"], Path(row["filename"]).name),
                    "tag": row["tag"],
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f"line {number}: {error!r}")
    if faults or not rows:
        raise UserErrors(f"{path}: not a per-image result file:", faults or ["it is empty"])
    return rows


def agreement(ours: Path, reference: Path) -> dict[str, Any]:
    """How two evaluators judged the same images: agreeing share, difference of the overall score, and by tag [both
    right, only ours, only theirs, both wrong].

    "accepted" says whether one may stand in for the other (the ACCEPTED_ constants). Raises UserErrors for unlike sets.
    """
    a, b = (
        {
            (json.dumps(json.loads(row["key"][0]), sort_keys=True), row["key"][1]): row
            for row in read_official_rows(path)
        }
        for path in (ours, reference)
    )
    if a.keys() != b.keys():
        faults = [
            f"{len(a.keys() - b.keys())} images only in {ours}",
            f"{len(b.keys() - a.keys())} images only in {reference}",
        ]
        raise UserErrors("the two files do not hold the same images:", faults)
    cell = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}
    tags: dict[str, list[int]] = {}
    for key, row in a.items():
        tags.setdefault(row["tag"], [0, 0, 0, 0])[cell[row["correct"], b[key]["correct"]]] += 1
    same = sum(cells[0] + cells[3] for cells in tags.values()) / len(a)
    difference = summary_of(list(a.values()))["overall"] - summary_of(list(b.values()))["overall"]
    accepted = len(a) >= ACCEPTED_IMAGES and same >= ACCEPTED_AGREEMENT and abs(difference) <= ACCEPTED_DIFFERENCE
    return {"images": len(a), "agreement": same, "overall_difference": difference, "tags": tags, "accepted": accepted}
