"""What every test stands on: nothing is reported home, nothing is written into the project, and commands run with this
very interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HOME = tempfile.mkdtemp(prefix="danceopd-tests-")
os.environ["PREFECT_HOME"] = str(Path(HOME) / "prefect")  # before anything imports Prefect
os.environ["MPLCONFIGDIR"] = str(Path(HOME) / "matplotlib")
for _name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "DANCEOPD_LEDGER", "DANCEOPD_PUBLISH", "DANCEOPD_REVIEWERS"):
    os.environ.pop(_name, None)

from tasks.environment import PROJECT, prepare  # noqa: E402

prepare()

pytest_plugins = ["tests.servers"]


def pytest_xdist_auto_num_workers() -> int:
    """A process more than cores: tests of servers wait about half of their time."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _home() -> Iterator[None]:
    yield
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs this interpreter in the project: python("-m", "tasks", ...)."""

    def run(*arguments: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )

    return run
