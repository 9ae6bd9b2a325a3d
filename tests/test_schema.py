"""params.schema.json says to an editor what the reader of params.yaml says: the same keys, types, ranges and
choices.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from data.errors import UserErrors
from data.files import read_json, write_json
from data.yaml_files import read_yaml
from tasks.checks.preflight import check_all
from tasks.environment import PROJECT
from tasks.params.presets import preset_names, preset_text
from tasks.params.schema import FILE, schema

FILES = [PROJECT / "params.yaml", *sorted((PROJECT / "presets").glob("*.yaml"))]
PARAMS = read_yaml(PROJECT / "params.yaml")
GONE = object()


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    made = schema()
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


def test_the_file_is_the_one_that_the_command_writes() -> None:
    assert read_json(PROJECT / FILE) == schema(), "run: python -m tasks schema"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_kept_is_valid_and_names_its_schema(validator: Draft202012Validator, file: Path) -> None:
    assert [error.message for error in validator.iter_errors(read_yaml(file))] == []
    line = file.read_text(encoding="utf-8").splitlines()[0]
    assert line.startswith("# yaml-language-server: $schema=")
    assert (file.parent / line.split("$schema=")[1]).resolve() == PROJECT / FILE


def test_a_preset_in_force_names_the_schema_beside_it() -> None:
    for name in preset_names(PROJECT):
        assert preset_text(name, PROJECT).startswith("# yaml-language-server: $schema=params.schema.json\n")


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("distill.steps", "520", "distill.steps = '520': expected a whole number"),
        ("distill.steps", True, "distill.steps = true: expected a whole number"),
        ("distill.steps", 0, "distill.steps = 0: expected 1 or more"),
        ("distill.steps", GONE, "distill.steps: missing; expected a whole number, 1 or more"),
        ("distill.stepz", 1, "distill.stepz = 1: unknown key; did you mean 'steps'?"),
        ("distill.optimizer", "muno", "distill.optimizer = 'muno': expected one of adamw, muon; did you mean 'muon'?"),
        ("distill.query_states", 3, "distill.query_states = 3: expected one of 1, 2, 4, 8, 16"),
        ("distill.accept_changed", "seed", "distill.accept_changed = 'seed': expected a list, each item text"),
        ("distill.world", {}, "distill.world = {}: unknown key"),
        ("collect.world", {}, "collect.world = {}: this is the shared top-level section 'world'; remove it here"),
        ("collect.train.t2j", 5, "collect.train.t2j = 5: unknown name; did you mean 't2i'?"),
        ("collect.train.t2i", -5, "collect.train.t2i = -5: expected 0 or more"),
        ("sampling.guidance", 0.5, "sampling.guidance = 0.5: expected 1 (unguided) or more"),
        ("judge.prices", [1.0], "judge.prices = [1.0]: expected a list of 2 values (a finite number, a finite number)"),
        ("execution.device", "tpu", "execution.device = 'tpu': expected one of auto, cpu, cuda"),
        ("validate.confidence", 1.0, "validate.confidence = 1.0: expected more than 0 and less than 1"),
        ("gate.floors.geneval/total", 1.0, "gate.floors.geneval/total = 1.0: unknown name; did you mean 'geneval/"),
        (
            "teachers.teachers.base.training.ema",
            1.0,
            "teachers.teachers.base.training.ema = 1.0: expected 0 or more and less than 1",
        ),
        (
            "teachers.teachers.base.kind",
            None,
            "teachers.teachers.base.kind = null: expected one of base, full, adapter",
        ),
        ("score", GONE, "score: the section is missing; it needs the keys seed, resamples, confidence, shown"),
        ("trian", {}, "trian: unknown section"),
    ],
)
def test_schema_and_reader_refuse_the_same(
    validator: Draft202012Validator, tmp_path: Path, key: str, value: Any, fault: str
) -> None:
    document = copy.deepcopy(PARAMS)
    *sections, last = key.split(".")
    place = document
    for section in sections:
        place = place[section]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    assert not validator.is_valid(document)
    write_json(tmp_path / "params.yaml", document)
    with pytest.raises(UserErrors) as told:
        check_all(tmp_path / "params.yaml")
    assert [text for text in told.value.faults if text.startswith(fault)], told.value.faults
