"""Property: the speed bench runs the same steps on both paths, counts the floor exactly, and says what cannot be
measured here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import speed
from model.backbones.sizes import SIZES, random_backbone

KEYS = {
    "ratio_median",
    "ratio_min",
    "ratio_max",
    "samples_per_second",
    "evaluations_per_sample",
    "floor",
    "peak_memory_bytes",
    "device",
    "seed",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_both_paths_take_the_same_steps_and_the_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size, written_to = speed.sd3_size(32, 2, 4, 3), tmp_path / "speed.json"
    adapters, full = speed.sd3_case("tiny", size, 4, 3, 1 << 20, 4), speed.sd3_case("whole", size, 0, 3, None, 4)
    chord = replace(full, field={"guidance": 2.0, "steps": {"steps": 4, "substeps": 2}})
    monkeypatch.setattr(speed, "CASES", {"tiny": lambda _: adapters, "whole": lambda _: full, "chord": lambda _: chord})
    options = ["--json", str(written_to), "--alternations", "2", "--seed", "4", "--threads", "1"]
    assert speed.main(["--case", "tiny", "whole", "chord", *options]) == 0
    written = json.loads(written_to.read_text())
    assert set(written) == {"tiny", "whole", "chord"}
    # A teacher's answer is four evaluations, two sub-steps of two each, and was one.
    assert written["chord"]["evaluations_per_sample"] == written["whole"]["evaluations_per_sample"] + 3
    for found in written.values():
        assert set(found) >= KEYS and found["seed"] == 4 and "CPU" in found["device"]
        assert found["ratio_min"] <= found["ratio_median"] <= found["ratio_max"] and found["ratio_min"] > 0
        assert found["evaluations_per_sample"] == found["floor"] > 2
        assert found["largest_loss_gap"] < 1e-4
        assert 0 < found["peak_memory_bytes"]["fast"] < found["peak_memory_bytes"]["plain"]
    assert "evaluations a sample" in capsys.readouterr().out


def test_the_case_of_14_million_parameters_is_one() -> None:
    network = random_backbone(speed.CASES["sd3-14m"](512).size, device="meta").network
    assert sum(value.numel() for value in network.parameters()) == pytest.approx(14e6, rel=0.03)
    assert set(speed.CASES) == {"micro", "micro-chord", "sd3-14m", "sd35-m", "zimage"}


@pytest.mark.parametrize("name", ["sd35-m", "zimage"])
def test_cases_of_real_size_are_the_published_networks(name: str) -> None:
    """Their parameters are counted in tests/test_families.py."""
    case = speed.CASES[name](1024)
    assert case.size is SIZES[name] and case.resolution == 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("name", ["sd35-m", "zimage"])
def test_without_a_gpu_the_large_cases_are_refused_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--case", name, "--resolution", "1024"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and name in errors[0] and "CUDA" in errors[0]
