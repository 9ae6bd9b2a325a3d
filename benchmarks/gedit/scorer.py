"""The judge of section `judge` as a scorer: it grades the edits that a stage draws, as GEdit-Bench does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.gedit.judging import MadeEdit
from benchmarks.gedit.rows import EditTask
from benchmarks.gedit.rules import LANGUAGES
from benchmarks.gedit.verdict import answered_by, coverage_of, score_made
from benchmarks.judge.access import Access, name_of_local
from benchmarks.judge.asking import Asking
from benchmarks.judge.protocol import JudgeSettings
from benchmarks.judge.wording import load_wording
from benchmarks.params import BenchmarkParams, JudgeParams
from benchmarks.scores.scorecard import ExampleScore, bounds
from benchmarks.scores.scorer import DrawnImage, Scorer
from data.errors import UserError, UserErrors
from data.files import digest, sha256_file
from data.records import CAPABILITIES, Example

STORE = Path("runs/judgements")  # outside every out, as DVC removes those before a stage runs
LANGUAGE = "instruction_language"  # where an edit's record names it; otherwise it is English


@dataclass(frozen=True)
class GeditScorer(Scorer):
    benchmark: BenchmarkParams
    judge: JudgeParams

    @cached_property
    def _settings(self) -> JudgeSettings:
        judge, local = self.judge, self.judge.kind == "local"
        host = urlsplit(judge.server.base_url).hostname or ""
        return JudgeSettings(
            kind=judge.kind,
            model=name_of_local(judge.model) if local else judge.model,
            provider=judge.server.provider or (host if judge.kind == "endpoint" else judge.kind),
            repeats=judge.repeats,
            wording=load_wording(judge.wording or None),
            **asdict(judge.request),
        )

    @cached_property
    def _access(self) -> Access:
        if self.judge.kind == "local":
            folder = str(Path(self.judge.model).resolve())
            return Access(self._settings, folder=folder, device=self.benchmark.device, dtype=self.judge.dtype)
        from benchmarks.judge.endpoint import Endpoint

        server = asdict(self.judge.server)
        return Access(self._settings, Endpoint(**{name: server[name] for name in server if name != "provider"}))

    def judges(self, example: Example) -> bool:
        """Edits in the judge's language and, where section `judge` lists categories, of these. Raises UserError for a
        language that GEdit-Bench does not have."""
        listed = not self.judge.categories or example.category in self.judge.categories
        if not CAPABILITIES[example.capability].is_edit or not listed:
            return False
        language = str(example.record.get(LANGUAGE, LANGUAGES[0]))
        if language not in LANGUAGES:
            fault = f"record.{LANGUAGE} = {language!r}; choose one of {list(LANGUAGES)}"
            raise UserError(f"{example.origin or 'examples'}, row {example.row}: {fault}")
        return language == self.judge.language

    def check(self, examples: Sequence[Example]) -> None:
        if self.judge.kind == "none":
            categories = ", ".join(sorted({example.category for example in examples}))
            advice = "name a judge there (endpoint or local), or keep edits out of the split that is scored"
            fault = f"there are edits to score ({categories}), which a detector cannot judge"
            raise UserError(f"judge.kind = none, but {fault}: {advice}")
        missing = [f"{x.origin or 'examples'}, row {x.row}" for x in examples if x.source is None]
        if missing:
            raise UserErrors("an edit without a source image cannot be judged:", missing)
        self._access.check()
        answered_by(STORE, self._settings)

    def score(self, drawn: Sequence[DrawnImage]) -> list[ExampleScore]:
        """What the judge has answered before is not asked again, but for the statuses that `judge.retry` names."""
        judge, edits = self.judge, []
        for image in drawn:
            example, source = image.example, image.source or Path()
            about = (example.id, judge.language, example.category, example.prompt, False, source, sha256_file(source))
            edits.append(MadeEdit(EditTask(*about), image.file, image.image, image.k, image.seed))
        asking = Asking(
            self._access,
            None if judge.kind == "local" else judge.concurrency,
            workers=judge.workers,
            scheduler=self.benchmark.scheduler,
            retry=judge.retry,
            prices=judge.prices,
            highest_price=judge.highest_price,
            say=lambda text: print(text, flush=True),
        )
        return score_made(edits, STORE, model=drawn[0].model, settings=self._settings, asking=asking)

    def identity(self, scores: Sequence[ExampleScore], examples: Sequence[Example]) -> dict[str, Any]:
        """Raises UserError where several models answered under the judge's name, in this stage and those before it."""
        rows = [score for score in scores if score.benchmark == "gedit"]
        judge = self._settings.identity()
        prompts = sorted([example.id, example.category, example.prompt, example.sha256] for example in examples)
        return {
            "gedit": {
                "judge": {**judge, "answered_by": answered_by(STORE, self._settings)},
                "repeats": self.judge.repeats,
                "prompts": digest(prompts),
                "language": self.judge.language,
                **coverage_of(rows),
            }
        }

    def notes(self, scores: Sequence[ExampleScore], identity: Mapping[str, Any]) -> list[str]:
        """Who judged, what has no score by category, and how far that could move the average of edits."""
        if "gedit" not in identity:
            return []
        about = identity["gedit"]
        judge = about["judge"]
        who = f"{judge['answered_by'] or judge['model']} ({judge['kind']}, {judge['provider']})"
        how = f"wording {judge['wording']['name']}, language {about['language']}"
        notes = [f"Edits: judge {who}, {how}, {about['repeats']} judgement(s) an image."]
        rows = [score for score in scores if score.benchmark == "gedit"]
        failed = sorted(Counter((row.category, row.status) for row in rows if row.status != "ok").items())
        if failed:
            low, high = bounds(rows)
            left = ", ".join(f"{count} {status} in {category}" for (category, status), count in failed)
            what = f"the average would be {low:.2f} or {high:.2f}"
            notes.append(f"Without a score: {left}. Had these images earned 0 or 10, {what}.")
        return notes
