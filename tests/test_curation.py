"""Property: every row read is kept or rejected with its reason, nothing scored leaks into training, and equal input
gives equal bytes.
"""

from __future__ import annotations

import csv
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.curation.duplicates import without_exact_duplicates, without_leakage, without_near_duplicates
from data.curation.filters import (
    Candidate,
    Options,
    consistent_source,
    count_words,
    decoded,
    known_task,
    normalise,
    scorable,
    sift,
    unique_ids,
    usable_prompts,
)
from data.curation.pipeline import balanced, curate, require_minimum
from data.errors import UserErrors
from data.files import sha256_file
from data.images import ImageFault, decode_image, distances, encode_png, fingerprint, picture_of
from data.manifests import RawRow, write_manifest
from data.microworld import BACKGROUNDS, COLORS, JITTER, RADII, SHAPES, Scene, Thing, World, render
from data.records import HELD_OUT, SPLITS, read_examples
from tasks.params.reading import faults_of

WORLD = World()
OPTIONS = Options(
    min_edge=24,
    max_edge=24,
    max_pixels=4096,
    convert_modes=False,
    max_prompt_words=12,
    near_duplicate_distance=6,
    max_ratio=3.0,
    minimum_train={},
    minimum_eval={},
)


def row(number: int = 1, **change: Any) -> RawRow:
    base = RawRow("set.jsonl", number, f"row-{number}", "train", "t2i", "colors", "a red circle")
    return replace(base, **change)


def scene(*things: tuple[str, str, int], background: str = "white") -> Scene:
    return Scene(background, tuple(Thing(shape, color, cell) for shape, color, cell in things))


def candidate(number: int = 1, source: Scene | None = None, target: Scene | None = None, **change: Any) -> Candidate:
    pictures = [picture_of(Image.fromarray(render(WORLD, shown)))[0] if shown else None for shown in (source, target)]
    edit = {"capability": "local_edit", "category": "color_alter"} if source else {}
    return Candidate(row(number, **{**edit, **change}), *pictures)


def reasons(rejected: Sequence[Any]) -> list[tuple[str, str]]:
    return [(rejection.id, rejection.reason) for rejection in rejected]


# --- text -------------------------------------------------------------------------------------------------------------


def test_unknown_tasks_and_splits() -> None:
    rows = [
        row(1),
        row(2, capability="video"),
        row(3, capability="edit", category="color_alter"),
        row(4, category="color_alter"),
        row(5, split="test"),
    ]
    kept, rejected = sift(rows, known_task)
    assert kept == rows[:1]
    assert reasons(rejected) == [
        ("row-2", "unknown capability"),
        ("row-3", "unknown capability"),
        ("row-4", "unknown task"),
        ("row-5", "unknown split"),
    ]
    assert "color_alter" in rejected[2].detail and "single_object" in rejected[2].detail


def test_ids_are_used_once() -> None:
    kept, rejected = unique_ids([row(1), row(2), row(3, id="row-1")])
    assert [item.row for item in kept] == [1, 2]
    assert reasons(rejected) == [("row-1", "duplicate id")] and rejected[0].row == 3


def test_prompts() -> None:
    long = " ".join(["word"] * 5)
    prompts = ["a red circle!", "", " ?! ", long, "a crimson circle", "把这个红色圆形"]
    rows = [row(number, prompt=prompt) for number, prompt in enumerate(prompts, 1)]
    kept, rejected = usable_prompts(rows, max_words=4, vocabulary={"a", "red", "circle"})
    assert kept == rows[:1]
    assert [rejection.reason for rejection in rejected] == [
        "empty prompt",
        "empty prompt",
        "over-long prompt",
        "unknown words",
        "over-long prompt",
    ]
    assert "crimson" in rejected[3].detail and "5 words, at most 4" in rejected[2].detail
    assert usable_prompts([row(prompt=long)], max_words=5)[1] == []


def test_words_and_normal_form() -> None:
    assert count_words("a red  circle\n") == 3 and count_words("红色 circle") == 3 and count_words("") == 0
    assert normalise("  A RED,\tcircle. ") == normalise("a red circle") == normalise("Ａ red—circle")
    assert normalise("a red circle") != normalise("a red circles")


