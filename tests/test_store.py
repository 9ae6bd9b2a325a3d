"""Defends: a result that was acknowledged is there after a kill, a torn line never is, a shard has one writer, and
unlike results do not share a folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.store import claim, open_shard, read_results, read_settings, result_key, shard_files, shard_of
from data.errors import UserError, UserErrors
from tasks.environment import PROJECT

WRITER = """
import sys
from benchmarks.store import open_shard
with open_shard(sys.argv[1]) as shard:
    for index in range(100_000):
        shard.append(f"key-{index}", {"value": index, "text": "x" * 3000})
        print(index, flush=True)
"""


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    values = {"a": 1, "b": [1.5, "ünï\u2028\n"], "c": {"nested": None}}
    with open_shard(tmp_path) as shard:
        shard.append("a", values["a"])
        shard.append_all({"b": values["b"], "c": values["c"]})
    assert read_results(tmp_path) == values
    with open_shard(tmp_path) as shard:
        shard.append("a", 2)  # a retry
    assert read_results(tmp_path) == {**values, "a": 2}
    assert read_results(tmp_path / "nothing") == {}


def test_every_torn_tail_is_ignored_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    with open_shard(tmp_path) as shard:
        shard.append("a", "x" * 200_000)  # longer than a block of the search for the newline
        shard.append("b", 2)
    (path,) = shard_files(tmp_path)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in (0, 1, first - 1, first, first + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        expected = {"a": "x" * 200_000} if length >= first else {}
        assert read_results(tmp_path) == expected
        with open_shard(tmp_path) as shard:
            assert path.stat().st_size == (first if length >= first else 0)
            shard.append("b", 2)
        assert read_results(tmp_path) == {**expected, "b": 2}


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with open_shard(tmp_path) as shard:
        shard.append_all({"a": 1, "b": 2})
    (path,) = shard_files(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"value":1}', b'"value"~1}'))
    with pytest.raises(UserError, match=r"0-of-1\.jsonl, line 1"):
        read_results(tmp_path)


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(20)][-1]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged = max([acknowledged, *(int(line) for line in writer.stdout.read().splitlines() if line)])
    writer.wait()
    found = read_results(tmp_path)
    assert [found[f"key-{index}"]["value"] for index in range(acknowledged + 1)] == list(range(acknowledged + 1))
    with open_shard(tmp_path):  # the lock went with the process
        pass


def test_a_shard_has_one_writer_and_shards_are_read_together(tmp_path: Path) -> None:
    with open_shard(tmp_path, "0-of-2") as one:
        with pytest.raises(UserError, match="another process is writing this shard"), open_shard(tmp_path, "0-of-2"):
            pass
        with open_shard(tmp_path, "1-of-2") as other:
            one.append("a", 1)
            other.append_all({"b": 2, "a": 1})  # equal results may meet
    assert read_results(tmp_path) == {"a": 1, "b": 2}
    with open_shard(tmp_path, "1-of-2") as other:
        other.append("a", 3)
    with pytest.raises(UserError, match="different results for the key a"):
        read_results(tmp_path)


def test_threads_share_a_writer(tmp_path: Path) -> None:
    with open_shard(tmp_path) as shard:
        threads = [
            threading.Thread(
                target=lambda name=name: [shard.append(f"{name}{index}", "y" * 500) for index in range(10)]
            )
            for name in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_results(tmp_path)) == 40


def test_results_made_otherwise_are_refused_with_every_difference(tmp_path: Path) -> None:
    claim(tmp_path, {"detector": {"id": "a", "size": (800, 1333)}, "prompts": "x"})
    claim(tmp_path, {"detector": {"id": "a", "size": (800, 1333)}, "prompts": "x"})
    with pytest.raises(UserErrors) as caught:
        claim(tmp_path, {"detector": {"id": "b", "size": (800, 1333)}, "prompts": "y"})
    assert caught.value.faults == [
        "detector.id: the folder has 'a', this command 'b'",
        "prompts: the folder has 'x', this command 'y'",
    ]
    assert read_settings(tmp_path)["prompts"] == "x"
    with pytest.raises(UserError, match="holds no results yet"):
        read_settings(tmp_path / "other")


def test_a_key_is_its_parts_alone() -> None:
    assert result_key("image", a=1, b=[2]) == result_key("image", b=[2], a=1)
    assert (
        len(
            {result_key("image", a=1), result_key("image", a=2), result_key("verdict", a=1), result_key("image", a="1")}
        )
        == 4
    )


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "0/0", "1/2/3"])
def test_shards_are_i_of_n(text: str) -> None:
    with pytest.raises(UserError, match="expected I/N"):
        shard_of(text)
    assert shard_of("1/2") == (1, 2)
