"""`python -m benchmarks gedit STEP ...`: each step of GEdit-Bench by itself, on any folder of edited images in the
official layout."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.gedit.judging import judge_folder
from benchmarks.gedit.price import IMAGE_TOKENS
from benchmarks.gedit.questions import SUITE, image_seed
from benchmarks.gedit.rows import EditTask, check_official, edited_path, load_tasks, set_digest, set_name, source_path
from benchmarks.gedit.rules import COLUMNS, LANGUAGES
from benchmarks.gedit.verdict import Judgements, column_scorecard, freeze_anchors, read_judgements, rows_of, summary
from benchmarks.judge.access import Access, name_of_local
from benchmarks.judge.asking import Asking
from benchmarks.judge.protocol import IMAGE_FORMATS, JUDGES, RESIZES, JudgeSettings, read_rgb
from benchmarks.judge.wording import PairWording, Wording, load_wording
from benchmarks.scores.scorecard import STATUSES, write_scorecard, write_scores
from benchmarks.steps import SAMPLER, Options, Steps, path, run_step, sample, setting
from benchmarks.store import shard_of
from data.errors import UserError
from data.files import atomic_file, write_json

UNPACKED = "sources"
SUMMARY_FILE, SCORECARD_FILE = "summary.json", "scorecard.json"
RETRIED = [status for status in STATUSES if status not in ("ok", "missing_image", "bad_image")]


# --- options ----------------------------------------------------------------------------------------------------------


def choice(default: str, text: str, choices: Sequence[str], **more: Any) -> dict[str, Any]:
    """An option with a default, of several values."""
    return {"default": default, "help": f"{text} (default: %(default)s)", "choices": choices, **more}


FLAG = {"action": "store_true"}
TASKS: Options = {
    "--data": path("GEdit-Bench's Parquet or Arrow files, or a folder with manifest.csv or .jsonl", required=True),
    "--custom-set": {**FLAG, "help": "the set is your own: do not compare its counts with the official ones"},
    "--language": choice("both", "which rows are taken", [*LANGUAGES, "both"]),
    "--unpack": path("where source images out of Parquet or Arrow files go (default: beside the output)"),
}
IMAGES: Options = {"--images": path("the model's folder, with fullset/TASK_TYPE/LANGUAGE/KEY.png", required=True)}
WORDING: Options = {"--wording": path("a folder with other texts than ours, or the upstream's vie_prompts.py", "PATH")}
JUDGE: Options = {
    "--judge": choice("endpoint", "what kind of judge", JUDGES, dest="kind"),
    "--judge-model": {
        "required": True,
        "metavar": "NAME",
        "help": "as the server names it; of local, replay: a folder",
    },
    "--provider": {"metavar": "NAME", "help": "who serves it (default: the base URL's host)"},
    "--temperature": setting(0.0, "of the judge"),
    "--seed": setting(0, "sent with every question, plus the repeat's number; -1 sends none"),
    "--max-tokens": setting(512, "of a reply"),
    "--images-first": {"action": "store_false", "dest": "text_first", "help": "the images before the text"},
    "--image-format": choice("png", "of the images sent", IMAGE_FORMATS),
    "--resize": choice("match-source", "what the images are scaled to", RESIZES),
    "--json-schema": {**FLAG, "help": "ask the server to enforce the reply's form, where it can"},
    "--extra": {"type": json.loads, "default": {}, "metavar": "JSON", "help": "further fields of the request's body"},
    "--repeats": setting(1, "how often each question is asked; 3 shows the judge's noise"),
}
SERVER: Options = {
    "--base-url": setting("https://api.openai.com/v1", "of the server", "URL"),
    "--key-variable": setting("OPENAI_API_KEY", 'environment variable with the key; "" for a server without', "NAME"),
    "--timeout": setting(120.0, "seconds that a try may take", dest="timeout_s"),
    "--tries": setting(6, "of a request"),
    "--wait": setting(1.0, "seconds before the second try; doubled before each further one", dest="wait_s"),
    "--longest-wait": setting(60.0, "seconds before a try", dest="longest_wait_s"),
    "--per-minute": setting(0, "requests that may begin in a minute; 0: no limit"),
    "--device": setting("cuda", "of the local judge", "DEVICE"),
    "--dtype": setting("bfloat16", "of the local judge", "DTYPE"),
}
RUN: Options = {
    "--out": path("where the judgements are kept", required=True),
    "--retry": {"nargs": "*", "choices": RETRIED, "default": [], "help": "ask again what ended with these statuses"},
    "--concurrency": setting(8, "questions under way at once"),
    "--workers": setting(1, "processes on this machine that ask; they share --concurrency and --per-minute"),
    "--scheduler": setting("", "a dask scheduler, e.g. tcp://127.0.0.1:8786, instead of processes here", "ADDRESS"),
    "--shard": setting("0/1", "every N-th question from the I-th on", "I/N", type=shard_of),
    "--image-tokens": choice("tiles", "how images count in the preview", sorted(IMAGE_TOKENS)),
    "--prices": {"type": float, "nargs": 2, "metavar": ("PROMPT", "COMPLETION"), "help": "per million tokens"},
    "--highest-price": {"type": float, "metavar": "N", "help": "refuse to begin above it"},
    "--preview": {**FLAG, "dest": "only_preview", "help": "say what it would cost, and stop"},
}
MODEL: Options = {
    "--model": {"metavar": "NAME", "help": "the name of what is judged (default: the folder's name)"},
    "--anchors": path("a frozen set, judged anew with this run to measure the judge's drift"),
}
JUDGEMENTS: Options = {"--judgements": path("what `judge` has written", required=True)}
SEED: Options = {"--bootstrap-seed": setting(0, "of the bootstrap and of the choice of anchors")}
INTERVALS: Options = {
    "--resamples": setting(10_000, "of the bootstrap"),
    "--confidence": setting(0.95, "of the intervals"),
}
JUDGED: Options = {**JUDGEMENTS, **WORDING, **SEED}
COLUMN: Options = {
    **JUDGED,
    **INTERVALS,
    "--column": choice("en/full", "the scorecard's column", COLUMNS),
    "--allow-partial": {**FLAG, "help": "give means although fewer than 99 percent of the images have a score"},
}
REPORT: Options = {
    "--beside": path("scorecards of champion, teachers, base", "FILE", nargs="*", default=[]),
    "--out": path("default: report.html beside the judgements", "FILE"),
}
ANCHORS: Options = {"--to": path(required=True), "--count": setting(44, "spread over the categories")}


def made_of(kind: type, given: Namespace, **more: Any) -> Any:
    """A dataclass from the options that are named like its fields, and from `more`."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in vars(given).items() if name in names} | more)


