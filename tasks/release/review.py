"""What a reviewer reads before promoting: the candidate's report page with the reigning champion beside it, as
`reports/review.html`.

The page itself is the score stage's and stays as it is: that stage cannot know the champion, whose place may change
without any stage running.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.scores.page import add_champion
from benchmarks.scores.scorecard import Scorecard
from data.files import read_json, write_text
from tasks.release.gate import Params, paired_with
from tasks.release.provenance import SCORECARD_FILE

PAGE_FILE, REVIEW_FILE = "reports/score/report.html", "reports/review.html"


def write_review(project: Path, params: Params, champion: Mapping[str, Any] | None) -> Path | None:
    """Writes the page and returns its path; removes an older page and returns None where there is no champion or no
    report page.

    `champion` is `tasks.registry.versions.champion`'s. Raises UserError for an unreadable scorecard, or a page of an
    older version.
    """
    page, review = project / PAGE_FILE, project / REVIEW_FILE
    if champion is None or not page.is_file():
        review.unlink(missing_ok=True)
        return None
    candidate = read_json(project / SCORECARD_FILE)
    cards = Scorecard.from_json(candidate), Scorecard.from_json(champion["scorecard"])
    comparison = paired_with(project, params, candidate, champion)
    version, champion_page = str(champion.get("version", "unknown")), champion.get("page")
    text = add_champion(page.read_text(encoding="utf-8"), *cards, version, comparison, "score/", champion_page)
    write_text(review, text)
    return review
