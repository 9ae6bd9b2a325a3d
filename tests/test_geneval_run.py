"""Defends: GenEval on a folder of images: whole sets only, exact verdicts, nothing looked at twice, and after a kill
the same bytes as without one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.geneval.images import ImageSet, image_path, image_seed, read_images, write_metadata
from benchmarks.geneval.prompts import COLORS, as_jsonl, official_records
from benchmarks.geneval.report import adjusted
from benchmarks.geneval.rules import OFFICIAL, Detection, Thresholds, overlap, surviving, verdict
from benchmarks.geneval.run import (
    DETECTIONS,
    VERDICT,
    Evaluator,
    agreement,
    detect_images,
    expected_of,
    judge_images,
    judge_pictures,
    summary_of,
)
from benchmarks.scores.scorecard import (
    ExampleScore,
    Scorecard,
    check_same_evaluator,
    compare,
    read_scorecard,
    read_scores,
    summarise,
)
from benchmarks.scores.statistics import Comparison
from benchmarks.store import open_shard, read_results, shard_files
from data.errors import UserError, UserErrors
from data.images import encode_png
from data.microworld import World, render, t2i_example
from data.randomness import numpy_generator
from data.records import GENEVAL_TAGS
from tasks.environment import PROJECT
from tests.tiny_evaluator import tiny_clip, tiny_mask2former

WORLD = World()
MICRO_EVALUATOR = Evaluator("micro", "", "cpu")
HOW: dict[str, Any] = {"model": "candidate", "seed": 0, "resamples": 300, "confidence": 0.95}


def micro_set(root: Path, per_tag: int, samples: int, right: float = 0.7) -> list[dict[str, Any]]:
    """A micro prompt set with its folder of images; a share of the images shows another prompt's scene."""
    rng = numpy_generator(0, 0, 0, "micro set")
    pairs: dict[str, tuple[dict[str, Any], Any]] = {}
    for tag in GENEVAL_TAGS:
        wanted = len(pairs) + per_tag
        while len(pairs) < wanted:
            record, scene = t2i_example(WORLD, rng, tag, "eval")
            pairs.setdefault(json.dumps(record), (record, scene))
    records, scenes = [record for record, _ in pairs.values()], [scene for _, scene in pairs.values()]
    write_metadata(root, records)
    for index in range(len(records)):
        for k in range(samples):
            scene = scenes[index if rng.random() < right else (index + 1) % len(records)]
            file = root / image_path(index, k)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(render(WORLD, scene)))
    (root.parent / "prompts.jsonl").write_text(as_jsonl(records))
    return records


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the folder -------------------------------------------------------------------------------------------------------


def official_folder(root: Path, records: list[dict[str, Any]], samples: int) -> None:
    """Names as a person might have them: folders in another order, four digits a sample, a grid, a text file."""
    for index, record in enumerate(records):
        folder = root / f"{len(records) - index + 100}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(dict(reversed(record.items()))) + "\n")
        (folder / "grid.png").write_bytes(b"")
        (folder / "samples" / "notes.png").write_bytes(b"")
        (folder / "samples" / "00001_mask.png").write_bytes(b"")
        (folder / "samples" / "1 (copy).png").write_bytes(b"")
        for k in range(samples):
            (folder / "samples" / f"{k:04d}.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    (root / "README").mkdir()


def test_folders_made_elsewhere_are_read_by_their_metadata(tmp_path: Path) -> None:
    records = official_records()[:5]
    official_folder(tmp_path, records, 2)
    items = read_images(tmp_path, records).items
    assert [(item.index, item.k) for item in items] == [(index, k) for index in range(5) for k in range(2)]
    assert (
        items[0].path == "105/samples/0000.png"
        and items[-1].path == "101/samples/0001.png"
        and items[2].record == records[1]
    )
    assert [item.example_id for item in items[:3]] == ["00000", "00000", "00001"]


FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a missing prompt", lambda root: (root / "103").rename(root / "gone"), r"1 of 5 prompts have no folder: 00002"),
    (
        "a missing image",
        lambda root: (root / "103/samples/0001.png").unlink(),
        r"1 prompts do not have 2 image\(s\): 103 has 1",
    ),
    (
        "an extra image",
        lambda root: (root / "103/samples/7.png").write_bytes(b""),
        r"4 prompts do not have 3 image\(s\)",
    ),
    ("no image", lambda root: [file.unlink() for file in root.glob("*/samples/0*.png")], "there is no image"),
    (
        "another set's metadata",
        lambda root: (root / "103/metadata.jsonl").write_text(json.dumps(official_records()[9])),
        r"1 folders whose metadata.jsonl is no record of the prompt set: 103\n.*1 of 5 prompts have no folder",
    ),
    (
        "a prompt twice",
        lambda root: (root / "103/metadata.jsonl").write_text((root / "104/metadata.jsonl").read_text()),
        r"1 prompts appear in two folders: 104 and 103",
    ),
    (
        "damaged metadata",
        lambda root: (root / "103/metadata.jsonl").write_text("{"),
        "1 folders without a readable metadata.jsonl: 103",
    ),
    (
        "two files of a number",
        lambda root: (root / "103/samples/1.png").write_bytes(b""),
        "0001.png and 1.png have the same number",
    ),
]


