"""Property: the micro world's raw folder is a function of its parameters, holds what was asked for, and passes
curation; a user's folder arrives unchanged.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.curation.filters import Options
from data.curation.pipeline import curate
from data.errors import UserError, UserErrors
from data.files import digest, write_json
from data.images import encode_png
from data.manifests import read_manifests, write_manifest
from data.microworld import SHAPES, Scene, World, render
from data.records import CAPABILITIES, CATEGORIES, SPLITS, read_examples
from data.sources import SOURCES
from data.sources.base import Request, Source
from data.sources.micro import draw_examples
from tasks.environment import PROJECT
from tasks.params.reading import PARAMS_FILE, faults_of, load_params
from tasks.stages.collect import Params, collect

WORLD = World(shapes=SHAPES[:3], backgrounds=("white", "gray", "black"))
COUNTS = {"t2i": 24, "local_edit": 12, "global_edit": 8}
PARAMS = Params("", 0, COUNTS, dict.fromkeys(CATEGORIES, 3), WORLD, source="microworld")
OPTIONS = Options(24, 24, 4096, False, 24, 6, 100.0, {"t2i": 12, "local_edit": 6, "global_edit": 4}, {})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folder_holds_what_was_asked_for(tmp_path: Path) -> None:
    summary = collect(PARAMS, out=tmp_path / "raw")
    found = read_manifests(tmp_path / "raw")
    assert not found.rejected and not found.ignored_columns
    train, dev, evaluation = ([row for row in found.rows if row.split == split] for split in SPLITS)
    assert Counter(row.capability for row in train) == PARAMS.train
    for rows in (dev, evaluation):
        assert Counter(row.category for row in rows) == PARAMS.evaluation
    for split, rows in zip(SPLITS, (train, dev, evaluation), strict=True):
        assert {row.origin for row in rows} == {f"{split}.jsonl"}
    spread = Counter(row.category for row in train)
    for capability in PARAMS.train:
        counts = [spread[category] for category in CAPABILITIES[capability].categories]
        assert max(counts) - min(counts) <= 1
    images = list((tmp_path / "raw" / "images").iterdir())
    assert [summary[name] for name in (*SPLITS, "images")] == [44, 36, 36, len(images)]
    for row in found.rows:
        assert (row.source is not None) == CAPABILITIES[row.capability].is_edit and row.target is not None
        if row.source:
            with (
                Image.open(tmp_path / "raw" / row.source) as source,
                Image.open(tmp_path / "raw" / row.target) as target,
            ):
                np.testing.assert_array_equal(np.asarray(source), render(WORLD, Scene.from_json(row.record["source"])))
                np.testing.assert_array_equal(np.asarray(target), render(WORLD, Scene.from_json(row.record["target"])))


def test_equal_parameters_give_equal_bytes_and_another_seed_others(tmp_path: Path) -> None:
    few = replace(PARAMS, train={"t2i": 6, "local_edit": 4, "global_edit": 2}, evaluation=dict.fromkeys(CATEGORIES, 1))
    for name, params in (("one", few), ("two", few), ("three", replace(few, seed=1))):
        collect(params, out=tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")["train.jsonl"] != contents(tmp_path / "three")["train.jsonl"]


def test_a_row_depends_on_its_own_address_only() -> None:
    """Asking for more of one capability changes nothing about the rows that were there."""
    fewer = {drawn[0]: drawn for drawn in draw_examples(PARAMS)}
    larger = replace(PARAMS, train={"global_edit": 16, "t2i": 30}, evaluation=dict.fromkeys(CATEGORIES[::-1], 4))
    more = {drawn[0]: drawn for drawn in draw_examples(larger)}
    shared = fewer.keys() & more.keys()
    assert len(shared) == 24 + 8 + 36 + 36 and all(fewer[name] == more[name] for name in shared)


def test_collected_examples_pass_curation(tmp_path: Path) -> None:
    collect(PARAMS, out=tmp_path / "raw")
    summary = curate(tmp_path / "raw", tmp_path / "out", OPTIONS, vocabulary=WORLD.vocabulary)
    assert set(summary["reasons"]) <= {"exact duplicate", "near duplicate", "leakage"}
    examples = read_examples(tmp_path / "out")
    assert Counter(example.category for example in examples if example.split == "eval") == PARAMS.evaluation
    prompts = [
        {example.prompt for example in examples if example.split == split and example.capability == "t2i"}
        for split in SPLITS
    ]
    assert all(prompts) and not any(one & other for one, other in combinations(prompts, 2))


def test_the_eval_split_is_the_one_that_was_always_reported() -> None:
    """Scores of different days are compared on these rows."""
    params = load_params(Params, "collect", PROJECT / PARAMS_FILE)
    rows = [
        [name, split, capability, record, source and source.to_json(), target.to_json()]
        for name, split, capability, record, source, target in draw_examples(params)
        if split == "eval"
    ]
    assert (len(rows), digest(rows)) == (656, "da9cb68b787f480046a66498fc0f103733f60dab94071476d356b312b9375905")


def test_a_world_too_small_for_its_evaluation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="single_object"):
        collect(
            replace(PARAMS, evaluation={"single_object": 17}), out=tmp_path / "raw"
        )  # 4 openings, 2 grounds, 2 held-out tuples
    with pytest.raises(UserErrors) as caught:
        collect(replace(PARAMS, world=replace(WORLD, shapes=("circle", "square"))), out=tmp_path / "raw")
    assert "two_object: this world has no examples that are held out for the eval split" in caught.value.faults
    tiny = World(("circle", "square"), ("red", "green"), ("white", "gray"), ("plain", "night"), grid=2)
    with pytest.raises(UserErrors) as caught:
        collect(replace(PARAMS, world=tiny), out=tmp_path / "raw")
    start = "color_attr: this world has no examples that are"
    assert {f"{start} left to train on", f"{start} held out for the eval split"} <= {*caught.value.faults}
    assert list(tmp_path.iterdir()) == []


def user_folder(folder: Path) -> Path:
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "a.png").write_bytes(encode_png(np.zeros((24, 24, 3), np.uint8)))
    (folder / "pictures" / "unused.png").write_bytes(b"x")
    row = {"capability": "t2i", "category": "colors", "prompt": "a red circle", "split": "train"}
    write_manifest(
        folder,
        "mine.jsonl",
        [
            {**row, "target": "pictures/a.png"},
            {**row, "target": "pictures/gone.png"},
            {**row, "target": "../secret.png"},
        ],
    )
    return folder


def test_a_users_folder_arrives_unchanged(tmp_path: Path) -> None:
    source = user_folder(tmp_path / "mine")
    summary = collect(replace(PARAMS, source="folder", folder=str(source)), out=tmp_path / "raw")
    expected = {name: content for name, content in contents(source).items() if "unused" not in name}
    assert contents(tmp_path / "raw") == expected
    assert (summary["rows"], summary["bad_rows"], summary["images"], summary["missing_images"]) == (3, 1, 1, 1)


def test_a_broken_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text('{"prompt": "cut')
    with pytest.raises(UserErrors, match=r"a\.jsonl"):
        collect(replace(PARAMS, source="folder", folder=str(tmp_path / "mine")), out=tmp_path / "raw")
    with pytest.raises(UserError, match="inside each other"):
        source = user_folder(tmp_path / "other")
        collect(replace(PARAMS, source="folder", folder=str(source)), out=source / "raw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]


@pytest.mark.parametrize(
    ("params", "key"),
    [
        (replace(PARAMS, source="folder"), "folder"),
        (replace(PARAMS, train={"t2j": 5}), "train.t2j"),
        (replace(PARAMS, train={"t2i": -5, "local_edit": 6}), "train.t2i"),
        (replace(PARAMS, evaluation={"dance": 5}), "evaluation.dance"),
        (replace(PARAMS, train={"t2i": 0}), "train"),
    ],
)
def test_params_name_their_faults(params: Params, key: str) -> None:
    assert faults_of(PARAMS) == []
    (fault,) = faults_of(params)
    assert fault.startswith(f"{key} = ")


def test_a_source_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_two(request: Request, out: Path) -> dict[str, int]:
        row = {"capability": "t2i", "category": "colors", "split": "train"}
        write_manifest(out, "made.jsonl", [{**row, "prompt": f"prompt {request.seed + i}"} for i in range(2)])
        return {"rows": 2}

    entry = Source(write_two, lambda request: [] if request.seed else ["seed = 0: expected another"])
    monkeypatch.setitem(SOURCES, "made_up", entry)
    section = {"folder": "", "seed": 7, "train": {}, "evaluation": {}, "source": "made_up"}
    document = {"collect": section, "world": asdict(WORLD)}
    write_json(tmp_path / "params.yaml", document)
    params = load_params(Params, "collect", tmp_path / "params.yaml")
    assert collect(params, out=tmp_path / "raw") == {"rows": 2}
    assert [row.prompt for row in read_manifests(tmp_path / "raw").rows] == ["prompt 7", "prompt 8"]
    assert faults_of(replace(params, seed=0)) == ["seed = 0: expected another"]
    (fault,) = faults_of(replace(params, source="made_down"))
    assert fault.startswith(
        "source = 'made_down': expected one of microworld, folder, made_up; did you mean 'made_up'?"
    )
