"""Property: with weights and examples of one's own, `dvc repro` runs every stage, and what is registered samples, exports, answers MLflow and is traced.

The whole path of a real checkpoint, tiny: a Z-Image pipeline with tokenizer, text encoder and VAE, a PEFT adapter, a folder of pictures with a manifest (one of
them turned by EXIF), GenEval's networks; each as its library writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from PIL import Image

from data.files import read_json
from model.adapters import write_peft
from model.backbones import load_backbone
from model.teachers import own_layers
from tasks import export, gate, lineage, plan, registry, sample, tracking
from tasks.params import load_params, read_yaml
from tasks.preflight import preflight
from tasks.repro import pull
from tests.short_params import OVERRIDES
from tests.test_exports import some_adapter
from tests.test_families_pipeline import picture
from tests.test_flow import copy_project
from tests.test_pyfunc import pixels
from tests.tiny_evaluator import tiny_clip, tiny_mask2former
from tests.tiny_families import save_family

EDGE = 24  # px
SEEN = ("airplane", "bird", "sandwich")  # what the tiny detector takes random pictures for, mostly
ASKED: dict[str, list[dict[str, Any]]] = {
    "single_object": [{"class": SEEN[0]}],
    "two_object": [{"class": SEEN[0]}, {"class": SEEN[1]}],
    "counting": [{"class": SEEN[2], "count": 2}],
    "colors": [{"class": SEEN[0], "color": "red"}],
    "position": [{"class": SEEN[1]}, {"class": SEEN[0], "position": ["left of", 0]}],
    "color_attr": [{"class": SEEN[0], "color": "red"}, {"class": SEEN[1], "color": "blue"}],
}


def save_examples(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    rows = []
    for row in range(8):
        image, exif = picture(f"train-{row}", *((48, 24) if row % 2 else (32, 32))), Image.Exif()
        if row == 3:
            image, exif[0x0112] = image.rotate(90, expand=True), 6
        image.save(folder / "images" / f"{row}.png", exif=exif)
        prompt = f"a {['red', 'green', 'blue', 'yellow'][row % 4]} {['circle', 'square'][row // 4]}"
        record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": prompt}
        named = {"id": f"train-{row}", "split": "train", "category": "single_object", "prompt": prompt, "target": f"images/{row}.png", "record": record}
        rows.append({**named, "capability": "t2i"})
    for tag, clauses in ASKED.items():
        for number in range(2):  # fewer have no standard error
            include = [{"count": 1, **clause} for clause in clauses]
            words = " and a ".join(clause["class"] for clause in include)
            prompt = f"{['a photo of a', 'a drawing of a'][number]} {words}, {tag.replace('_', ' ')}"
            record = {"tag": tag, "include": include, "prompt": prompt}
            rows.append({"id": f"eval-{tag}-{number}", "split": "eval", "capability": "t2i", "category": tag, "prompt": prompt, "record": record})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def put_params(project: Path) -> None:
    """The preset of the paper's first composition, cut down to these weights."""
    document = read_yaml(project / "presets" / "zimage_t2i_edit.yaml")
    for key, value in OVERRIDES.items():
        section, name = key.split(".")
        if section in ("sampling", "distill", "absorb", "score", "gate") or name == "resamples":
            document[section][name] = value
    changes: dict[str, dict[str, Any]] = {
        "backbone": {"pretrained": {"precision": "float32", "device": "cpu", "resolution": EDGE, "max_tokens": 48, "offload": False}},
        "sampling": {"images_per_prompt": 1},
        "routing": {"routes": [{"capability": "t2i", "teacher": "realism", "weight": 1.0}]},
        "execution": {"precision": "fp32"},
        "benchmark": {"detector": "weights/detector", "classifier": "weights/clip"},
        "curate": {"min_edge": 16, "minimum_train": {"t2i": 4}, "minimum_eval": {"t2i": 4}},
        "distill": {"start": "realism", "rank": 4, "alpha": 4},
        "absorb": {"fields": [{"capability": "t2i", "scale": 2.0, "weight": 1.0}]},
        "gate": {"capabilities": ["t2i"], "retention": 0.0, "compared": ["geneval/overall"], "min_prompts": {"geneval": 1}},
        "teachers": {
            "sources": {
                "base": {"capability": "t2i", "kind": "base", "uri": "weights/base", "sha256": ""},
                "realism": {"capability": "t2i", "kind": "adapter", "uri": "weights/realism", "sha256": ""},
            }
        },
    }
    for section, values in changes.items():
        document[section] |= values
    (project / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_weights_of_ones_own_to_a_champion_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    project = copy_project(tmp_path / "project")
    monkeypatch.chdir(project)
    save_family(project / "weights" / "base", "zimage")
    backbone = load_backbone(project / "weights" / "base", need=("transformer",))
    write_peft(project / "weights" / "realism", some_adapter(backbone.network, own_layers(backbone), seed=1))
    tiny_mask2former(project / "weights" / "detector")
    tiny_clip(project / "weights" / "clip")
    save_examples(project / "data" / "examples")
    put_params(project)
    preflight()

    def dvc(*arguments: str) -> str:
        ended = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=project, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    pull("data/teachers", project, lambda _: None)
    dvc("repro")
    assert "Running stage" not in dvc("repro")
    assert read_json(project / "data" / "encoded" / "encoded.json")["shapes"] == [[4, 6, 16], [4, 12, 12]]
    judged = gate.judge_files(project, load_params(gate.Params, "gate", project / "params.yaml"))
    assert judged["passed"], [rule for rule in judged["rules"] if not rule["passed"]]
    submitted = registry.submit_files(project, load_params(gate.Params, "gate", project / "params.yaml"), "auto", "ann", "own weights")
    assert submitted["status"] == "champion"

    uri = f"models:/{registry.MODEL}@{registry.CHAMPION}"
    assert sample.cli(["--model", uri, "--prompt", "a red circle", "--out", "out", "--steps", "2"]) == 0
    with Image.open(project / "out" / "000.png") as drawn:
        assert drawn.size == (EDGE, EDGE)  # as it was trained, not the family's 1024 px
        image = drawn.convert("RGB")
    for kind in export.FORMATS:
        assert export.cli(["--model", uri, "--format", kind, "--out", f"exported/{kind}"]) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.local_uri(project))
    answer = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"prompt": ["a red circle"]}), params={"steps": 2})
    assert abs(pixels(answer["image"][0]).astype(int) - image).max() <= 1
    capsys.readouterr()
    assert lineage.cli([uri]) == 0 and "missing" not in capsys.readouterr().out
    states = {row["stage"]: row["state"] for row in plan.plan(project / "params.yaml", project)["stages"]}
    assert states.pop("teachers") == "frozen" and set(states.values()) == {"cached"}
