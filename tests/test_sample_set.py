"""Defends: a list of prompts is sampled into its files once, every image from its own seed, and stages score pictures
with GenEval's networks where told to.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.geneval.images import image_path, image_seed, read_images
from benchmarks.geneval.prompts import as_jsonl, official_records
from benchmarks.params import BenchmarkParams
from benchmarks.scorers import scorer_of
from benchmarks.scores.scorecard import read_scores
from data.errors import UserError
from data.records import Example
from model.networks.student import Sampled
from model.networks.teachers import BASE, load_teachers
from tasks.__main__ import main
from tasks.params.sections import SamplingParams
from tasks.scoring.sampling import EvaluationSet, Scoring, score_field
from tasks.scoring.sampling import image_seed as example_seed
from tests.tiny import NOBODY, WORLD, draw, save_teachers
from tests.tiny_evaluator import tiny_clip, tiny_mask2former

TAGS = ("single_object", "colors", "counting")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    save_teachers(folder)
    return folder


def jobs_file(folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any] | None = None) -> Path:
    path = folder / "jobs.json"
    path.write_text(json.dumps({"settings": settings or {"suite": "test"}, "jobs": rows}))
    return path


def rows_of(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{k}", "prompt": draw("colors", k)[0]["prompt"], "seed": 100 + k, "path": f"a/{k}.png"}
        for k in range(count)
    ]


def command(model: Path, jobs: Path, out: Path, *more: str) -> list[str]:
    return [
        "sample-set",
        "--model",
        str(model),
        "--jobs",
        str(jobs),
        "--out",
        str(out),
        "--steps",
        "3",
        "--batch",
        "4",
        *more,
    ]


def test_images_are_made_once_and_are_the_same_again(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, out = jobs_file(tmp_path, rows_of(6)), tmp_path / "out"
    assert main(command(teachers / "global", jobs, out)) == 0
    first = {path: path.read_bytes() for path in sorted(out.rglob("*.png"))}
    assert len(first) == len(set(first.values())) == 6
    for path in list(first)[1:3]:
        path.unlink()
    assert main(command(teachers / "global", jobs, out)) == 0
    assert "2 of 6 images made" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.png"))} == first
    assert main(command(teachers / "local", jobs, out)) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert main(command(teachers / "global", jobs, out, "--guidance", "2")) == 2


def test_edits_take_their_source(teachers: Path, tmp_path: Path) -> None:
    from PIL import Image

    record, source, _ = draw("subject-add", 0)
    assert source is not None
    Image.fromarray(source).save(tmp_path / "source.png")
    edit = {
        "id": "e",
        "prompt": record["prompt"],
        "seed": 5,
        "path": "edit.png",
        "source": str(tmp_path / "source.png"),
    }
    assert (
        main(
            command(
                teachers / "local",
                jobs_file(tmp_path, [edit, {**edit, "path": "plain.png", "source": ""}]),
                tmp_path / "out",
            )
        )
        == 0
    )
    with_source, without = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("edit.png", "plain.png"))
    assert with_source.shape == source.shape and (with_source != without).any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**rows_of(1)[0], "path": "../a.png"}], "a .png below the output folder"),
        ([{**rows_of(1)[0], "path": "/a.png"}], "a .png below the output folder"),
        ([rows_of(1)[0], rows_of(1)[0]], "two jobs have the same path"),
        ([{**rows_of(1)[0], "prompt": " "}], "the prompt is empty"),
        ([{"id": "a"}], "job 0"),
        ([], "it holds no job"),
    ],
)
def test_lists_at_fault_are_refused(
    teachers: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(teachers / BASE, jobs_file(tmp_path, rows), tmp_path / "out")) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.rglob("*.png"))


def test_words_that_the_model_does_not_know_are_refused(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {**rows_of(1)[0], "prompt": prompt, "path": f"{k}.png"}
        for k, prompt in enumerate(("a red zebra", "A bleu circel."))
    ]
    assert main(command(teachers / BASE, jobs_file(tmp_path, [*rows, *rows_of(1)]), tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert all(f"'{word}'" in said for word in ("zebra", "bleu", "circel")) and "'red'" not in said
    assert "blue" in said and "circle" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, jobs_file(tmp_path, rows_of(1)), tmp_path / "out")) == 2
    assert "no .safetensors file in it" in capsys.readouterr().err


def test_a_student_is_opened_with_its_base(teachers: Path, tmp_path: Path) -> None:
    from model.networks.student import save_student, start_student
    from model.networks.teachers import read_records

    backbone, fields = load_teachers(teachers, [BASE, "global"])
    student = start_student(backbone, fields, "global", "all", 4, 4, seed=0)
    record = {"base_sha256": read_records(teachers)[BASE].sha256, "rank": 4, "alpha": 4, "start": "global"}
    save_student(tmp_path / "student", student, record)
    jobs = jobs_file(tmp_path, rows_of(2))
    for model, out in ((tmp_path / "student", "one"), (teachers / "global", "two")):
        assert main(command(model, jobs, tmp_path / out, "--base", str(teachers / BASE))) == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "one").rglob("*.png"))] == [
        path.read_bytes() for path in sorted((tmp_path / "two").rglob("*.png"))
    ]


def test_generate_detect_and_verdict_of_a_model(teachers: Path, tmp_path: Path) -> None:
    """Through the benchmarks' command line, which starts the sampler as a program of its own."""
    from benchmarks.__main__ import main as benchmarks

    records = [draw(tag, row)[0] for tag in TAGS for row in range(2)]
    (tmp_path / "prompts.jsonl").write_text(as_jsonl(records))
    common = ["--images", str(tmp_path / "images"), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert (
        benchmarks(
            [
                "geneval",
                "generate",
                "--model",
                str(teachers / BASE),
                *common,
                "--samples",
                "2",
                "--seed",
                "3",
                "--",
                "--steps",
                "2",
            ]
        )
        == 0
    )
    assert (
        len(read_images(tmp_path / "images", records, 2).items) == 12
        and (tmp_path / "images" / image_path(5, 1)).exists()
    )
    out = ["--out", str(tmp_path / "out")]
    assert benchmarks(["geneval", "detect", *common, *out, "--detector", "micro"]) == 0
    assert benchmarks(
        [
            "geneval",
            "verdict",
            *common,
            *out,
            "--resamples",
            "50",
            "--threshold",
            "0.01",
            "--counting-threshold",
            "0.01",
        ]
    ) in (0, 2)
    if (tmp_path / "out" / "verdict").exists():  # an untrained network may draw nothing at all
        assert [score.seed for score in read_scores(tmp_path / "out" / "verdict")] == [
            image_seed(index, k, 3) for index in range(6) for k in range(2)
        ]
    # the stages' seeds and the command's are the same function of (prompt, sample, seed)
    assert image_seed(7, 1, 3) == example_seed(Example("00007", "eval", "t2i", "colors", "p"), 1, 3)


def test_a_stage_scores_with_the_real_networks(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.geneval.scorer.STORE", tmp_path / "store")
    monkeypatch.setattr("benchmarks.geneval.detector.SHORT_SIDE", 64)
    tiny_mask2former(tmp_path / "detector")
    tiny_clip(tmp_path / "classifier")
    benchmark = BenchmarkParams(
        str(tmp_path / "detector"), str(tmp_path / "classifier"), "cpu", batch=4, workers=1, scheduler=""
    )
    wanted = [record for tag in TAGS for record in [one for one in official_records() if one["tag"] == tag][:2]]
    examples = tuple(
        Example(f"{index:05d}", "eval", "t2i", record["tag"], draw("colors", index)[0]["prompt"], record=record)
        for index, record in enumerate(wanted)
    )
    scorer, evaluation = scorer_of(benchmark, NOBODY, WORLD), EvaluationSet(examples, {}, tmp_path)
    sampling = SamplingParams("eval", steps=2, guidance=1.0, images_per_prompt=2, seed=0, batch=5)
    backbone, fields = load_teachers(teachers, [BASE])
    advanced: list[int] = []

    def rows() -> list[Any]:
        with torch.no_grad():
            scoring = Scoring(backbone, sampling, scorer, tmp_path, lambda n=1, **_: advanced.append(n))
            return score_field(fields[BASE], evaluation, scoring, model="m", how=Sampled(2, 1.0))

    scores = rows()
    assert [(score.example_id, score.k, score.seed) for score in scores] == [
        (one.id, k, example_seed(one, k, 0)) for one in examples for k in range(2)
    ]
    assert sum(advanced) == 12 and {score.values["correct"] for score in scores} <= {0.0, 1.0}
    assert all((score.values["correct"] == 1.0) is not bool(score.reasons) for score in scores)
    assert all((tmp_path / score.image).exists() for score in scores)
    monkeypatch.setattr("benchmarks.geneval.run.evaluate", None)  # a stage that runs again looks at nothing twice
    assert rows() == scores
    identity = scorer.identity(scores, examples)["geneval"]["evaluator"]
    assert identity["detector"]["architecture"] == "mask2former" and identity["classifier"]["architecture"] == "clip"
    with pytest.raises(UserError, match="no such folder"):
        scorer_of(replace(benchmark, detector="gone"), NOBODY, WORLD).check(examples)
