"""Work spread over processes and machines by dask.distributed: the same results in the same order for any number of
workers.

A job must be a pure function's argument: what it yields may depend on the job alone, not on who runs it or what ran
before. Torch's sums depend on the number of threads, so a job runs on one; more workers make it faster. Where items are
batched, the batches must follow from the full list and not from what a killed run has left to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data.errors import Outage, UserError
from data.files import digest, sha256_file

J = TypeVar("J")
P = TypeVar("P")
R = TypeVar("R")
AHEAD = 2  # jobs a worker has waiting, so that none is idle while results are written
CONNECT_SECONDS = 20
PROJECT = Path(__file__).resolve().parents[1]
ROOMS = ("benchmarks", "data", "model", "tasks")  # whose code runs in workers; tasks/ draws images with the model


def batches(items: Sequence[J], size: int) -> list[tuple[J, ...]]:
    """Consecutive batches of `size`, the last perhaps shorter."""
    if size < 1:
        raise UserError(f"batch = {size}: expected 1 or more")
    return [tuple(items[first : first + size]) for first in range(0, len(items), size)]


def _answer(function: Callable[[J], R], job: J) -> tuple[str, Any]:
    """(kind, result): an exception comes back as kind and text, since it may not survive the way between processes."""
    try:
        return "result", function(job)
    except UserError as error:
        return "outage" if isinstance(error, Outage) else "mistake", str(error)


def _one_thread(function: Callable[[J], R], job: J) -> tuple[str, Any]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _answer(function, job)
    finally:
        torch.set_num_threads(before)


def _unwrapped(answer: tuple[str, Any]) -> Any:
    kind, result = answer
    if kind != "result":
        raise (Outage if kind == "outage" else UserError)(result)
    return result


def code_digest(root: Path = PROJECT) -> str:
    """SHA-256 (hex) of all code below `root` that a worker may run: workers on other machines must run the same."""
    packages = [path.parent for room in ROOMS for path in (root / room).rglob("__init__.py")]  # not the data in data/
    files = [path for package in packages for path in package.iterdir() if path.suffix in (".py", ".yaml")]
    return digest({path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(files)})


@contextmanager
def _client(workers: int, scheduler: str, threads: int = 1) -> Iterator[tuple[Any, int]]:
    """A dask client of the named scheduler, or of a cluster of processes on this machine that is gone afterwards, and
    its number of processes. Nothing listens beyond loopback.

    `threads`: jobs that each process of such a cluster takes at once."""
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        if scheduler:
            try:
                client = stack.enter_context(Client(scheduler, timeout=CONNECT_SECONDS))
            except (OSError, ValueError) as error:  # a time-out is an OSError
                advice = "start one (`dask scheduler --host 127.0.0.1`) and its workers, or leave it empty"
                raise UserError(f"scheduler {scheduler}: no answer ({error}); {advice}") from error
            check_workers(client, scheduler, code_digest())
        else:
            local = {"host": "127.0.0.1", "dashboard_address": None, "memory_limit": 0}
            cluster = LocalCluster(n_workers=workers, threads_per_worker=threads, processes=True, **local)
            client = stack.enter_context(Client(stack.enter_context(cluster)))
        yield client, max(1, len(client.scheduler_info(n_workers=-1)["workers"]))


def check_workers(client: Any, scheduler: str, digest_here: str) -> None:
    """Raises UserError unless the scheduler has workers and all of them run the code with this digest."""
    where = f"scheduler {scheduler}"
    try:
        digests = client.run(code_digest)
    except Exception as error:  # whatever importing our code raises over there
        advice = "start them in its folder with its environment"
        raise UserError(f"{where}: its workers cannot import this project ({error}); {advice}") from error
    if not digests:
        raise UserError(f"{where}: it has no worker; start some: `dask worker {scheduler}` in the project's folder")
    other = sorted(address for address, value in digests.items() if value != digest_here)
    if other:
        fault = f"{len(other)} of {len(digests)} workers run another version of the code, e.g. {other[0]}"
        raise UserError(f"{where}: {fault}; update and restart them")


def each(
    function: Callable[[P], R],
    jobs: Sequence[J],
    prepare: Callable[[J], P],
    done: Callable[[int, R], None],
    *,
    workers: int = 1,
    scheduler: str = "",
) -> None:
    """Calls `done(i, function(prepare(jobs[i])))` for every job, in the order of the jobs.

    `prepare` and `done` run in this process, so that files are read and written by one machine alone; `function`, of a
    module's top level, runs in the workers and is given all that it needs. One worker and no scheduler: everything
    happens in this process. Raises UserError for a mistake that a job reports, or a scheduler that does not answer."""
    if workers < 1:
        raise UserError(f"workers = {workers}: expected 1 or more")
    if not jobs:
        return
    if workers == 1 and not scheduler:
        for index, job in enumerate(jobs):
            done(index, _unwrapped(_one_thread(function, prepare(job))))
        return
    with _client(min(workers, len(jobs)), scheduler) as (client, processes):
        waiting: deque[tuple[int, Any]] = deque()
        for index, job in enumerate(jobs):
            if len(waiting) == AHEAD * processes:
                place, future = waiting.popleft()
                done(place, _unwrapped(future.result()))
            waiting.append((index, client.submit(_one_thread, function, prepare(job), pure=False)))
        for place, future in waiting:
            done(place, _unwrapped(future.result()))


def as_they_come(
    function: Callable[[P], R],
    jobs: Sequence[J],
    prepare: Callable[[J, int], P],
    done: Callable[[int, R], None],
    *,
    at_once: int | None,
    workers: int = 1,
    scheduler: str = "",
) -> None:
    """Calls `done(i, function(prepare(jobs[i], processes)))` for every job once it has ended, in any order: for jobs
    that wait rather than compute.

    At most `at_once` jobs are under way in all workers together (None: one a worker), and none begins before `done` has
    returned for the job whose place it takes. `processes` is the number of workers. After a mistake (a UserError of a
    job or of `done`) no further job begins; those under way are done as well, then the first mistake is raised. A
    cluster on this machine where no `scheduler` is named, as for `each`."""
    if workers < 1 or (at_once is not None and at_once < 1):
        raise UserError(f"workers = {workers}, at once {at_once}: expected 1 or more")
    if not jobs:
        return
    from distributed import as_completed

    workers = min(workers, len(jobs))
    threads = -(-at_once // workers) if at_once else 1
    with _client(workers, scheduler, threads) as (client, processes):
        todo, index_of, mistake = iter(enumerate(jobs)), dict[str, int](), None
        running = as_completed()

        def begin(count: int) -> None:
            for index, job in islice(todo, count):
                future = client.submit(_answer, function, prepare(job, processes), pure=False)
                index_of[future.key] = index
                running.add(future)

        begin(at_once or processes)
        for future in running:
            try:
                done(index_of.pop(future.key), _unwrapped(future.result()))
            except UserError as error:
                mistake = mistake or error
            if mistake is None:
                begin(1)
        if mistake is not None:
            raise mistake


def device_of(device: str) -> str:
    """The torch device that this process computes on: "cuda" in a dask worker is dealt out by the worker's number,
    "cpu" and "cuda:1" are taken as they are."""
    if device != "cuda":
        return device
    import torch

    try:
        from distributed import get_worker

        number = get_worker().name
    except (ImportError, ValueError):  # not inside a worker
        return device
    count = torch.cuda.device_count()
    return f"cuda:{int(number) % count}" if isinstance(number, int) and count else device
