"""`python -m benchmarks gedit STEP ...`: each step of GEdit-Bench by itself, on any folder of edited images in the
official layout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.gedit.judging import judge_folder
from benchmarks.gedit.price import IMAGE_TOKENS
from benchmarks.gedit.questions import SUITE, image_seed
from benchmarks.gedit.rows import (
    EditTask,
    check_official,
    edited_path,
    is_official,
    load_tasks,
    set_digest,
    source_path,
)
from benchmarks.gedit.rules import LANGUAGES, SUBSETS
from benchmarks.gedit.verdict import column_scorecard, freeze_anchors, read_judgements, rows_of, summary
from benchmarks.judge.access import Access, name_of_local
from benchmarks.judge.protocol import IMAGE_FORMATS, JUDGES, RESIZES, JudgeSettings, read_rgb
from benchmarks.judge.wording import load_wording
from benchmarks.scores.scorecard import STATUSES, write_scorecard, write_scores
from benchmarks.steps import sample
from benchmarks.store import shard_of
from data.commands import overview
from data.errors import UserError, UserErrors
from data.files import atomic_file, write_json

UNPACKED = "sources"
SUMMARY_FILE, SCORECARD_FILE = "summary.json", "scorecard.json"
RETRIED = [status for status in STATUSES if status not in ("ok", "missing_image", "bad_image")]


def _parser(step: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"python -m benchmarks gedit {step}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="GEdit-Bench's Parquet or Arrow files, or a folder with manifest.csv or .jsonl",
    )
    parser.add_argument(
        "--custom-set",
        action="store_true",
        help="the set is your own: do not compare its counts with the official ones",
    )
    parser.add_argument("--language", choices=[*LANGUAGES, "both"], default="both", help="which rows are taken")
    parser.add_argument(
        "--unpack",
        type=Path,
        metavar="FOLDER",
        help="where source images out of Parquet or Arrow files are written (default: beside the output)",
    )


def _tasks(parsed: argparse.Namespace, out: Path) -> list[EditTask]:
    tasks = load_tasks(parsed.data, parsed.unpack or out / UNPACKED)
    if not parsed.custom_set:
        check_official(tasks)
    chosen = [task for task in tasks if parsed.language in ("both", task.language)]
    if not chosen:
        raise UserError(f"{parsed.data}: no row in the language {parsed.language!r}")
    return chosen


# --- steps ------------------------------------------------------------------------------------------------------------


def _prompts(arguments: Sequence[str]) -> int:
    parser = _parser(
        "prompts", "Print the set's rows as JSON Lines, and on stderr how many there are of each category."
    )
    _add_data(parser)
    parsed = parser.parse_args(arguments)
    tasks = _tasks(parsed, Path("."))
    for task in tasks:
        row = {
            "key": task.key,
            "instruction_language": task.language,
            "task_type": task.category,
            "instruction": task.instruction,
        }
        sys.stdout.write(
            json.dumps({**row, "intersection_exist": task.intersection, "source": str(task.source)}, ensure_ascii=False)
            + "\n"
        )
    counts = Counter((task.language, task.category) for task in tasks)
    sys.stderr.write(
        "".join(f"{language} {category}: {count}\n" for (language, category), count in sorted(counts.items()))
    )
    return 0


def _generate(arguments: Sequence[str]) -> int:
    parser = _parser(
        "generate",
        "Edit the set's source images with a model into the official folder layout. What is there already is not made again.",
    )
    _add_data(parser)
    parser.add_argument(
        "--model", required=True, metavar="URI", help="as `python -m tasks sample-set --model` takes it"
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the model's folder; gets fullset/TASK_TYPE/LANGUAGE/KEY.png",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="base seed; every image has a seed of its own that follows from it"
    )
    parser.add_argument(
        "sampler",
        nargs=argparse.REMAINDER,
        metavar="-- OPTIONS",
        help="passed on to `python -m tasks sample-set`, e.g. -- --steps 28",
    )
    parsed = parser.parse_args(arguments)
    tasks = _tasks(parsed, parsed.images)
    jobs = []
    for task in tasks:
        copy = source_path(parsed.images, task)
        if not copy.exists():
            with atomic_file(copy) as temporary:
                read_rgb(task.source).save(temporary, format="PNG")
        path = edited_path(".", task).as_posix()
        jobs.append(
            {
                "id": task.id,
                "prompt": task.instruction,
                "seed": image_seed(task, parsed.seed),
                "path": path,
                "source": str(task.source.resolve()),
            }
        )
    settings = {
        "suite": SUITE,
        "prompts": set_digest(tasks),
        "set": "official" if is_official(tasks) else "custom",
        "seed": parsed.seed,
    }
    return sample(parsed.model, parsed.images, settings, jobs, parsed.sampler)


def _judge_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "judge",
        "Ask a judge about every edited image; what was answered is kept, and the same command goes on from there.",
    )
    _add_data(parser)
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the model's folder: FOLDER/fullset/TASK_TYPE/LANGUAGE/KEY.png",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the judgements are kept")
    parser.add_argument("--model", metavar="NAME", help="the name of what is judged (default: the folder's name)")
    judge = parser.add_argument_group("the judge (its settings are part of every result)")
    judge.add_argument("--judge", choices=JUDGES, default="endpoint")
    judge.add_argument(
        "--judge-model",
        required=True,
        metavar="NAME",
        help="as the server names it, with its date; for `local` the checkpoint's folder, for `replay` a folder of judgements",
    )
    judge.add_argument("--provider", help="who serves it (default: the base URL's host)")
    judge.add_argument(
        "--wording",
        "--judge-prompts",
        dest="wording",
        type=Path,
        metavar="PATH",
        help="other texts than ours: a folder with semantic.txt and quality.txt, or the upstream's vie_prompts.py",
    )
    judge.add_argument("--temperature", type=float, default=0.0)
    judge.add_argument(
        "--seed", type=int, default=0, help="sent with every question, plus the repeat's number; -1 sends none"
    )
    judge.add_argument("--max-tokens", type=int, default=512)
    judge.add_argument("--images-first", action="store_true", help="the images before the text")
    judge.add_argument("--image-format", choices=IMAGE_FORMATS, default="png")
    judge.add_argument("--resize", choices=RESIZES, default="match-source")
    judge.add_argument(
        "--json-schema", action="store_true", help="ask the server to enforce the reply's form, where it can"
    )
    judge.add_argument(
        "--extra", type=json.loads, default={}, metavar="JSON", help="further fields of the request's body"
    )
    judge.add_argument(
        "--repeats", type=int, default=1, help="how often each question is asked; 3 shows the judge's noise"
    )
    server = parser.add_argument_group("how it is reached")
    server.add_argument("--base-url", default="https://api.openai.com/v1")
    server.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help='the environment variable with the key; "" for a server without keys',
    )
    server.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    server.add_argument("--tries", type=int, default=6)
    server.add_argument(
        "--wait",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="before the second try; doubled before each further one",
    )
    server.add_argument("--longest-wait", type=float, default=60.0, metavar="SECONDS")
    server.add_argument("--per-minute", type=int, default=0, help="requests that may begin in a minute; 0: no limit")
    server.add_argument("--concurrency", type=int, default=8, help="questions under way at once")
    local = parser.add_argument_group("the local judge")
    local.add_argument("--device", default="cuda")
    local.add_argument("--dtype", default="bfloat16")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--anchors",
        type=Path,
        metavar="FOLDER",
        help="a frozen set, judged anew with this run to measure the judge's drift",
    )
    run.add_argument(
        "--retry", nargs="*", choices=RETRIED, default=[], metavar="STATUS", help="ask again what ended so"
    )
    run.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes on this machine that ask; they share --concurrency and --per-minute",
    )
    run.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="a dask scheduler, e.g. tcp://127.0.0.1:8786, instead of processes here",
    )
    run.add_argument("--shard", default="0/1", metavar="I/N", help="take every N-th question, beginning with the I-th")
    run.add_argument(
        "--image-tokens", choices=sorted(IMAGE_TOKENS), default="tiles", help="how images count in the preview"
    )
    run.add_argument(
        "--prices", type=float, nargs=2, metavar=("PROMPT", "COMPLETION"), help="per million tokens, for the preview"
    )
    run.add_argument("--highest-price", type=float, help="refuse to begin above it")
    run.add_argument("--preview", action="store_true", help="say what it would cost, and stop")
    return parser


def _access(parsed: argparse.Namespace, settings: JudgeSettings) -> Access:
    if settings.kind != "endpoint":
        return Access(
            settings, folder=str(Path(parsed.judge_model).resolve()), device=parsed.device, dtype=parsed.dtype
        )
    from benchmarks.judge.endpoint import Endpoint

    endpoint = Endpoint(
        parsed.base_url,
        parsed.key_variable,
        parsed.timeout,
        parsed.tries,
        parsed.wait,
        parsed.longest_wait,
        parsed.per_minute,
    )
    if endpoint.faults():
        raise UserErrors("the judge's server:", endpoint.faults())
    return Access(settings, endpoint)


def _judge(arguments: Sequence[str]) -> int:
    parsed = _judge_parser().parse_args(arguments)
    provider = parsed.provider or (
        urlsplit(parsed.base_url).hostname or "" if parsed.judge == "endpoint" else parsed.judge
    )
    name = parsed.judge_model
    if parsed.judge in ("local", "replay"):
        name = name_of_local(name) if parsed.judge == "local" else Path(name).name
    settings = JudgeSettings(
        parsed.judge,
        name,
        provider,
        parsed.temperature,
        None if parsed.seed < 0 else parsed.seed,
        parsed.max_tokens,
        not parsed.images_first,
        parsed.image_format,
        parsed.resize,
        parsed.json_schema,
        parsed.repeats,
        parsed.extra,
    )
    judge_folder(
        _tasks(parsed, parsed.out),
        parsed.images,
        parsed.out,
        model=parsed.model or parsed.images.resolve().name,
        settings=settings,
        wording=load_wording(parsed.wording),
        make_ask=_access(parsed, settings),
        concurrency=None if parsed.judge == "local" else parsed.concurrency,
        workers=parsed.workers,
        scheduler=parsed.scheduler,
        anchors=parsed.anchors,
        retry=parsed.retry,
        shard=shard_of(parsed.shard),
        image_tokens=parsed.image_tokens,
        prices=tuple(parsed.prices) if parsed.prices else None,
        highest_price=parsed.highest_price,
        only_preview=parsed.preview,
        say=lambda text: print(text, flush=True),
    )
    return 0


def _add_judged(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judgements", type=Path, required=True, metavar="FOLDER", help="what `judge` has written")
    parser.add_argument(
        "--wording",
        "--judge-prompts",
        dest="wording",
        type=Path,
        metavar="PATH",
        help="the texts that the judge was given, where they were not ours",
    )
    parser.add_argument("--bootstrap-seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--confidence", type=float, default=0.95)


def _verdict(arguments: Sequence[str]) -> int:
    parser = _parser(
        "verdict",
        "Turn the raw replies into scores: rows, all columns, and one column's scorecard. Asks nobody; the same replies give the same bytes.",
    )
    _add_judged(parser)
    parser.add_argument(
        "--column",
        default="en/full",
        choices=[f"{language}/{subset}" for language in LANGUAGES for subset in SUBSETS],
        help="the scorecard's column",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="give means although fewer than 99 percent of a category have a score",
    )
    parsed = parser.parse_args(arguments)
    judgements = read_judgements(parsed.judgements, load_wording(parsed.wording))
    numbers = {"seed": parsed.bootstrap_seed, "resamples": parsed.resamples, "confidence": parsed.confidence}
    whole = summary(judgements, allow_partial=parsed.allow_partial, **numbers)
    write_json(parsed.judgements / SUMMARY_FILE, whole)
    write_scores(parsed.judgements, rows_of(judgements))
    for name, column in whole["columns"].items():
        print(
            f"{name}: no headline: {column['refused']}" if "refused" in column else _headline(name, column["average"])
        )
    if whole["drift"] and whole["drift"]["difference"] is not None:
        found = whole["drift"]
        word = "the judge has drifted" if found["drifted"] else "no drift is visible"
        print(f"anchors: {found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] n={found['n']}: {word}")
    card, _ = column_scorecard(judgements, parsed.column, allow_partial=parsed.allow_partial, **numbers)
    write_scorecard(parsed.judgements / SCORECARD_FILE, card)
    print(f"{parsed.judgements / SCORECARD_FILE}: the scorecard of {parsed.column}")
    return 0


def _headline(name: str, average: dict[str, float]) -> str:
    bounds = f"between {average['low']:.3f} and {average['high']:.3f} if the missing had earned 0 or 10"
    return f"{name}: O {average['overall']:.3f}, SC {average['sc']:.3f}, PQ {average['pq']:.3f}, n={average['n']}, coverage {average['coverage']:.1%}, {bounds}"


def _anchors(arguments: Sequence[str]) -> int:
    parser = _parser(
        "anchors",
        "Freeze judged images with their scores, to measure the judge's drift with every later run (judge --anchors).",
    )
    _add_judged(parser)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=44, help="spread over the categories")
    parsed = parser.parse_args(arguments)
    judgements = read_judgements(parsed.judgements, load_wording(parsed.wording))
    taken = freeze_anchors(judgements, parsed.judgements, parsed.to, count=parsed.count, seed=parsed.bootstrap_seed)
    print(f"{parsed.to}: {taken} anchors, judged by {judgements.answered_by or judgements.identity['model']}")
    return 0


def _report(arguments: Sequence[str]) -> int:
    from benchmarks.gedit.report import write_gedit_report

    parser = _parser("report", "Write one HTML page for the scorecard that `verdict` has made.")
    _add_judged(parser)
    parser.add_argument(
        "--column", default="en/full", choices=[f"{language}/{subset}" for language in LANGUAGES for subset in SUBSETS]
    )
    parser.add_argument("--allow-partial", action="store_true")
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="*",
        default=[],
        metavar="SCORECARD",
        help="other models' scorecards: champion, teachers, base",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html beside the judgements")
    parsed = parser.parse_args(arguments)
    numbers = {"seed": parsed.bootstrap_seed, "resamples": parsed.resamples, "confidence": parsed.confidence}
    out = parsed.out or parsed.judgements / "report.html"
    write_gedit_report(
        out,
        parsed.judgements,
        load_wording(parsed.wording),
        parsed.column,
        parsed.beside,
        allow_partial=parsed.allow_partial,
        **numbers,
    )
    print(os.fspath(out))
    return 0


STEPS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "prompts": (_prompts, "print the set's rows and their counts"),
    "generate": (_generate, "edit the set's images with a model"),
    "judge": (_judge, "ask a judge about every edited image"),
    "verdict": (_verdict, "raw replies to scores, columns and a scorecard"),
    "report": (_report, "one HTML page"),
    "anchors": (_anchors, "freeze a set by which the judge's drift is measured"),
}


def cli(arguments: Sequence[str]) -> int:
    """Runs one step; returns the exit status. Raises UserError for an unknown step."""
    name, *others = arguments or ["--help"]
    if name in STEPS:
        return STEPS[name][0](others)
    return overview("python -m benchmarks gedit STEP", name, {"": {step: text for step, (_, text) in STEPS.items()}})