def test_edits_have_a_source_and_t2i_has_none() -> None:
    edit = {"capability": "global_edit", "category": "style_change"}
    rows = [row(1), row(2, source="a.png"), row(3, **edit), row(4, source="a.png", **edit)]
    kept, rejected = sift(rows, consistent_source)
    assert [item.id for item in kept] == ["row-1", "row-4"]
    assert reasons(rejected) == [("row-2", "unexpected source"), ("row-3", "missing source")]


def test_scored_prompts_need_their_metadata() -> None:
    good = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    records = [good, {}, {**good, "tag": "counting"}, {**good, "include": []}, {**good, "include": ["circle"]}]
    rows = [row(number, split=HELD_OUT[number % 2], record=record) for number, record in enumerate(records)]
    kept, rejected = sift([*rows, row(9)], scorable)
    assert (
        [item.id for item in kept] == ["row-0", "row-9"]
        and {rejection.reason for rejection in rejected} == {"unscorable record"}
        and len(rejected) == 4
    )


# --- images -----------------------------------------------------------------------------------------------------------


def picture_file(path: Path) -> Path:
    """A real 24 x 24 PNG with enough texture that cutting it loses pixels."""
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    path.write_bytes(encode_png(pixels))
    return path


def cut(path: Path) -> None:
    path.write_bytes(picture_file(path).read_bytes()[:-200])


