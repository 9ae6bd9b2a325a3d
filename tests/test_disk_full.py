"""A disk that fills up while a checkpoint is written costs that checkpoint and nothing else: one clear line, the state
before it stays whole, and with space again the same command ends as if nothing had been."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_resume import at_step, command, result, states, straight

from tasks.__main__ import main
from tests.tiny import build, write_params

SIZE = "size=16m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB in memory, where the state of the run is kept."""
    folder = tmp_path / "run" / "runs"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", SIZE, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    try:
        with open(path, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError as error:
        assert error.errno == errno.ENOSPC


def test_a_full_disk_costs_one_checkpoint(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tiny = build(tmp_path / "tiny")
        expected = straight(tiny, tmp_path, monkeypatch)
        monkeypatch.chdir(small_disk.parent)
        arguments = command(tiny, write_params(Path("params.yaml")))
        with monkeypatch.context() as context:
            at_step(context, 3, lambda: fill(small_disk / "filler"))  # the state of step 2 is saved by then
            capsys.readouterr()
            assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and "no space left on the device" in told and len(told.splitlines()) == 1
        assert states() == ["step-00000002"] and not Path("student").exists()
        assert not [path for path in small_disk.rglob(".*")]  # nothing half-written
        (small_disk / "filler").unlink()
        assert main(arguments) == 0
        assert "goes on at step 2 of 4" in capsys.readouterr().out
        assert result(Path("student")) == expected
    finally:
        torch.set_num_threads(threads)
