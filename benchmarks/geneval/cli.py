"""`python -m benchmarks geneval STEP ...`: each step of GenEval by itself, on any model or folder of images."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.geneval.images import SUITE, example_id, image_path, image_seed, write_metadata
from benchmarks.geneval.prompts import as_jsonl, is_official, official_records, read_prompts, set_digest
from benchmarks.geneval.rules import OFFICIAL, Thresholds
from benchmarks.steps import SAMPLER, Options, Step, run_step, sample, setting
from benchmarks.store import shard_of
from data.errors import UserError
from data.files import read_json

SAMPLES = 4  # images a prompt, as the benchmark has it; the paper's rows have 1

FLAG = {"action": "store_true"}
FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
FOLDERS: dict[str, Any] = {**FOLDER, "action": "append", "default": []}
NEEDED: dict[str, Any] = {**FOLDER, "required": True}
FILE: dict[str, Any] = {"type": Path, "required": True, "metavar": "FILE"}
PROMPTS: Options = {
    "--prompts": {
        "type": Path,
        "metavar": "FILE",
        "help": "a metadata file of one's own (JSON Lines); default: the official 553 records",
    }
}
DETECTOR: Options = {
    "--detector": {
        "default": "facebook/mask2former-swin-small-coco-instance",
        "metavar": "MODEL",
        "help": "a folder, a name on the hub, or `micro` for the micro world's pictures (default: %(default)s)",
    },
    "--classifier": {
        "default": "openai/clip-vit-large-patch14",
        "metavar": "MODEL",
        "help": "the CLIP that tells colours (default: %(default)s)",
    },
    "--samples": {"type": int, "help": "images a prompt that must be there (default: as many as the first prompt has)"},
    "--batch": setting(8, "images that pass a network together; fixed for a folder's life"),
    "--workers": setting(1, "processes on this machine"),
    "--scheduler": {
        "default": "",
        "metavar": "ADDRESS",
        "help": "a dask scheduler, e.g. tcp://127.0.0.1:8786, instead of processes here",
    },
    "--shard": {
        "default": "0/1",
        "metavar": "I/N",
        "help": "only every N-th batch, beginning with the I-th: for machines without a scheduler",
    },
    "--device": {"default": "cpu", "help": "cpu, cuda, cuda:1, ... (default: %(default)s)"},
}
THRESHOLDS: Options = {
    "--threshold": setting(OFFICIAL.score, "a detection counts above this score", dest="score"),
    "--counting-threshold": setting(OFFICIAL.counting, "the same for counting", dest="counting"),
    "--max-objects": setting(OFFICIAL.most, "detections of a class that count", dest="most"),
    "--max-overlap": setting(
        OFFICIAL.overlap, "IoU from which the less confident of two boxes is dropped; 1 drops none", dest="overlap"
    ),
    "--position-threshold": setting(
        OFFICIAL.position, "share of the extents that an offset must exceed", dest="position"
    ),
}
INTERVALS: Options = {
    "--resamples": setting(10_000, "of the bootstrap"),
    "--confidence": setting(0.95, "of the intervals"),
    "--seed": setting(0, "of the bootstrap"),
}


def _records(path: Path | None) -> list[dict[str, Any]]:
    return official_records() if path is None else read_prompts(path)


def _intervals(given: Namespace) -> dict[str, Any]:
    return {"seed": given.seed, "resamples": given.resamples, "confidence": given.confidence}


def _manifest_row(index: int, record: Mapping[str, Any]) -> dict[str, Any]:
    row = {"id": example_id(index), "split": "eval", "capability": "t2i"}
    return {**row, "category": record["tag"], "prompt": record["prompt"], "record": dict(record)}


def _prompts(given: Namespace) -> None:
    """Print the prompt set as JSON Lines: the 553 official records, or a checked file of one's own."""
    records = _records(given.prompts)
    if given.text and given.manifest:
        raise UserError("--text and --manifest are two forms of the set; give one of them")
    if given.text:
        sys.stdout.write("".join(f"{record['prompt']}\n" for record in records))
    else:
        rows = [_manifest_row(*pair) for pair in enumerate(records)] if given.manifest else records
        sys.stdout.write(as_jsonl(rows))


def _generate(given: Namespace) -> int:
    """Sample the prompt set with a model into the official folder layout. What is there already is not made again."""
    if given.samples < 1:
        raise UserError(f"--samples {given.samples}: expected 1 or more")
    records = _records(given.prompts)
    write_metadata(given.images, records)
    jobs = [
        {
            "id": f"{example_id(index)}-{k}",
            "prompt": record["prompt"],
            "seed": image_seed(index, k, given.seed),
            "path": image_path(index, k),
        }
        for index, record in enumerate(records)
        for k in range(given.samples)
    ]
    name = "official" if is_official(records) else "custom"
    settings = {"suite": SUITE, "prompts": set_digest(records), "set": name, "seed": given.seed}
    return sample(given.model, given.images, settings, jobs, given.sampler)


