"""Defends: work spread over processes gives what one process gives, in the order of the jobs; a job's mistake or a
silent scheduler is one message.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from benchmarks.parallel import as_they_come, batches, check_workers, code_digest, each
from data.errors import Outage, UserError, UserErrors
from tasks.environment import PROJECT


def product(job: tuple[int, torch.Tensor]) -> tuple[int, float, int]:
    """(index, a sum whose last bits depend on the number of threads, process)."""
    index, values = job
    return index, float((values @ values.T).sum()), os.getpid()


def mistaken(job: tuple[int, torch.Tensor]) -> tuple[int, float, int]:
    if job[0] == 3:
        raise UserErrors("two faults:", ["one", "another"])
    return job[0], 0.0, 0


def collected(workers: int, function=product, scheduler: str = "") -> list[tuple[int, float, int]]:
    found: list[tuple[int, float, int]] = []

    def done(index: int, result: tuple[int, float, int]) -> None:
        assert index == len(found) == result[0]  # in order
        found.append(result)

    def prepare(index: int) -> tuple[int, torch.Tensor]:
        return index, torch.rand(64, 300, generator=torch.Generator().manual_seed(index))

    each(function, list(range(12)), prepare, done, workers=workers, scheduler=scheduler)
    return found


def test_any_number_of_workers_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    alone, together = collected(1), collected(2)
    assert [row[:2] for row in alone] == [row[:2] for row in together]
    assert {row[2] for row in alone} == {os.getpid()} and os.getpid() not in {row[2] for row in together}


def test_a_named_scheduler_s_workers_are_used_and_checked() -> None:
    from distributed import Client, LocalCluster

    with LocalCluster(
        n_workers=0, host="127.0.0.1", dashboard_address=None, processes=False, protocol="tcp://", threads_per_worker=1
    ) as cluster:
        address = cluster.scheduler_address
        with pytest.raises(UserError, match="it has no worker"):
            collected(1, scheduler=address)
        cluster.scale(1)
        cluster.wait_for_workers(1)
        assert [row[:2] for row in collected(1, scheduler=address)] == [row[:2] for row in collected(1)]
        with pytest.raises(UserError, match="two faults"):
            collected(1, mistaken, address)
        with (
            Client(address) as client,
            pytest.raises(UserError, match="1 of 1 workers run another version of the code"),
        ):
            check_workers(client, address, "another version")


@pytest.mark.parametrize(
    "name",
    [
        "model/networks/student.py",
        "model/backbones/micro.py",
        "tasks/scoring/sampling.py",
        "benchmarks/paper.yaml",
        "data/records.py",
    ],
)
def test_workers_with_another_file_of_any_room_have_another_digest(tmp_path: Path, name: str) -> None:
    for room in ("benchmarks", "data", "model", "tasks"):
        code = shutil.ignore_patterns("__pycache__", "raw", "teachers", "curated", "validated", "encoded")
        shutil.copytree(PROJECT / room, tmp_path / room, ignore=code)
    assert code_digest(tmp_path) == code_digest()
    (tmp_path / "data" / "raw").mkdir()
    (tmp_path / "data" / "raw" / "manifest.yaml").write_text("data is no code")
    assert code_digest(tmp_path) == code_digest()
    with open(tmp_path / name, "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert code_digest(tmp_path) != code_digest()


def unanswered(job: tuple[int, torch.Tensor]) -> tuple[int, float, int]:
    raise Outage("the store does not answer")


def test_an_outage_in_a_job_stays_one() -> None:
    """It is tried again by its type, which has to survive the way between processes."""
    with pytest.raises(Outage, match="the store does not answer"):
        collected(1, unanswered)


def test_a_mistake_in_a_job_is_its_message() -> None:
    with pytest.raises(UserError, match="two faults:\n  - one"):
        collected(1, mistaken)
    with pytest.raises(UserError, match="workers = 0"):
        collected(0)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.parallel.CONNECT_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"scheduler tcp://127\.0\.0\.1:1: no answer"):
        collected(1, scheduler="tcp://127.0.0.1:1")


def test_threads_are_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    collected(1)
    assert torch.get_num_threads() == before


def test_batches_are_consecutive() -> None:
    assert batches(list("abcde"), 2) == [("a", "b"), ("c", "d"), ("e",)]
    assert batches([], 2) == []
    with pytest.raises(UserError, match="batch = 0"):
        batches([1], 0)


# --- jobs that wait for others ----------------------------------------------------------------------------------------


def waiting(job: tuple[int, float, int]) -> tuple[int, int]:
    """(index, process) after a while."""
    if job[0] == 5:
        raise UserError("the fifth is wrong")
    time.sleep(job[1])
    return job[0], os.getpid()


def test_jobs_that_wait_are_kept_as_they_come_and_a_mistake_ends_the_run_with_what_was_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    found: list[tuple[int, int]] = []
    begun: list[int] = []

    def prepare(index: int, processes: int) -> tuple[int, float, int]:
        begun.append(index)
        assert processes == 2 and len(begun) - len(found) <= 3  # never more than three under way
        return index, 1.0 if index == 0 else 0.01, processes

    def done(index: int, result: tuple[int, int]) -> None:
        assert index == result[0]
        found.append(result)

    with pytest.raises(UserError, match="the fifth is wrong"):
        as_they_come(waiting, range(40), prepare, done, at_once=3, workers=2)
    assert os.getpid() not in {process for _, process in found} and found[0][0] != 0  # the slow one is not waited for
    assert 0 in [index for index, _ in found] and 5 not in [index for index, _ in found]
    assert len(begun) == len(found) + 1 < 12  # what had begun is done, nothing more began
    with pytest.raises(UserError, match="workers = 0"):
        as_they_come(waiting, range(1), prepare, done, at_once=1, workers=0)
