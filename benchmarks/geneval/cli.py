"""`python -m benchmarks geneval STEP ...`: each step of GenEval by itself, on any model or folder of images."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from benchmarks.geneval.images import SUITE, ImageSet, example_id, image_path, image_seed, read_images, write_metadata
from benchmarks.geneval.prompts import as_jsonl, official_records, read_prompts, set_digest, set_name
from benchmarks.geneval.rules import CLASSIFIER, DETECTOR, OFFICIAL, Thresholds
from benchmarks.steps import SAMPLER, Options, Steps, path, run_step, sample, setting
from benchmarks.store import shard_of
from data.errors import UserError
from data.files import read_json

PROMPTS: Options = {
    "--prompts": path("a metadata file of one's own (JSON Lines); default: the official 553 records", "FILE")
}
SAMPLES: Options = {
    "--samples": {"type": int, "help": "images a prompt that must be there (default: as many as the first prompt has)"}
}
EVALUATOR: Options = {
    "--detector": setting(DETECTOR, "a folder, a name on the hub, or `micro` for the micro world's images", "MODEL"),
    "--classifier": setting(CLASSIFIER, "the CLIP that tells colours", "MODEL"),
    "--device": setting("cpu", "cpu, cuda, cuda:1, ...", "DEVICE"),
    "--batch": setting(8, "images that pass a network together; fixed for a folder's life"),
    "--workers": setting(1, "processes on this machine"),
    "--scheduler": setting("", "a dask scheduler, e.g. tcp://127.0.0.1:8786, instead of processes here", "ADDRESS"),
    "--shard": setting("0/1", "every N-th batch from the I-th on: for machines without a scheduler", "I/N"),
}
THRESHOLDS: Options = {
    "--threshold": setting(OFFICIAL.score, "a detection counts above this score", dest="score"),
    "--counting-threshold": setting(OFFICIAL.counting, "the same for counting", dest="counting"),
    "--max-objects": setting(OFFICIAL.most, "detections of a class that count", dest="most"),
    "--max-overlap": setting(OFFICIAL.overlap, "IoU that drops the weaker of two boxes; 1: none", dest="overlap"),
    "--position-threshold": setting(OFFICIAL.position, "share of the extents that an offset exceeds", dest="position"),
}
INTERVALS: Options = {
    "--resamples": setting(10_000, "of the bootstrap"),
    "--confidence": setting(0.95, "of the intervals"),
    "--seed": setting(0, "of the bootstrap"),
}


def _records(given: Namespace) -> list[dict[str, Any]]:
    return read_prompts(given.prompts) if given.prompts else official_records()


def _images(given: Namespace) -> ImageSet:
    return read_images(given.images, _records(given), given.samples)


def _values(given: Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(given, name) for name in names}


def _prompts(given: Namespace) -> None:
    """Print the prompt set as JSON Lines: the 553 official records, or a checked file of one's own."""
    if given.text and given.manifest:
        raise UserError("--text and --manifest are two forms of the set; give one of them")
    records = _records(given)
    fixed = {"split": "eval", "capability": "t2i"}
    rows = [
        {"id": example_id(index), **fixed, "category": record["tag"], "prompt": record["prompt"], "record": record}
        for index, record in enumerate(records)
    ]
    text = "".join(f"{record['prompt']}\n" for record in records)
    sys.stdout.write(text if given.text else as_jsonl(rows if given.manifest else records))


def _generate(given: Namespace) -> int:
    """Sample the prompt set with a model into the official folder layout. What is there already is not made again."""
    if given.samples < 1:
        raise UserError(f"--samples {given.samples}: expected 1 or more")
    records = _records(given)
    write_metadata(given.images, records)
    jobs = []
    for index, record in enumerate(records):
        for k in range(given.samples):
            seed, place = image_seed(index, k, given.seed), image_path(index, k)
            jobs.append({"id": f"{example_id(index)}-{k}", "prompt": record["prompt"], "seed": seed, "path": place})
    settings = {"suite": SUITE, "prompts": set_digest(records), "set": set_name(records), "seed": given.seed}
    return sample(given.model, given.images, settings, jobs, given.sampler)