def tasks_of(given: Namespace, out: Path) -> list[EditTask]:
    """The rows that options TASKS name; images out of Parquet or Arrow files go below `out`. Raises UserError(s)."""
    tasks = load_tasks(given.data, given.unpack or out / UNPACKED)
    if not given.custom_set:
        check_official(tasks)
    chosen = [task for task in tasks if given.language in ("both", task.language)]
    if not chosen:
        raise UserError(f"{given.data}: no row in the language {given.language!r}")
    return chosen


def _judgements(given: Namespace) -> Judgements:
    return read_judgements(given.judgements, load_wording(given.wording))


def how_of(given: Namespace) -> dict[str, Any]:
    """What options SEED, INTERVALS and --allow-partial say."""
    bootstrap = {"seed": given.bootstrap_seed, "resamples": given.resamples, "confidence": given.confidence}
    return {"allow_partial": given.allow_partial, **bootstrap}


# --- steps ------------------------------------------------------------------------------------------------------------


def _prompts(given: Namespace) -> None:
    """Print the set's rows as JSON Lines, and on stderr how many there are of each category."""
    tasks = tasks_of(given, Path("."))
    for task in tasks:
        row: dict[str, Any] = {"key": task.key, "instruction_language": task.language, "task_type": task.category}
        row |= {"instruction": task.instruction, "intersection_exist": task.intersection, "source": str(task.source)}
        print(json.dumps(row, ensure_ascii=False))
    for (language, category), count in sorted(Counter((task.language, task.category) for task in tasks).items()):
        print(f"{language} {category}: {count}", file=sys.stderr)


def _generate(given: Namespace) -> int:
    """Edit the set's source images with a model into the official folder layout. What is there is not made again."""
    tasks = tasks_of(given, given.images)
    jobs = []
    for task in tasks:
        copy = source_path(given.images, task)
        if not copy.exists():
            with atomic_file(copy) as temporary:
                read_rgb(task.source).save(temporary, format="PNG")
        files = {"path": edited_path(Path("."), task).as_posix(), "source": str(task.source.resolve())}
        job = {"id": task.id, "prompt": task.instruction, "seed": image_seed(task, given.seed)}
        jobs.append({**job, **files})
    settings = {"suite": SUITE, "prompts": set_digest(tasks), "set": set_name(tasks), "seed": given.seed}
    return sample(given.model, given.images, settings, jobs, given.sampler)


