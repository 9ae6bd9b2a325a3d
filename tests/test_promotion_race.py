"""Two people promote two versions at the same moment, in two processes: one champion, one ledger entry, one clear
refusal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import candidates
import pytest

from tasks.registry import ledger, tracking, versions

ROOT = Path(__file__).parents[1]
PROMOTER = """
import sys, time
from pathlib import Path
from data.errors import UserError
from tasks.registry import ledger, tracking
from tasks.release import decisions
project, version, simultaneous = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "yes"
tracking.open_store(project)  # the slow imports come before the start
meet = project / "meet"
def wait(name):
    (meet / f"{name}-{version}").touch()
    until = time.monotonic() + 120
    while len(list(meet.glob(f"{name}-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.001)
append = ledger.append
def append_together(*positional, **named):
    wait("append")
    return append(*positional, **named)
if simultaneous:
    ledger.append = append_together  # both have checked everything before either writes
wait("start")
try:
    decisions.promote(project, version, f"reviewer {version}", "mine is better")
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.parametrize(("simultaneous", "place"), [("yes", "folder"), ("no", "folder"), ("yes", "S3")])
def test_two_processes_promote_two_versions(
    tmp_path: Path,
    mlflow_database: Path,
    simultaneous: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """ "yes": both reach the ledger having seen it empty. "no": they start together and run as they happen to."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DANCEOPD_LEDGER", raising=False)
    if place == "S3":
        monkeypatch.setenv("DANCEOPD_LEDGER", request.getfixturevalue("s3"))
    project = candidates.new_project(tmp_path / "project", mlflow_database)
    candidates.submitted(project)
    candidates.submitted(project, weights=2.0)
    (project / "meet").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROMOTER, str(project)]
    running = [
        subprocess.Popen(
            [*command, version, simultaneous],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for version in ("1", "2")
    ]
    try:
        ended = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    codes = [process.returncode for process in running]
    assert sorted(codes) == [0, 2], ended
    winner, loser = ("1", "2") if codes[0] == 0 else ("2", "1")
    message = ended[int(loser) - 1][1]
    expected = "somebody else decided at the same moment" if simultaneous == "yes" else "error: "
    assert expected in message and "Traceback" not in message
    entries = ledger.read(versions.ledger_place(tracking.open_store(project)))
    assert [(entry.to_version, entry.actor, entry.reason) for entry in entries] == [
        (winner, f"reviewer {winner}", "mine is better")
    ]
    store = tracking.open_store(project)
    assert versions.aliases_of(store)["champion"] == winner
    assert versions.reconcile(project) == []