def _detect(given: Namespace) -> None:
    """Detect what the images show and keep it below OUT/detections. Run again, it goes on where it stopped."""
    from benchmarks.geneval.run import Evaluator, detect_images

    evaluator = Evaluator(**_values(given, *(field.name for field in fields(Evaluator))))
    counts = detect_images(_images(given), given.out, evaluator, shard_of(given.shard))
    print(f"detect: {counts['detected']} images looked at, {counts['kept']} were known, {counts['images']} in the set")


def _verdict(given: Namespace) -> None:
    """Verdicts, per-image file, summary and scorecard from the stored detections; no network runs."""
    from benchmarks.geneval.run import SUMMARY_FILE, VERDICT, judge_images

    to = given.to or given.out / VERDICT
    thresholds = Thresholds(**_values(given, *(field.name for field in fields(Thresholds))))
    images, intervals = _images(given), _values(given, "seed", "resamples", "confidence")
    card = judge_images(images, given.out, model=given.model, to=to, thresholds=thresholds, **intervals)
    summary = read_json(to / SUMMARY_FILE)
    print(f"{'metric':24}{'value':>9}   {'interval':19}{'correct':>8}{'images':>8}")
    for name, metric in card.metrics.items():
        tag = summary["tags"].get(name.split("/")[1], {})
        counts = f"{tag.get('correct', ''):>8}{tag.get('images', ''):>8}"
        print(f"{name:24}{metric.mean:9.5f}   {metric.low:.4f} to {metric.high:.4f}   {counts}")
    shares = f"images correct {summary['correct_images']:.2%}, "
    shares += f"prompts with a correct image {summary['correct_prompts']:.2%}"
    print(f"images {summary['images']}, prompts {summary['prompts']}, {shares}; set: {summary['identity']['set']}")


def _report(given: Namespace) -> None:
    """Tables of one or several verdicts, paired comparisons with the first, and its page."""
    from benchmarks.geneval.report import report

    intervals = _values(given, "seed", "resamples", "confidence")
    print(report(given.out, given.against, given.training, images=given.images, **intervals))


def _agreement(given: Namespace) -> None:
    """How far two evaluators agree on the same images: this project's per-image file beside the reference's."""
    from benchmarks.geneval.run import agreement

    print(json.dumps(agreement(given.ours, given.reference), indent=2))


FORMS: Options = {
    "--text": {"action": "store_true", "help": "the prompts alone, one a line"},
    "--manifest": {"action": "store_true", "help": "as a manifest of the eval split, which the collect stage reads"},
}
IMAGES: Options = {"--images": path(required=True)}
OUT: Options = {"--out": path("where detections are kept, and verdicts below them", required=True)}
COUNT: Options = {"--samples": setting(4, "images a prompt; the paper's rows have 1")}
NAMES: Options = {
    "--to": path("where verdicts go (default: OUT/verdict); other thresholds need another folder"),
    "--model": setting("model", "in the scorecard", "NAME"),
}
MODELS: Options = {
    "--out": path("as given to detect, or a folder that verdict wrote to", required=True),
    "--against": path("another model's; may be repeated", action="append", default=[]),
    "--training": path("another training of the same recipe; two or more", action="append", default=[]),
    "--images": path("the first model's images: with them the page report.html is written"),
}
FILES: Options = {flag: path(metavar="FILE", required=True) for flag in ("--ours", "--reference")}
STEPS: Steps = {
    "prompts": (_prompts, {**FORMS, **PROMPTS}),
    "generate": (_generate, {**IMAGES, **COUNT, **PROMPTS, **SAMPLER}),
    "detect": (_detect, {**IMAGES, **OUT, **EVALUATOR, **SAMPLES, **PROMPTS}),
    "verdict": (_verdict, {**IMAGES, **OUT, **NAMES, **SAMPLES, **PROMPTS, **THRESHOLDS, **INTERVALS}),
    "report": (_report, {**MODELS, **INTERVALS}),
    "agreement": (_agreement, FILES),
}


def cli(arguments: Sequence[str]) -> int:
    """Runs a step; returns the exit status. Raises UserError for an unknown step."""
    if arguments[:1] == ["judge"]:
        raise UserError("GenEval asks no judge: detect and verdict are its steps")
    return run_step("geneval", STEPS, arguments)
