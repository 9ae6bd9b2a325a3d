"""Scores of pictures that no parser of shapes can read: GenEval's networks for T2I, a judge for edits. The stages that
draw images share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks.gedit.judging import Asking, MadeEdit
from benchmarks.gedit.rows import EditTask
from benchmarks.gedit.rules import LANGUAGES
from benchmarks.gedit.verdict import answered_by, coverage_of, score_made
from benchmarks.geneval.run import Evaluator, evaluator_identity, judge_pictures
from benchmarks.judge.access import Access, name_of_local
from benchmarks.judge.protocol import JudgeSettings
from benchmarks.judge.wording import load_wording
from benchmarks.scores.scorecard import HIGHEST, ExampleScore
from data.errors import UserError
from data.files import digest, sha256_file
from data.microworld import MICRO
from data.progress import Advance
from data.records import CAPABILITIES, Example
from tasks.params.sections import BenchmarkParams, JudgeParams

STORE = Path("runs/detections")  # outside every out: DVC removes those before a stage runs
JUDGEMENTS = Path("runs/judgements")
LANGUAGE = "instruction_language"  # where an edit's record names it; otherwise it is English


class Batch(Protocol):
    """Images as tasks.scoring.sampling draws them: their files, relative to the folder, and what each was drawn
    from.
    """

    @property
    def examples(self) -> list[Example]: ...
    @property
    def paths(self) -> list[str]: ...
    @property
    def seeds(self) -> list[int]: ...
    @property
    def k(self) -> list[int]: ...


def _is_edit(example: Example) -> bool:
    return CAPABILITIES[example.capability].is_edit


def _language(example: Example) -> str:
    """Raises UserError for a language that GEdit-Bench does not have."""
    found = str(example.record.get(LANGUAGE, LANGUAGES[0]))
    if found not in LANGUAGES:
        raise UserError(
            f"{example.origin or 'examples'}, row {example.row}: record.{LANGUAGE} = {found!r}; choose one of {list(LANGUAGES)}"
        )
    return found


def scored_examples(examples: Sequence[Example], benchmark: BenchmarkParams, judge: JudgeParams) -> list[Example]:
    """The examples without the edits that section `judge` leaves out by language or category. The micro world's all
    stay.
    """
    if benchmark.detector == MICRO:
        return list(examples)
    return [
        example
        for example in examples
        if not _is_edit(example)
        or ((not judge.categories or example.category in judge.categories) and _language(example) == judge.language)
    ]


# --- who scores -------------------------------------------------------------------------------------------------------


def evaluator_of(benchmark: BenchmarkParams) -> Evaluator:
    return Evaluator(**asdict(benchmark))


def _judge_of(judge: JudgeParams, benchmark: BenchmarkParams) -> Access:
    """The judge and where it is. Raises UserError(s) for texts that are not there."""
    server, request = asdict(judge.server), asdict(judge.request)
    named = server.pop("provider")
    provider = named or (urlsplit(judge.server.base_url).hostname or "" if judge.kind == "endpoint" else judge.kind)
    name, wording = judge.model, load_wording(judge.wording or None)
    if judge.kind == "local":
        name = name_of_local(judge.model)
    settings = JudgeSettings(judge.kind, name, provider, repeats=judge.repeats, wording=wording, **request)
    if judge.kind == "local":
        folder = str(Path(judge.model).resolve())
        return Access(settings, folder=folder, device=benchmark.device, dtype=judge.dtype)
    from benchmarks.judge.endpoint import Endpoint

    return Access(settings, Endpoint(**server))


def check_judgeable(examples: Sequence[Example], benchmark: BenchmarkParams, judge: JudgeParams) -> None:
    """Raises UserError, before anything is drawn, for networks or a judge that are not there, or for edits where
    section `judge` names nobody.
    """
    edits = sorted({example.category for example in examples if _is_edit(example)})
    drawn = [example.record for example in examples if not _is_edit(example)]
    if edits and judge.kind == "none":
        advice = "name a judge there (endpoint or local), or keep edits out of the eval split"
        raise UserError(
            f"judge.kind = none, but there are edits to score ({', '.join(edits)}), which a detector cannot judge: {advice}"
        )
    if drawn:
        evaluator_identity(evaluator_of(benchmark), drawn)
    if edits:
        access = _judge_of(judge, benchmark)
        access.check()
        answered_by(JUDGEMENTS, access.settings)


def identities_of_scores(
    scores: Sequence[ExampleScore], examples: Sequence[Example], benchmark: BenchmarkParams, judge: JudgeParams
) -> dict[str, Any]:
    """What a scorecard of these examples names under "geneval" and "gedit": scorecards of other evaluators, judges or
    prompts are not compared with it.

    Raises UserError where several models answered under the judge's name, in this stage and those before it.
    """
    drawn, edits = ([example for example in examples if _is_edit(example) == kind] for kind in (False, True))
    found: dict[str, Any] = {}
    if drawn:
        found["geneval"] = {
            "evaluator": evaluator_identity(evaluator_of(benchmark), [example.record for example in drawn])
        }
    if edits:
        settings = _judge_of(judge, benchmark).settings
        rows = [score for score in scores if score.benchmark == "gedit"]
        found["gedit"] = {
            "judge": {**settings.identity(), "answered_by": answered_by(JUDGEMENTS, settings)},
            "repeats": judge.repeats,
            "prompts": digest(
                sorted([example.id, example.category, example.prompt, example.sha256] for example in edits)
            ),
            "language": judge.language,
            "coverage": coverage_of(rows),
            "statuses": dict(sorted(Counter(score.status for score in rows).items())),
        }
    return found


def notes_of_scores(scores: Sequence[ExampleScore], identities: Mapping[str, Any]) -> list[str]:
    """Sentences for the report: who judged, what has no score by category, and how far that could move the average of
    edits. None where nobody judged.
    """
    if "gedit" not in identities:
        return []
    about, rows = identities["gedit"], [score for score in scores if score.benchmark == "gedit"]
    judge = about["judge"]
    found = [
        f"Edits: judge {judge['answered_by'] or judge['model']} ({judge['kind']}, {judge['provider']}), wording {judge['wording']['name']}, language "
        f"{about['language']}, {about['repeats']} judgement(s) an image."
    ]
    missing = Counter((row.category, row.status) for row in rows if row.status != "ok")
    if missing:
        groups = [
            [row for row in rows if row.category == category]
            for category in dict.fromkeys(row.category for row in rows)
        ]
        low, high = (
            sum(sum(row.values.get("O", least) for row in group) / len(group) for group in groups) / len(groups)
            for least in (0.0, HIGHEST)
        )
        left = ", ".join(f"{count} {status} in {category}" for (category, status), count in sorted(missing.items()))
        found.append(
            f"Without a score: {left}. Had these images earned 0 or 10, the average would be {low:.2f} or {high:.2f}."
        )
    return found


# --- scoring ----------------------------------------------------------------------------------------------------------


Made = tuple[Example, str, int, int]  # an image's example, file, seed and number


def _seen(made: Sequence[Made], benchmark: BenchmarkParams, *, model: str, folder: Path) -> list[ExampleScore]:
    """GenEval's verdicts. Images that these networks have seen before, in a run that was killed or whose student did
    not change, are not looked at again.
    """
    pictures = [(path, example.record) for example, path, *_ in made]
    verdicts, _ = judge_pictures(folder, STORE, pictures, evaluator_of(benchmark))
    return [
        ExampleScore(
            model, "geneval", example.category, example.id, k, seed, {"correct": float(one.correct)}, one.reasons, path
        )
        for (example, path, seed, k), one in zip(made, verdicts, strict=True)
    ]


def _graded(
    made: Sequence[Made], benchmark: BenchmarkParams, judge: JudgeParams, *, model: str, folder: Path, curated: Path
) -> list[ExampleScore]:
    """The judge's grades. What it has answered before is not asked again, but for the statuses that `judge.retry`
    names.
    """
    access = _judge_of(judge, benchmark)
    edits = []
    for example, path, seed, k in made:
        if example.source is None:
            raise UserError(
                f"{example.origin or 'examples'}, row {example.row}: an edit without a source image cannot be judged"
            )
        source = curated / example.source
        task = EditTask(
            example.id, judge.language, example.category, example.prompt, False, source, sha256_file(source)
        )
        edits.append(MadeEdit(task, folder / path, path, k, seed))
    asking = Asking(
        access,
        None if judge.kind == "local" else judge.concurrency,
        workers=judge.workers,
        scheduler=benchmark.scheduler,
        retry=judge.retry,
        prices=judge.prices,
        highest_price=judge.highest_price,
        say=lambda text: print(text, flush=True),
    )
    return score_made(edits, JUDGEMENTS, model=model, settings=access.settings, asking=asking)


def score_drawn(
    batches: Iterable[Batch],
    benchmark: BenchmarkParams,
    judge: JudgeParams,
    *,
    model: str,
    folder: Path,
    curated: Path,
    advance: Advance,
) -> list[ExampleScore]:
    """Draws every batch, then has all of its images scored, which spreads over workers; one ExampleScore an image, an
    edit that has no score with its status.

    `folder` is what images are relative to, `curated` what sources are. Raises UserError as `check_judgeable`, for a
    malformed record, and where the judge answers nothing.
    """
    drawn: list[Made] = []
    for batch in batches:
        drawn += list(zip(batch.examples, batch.paths, batch.seeds, batch.k, strict=True))
        advance(len(batch.examples))
    parts = [[made for made in drawn if _is_edit(made[0]) == kind] for kind in (False, True)]
    seen = _seen(parts[0], benchmark, model=model, folder=folder) if parts[0] else []
    graded = _graded(parts[1], benchmark, judge, model=model, folder=folder, curated=curated) if parts[1] else []
    rows = {(row.example_id, row.k): row for row in (*seen, *graded)}
    return [rows[example.id, k] for example, _, _, k in drawn]
