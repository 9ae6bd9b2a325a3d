"""`python -m benchmarks geneval STEP ...`: each step of GenEval by itself, on any model or folder of images."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.geneval.images import SUITE, example_id, image_path, image_seed, write_metadata
from benchmarks.geneval.prompts import as_jsonl, is_official, official_records, read_prompts, set_digest
from benchmarks.geneval.rules import (
    COUNTING_THRESHOLD,
    MAX_OVERLAP,
    MAX_PER_CLASS,
    POSITION_THRESHOLD,
    THRESHOLD,
    Thresholds,
)
from benchmarks.store import shard_of
from data.commands import overview
from data.errors import UserError
from data.files import write_json

DETECTOR, CLASSIFIER = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
SAMPLES = 4  # images a prompt, as the benchmark has it; the paper's rows have 1


def _parser(step: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"python -m benchmarks geneval {step}", description=description)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a metadata file of one's own (JSON Lines); default: the official 553 records",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch",
        type=int,
        default=8,
        help="images that pass a network together; fixed for a folder's life (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (default: %(default)s)")
    parser.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="a dask scheduler, e.g. tcp://127.0.0.1:8786, instead of processes here",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="only every N-th batch, beginning with the I-th: for machines without a scheduler",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")


def _records(path: Path | None) -> list[dict[str, Any]]:
    return official_records() if path is None else read_prompts(path)


def _manifest_row(index: int, record: Mapping[str, Any]) -> dict[str, Any]:
    shared = {
        "id": example_id(index),
        "split": "eval",
        "capability": "t2i",
        "category": record["tag"],
        "prompt": record["prompt"],
    }
    return {**shared, "record": dict(record)}


def _prompts(arguments: Sequence[str]) -> int:
    parser = _parser(
        "prompts", "Print the prompt set as JSON Lines: the 553 official records, or a checked file of one's own."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="the prompts alone, one a line")
    form.add_argument(
        "--manifest",
        action="store_true",
        help="as a manifest of the eval split, for a folder that the collect stage reads",
    )
    _add_prompts(parser)
    parsed = parser.parse_args(arguments)
    records = _records(parsed.prompts)
    if parsed.manifest:
        sys.stdout.write(as_jsonl([_manifest_row(index, record) for index, record in enumerate(records)]))
        return 0
    sys.stdout.write("".join(f"{record['prompt']}\n" for record in records) if parsed.text else as_jsonl(records))
    return 0


def _generate(arguments: Sequence[str]) -> int:
    parser = _parser(
        "generate",
        "Sample the prompt set with a model into the official folder layout. What is there already is not made again.",
    )
    parser.add_argument(
        "--model", required=True, metavar="URI", help="as `python -m tasks sample-set --model` takes it"
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="images a prompt (default: %(default)s; the paper's rows have 1)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="base seed; every image has a seed of its own that follows from it (default: %(default)s)",
    )
    _add_prompts(parser)
    parser.add_argument(
        "sampler",
        nargs=argparse.REMAINDER,
        metavar="-- OPTIONS",
        help="passed on to `python -m tasks sample-set`, e.g. -- --steps 28 --guidance 1",
    )
    parsed = parser.parse_args(arguments)
    if parsed.samples < 1:
        raise UserError(f"--samples {parsed.samples}: expected 1 or more")
    records = _records(parsed.prompts)
    write_metadata(parsed.images, records)
    jobs = [
        {
            "id": f"{example_id(index)}-{k}",
            "prompt": record["prompt"],
            "seed": image_seed(index, k, parsed.seed),
            "path": image_path(index, k),
        }
        for index, record in enumerate(records)
        for k in range(parsed.samples)
    ]
    settings = {
        "suite": SUITE,
        "prompts": set_digest(records),
        "set": "official" if is_official(records) else "custom",
        "seed": parsed.seed,
    }
    with tempfile.TemporaryDirectory(prefix="geneval-") as folder:
        file = Path(folder) / "jobs.json"
        write_json(file, {"settings": settings, "jobs": jobs})
        # Sampling belongs to the room above this one, so it is another program: it is given the list and nothing else.
        command = [
            sys.executable,
            "-m",
            "tasks",
            "sample-set",
            "--model",
            parsed.model,
            "--jobs",
            str(file),
            "--out",
            str(parsed.images),
        ]
        return subprocess.run([*command, *(word for word in parsed.sampler if word != "--")], check=False).returncode


def _detect(arguments: Sequence[str]) -> int:
    from benchmarks.geneval.run import Evaluator, detect_images

    parser = _parser(
        "detect",
        "Detect what the images show and keep it below OUT/detections. Run again, it goes on where it stopped.",
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--detector",
        default=DETECTOR,
        metavar="MODEL",
        help="a folder, a name on the hub, or `micro` for the micro world's pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--classifier", default=CLASSIFIER, metavar="MODEL", help="the CLIP that tells colours (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, help="images a prompt that must be there (default: as many as the first prompt has)"
    )
    _add_prompts(parser)
    _add_workers(parser)
    parsed = parser.parse_args(arguments)
    counts = detect_images(
        parsed.images,
        parsed.out,
        _records(parsed.prompts),
        Evaluator(parsed.detector, parsed.classifier, parsed.device),
        samples=parsed.samples,
        batch=parsed.batch,
        shard=shard_of(parsed.shard),
        workers=parsed.workers,
        scheduler=parsed.scheduler,
    )
    print(f"detect: {counts['detected']} images looked at, {counts['kept']} were known, {counts['images']} in the set")
    return 0


def _verdict(arguments: Sequence[str]) -> int:
    from benchmarks.geneval.run import VERDICT, judge_images

    parser = _parser(
        "verdict", "Verdicts, per-image file, summary and scorecard from the stored detections; no network runs."
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="as given to detect")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="where verdicts go (default: OUT/verdict); name another for other thresholds",
    )
    parser.add_argument(
        "--model", default="model", metavar="NAME", help="the name in the scorecard (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int)
    _add_prompts(parser)
    for name, default, text in (
        ("threshold", THRESHOLD, "a detection counts above this score"),
        ("counting-threshold", COUNTING_THRESHOLD, "the same for counting"),
        ("max-objects", MAX_PER_CLASS, "detections of a class that are looked at"),
        ("max-overlap", MAX_OVERLAP, "IoU from which the less confident of two boxes is dropped; 1 drops none"),
        ("position-threshold", POSITION_THRESHOLD, "share of the extents that an offset must exceed"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    thresholds = Thresholds(
        parsed.threshold, parsed.counting_threshold, parsed.max_objects, parsed.max_overlap, parsed.position_threshold
    )
    card = judge_images(
        parsed.images,
        parsed.out,
        _records(parsed.prompts),
        model=parsed.model,
        to=parsed.to,
        thresholds=thresholds,
        samples=parsed.samples,
        seed=parsed.seed,
        resamples=parsed.resamples,
        confidence=parsed.confidence,
    )
    _show(parsed.to or parsed.out / VERDICT, card.metrics)
    return 0


def _show(folder: Path, metrics: Mapping[str, Any]) -> None:
    from benchmarks.geneval.run import SUMMARY_FILE
    from data.files import read_json

    summary = read_json(folder / SUMMARY_FILE)
    print(f"{'metric':24}{'value':>9}   {'interval':19}{'correct':>8}{'images':>8}")
    for path, metric in metrics.items():
        tag = summary["tags"].get(path.split("/")[1], {})
        print(
            f"{path:24}{metric.mean:9.5f}   {metric.low:.4f} to {metric.high:.4f}   {tag.get('correct', ''):>8}{tag.get('images', ''):>8}"
        )
    print(
        f"images {summary['images']}, prompts {summary['prompts']}, images correct {summary['correct_images']:.2%}, ",
        end="",
    )
    print(f"prompts with a correct image {summary['correct_prompts']:.2%}; set: {summary['identity']['set']}")


def _report(arguments: Sequence[str]) -> int:
    from benchmarks.geneval.report import report

    parser = _parser("report", "Tables of one or several verdicts, paired comparisons with the first, and its page.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="as given to detect, or a folder that verdict wrote to"
    )
    parser.add_argument(
        "--against", type=Path, action="append", default=[], metavar="DIR", help="another model's; may be repeated"
    )
    parser.add_argument(
        "--training",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="another training seed of the same recipe; two or more",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="the first one's images: with them the page report.html is written"
    )
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    numbers = {"seed": parsed.seed, "resamples": parsed.resamples, "confidence": parsed.confidence}
    print(report(parsed.out, parsed.against, parsed.training, images=parsed.images, **numbers))
    return 0


def _agreement(arguments: Sequence[str]) -> int:
    from benchmarks.geneval.run import agreement

    parser = _parser(
        "agreement",
        "How far two evaluators agree on the same images: this project's per-image file beside the reference's.",
    )
    parser.add_argument("--ours", type=Path, required=True, metavar="FILE")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE")
    parsed = parser.parse_args(arguments)
    print(json.dumps(agreement(parsed.ours, parsed.reference), indent=2))
    return 0


STEPS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "prompts": (_prompts, "print the 553 records"),
    "generate": (_generate, "sample the set with a model"),
    "detect": (_detect, "detect objects and colours, once"),
    "verdict": (_verdict, "verdicts, summary and scorecard from what was detected"),
    "report": (_report, "tables, paired comparisons, the page"),
    "agreement": (_agreement, "compare two detectors' verdicts on the same images"),
}


def cli(arguments: Sequence[str]) -> int:
    """Runs one step; returns the exit status. Raises UserError for an unknown step."""
    name, *others = arguments or ["--help"]
    if name in STEPS:
        return STEPS[name][0](others)
    if name == "judge":
        raise UserError("GenEval asks no judge: detect and verdict are its steps")
    return overview("python -m benchmarks geneval STEP", name, {"": {step: text for step, (_, text) in STEPS.items()}})