def _access(given: Namespace, settings: JudgeSettings) -> Access:
    if settings.kind != "endpoint":
        folder = str(Path(given.judge_model).resolve())
        return Access(settings, folder=folder, device=given.device, dtype=given.dtype)
    from benchmarks.judge.endpoint import Endpoint

    return Access(settings, made_of(Endpoint, given))


def judge_of(given: Namespace, wording: Wording | PairWording) -> tuple[JudgeSettings, Asking]:
    """The judge of options JUDGE and SERVER, and how it is asked, of RUN. Raises UserError(s)."""
    name, kind = given.judge_model, given.kind
    if kind in ("local", "replay"):
        name = name_of_local(name) if kind == "local" else Path(name).name
    provider = given.provider or ((urlsplit(given.base_url).hostname or "") if kind == "endpoint" else kind)
    seed = None if given.seed < 0 else given.seed
    settings = made_of(JudgeSettings, given, model=name, provider=provider, seed=seed, wording=wording)
    access, at_once = _access(given, settings), None if kind == "local" else given.concurrency
    return settings, made_of(Asking, given, make_ask=access, concurrency=at_once, say=partial(print, flush=True))


def _judge(given: Namespace) -> None:
    """Ask a judge about every edited image; what was answered is kept, and the same command goes on from there."""
    settings, asking = judge_of(given, load_wording(given.wording))
    tasks, model = tasks_of(given, given.out), given.model or given.images.resolve().name
    judge_folder(tasks, given.images, given.out, model=model, settings=settings, asking=asking, anchors=given.anchors)


def _headline(column: dict[str, Any]) -> str:
    if "refused" in column:
        return f"no headline: {column['refused']}"
    mean = column["average"]
    scores = f"O {mean['overall']:.3f}, SC {mean['sc']:.3f}, PQ {mean['pq']:.3f}"
    bounds = f"between {mean['low']:.3f} and {mean['high']:.3f} if the missing had earned 0 or 10"
    return f"{scores}, n={mean['n']}, coverage {mean['coverage']:.1%}, {bounds}"


def _verdict(given: Namespace) -> None:
    """Turn the raw replies into scores: rows, all columns, and one column's scorecard. Asks nobody; the same replies
    give the same bytes."""
    judgements, folder = _judgements(given), given.judgements
    whole = summary(judgements, **how_of(given))
    write_json(folder / SUMMARY_FILE, whole)
    write_scores(folder, rows_of(judgements))
    for name, column in whole["columns"].items():
        print(f"{name}: {_headline(column)}")
    drift = whole["drift"]
    if drift and drift["difference"] is not None:
        word = "the judge has drifted" if drift["drifted"] else "no drift is visible"
        print(f"anchors: {drift['difference']:+.3f} [{drift['low']:+.3f}, {drift['high']:+.3f}] n={drift['n']}: {word}")
    card, _ = column_scorecard(judgements, given.column, **how_of(given))
    write_scorecard(folder / SCORECARD_FILE, card)
    print(f"{folder / SCORECARD_FILE}: the scorecard of {given.column}")


def _anchors(given: Namespace) -> None:
    """Freeze judged images with their scores, to measure the judge's drift with every later run (judge --anchors)."""
    judgements = _judgements(given)
    taken = freeze_anchors(judgements, given.to, count=given.count, seed=given.bootstrap_seed)
    print(f"{given.to}: {taken} anchors, judged by {judgements.answered_by or judgements.identity['model']}")


def _report(given: Namespace) -> None:
    """Write one HTML page for the scorecard that `verdict` has made."""
    from benchmarks.gedit.report import write_gedit_report

    out = given.out or given.judgements / "report.html"
    write_gedit_report(out, _judgements(given), given.column, given.beside, **how_of(given))
    print(out)


STEPS: Steps = {
    "prompts": (_prompts, TASKS),
    "generate": (_generate, {**TASKS, **IMAGES, **SAMPLER}),
    "judge": (_judge, {**TASKS, **IMAGES, **WORDING, **JUDGE, **SERVER, **RUN, **MODEL}),
    "verdict": (_verdict, COLUMN),
    "report": (_report, {**COLUMN, **REPORT}),
    "anchors": (_anchors, {**JUDGED, **ANCHORS}),
}


def cli(arguments: Sequence[str]) -> int:
    """Runs one step; returns the exit status. Raises UserError for an unknown step."""
    return run_step("gedit", STEPS, arguments)