def _detect(given: Namespace) -> None:
    """Detect what the images show and keep it below OUT/detections. Run again, it goes on where it stopped."""
    from benchmarks.geneval.run import Evaluator, detect_images

    evaluator = Evaluator(**{field.name: getattr(given, field.name) for field in fields(Evaluator)})
    records, shard = _records(given.prompts), shard_of(given.shard)
    counts = detect_images(given.images, given.out, records, evaluator, samples=given.samples, shard=shard)
    print(f"detect: {counts['detected']} images looked at, {counts['kept']} were known, {counts['images']} in the set")


def _verdict(given: Namespace) -> None:
    """Verdicts, per-image file, summary and scorecard from the stored detections; no network runs."""
    from benchmarks.geneval.run import SUMMARY_FILE, VERDICT, judge_images

    to = given.to or given.out / VERDICT
    card = judge_images(
        given.images,
        given.out,
        _records(given.prompts),
        model=given.model,
        to=to,
        thresholds=Thresholds(**{field.name: getattr(given, field.name) for field in fields(Thresholds)}),
        samples=given.samples,
        **_intervals(given),
    )
    summary = read_json(to / SUMMARY_FILE)
    print(f"{'metric':24}{'value':>9}   {'interval':19}{'correct':>8}{'images':>8}")
    for path, metric in card.metrics.items():
        tag = summary["tags"].get(path.split("/")[1], {})
        counts = f"{tag.get('correct', ''):>8}{tag.get('images', ''):>8}"
        print(f"{path:24}{metric.mean:9.5f}   {metric.low:.4f} to {metric.high:.4f}   {counts}")
    shares = f"images correct {summary['correct_images']:.2%}, "
    shares += f"prompts with a correct image {summary['correct_prompts']:.2%}"
    print(f"images {summary['images']}, prompts {summary['prompts']}, {shares}; set: {summary['identity']['set']}")


def _report(given: Namespace) -> None:
    """Tables of one or several verdicts, paired comparisons with the first, and its page."""
    from benchmarks.geneval.report import report

    print(report(given.out, given.against, given.training, images=given.images, **_intervals(given)))


def _agreement(given: Namespace) -> None:
    """How far two evaluators agree on the same images: this project's per-image file beside the reference's."""
    from benchmarks.geneval.run import agreement

    print(json.dumps(agreement(given.ours, given.reference), indent=2))


STEPS = {
    "prompts": Step(
        _prompts,
        "print the 553 records",
        {
            "--text": {**FLAG, "help": "the prompts alone, one a line"},
            "--manifest": {**FLAG, "help": "as a manifest of the eval split, which the collect stage reads"},
            **PROMPTS,
        },
    ),
    "generate": Step(
        _generate,
        "sample the set with a model",
        {"--images": NEEDED, "--samples": setting(SAMPLES, "images a prompt; the paper's rows have 1")}
        | PROMPTS
        | SAMPLER,
    ),
    "detect": Step(
        _detect, "detect objects and colours, once", {"--images": NEEDED, "--out": NEEDED, **DETECTOR, **PROMPTS}
    ),
    "verdict": Step(
        _verdict,
        "verdicts, summary and scorecard from what was detected",
        {
            "--images": NEEDED,
            "--out": {**NEEDED, "help": "as given to detect"},
            "--to": {**FOLDER, "help": "where verdicts go (default: OUT/verdict); other thresholds, another folder"},
            "--model": {"default": "model", "metavar": "NAME", "help": "in the scorecard (default: %(default)s)"},
            "--samples": DETECTOR["--samples"],
            **PROMPTS,
            **THRESHOLDS,
            **INTERVALS,
        },
    ),
    "report": Step(
        _report,
        "tables, paired comparisons, the page",
        {
            "--out": {**NEEDED, "help": "as given to detect, or a folder that verdict wrote to"},
            "--against": {**FOLDERS, "help": "another model's; may be repeated"},
            "--training": {**FOLDERS, "help": "another training seed of the same recipe; two or more"},
            "--images": {**FOLDER, "help": "the first model's images: with them the page report.html is written"},
            **INTERVALS,
        },
    ),
    "agreement": Step(
        _agreement, "compare two detectors' verdicts on the same images", {"--ours": FILE, "--reference": FILE}
    ),
}


def cli(arguments: Sequence[str]) -> int:
    """Runs a step; returns the exit status. Raises UserError for an unknown step."""
    if arguments[:1] == ["judge"]:
        raise UserError("GenEval asks no judge: detect and verdict are its steps")
    return run_step("geneval", STEPS, arguments)
