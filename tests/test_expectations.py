"""Property: every promise about the curated set is really checked, a broken one is named with its rows, and a failing
suite fails the stage.

Great Expectations takes many seconds to import and a second or more per suite, so few suites are run and each shows
several things.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data.curation.expectations import expectations, table_of, validate_curated
from data.curation.filters import Options
from data.errors import UserErrors
from data.files import sha256_bytes
from data.images import encode_png
from data.manifests import read_manifests, write_manifest
from data.microworld import World
from data.records import CATEGORIES, HELD_OUT, SPLITS, Example, read_examples
from tasks.stages.collect import Params as CollectParams
from tasks.stages.collect import collect
from tasks.stages.curate import Params, curate

OPTIONS = Options(24, 24, 4096, False, 6, 6, 3.0, {"t2i": 2, "local_edit": 1}, {"t2i": 1})


def example(name: str, pixels: int | None, folder: Path, **change: object) -> Example:
    """A good row; `pixels` is the edge of its target image."""
    target = None
    if pixels:
        content = encode_png(np.full((pixels, pixels, 3), len(name), np.uint8))
        target = f"images/{sha256_bytes(content)}.png"
        (folder / "images").mkdir(exist_ok=True)
        (folder / target).write_bytes(content)
    base = Example(
        name, "train", "t2i", "colors", f"prompt {name}", None, target, {}, "a.jsonl", 1, sha256_bytes(name.encode())
    )
    return replace(base, **change)  # type: ignore[arg-type]


def good_set(folder: Path) -> list[Example]:
    edit = example("edit", 24, folder, capability="local_edit", category="color_alter")
    return [
        example("one", 24, folder),
        example("two", None, folder),
        replace(edit, source=edit.target),
        example("scored", 24, folder, split="eval"),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(page: str) -> list[str]:
    """What a browser would fetch for this page by itself."""
    sources = re.findall(r"<(?:script|img|source|iframe)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", page) + re.findall(
        r"<link\b[^>]*\bhref=[\"']?([^\"'\s>]+)", page
    )
    return sources + re.findall(r"url\(([^)]*)\)|@import ([^;]*)", page)


def test_a_good_set_passes_and_its_pages_need_no_network(tmp_path: Path) -> None:
    found = validate_curated(good_set(tmp_path), OPTIONS, tmp_path / "docs", folder=tmp_path)
    names = [outcome["name"] for outcome in found["expectations"]]
    assert (
        found["success"]
        and found["evaluated"] == found["successful"] == len(names) == len(expectations(OPTIONS, {"train", "eval"})) > 0
    )
    assert {"count_t2i_train", "count_local_edit_train", "count_t2i_eval"} <= set(names)
    assert "count_t2i_dev" not in names  # of a split without a row nothing is asked
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").iterdir()}
    assert set(pages) == {"index.html", "index.md", "validation.html", "suite.html"}
    for name, page in pages.items():
        assert loaded(page) == [] and "<script" not in page, name
        for link in re.findall(r'href="([^"#]+)"', page):
            assert link in pages, (name, link)
    assert all(name in pages["index.md"] and name in pages["index.html"] for name in names)
    assert "Evaluated Expectations" in pages["validation.html"] and "prompt_words" in pages["suite.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "images"]


def test_every_broken_promise_is_named_with_its_rows(tmp_path: Path) -> None:
    good = good_set(tmp_path)
    altered = example("altered!", 24, tmp_path)
    (tmp_path / str(altered.target)).write_bytes(encode_png(np.zeros((24, 24, 3), np.uint8)))
    bad = [
        replace(good[0], id="twin", sha256=good[0].sha256),
        example("scored2", None, tmp_path, prompt="Prompt  SCORED."),
        example("manifest", None, tmp_path, origin="somewhere", row=0),
        example("digest", None, tmp_path, sha256="abc"),
        example("split", None, tmp_path, split="test"),
        example("capability", None, tmp_path, capability="video", category="dance"),
        example("category", None, tmp_path, category="color_alter"),
        example("prompt", None, tmp_path, prompt=" "),
        example("long", None, tmp_path, prompt="word " * 7),
        example("nosource", None, tmp_path, capability="local_edit", category="color_alter"),
        example("small", 23, tmp_path),
        example("large", 25, tmp_path),
        example("../escape", None, tmp_path),
        example("again", None, tmp_path),
        example("again", None, tmp_path, sha256=sha256_bytes(b"other")),
        example("chosen", None, tmp_path, split="dev"),
        altered,
    ]
    options = replace(OPTIONS, minimum_train={"t2i": 100}, minimum_eval={"global_edit": 1})
    with pytest.raises(UserErrors) as caught:
        validate_curated(good + bad, options, tmp_path / "docs", folder=tmp_path)
    with pytest.raises(UserErrors):
        validate_curated(good + bad, options, tmp_path / "again", folder=tmp_path)
    assert contents(tmp_path / "docs") == contents(tmp_path / "again")
    faults = {fault.split(" ")[0]: fault for fault in caught.value.faults}
    assert set(faults) == set(expectations(options, SPLITS)) - {"columns"}
    named = {
        "id_form": "../escape",
        "id_unique": "again",
        "sha256_form": "digest",
        "provenance": "manifest",
        "provenance_row": "manifest",
        "split_known": "split",
        "capability_known": "capability",
        "category_known": "capability",
        "category_fits": "category",
        "prompt_given": "prompt",
        "prompt_length": "long",
        "source_as_needed": "nosource",
        "images_intact": "altered!",
        "image_size_min": "small",
        "image_size_max": "large",
        "no_leakage": "scored2",
        "sha256_unique": "twin",
    }
    for name, identifier in named.items():
        assert (
            re.search(r": \d+ rows, the first ", faults[name]) and identifier in faults[name].split("the first ")[1]
        ), faults[name]
    assert ": 2 rows, the first again, again" in faults["id_unique"]
    assert "observed 21" in faults["row_count"] and "at least 102" in faults["row_count"]
    assert all("observed 0" in faults[f"count_global_edit_{split}"] for split in HELD_OUT)
    assert "FAILS" in (tmp_path / "docs" / "index.md").read_text() and (tmp_path / "docs" / "validation.html").is_file()


def test_a_t2i_prompt_is_in_one_split_alone(tmp_path: Path) -> None:
    for one, other in product(SPLITS, SPLITS):
        pair = [example(split, None, tmp_path, split=split, prompt="A prompt") for split in (one, other)]
        assert set(table_of(pair, tmp_path)["prompt_in_other_split"]) == {one != other}, (one, other)


def test_an_empty_set_does_not_pass_vacuously(tmp_path: Path) -> None:
    with pytest.raises(UserErrors) as caught:
        validate_curated([], replace(OPTIONS, minimum_train={}, minimum_eval={}), tmp_path / "docs", folder=tmp_path)
    assert [fault.split(" ")[0] for fault in caught.value.faults] == ["row_count"]


def test_the_stage_writes_only_what_passes(tmp_path: Path) -> None:
    world = World(shapes=("circle", "square", "cross"), backgrounds=("white", "gray", "black"))
    counts = {"t2i": 12, "local_edit": 8, "global_edit": 4}
    wanted = CollectParams("", 0, counts, dict.fromkeys(CATEGORIES, 1), world, source="microworld")
    collect(wanted, out=tmp_path / "raw")
    params = Params(
        24, 24, 4096, False, 24, 6, 10.0, {"t2i": 4}, {"t2i": 6, "local_edit": 4, "global_edit": 2}, "world", world
    )
    paths = {"raw": tmp_path / "raw", "out": tmp_path / "curated", "docs": tmp_path / "docs"}
    with pytest.raises(UserErrors, match="count_t2i_eval"):
        curate(replace(params, minimum_eval={"t2i": 7}), **paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "raw"]
    summary = curate(params, **paths)
    again = {"raw": tmp_path / "raw", "out": tmp_path / "again/curated", "docs": tmp_path / "again/docs"}
    curate(params, **again)
    assert all(contents(paths[name]) == contents(again[name]) for name in ("out", "docs"))  # DVC hashes both
    assert "Run Time" not in (paths["docs"] / "validation.html").read_text()
    shutil.rmtree(tmp_path / "again")
    assert summary["validation"]["success"] and summary["kept"] == len(read_examples(tmp_path / "curated"))
    assert summary["rows"] == read_manifests(tmp_path / "raw").count == summary["kept"] + summary["rejected"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curated", "docs", "raw"]
    write_manifest(
        tmp_path / "raw",
        "more.jsonl",
        [{"capability": "t2i", "category": "colors", "prompt": "a crimson circle", "split": "train"}],
    )
    assert curate(params, **paths)["reasons"]["unknown words"] == 1