def flip_a_byte(path: Path) -> None:
    content = bytearray(picture_file(path).read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def cut_jpeg(path: Path) -> None:
    with Image.open(picture_file(path)) as image:
        image.load()
    image.save(path, "JPEG", quality=95)
    path.write_bytes(path.read_bytes()[:-300])


def bomb(path: Path) -> None:
    """A header that promises 50 000 x 50 000 pixels in a file of a hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def animate(path: Path) -> None:
    Image.new("RGB", (24, 24)).save(path, "PNG", save_all=True, append_images=[Image.new("RGB", (24, 24), "red")])


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "unreadable image"),
    "folder": (lambda path: path.mkdir(), "unreadable image"),
    "empty": (lambda path: path.write_bytes(b""), "unreadable image"),
    "text": (lambda path: path.write_text("not an image"), "unreadable image"),
    "truncated": (cut, "unreadable image"),
    "damaged": (flip_a_byte, "unreadable image"),
    "truncated jpeg": (cut_jpeg, "unreadable image"),
    "bomb": (bomb, "too many pixels"),
    "larger than max_pixels": (lambda path: Image.new("RGB", (65, 64)).save(path), "too many pixels"),
    "animated": (animate, "animated image"),
    "too small": (lambda path: Image.new("RGB", (24, 23)).save(path), "wrong size"),
    "too large": (lambda path: Image.new("RGB", (25, 24)).save(path), "wrong size"),
    **{
        mode: (lambda path, mode=mode: Image.new(mode, (24, 24)).save(path), "wrong mode")
        for mode in ("1", "L", "LA", "P", "RGBA", "I;16")
    },
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_unusable_images_are_rejected(tmp_path: Path, kind: str) -> None:
    make, reason = BAD_FILES[kind]
    make(tmp_path / "bad.png")
    picture_file(tmp_path / "good.png")
    saved: dict[str, bytes] = {}
    kept, rejected = decoded(
        [row(1, target="bad.png"), row(2, target="good.png"), row(3)], tmp_path, OPTIONS, save=saved.__setitem__
    )
    assert reasons(rejected) == [("row-1", reason)] and "bad.png" in rejected[0].detail
    assert [item.row.id for item in kept] == ["row-2", "row-3"] and len(saved) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_modes_are_converted_on_request_where_nothing_is_lost(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (24, 24)).save(path)
    kept, rejected = decoded([row(target=path.name)], tmp_path, replace(OPTIONS, convert_modes=True))
    assert (len(kept), [rejection.reason for rejection in rejected]) == (
        (0, ["wrong mode"]) if mode == "I;16" else (1, [])
    )


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (24, 24), (200, 0, 0, 0))
    image.putpixel((3, 4), (0, 0, 250, 255))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(decode_image(tmp_path / "a.png", max_pixels=4096, convert_modes=True))
    assert tuple(pixels[0, 0]) == (255, 255, 255) and tuple(pixels[4, 3]) == (0, 0, 250)


def test_exif_orientation_is_applied_before_the_size_is_judged(tmp_path: Path) -> None:
    pixels = np.zeros((24, 12, 3), np.uint8)
    pixels[0, 0] = (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(decode_image(tmp_path / "a.png", max_pixels=4096, convert_modes=False))
    np.testing.assert_array_equal(upright, np.rot90(pixels, k=-1))
    kept, rejected = decoded([row(target="a.png")], tmp_path, OPTIONS)
    assert not kept and "24x12" in rejected[0].detail


def test_source_and_target_have_one_size(tmp_path: Path) -> None:
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    edit = row(source="a.png", target="b.png", capability="local_edit", category="color_alter")
    kept, rejected = decoded([edit], tmp_path, replace(OPTIONS, max_edge=32))
    assert (
        not kept
        and rejected[0].reason == "wrong size"
        and "24x24" in rejected[0].detail
        and "32x32" in rejected[0].detail
    )


def test_other_decoders_are_never_started(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageFault, match="unreadable image"):
        decode_image(tmp_path / "a.png", max_pixels=4096, convert_modes=True)


# --- duplicates -------------------------------------------------------------------------------------------------------


def apart(one: np.ndarray, other: np.ndarray) -> int:
    codes = [fingerprint(Image.fromarray(pixels)) for pixels in (one, other)]
    return int(distances(codes[0], np.frombuffer(codes[1], np.uint8)[None])[0])


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_scenes_that_differ_in_one_shape_or_colour_are_no_near_duplicates(background: str) -> None:
    """Over every shape, colour, jitter and radius; a thing covers its own cell only, so other things change nothing."""
    looks = list(product(SHAPES, COLORS))
    for dx, dy, radius in product(JITTER, JITTER, RADII):
        codes = [
            fingerprint(Image.fromarray(render(WORLD, Scene(background, (Thing(shape, color, 4, dx, dy, radius),)))))
            for shape, color in looks
        ]
        table = np.array([np.frombuffer(code, np.uint8) for code in codes])
        for index, code in enumerate(codes[:-1]):
            assert distances(code, table[index + 1 :]).min() > OPTIONS.near_duplicate_distance


def test_noise_and_recompression_stay_near(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    for background in BACKGROUNDS:
        image = render(WORLD, scene(("circle", "red", 4), ("square", "blue", 0), background=background))
        noisy = np.clip(np.rint(image + rng.normal(0, 1, image.shape)), 0, 255).astype(np.uint8)
        assert apart(image, image) == 0 and apart(image, noisy) <= OPTIONS.near_duplicate_distance
        Image.fromarray(image).save(tmp_path / "a.jpg", quality=99, subsampling=0)
        with Image.open(tmp_path / "a.jpg") as loaded:
            assert apart(image, np.asarray(loaded)) <= OPTIONS.near_duplicate_distance
    assert apart(np.zeros((24, 24, 3), np.uint8), np.full((24, 24, 3), 255, np.uint8)) == 12 * 12 * 3 * 16


def test_exact_duplicates_of_a_split() -> None:
    shown = scene(("circle", "red", 4))
    changes: list[dict[str, Any]] = [{}, {}, {"split": "eval"}, {"prompt": "another"}]
    rows = [*(candidate(number, target=shown, **change) for number, change in enumerate(changes, 1)), candidate(5)]
    kept, rejected = without_exact_duplicates(rows)
    assert [item.row.row for item in kept] == [1, 3, 4, 5]
    assert reasons(rejected) == [("row-2", "exact duplicate")] and "row-1 (set.jsonl row 1)" in rejected[0].detail


def test_near_duplicates_need_the_same_prompt_and_both_pictures() -> None:
    one, other = scene(("circle", "red", 4)), scene(("square", "red", 4))
    nudged = replace(one, things=(replace(one.things[0], dx=0.02),))
    assert (render(WORLD, one) != render(WORLD, nudged)).any()
    rows = [
        candidate(1, one, other),
        candidate(2, nudged, other, prompt="A red  circle."),  # near
        candidate(3, one, one),  # another target
        candidate(4, other, other),  # another source
        candidate(5, nudged, other, prompt="a blue circle"),
        candidate(6, nudged, other, split="eval"),
        candidate(7, target=one),
        candidate(8, target=nudged),  # near
        candidate(9),
        candidate(10, prompt="A RED CIRCLE"),  # no pictures: the prompt alone decides
    ]
    kept, rejected = without_near_duplicates(rows, distance=6)
    assert [item.row.row for item in kept] == [1, 3, 4, 5, 6, 7, 9]
    assert reasons(rejected) == [("row-2", "near duplicate"), ("row-8", "near duplicate"), ("row-10", "near duplicate")]


def test_the_search_for_neighbours_equals_comparing_all_pairs() -> None:
    rng = np.random.Generator(np.random.PCG64(2))
    base = rng.integers(0, 256, (12, 12, 3))
    images = [
        np.clip(base + rng.integers(-3, 4) + rng.integers(-1, 2, base.shape), 0, 255).astype(np.uint8)
        for _ in range(60)
    ]
    rows = [Candidate(row(number), None, picture_of(Image.fromarray(image))[0]) for number, image in enumerate(images)]
    expected: list[int] = []
    for number, image in enumerate(images):
        if all(apart(image, images[other]) > 60 for other in expected):
            expected.append(number)
    kept, rejected = without_near_duplicates(rows, distance=60)
    assert (
        [item.row.row for item in kept] == expected and 1 < len(expected) < 60 and len(rejected) == 60 - len(expected)
    )


# --- leakage and balance ----------------------------------------------------------------------------------------------


def test_leakage_removes_the_training_row() -> None:
    one, two, three, four = (
        scene((shape, "red", cell)) for shape, cell in (("circle", 0), ("square", 1), ("triangle", 2), ("cross", 3))
    )
    nudged = replace(one, things=(replace(one.things[0], dx=0.02),))
    evaluation = [
        candidate(1, target=four, split="eval", prompt="A red circle"),
        candidate(2, one, two, split="eval", prompt="make it blue"),
    ]
    train = [
        candidate(3, target=three),  # a scored T2I prompt
        candidate(4, target=two, prompt="a square"),  # a scored target image
        candidate(5, one, three, prompt="make it green"),  # a scored source image
        candidate(6, nudged, three, prompt="Make it blue!"),  # a scored instruction with nearly its source
        candidate(7, nudged, three, prompt="make it green"),
        candidate(8, three, scene(("circle", "green", 8)), prompt="make it blue"),
        candidate(9, three, scene(("circle", "green", 7)), prompt="a red circle"),  # a T2I prompt, but an edit
        candidate(10, target=three, prompt="make it blue"),
    ]
    for earlier, later in combinations(SPLITS, 2):
        rows = [*moved(train, earlier), *moved(evaluation, later)]
        kept, rejected = without_leakage(rows, distance=6)
        assert reasons(rejected) == [(f"row-{number}", "leakage") for number in (3, 4, 5, 6)]
        assert kept == [item for item in rows if item.row.row not in (3, 4, 5, 6)]
        assert "row-2 (set.jsonl row 2)" in rejected[3].detail
        assert without_leakage([*moved(train, later), *moved(evaluation, later)], distance=6)[1] == []


def moved(rows: list[Candidate], split: str) -> list[Candidate]:
    return [replace(item, row=replace(item.row, split=split)) for item in rows]


def test_a_row_that_leaks_takes_no_other_along() -> None:
    one, two, three = (scene(("circle", "red", cell)) for cell in (0, 1, 2))
    train = candidate(1, two, two)
    dev, evaluation = candidate(2, one, two, split="dev"), candidate(3, one, three, split="eval", prompt="another")
    assert without_leakage([train, dev], distance=6)[0] == [dev]
    assert without_leakage([train, dev, evaluation], distance=6)[0] == [train, evaluation]


def test_a_flat_image_gives_nothing_away() -> None:
    empty = scene()
    rows = [
        candidate(1, scene(("circle", "red", 0)), empty, split="eval"),
        candidate(2, scene(("square", "red", 1)), empty, prompt="remove it"),
    ]
    assert without_leakage(rows, distance=6) == (rows, [])


def counted(**counts: int) -> list[Candidate]:
    category = {"t2i": "colors", "local_edit": "color_alter", "global_edit": "style_change"}
    names = [(name, f"{name}-{number}") for name, count in counts.items() for number in range(count)]
    return [
        Candidate(row(id=identifier, capability=name, category=category[name], prompt=identifier), None, None)
        for name, identifier in names
    ]


def test_balance_caps_training_rows_by_their_content() -> None:
    rows = counted(t2i=20, local_edit=4, global_edit=9)
    evaluation = [replace(item, row=replace(item.row, id=f"eval-{item.row.id}", split="eval")) for item in rows[:15]]
    kept, rejected = balanced([*rows, *evaluation], max_ratio=2.0)
    left = [item.row.capability for item in kept if item.row.split == "train"]
    assert (left.count("t2i"), left.count("local_edit"), left.count("global_edit")) == (8, 4, 8)
    assert [item for item in kept if item.row.split == "eval"] == evaluation
    assert {rejection.reason for rejection in rejected} == {"balance"} and len(rejected) == 13
    again, _ = balanced([*reversed(rows), *evaluation], max_ratio=2.0)
    assert {item.row.id for item in again} == {item.row.id for item in kept}
    assert balanced(rows, max_ratio=5.0) == (rows, [])


def test_too_few_rows_are_an_error_that_names_them() -> None:
    with pytest.raises(UserErrors) as caught:
        require_minimum(
            counted(t2i=3, local_edit=2), unique_ids([row(1), row(1)])[1], {"t2i": 3, "local_edit": 5, "global_edit": 1}
        )
    assert len(caught.value.faults) == 3
    assert "local_edit: 2 training rows" in caught.value.faults[0] and "minimum is 5" in caught.value.faults[0]
    assert "global_edit: 0 training rows" in caught.value.faults[1] and "duplicate id: 1 rows" in caught.value.faults[2]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"min_edge": 0}, "min_edge"),
        ({"min_edge": 32}, "min_edge"),
        ({"max_pixels": 100}, "max_pixels"),
        ({"max_prompt_words": 0}, "max_prompt_words"),
        ({"near_duplicate_distance": -1}, "near_duplicate_distance"),
        ({"max_ratio": 0.5}, "max_ratio"),
        ({"minimum_train": {"t2j": 1}}, "minimum_train.t2j"),
        ({"minimum_eval": {"t2i": -1}}, "minimum_eval.t2i"),
    ],
)
def test_options_name_their_faults(change: dict[str, Any], key: str) -> None:
    assert faults_of(OPTIONS) == []
    (fault,) = faults_of(replace(OPTIONS, **change))
    assert fault.startswith(f"{key} = ")


# --- the whole chain --------------------------------------------------------------------------------------------------


def raw_folder(folder: Path) -> Path:
    """One row for each kind of fault, and some good ones; returns the folder."""
    folder.mkdir()

    def save(name: str, shown: Scene) -> str:
        (folder / name).write_bytes(encode_png(render(WORLD, shown)))
        return name

    t2i = {"capability": "t2i", "category": "colors", "split": "train"}
    edit = {"capability": "local_edit", "category": "color_alter", "split": "train", "prompt": "make it blue"}
    a, b, c = (
        save("a.png", scene(("circle", "red", 0))),
        save("b.png", scene(("circle", "blue", 0))),
        save("c.png", scene(("square", "red", 5))),
    )
    cut(folder / "cut.png")
    record = {"tag": "colors", "include": [{"class": "square", "count": 1, "color": "red"}]}
    rows = [
        {**t2i, "id": "good", "prompt": "a red circle", "target": a},
        {**t2i, "id": "same", "prompt": "a red circle", "target": a},
        {**t2i, "id": "near", "prompt": "A red circle", "target": a},
        {**t2i, "id": "leak", "prompt": "a red square"},
        {**t2i, "id": "long", "prompt": "word " * 13},
        {**t2i, "id": "empty", "prompt": ""},
        {**t2i, "id": "cut", "prompt": "a cut circle", "target": "cut.png"},
        {**t2i, "id": "away", "prompt": "x", "target": "../a.png"},
        {**t2i, "id": "task", "prompt": "x", "category": "dance"},
        {**edit, "id": "edit", "source": a, "target": b},
        {**edit, "id": "nosource", "target": b},
        {**t2i, "id": "scored", "split": "eval", "prompt": "a red square", "target": c, "record": record},
    ]
    write_manifest(folder, "a.jsonl", rows)
    write_manifest(
        folder,
        "b.jsonl",
        [
            {**edit, "id": "second", "prompt": "make it blue now", "source": b, "target": a},
            {**edit, "id": "good", "source": b},
        ],
    )
    return folder


EXPECTED = {
    "same": "exact duplicate",
    "near": "near duplicate",
    "leak": "leakage",
    "long": "over-long prompt",
    "empty": "empty prompt",
    "cut": "unreadable image",
    "away": "path outside the folder",
    "task": "unknown task",
    "nosource": "missing source",
    "good": "duplicate id",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_everything_read_is_kept_or_listed(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    summary = curate(raw_folder(tmp_path / "raw"), tmp_path / "out", OPTIONS, progress=lambda *call: calls.append(call))
    examples = read_examples(tmp_path / "out")
    with (tmp_path / "out" / "rejected.csv").open(encoding="utf-8", newline="") as file:
        rejected = list(csv.DictReader(file))
    assert [example.id for example in examples] == ["good", "edit", "scored", "second"]
    assert {line["id"]: line["reason"] for line in rejected} == EXPECTED and all(line["detail"] for line in rejected)
    assert list(rejected[0]) == ["origin", "row", "id", "reason", "detail"]
    assert (summary["rows"], summary["kept"], summary["rejected"]) == (14, len(examples), len(rejected)) and len(
        examples
    ) + len(rejected) == 14
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(summary["reasons"].values()) == len(rejected) == sum(step["rejected"] for step in summary["filters"])
    assert all(step["kept"] + step["rejected"] == step["rows"] for step in summary["filters"])
    assert summary["capabilities"]["local_edit"] == {"train": 2, "dev": 0, "eval": 0}
    assert summary["categories"]["colors"] == {"train": 1, "dev": 0, "eval": 1}
    assert summary["manifests"] == {"a.jsonl": 12, "b.jsonl": 2}
    assert calls[-1] == (calls[-1][1], calls[-1][1], "decode")
    assert examples[3].origin == "b.jsonl" and examples[3].row == 1 and examples[2].record["tag"] == "colors"


def test_images_are_named_by_their_bytes_and_none_is_left_over(tmp_path: Path) -> None:
    curate(raw_folder(tmp_path / "raw"), tmp_path / "out", OPTIONS)
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert all(sha256_file(path) == path.stem for path in files)
    named = {path for example in read_examples(tmp_path / "out") for path in (example.source, example.target) if path}
    assert {f"images/{path.name}" for path in files} == named and len(files) == 3
    good = read_examples(tmp_path / "out")[0]
    with Image.open(tmp_path / "out" / str(good.target)) as image:
        np.testing.assert_array_equal(np.asarray(image), render(WORLD, scene(("circle", "red", 0))))


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path / "raw")
    curate(raw, tmp_path / "one", OPTIONS)
    curate(raw, tmp_path / "two", OPTIONS)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("failure", ["minimum", "accept", "nothing left"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: str) -> None:
    raw, out = raw_folder(tmp_path / "raw"), tmp_path / "out"
    curate(raw, out, OPTIONS)
    before = contents(tmp_path)

    def refuse(folder: Path, examples: Sequence[Any]) -> dict[str, Any]:
        raise UserErrors("refused", ["because"])

    options = {
        "minimum": replace(OPTIONS, minimum_train={"t2i": 5}),
        "nothing left": replace(OPTIONS, max_prompt_words=0),
    }.get(failure, OPTIONS)
    with pytest.raises(
        UserErrors,
        match={"minimum": "t2i: 1 training rows", "accept": "refused", "nothing left": "no row of 14"}[failure],
    ):
        curate(raw, out, options, accept=refuse if failure == "accept" else None)
    assert contents(tmp_path) == before