@pytest.mark.parametrize(("change", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_incomplete_repeated_and_foreign_sets_are_refused(
    tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    records = official_records()[:5]
    official_folder(tmp_path, records, 2)
    change(tmp_path)
    with pytest.raises(UserErrors, match=f"(?s)not a complete set of 5 prompts.*{message}"):
        read_images(tmp_path, records)


def test_a_number_of_images_may_be_demanded(tmp_path: Path) -> None:
    records = official_records()[:5]
    official_folder(tmp_path, records, 2)
    assert len(read_images(tmp_path, records, 2).items) == 10
    with pytest.raises(UserErrors, match=r"5 prompts do not have 4 image\(s\)"):
        read_images(tmp_path, records, 4)
    with pytest.raises(UserError, match="no such folder"):
        read_images(tmp_path / "nowhere", records)


def test_seeds_belong_to_prompt_and_sample() -> None:
    seeds = {image_seed(index, k, base) for index in range(50) for k in range(4) for base in range(2)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def row(tag: str, prompt: int, correct: bool, name: str = "0.png") -> dict[str, Any]:
    return {
        "filename": name,
        "tag": tag,
        "prompt": str(prompt),
        "correct": correct,
        "reason": "",
        "metadata": json.dumps({"prompt": prompt}),
        "details": "{}",
    }


def test_the_overall_score_weighs_tasks_and_a_prompt_needs_one_right_image() -> None:
    rows = [row("colors", 0, True)] + [
        row("counting", prompt, prompt == 1 and k == 3) for prompt in (1, 2, 3) for k in range(4)
    ]
    found = summary_of(rows)
    assert found["overall"] == pytest.approx((1 + 1 / 12) / 2) and found["correct_images"] == pytest.approx(2 / 13)
    assert found["correct_prompts"] == pytest.approx(2 / 4) and (found["images"], found["prompts"]) == (13, 4)
    assert found["tags"]["counting"] == {"score": pytest.approx(1 / 12), "correct": 1, "images": 12}


def test_overlaps_are_dropped_only_where_asked() -> None:
    """Sides count one pixel more: boxes 0-9 and 5-14 share 5 x 10 of 150 pixels."""
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (20, 0, 29, 9)) == 0.0
    record = {
        "tag": "counting",
        "prompt": "",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
    }
    boxes = [(0, 0, 9, 9), (0, 0, 9, 8), (30, 0, 39, 9)]
    cats = {"cat": [Detection("cat", None, score, box) for score, box in zip((0.99, 0.95, 0.92), boxes, strict=True)]}
    assert not verdict(record, cats).correct and verdict(record, cats, replace(OFFICIAL, overlap=0.5)).correct
    from benchmarks.geneval.rules import parse_record

    assert [one.box for one in surviving(parse_record(record), cats, replace(OFFICIAL, overlap=0.5))["cat"]] == [
        boxes[0],
        boxes[2],
    ]
    assert (
        verdict(record, cats, Thresholds(counting=0.93)).correct
        and not verdict(record, cats, Thresholds(counting=0.96)).correct
    )


def test_ten_thousand_results_aggregate_in_seconds() -> None:
    rng = numpy_generator(0, 0, 0, "many")
    records = [{"tag": tag, "prompt": f"{tag} {index}"} for tag in GENEVAL_TAGS for index in range(417)]
    expected = expected_of(records, 4)
    rows = [
        ExampleScore("model", "geneval", record["tag"], f"{index:05d}", k, 0, {"correct": float(rng.random() < 0.7)})
        for index, record in enumerate(records)
        for k in range(4)
    ]
    begun = time.process_time()
    metrics = summarise(rows, expected=expected, seed=0, resamples=10_000, confidence=0.95)
    assert len(rows) > 10_000 and time.process_time() - begun < 10.0
    assert metrics["geneval/overall"].mean == pytest.approx(0.7, abs=0.02)


def test_categories_are_adjusted_together_and_the_average_is_not() -> None:
    found = adjusted(
        {
            path: Comparison(0.1, 0, 0.2, p, 10, 5)
            for path, p in (("geneval/overall", 0.04), ("geneval/colors", 0.01), ("geneval/position", 0.04))
        }
    )
    assert found == {"geneval/overall": 0.04, "geneval/colors": 0.02, "geneval/position": 0.04}


# --- the steps --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("micro") / "images"
    return read_images(root, micro_set(root, per_tag=4, samples=2))


def test_verdicts_files_and_scorecard(micro: ImageSet, tmp_path: Path) -> None:
    counts = detect_images(micro, tmp_path, MICRO_EVALUATOR)
    assert counts == {"images": 48, "kept": 0, "detected": 48}
    assert detect_images(micro, tmp_path, MICRO_EVALUATOR)["detected"] == 0
    card = judge_images(micro, tmp_path, **HOW)
    rows = [json.loads(line) for line in (tmp_path / VERDICT / "results.jsonl").read_text().splitlines()]
    assert [list(one) for one in rows] == [
        ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    ] * 48
    assert all(bool(one["reason"]) is not one["correct"] for one in rows)
    name, boxes = next(iter(json.loads(rows[0]["details"]).items()))
    assert name in WORLD.shapes and all(len(box) == 5 for box in boxes)
    scores = read_scores(tmp_path / VERDICT)
    assert [(score.example_id, score.k, score.values["correct"], "\n".join(score.reasons)) for score in scores] == [
        (f"{index // 2:05d}", index % 2, float(one["correct"]), one["reason"]) for index, one in enumerate(rows)
    ]
    summary = json.loads((tmp_path / VERDICT / "summary.json").read_text())
    assert card.metrics["geneval/overall"].mean == pytest.approx(summary["overall"]) and 0.4 < summary["overall"] < 1.0
    assert read_scorecard(tmp_path / VERDICT / "scorecard.json") == card
    assert card.identities["geneval"]["set"] == "custom" and card.identities["geneval"]["images_per_prompt"] == 2
    assert {score.seed for score in scores} == {-1}  # nobody knows the seeds of these images


def test_pictures_of_their_own_scene_are_right(tmp_path: Path) -> None:
    images = read_images(tmp_path / "images", micro_set(tmp_path / "images", per_tag=3, samples=1, right=2.0))
    detect_images(images, tmp_path / "out", MICRO_EVALUATOR)
    assert judge_images(images, tmp_path / "out", **HOW).metrics["geneval/overall"].mean == 1.0


def test_shards_make_one_set_and_thresholds_need_no_detector(
    micro: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect_images(micro, tmp_path / "whole", MICRO_EVALUATOR)
    judge_images(micro, tmp_path / "whole", **HOW)
    for shard in ((0, 2), (1, 2)):
        if shard[0]:
            with pytest.raises(UserError, match="24 of 48 images have no detections.*every shard of it"):
                judge_images(micro, tmp_path / "parts", **HOW)
        detect_images(micro, tmp_path / "parts", MICRO_EVALUATOR, shard=shard)
    assert len(shard_files(tmp_path / "parts" / DETECTIONS)) == 2
    judge_images(micro, tmp_path / "parts", **HOW)
    assert bytes_of(tmp_path / "whole" / VERDICT) == bytes_of(tmp_path / "parts" / VERDICT)
    monkeypatch.setattr("benchmarks.geneval.run.evaluate", None)
    strict = judge_images(
        micro, tmp_path / "whole", to=tmp_path / "strict", thresholds=Thresholds(score=0.999, counting=0.999), **HOW
    )
    assert strict.identities["geneval"]["thresholds"]["score"] == 0.999


def test_a_stage_s_own_pictures_get_the_same_verdicts(
    micro: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect_images(micro, tmp_path, MICRO_EVALUATOR)
    judge_images(micro, tmp_path, **HOW)
    scores = read_scores(tmp_path / VERDICT)
    pictures = [(score.image, micro.records[int(score.example_id)]) for score in scores]
    evaluator = replace(MICRO_EVALUATOR, batch=5)
    found, identity = judge_pictures(micro.root, tmp_path / "store", pictures, evaluator)
    assert [(float(one.correct), one.reasons) for one in found] == [
        (score.values["correct"], score.reasons) for score in scores
    ]
    assert identity["detector"]["architecture"] == "micro"
    monkeypatch.setattr("benchmarks.geneval.run.evaluate", None)  # the second time nothing is looked at
    assert judge_pictures(micro.root, tmp_path / "store", pictures, evaluator)[0] == found


def test_refusals_name_what_is_wrong(micro: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results yet"):
        judge_images(micro, tmp_path, **HOW)
    detect_images(micro, tmp_path, MICRO_EVALUATOR)
    images = tmp_path / "images"
    other = micro_set(images, per_tag=4, samples=1)
    with pytest.raises(UserErrors, match="(?s)made with other settings.*prompts"):
        detect_images(read_images(images, _renamed(images, other)), tmp_path, MICRO_EVALUATOR)
    with pytest.raises(UserError, match="saw nothing above the threshold"):
        judge_images(micro, tmp_path, thresholds=Thresholds(score=1.0, counting=1.0), **HOW)
    with pytest.raises(UserError, match="name the colour classifier"):
        detect_images(micro, tmp_path / "other", Evaluator("some/detector", "", "cpu"))
    broken = tmp_path / "broken"
    records = micro_set(broken, per_tag=2, samples=1)
    (broken / image_path(3, 0)).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"00003/samples/00000\.png: unreadable image"):
        detect_images(read_images(broken, records), tmp_path / "third", MICRO_EVALUATOR)


def _renamed(root: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    changed = [{**records[0], "prompt": "another prompt"}, *records[1:]]
    write_metadata(root, changed)
    return changed


def test_detectors_are_not_mixed(tmp_path: Path) -> None:
    def card(detector: str, prompts: str = "p") -> Scorecard:
        return Scorecard(detector, {}, {"geneval": {"evaluator": {"detector": detector}, "prompts": prompts}}, {})

    check_same_evaluator({"a": card("x"), "b": card("x"), "micro": Scorecard("micro", {}, {"student": "abc"}, {})})
    with pytest.raises(UserErrors, match=r"2 different values of evaluator \(a; b, c\)"):
        check_same_evaluator({"a": card("x"), "b": card("y"), "c": card("y")})
    with pytest.raises(UserErrors, match="different values of prompts"):
        check_same_evaluator({"a": card("x"), "b": card("x", "q")})


def test_two_evaluators_agreement_is_counted_image_by_image(tmp_path: Path) -> None:
    ours = [
        row(tag, prompt, prompt != 1, f"x/{k}.png")
        for tag, prompt in (("colors", 0), ("colors", 1), ("counting", 2))
        for k in range(2)
    ]
    theirs = [
        {**one, "filename": one["filename"].replace("x/", "/elsewhere/"), "correct": index != 0 and one["correct"]}
        for index, one in enumerate(ours)
    ]
    for name, rows in (("ours", ours), ("theirs", theirs[::-1]), ("less", theirs[1:])):
        (tmp_path / name).write_text(as_jsonl(rows))
    found = agreement(tmp_path / "ours", tmp_path / "theirs")
    assert found["agreement"] == pytest.approx(5 / 6) and found["tags"] == {
        "colors": [1, 1, 0, 2],
        "counting": [2, 0, 0, 0],
    }
    assert found["overall_difference"] == pytest.approx((0.5 + 1) / 2 - (0.25 + 1) / 2) and found["accepted"] is False
    with pytest.raises(UserErrors, match="1 images only in"):
        agreement(tmp_path / "ours", tmp_path / "less")


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_kill_anywhere_changes_no_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL while detecting, a torn line, the same command again: shards, verdicts and scorecard are those of a run
    that nobody stopped.
    """
    micro_set(tmp_path / "images", per_tag=15, samples=1)
    common = ["--images", str(tmp_path / "images"), "--prompts", str(tmp_path / "prompts.jsonl")]
    detecting = ["geneval", "detect", *common, "--detector", "micro", "--batch", "2"]
    judging = ["geneval", "verdict", *common, "--resamples", "200"]
    assert main([*detecting, "--out", str(tmp_path / "whole")]) == 0
    assert main([*judging, "--out", str(tmp_path / "whole")]) == 0
    shard = tmp_path / "killed" / DETECTIONS / "shards" / "0-of-1.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *detecting, "--out", str(tmp_path / "killed")],
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
    )
    try:
        while child.poll() is None and (not shard.exists() or shard.read_bytes().count(b"\n") < 4):
            time.sleep(0.002)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    kept = read_results(shard.parents[1])
    assert 4 <= len(kept) < 90
    with shard.open("ab") as file:
        file.write(b'{"key":"torn')
    capsys.readouterr()
    assert main([*detecting, "--out", str(tmp_path / "killed")]) == 0
    assert f"{len(kept) - len(kept) % 2} were known, 90 in the set" in capsys.readouterr().out
    assert main([*judging, "--out", str(tmp_path / "killed")]) == 0
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")


def test_report_compares_models_of_the_same_seeds(
    micro: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "images"
    micro_set(other, per_tag=4, samples=2, right=2.0)
    prompts = ["--prompts", str(micro.root.parent / "prompts.jsonl")]
    for name, images in (("one", micro.root), ("other", other)):
        common = ["--images", str(images), "--out", str(tmp_path / name), *prompts]
        assert main(["geneval", "detect", *common, "--detector", "micro"]) == 0
        assert main(["geneval", "verdict", *common, "--model", name, "--resamples", "300"]) == 0
    assert "prompts with a correct image" in capsys.readouterr().out
    for seed in "ab":
        shutil.copytree(tmp_path / "one", tmp_path / seed)
    trainings = ["--training", str(tmp_path / "a"), "--training", str(tmp_path / "b")]
    compared = ["--out", str(tmp_path / "one"), "--against", str(tmp_path / "other"), *trainings]
    assert main(["geneval", "report", *compared, "--resamples", "300", "--images", str(micro.root)]) == 0
    text = capsys.readouterr().out
    expected = expected_of(micro.records, 2)
    scores = [read_scores(tmp_path / name / VERDICT) for name in ("one", "other")]
    difference = compare(*scores, expected=expected, seed=0, resamples=300, confidence=0.95)[
        "geneval/overall"
    ].difference
    assert f"{difference:+.4f}" in text and difference < 0 and "over 3 trainings" in text
    page = (tmp_path / "one" / VERDICT / "report.html").read_text()
    assert "geneval/overall" in page and str(tmp_path / "one") in page
    assert (tmp_path / "one" / VERDICT / "report.txt").read_text() == text


def test_unknown_steps_and_missing_folders_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["geneval", "judge"]) == 2 and "GenEval asks no judge" in capsys.readouterr().err
    assert main(["genevla"]) == 2 and "did you mean 'geneval'" in capsys.readouterr().err
    assert (
        main(["geneval", "report", "--out", str(tmp_path)]) == 2
        and "run the verdict step first" in capsys.readouterr().err
    )
    assert (
        main(["geneval", "detect", "--images", str(tmp_path / "no"), "--out", str(tmp_path), "--detector", "micro"])
        == 2
    )
    assert "no such folder" in capsys.readouterr().err
    assert main([]) == 0 and main(["geneval", "--help"]) == 0


# --- the real networks ------------------------------------------------------------------------------------------------


def real_set(tmp_path: Path) -> tuple[list[dict[str, Any]], Evaluator]:
    official = official_records()
    records = [
        record for tag in ("single_object", "colors") for record in [one for one in official if one["tag"] == tag][:3]
    ]
    rng = numpy_generator(0, 0, 0, "noise images")
    write_metadata(tmp_path / "images", records)
    for index in range(len(records)):
        file = tmp_path / "images" / image_path(index, 0)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(rng.integers(0, 256, (30 + 10 * (index % 2), 40, 3), dtype=np.uint8)))
    tiny_mask2former(tmp_path / "detector")
    tiny_clip(tmp_path / "classifier")
    return records, Evaluator(str(tmp_path / "detector"), str(tmp_path / "classifier"), "cpu")


def test_the_whole_path_with_mask2former_and_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.geneval.detector.SHORT_SIDE", 64)
    (records, evaluator), root = real_set(tmp_path), tmp_path / "images"
    # the records ask for a class that this random network reports, so that a colour is asked of something
    detect_images(read_images(root, records), tmp_path / "probe", replace(evaluator, batch=4))
    seen = [one["detections"] for one in read_results(tmp_path / "probe" / DETECTIONS).values()]
    assert all(seen)
    records = [
        {**record, "include": [{**record["include"][0], "class": seen[index][0]["class"]}]}
        for index, record in enumerate(records)
    ]
    write_metadata(root, records)
    images, evaluator = read_images(root, records), replace(evaluator, batch=4)
    assert detect_images(images, tmp_path / "out", evaluator)["detected"] == 6
    stored = read_results(tmp_path / "out" / DETECTIONS)
    for record, value in zip(records, stored.values(), strict=True):
        found = value["detections"]
        asked = (
            [one for one in found if one["class"] == record["include"][0]["class"]]
            if "color" in record["include"][0]
            else []
        )
        assert all((one["color"] in COLORS) is (one is asked[0] if asked else False) for one in found)
        assert all(
            sum(one["mask"]["counts"]) == value["size"][0] * value["size"][1] and 0.05 <= one["score"] <= 1
            for one in found
        )
    # a killed run has lost the second half of a batch: the batch is evaluated as a whole again, and nothing changes
    (shard,) = shard_files(tmp_path / "out" / DETECTIONS)
    whole = shard.read_bytes()
    shard.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert detect_images(images, tmp_path / "out", evaluator)["detected"] == 6
    assert shard.read_bytes() == whole
    card = judge_images(images, tmp_path / "out", thresholds=Thresholds(score=0.05, counting=0.05), **HOW)
    assert card.metrics["geneval/single_object"].mean == 1.0
    identity = card.identities["geneval"]["evaluator"]
    assert identity["classifier"]["activation"] == "quick_gelu" and len(identity["detector"]["weights"]) == 64
    tiny_clip(tmp_path / "classifier2", activation="gelu")
    with pytest.raises(UserErrors, match=r"(?s)made with other settings.*evaluator\.classifier\.weights"):
        detect_images(images, tmp_path / "out", replace(evaluator, classifier=str(tmp_path / "classifier2")))


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the reference's own resolution, with both networks."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    records, evaluator = real_set(tmp_path)
    images = read_images(tmp_path / "images", records)
    for workers in (1, 2):
        detect_images(images, tmp_path / str(workers), replace(evaluator, batch=2, workers=workers))
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_a_shard_that_another_process_writes_is_refused(micro: ImageSet, tmp_path: Path) -> None:
    with open_shard(tmp_path / DETECTIONS), pytest.raises(UserError, match="another process is writing"):
        detect_images(micro, tmp_path, MICRO_EVALUATOR)
