"""Property: a registered student is a whole model: MLflow loads it from the registry by its alias and draws the very
images that the student draws.
"""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data.errors import UserError, UserErrors
from model.networks.student import save_student, start_student
from model.networks.teachers import BASE, load_teachers, read_records
from tasks.pyfunc_model import picture_of, png_of
from tasks.registry import server, versions
from tasks.release import submission
from tasks.student.opening import Drawing, carried, draw, open_model
from tests.candidates import PARAMS, judged, new_project
from tests.tiny import disturb, save_teachers

PROMPTS = ["a red circle", "make the circle green"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    """A project whose champion is a real (untrained) adapter student on the base among its teachers."""
    root = new_project(tmp_path_factory.mktemp("project"), mlflow_database)
    teachers = root / "data" / "teachers"
    save_teachers(teachers)
    backbone, fields = load_teachers(teachers, [BASE, "local"])
    student = start_student(backbone, fields, "local", "adapter", 5, 5, seed=0)
    disturb({name: value.detach() for name, value in student.parameters.items()}, 0.05, seed=1)
    shutil.rmtree(root / "checkpoints" / "absorbed")
    save_student(
        root / "checkpoints" / "absorbed",
        student,
        {"base_sha256": read_records(teachers)[BASE].sha256, "rank": 5, "alpha": 5, "teachers": {}},
    )
    shutil.copyfile(root / "checkpoints" / "student" / "steps.csv", root / "checkpoints" / "absorbed" / "steps.csv")
    judged(root)
    assert submission.submit_files(root, PARAMS, "auto", "ann", "nightly run")["status"] == "champion"
    return root


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_mlflow_draws_what_the_student_draws(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    expected = draw(
        open_model("checkpoints/absorbed", project), PROMPTS, [None, picture], Drawing(steps=2, seed=5), batch=2
    )
    assert all((project / "data" / "teachers" / name).exists() for name in (BASE, "local"))
    monkeypatch.chdir(tmp_path)  # neither teachers nor checkpoints there: the model carries its base
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.local_uri(project))
    model = mlflow.pyfunc.load_model(f"models:/{versions.MODEL}@champion")
    frame = pd.DataFrame({"prompt": PROMPTS, "source": ["", png_of(picture)]})
    answer = model.predict(frame, params={"steps": 2, "seed": 5})
    assert list(answer.columns) == ["image"]
    for text, wanted in zip(answer["image"], expected, strict=True):
        assert int(np.abs(pixels(text).astype(int) - wanted.astype(int)).max()) <= 1
    alone = model.predict(frame[["prompt"]][:1], params={"steps": 2, "seed": 5})  # the source is optional
    assert np.abs(pixels(alone["image"][0]).astype(int) - expected[0].astype(int)).max() <= 1
    assert model.metadata.signature is not None


def test_words_that_mean_nothing_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.local_uri(project))
    model = mlflow.pyfunc.load_model(f"models:/{versions.MODEL}@champion")
    with pytest.raises(UserErrors, match=r"'zebra' .prompt 'a red zebra'.: use one of the nearest known words"):
        model.predict(pd.DataFrame({"prompt": ["a red circle", "a red zebra"]}), params={"steps": 1})


def test_the_alias_is_followed_and_its_files_are_verified(project: Path) -> None:
    model = open_model(f"models:/{versions.MODEL}@champion", project)
    assert model.record["rank"] == 5
    version = versions.require(project, f"models:/{versions.MODEL}/1")
    assert {"base/transformer/config.json", "adapter_model.safetensors"} <= set(version.weights)
    for uri, words in (
        (f"models:/{versions.MODEL}@nobody", "no such alias; have champion"),
        (f"models:/{versions.MODEL}/9", "9"),
        ("models:/other@x", "expected models:/danceopd"),
    ):
        with pytest.raises(UserError, match=words):
            open_model(uri, project)


def test_a_base_that_is_not_there_is_refused_before_anything_is_sent(project: Path, tmp_path: Path) -> None:
    assert "base/model_index.json" in carried(project, project / "checkpoints" / "absorbed")
    with pytest.raises(UserError, match="which is not here"):
        carried(tmp_path, project / "checkpoints" / "absorbed")


def test_a_source_that_is_no_image_names_its_row() -> None:
    with pytest.raises(UserError, match="row 3: source is no image"):
        picture_of("bm90IGFuIGltYWdl", 3)
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    assert np.array_equal(picture_of(f"data:image/png;base64,{png_of(picture)}", 0), picture)
