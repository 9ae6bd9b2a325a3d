"""Defends: params choose once who judges; another evaluator is a file and an entry, and no stage learns its name.

A made-up evaluator, which calls a picture right where it is bright, validates a tiny micro world's teachers.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scorers
from benchmarks.params import BenchmarkParams
from benchmarks.scores.scorecard import ExampleScore, read_scores
from benchmarks.scores.scorer import DrawnImage, Scorer
from data.errors import UserError, UserErrors
from data.files import read_json
from data.images import read_picture
from data.records import CAPABILITIES, HELD_OUT, Example, read_examples, write_examples
from model.route import Route
from tasks.checks.preflight import evaluators, judge_faults
from tasks.params.sections import BackboneParams, MicroParams, RoutingParams, SamplingParams
from tasks.stages import validate as validating
from tests.tiny import CHANNELS, HEADS, LAYERS, NOBODY, WIDTH, WORLD, Tiny, build

BRIGHT = BenchmarkParams("bright", "", "cpu", batch=4, workers=1, scheduler="")
NUMBERS: dict[str, Any] = {"seed": 0, "resamples": 50, "confidence": 0.9}


class Bright(Scorer):
    """Judges T2I alone."""

    def judges(self, example: Example) -> bool:
        return not CAPABILITIES[example.capability].is_edit

    def check(self, examples: Sequence[Example]) -> None:
        if any("forbidden" in example.prompt for example in examples):
            raise UserError("bright: a forbidden prompt")

    def score(self, drawn: Sequence[DrawnImage]) -> list[ExampleScore]:
        return [image.score({"correct": float(read_picture(image.file).mean() > 1)}) for image in drawn]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Every example of train is in eval, too, and there are two of each in dev and eval."""
    monkeypatch.setitem(scorers.SCORERS, "bright", scorers.Entry(lambda *_: Bright()))
    made = build(tmp_path)
    examples = [example for example in read_examples(made.curated) if example.category != "color_attr"]
    dev, train = ([example for example in examples if example.split == split] for split in ("dev", "train"))
    held_out = [replace(example, split="eval", id=f"{example.id}-{k}") for example in train for k in range(2)]
    write_examples(made.curated, examples + [replace(example, id=f"{example.id}-again") for example in dev] + held_out)
    return made


def validate(tiny: Tiny, out: Path, split: str = "eval", **floors: float) -> dict[str, Any]:
    params = validating.Params(
        WORLD,
        BackboneParams("micro", MicroParams(WIDTH, LAYERS, HEADS, CHANNELS), None),
        SamplingParams(split, steps=1, guidance=2.0, images_per_prompt=1, seed=0, batch=16),
        RoutingParams((Route("t2i", "base", 1.0),)),
        BRIGHT,
        NOBODY,
        **NUMBERS,
        floors=floors,
    )
    folders = {"curated": tiny.curated, "teachers": tiny.teachers, "out": out, "report": out.with_suffix(".json")}
    return validating.validate(params, **folders)


def test_a_made_up_evaluator_judges_what_is_its_own(tiny: Tiny, tmp_path: Path) -> None:
    assert validate(tiny, tmp_path / "validated") == {"base on t2i": 1.0}
    rows = read_scores(tmp_path / "validated")
    assert {row.model for row in rows} == {"base", "base_guided"} and {row.benchmark for row in rows} == {"geneval"}
    assert all(row.values == {"correct": 1.0} and (tmp_path / "validated" / row.image).is_file() for row in rows)
    assert read_json(tmp_path / "validated.json")["teachers"]["base"]["own"]["mean"] == 1.0
    with pytest.raises(UserErrors, match=r"base: geneval/overall = 1\.000 on its own t2i, below its floor 2\.0"):
        validate(tiny, tmp_path / "again", base=2.0)


def test_scores_are_of_the_split_that_is_named(tiny: Tiny, tmp_path: Path) -> None:
    for split in HELD_OUT:
        validate(tiny, tmp_path / split, split)
        t2i = {e.id for e in read_examples(tiny.curated) if (e.split, e.capability) == (split, "t2i")}
        assert {row.example_id for row in read_scores(tmp_path / split)} == t2i
    write_examples(tiny.curated, [example for example in read_examples(tiny.curated) if example.split != "dev"])
    with pytest.raises(UserError, match=r"no example of the dev split \(sampling.split\)"):
        validate(tiny, tmp_path / "none", "dev")


def test_its_faults_are_told_before_anything_is_drawn(tiny: Tiny, tmp_path: Path) -> None:
    examples = [replace(example, prompt=f"{example.prompt} forbidden") for example in read_examples(tiny.curated)]
    write_examples(tiny.curated, examples)
    with pytest.raises(UserError, match="bright: a forbidden prompt"):
        validate(tiny, tmp_path / "validated")
    assert not (tmp_path / "validated").exists()


def test_checks_before_a_run_know_what_an_evaluator_needs(tiny: Tiny, tmp_path: Path) -> None:
    def document(detector: str) -> dict[str, Any]:
        routes = [{"capability": "local_edit", "teacher": "t", "weight": 1.0}]
        judge, benchmark = {"kind": "none"}, {"detector": detector, "classifier": "clip"}
        return {"judge": judge, "benchmark": benchmark, "routing": {"routes": routes}}

    for name in ("micro", "bright"):
        assert evaluators(document(name), tmp_path) == {} and judge_faults(document(name)) == []
    networks = evaluators(document("folder"), tmp_path)
    assert list(networks) == ["benchmark.detector", "benchmark.classifier"] and judge_faults(document("folder"))
    assert [entry.asks for entry in scorers.entries("folder")] == [False, True]


def test_the_table_of_evaluators_loads_no_table_library(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    ended = python("-c", "import sys, benchmarks.scorers; print('pandas' in sys.modules, 'torch' in sys.modules)")
    assert ended.stdout.split() == ["False", "False"], ended.stderr
