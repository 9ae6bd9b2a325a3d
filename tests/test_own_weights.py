"""Property: with weights and examples of one's own, every stage runs; what is registered samples, exports, answers
MLflow and is traced. `dvc repro` runs the stages for Z-Image; for SD3 their commands run in this process, which spares
the import of the libraries in every stage.

The whole path of a real checkpoint, tiny, T2I and edits: a pipeline with tokenizers, text encoders and VAE, a PEFT
adapter and a single LoRA file, a folder of pictures with a manifest (one of them turned by EXIF), GenEval's networks,
each as its library writes it; and a judge on loopback."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data.errors import UserError
from data.files import read_json, write_json
from data.records import LOCAL_EDITS
from data.yaml_files import read_yaml
from model.backbones import load_backbone
from model.networks.adapters import write_comfyui, write_peft
from model.networks.network import own_layers
from tasks.__main__ import main
from tasks.checks import lineage, plan
from tasks.checks.preflight import preflight
from tasks.environment import for_children
from tasks.params.reading import load_params
from tasks.pyfunc_model import png_of
from tasks.registry import server as registry_server
from tasks.registry import versions
from tasks.release import gate, submission
from tasks.running.repro import pull
from tasks.stages.contract import STAGES
from tasks.student import export, sample
from tasks.student.exports import FORMS
from tests.judge_server import MODEL, judge_server
from tests.short_params import OVERRIDES
from tests.test_exports import some_adapter
from tests.test_families_pipeline import picture
from tests.test_flow import copy_project
from tests.test_pyfunc import pixels
from tests.tiny_evaluator import tiny_clip, tiny_mask2former
from tests.tiny_families import save_family

EDGE = 24  # px
SHAPES = [[4, 8, 16], [4, 12, 12]]  # landscape and square; what EXIF turns would be a portrait as it is stored
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
        source = f"images/source-{row}.png"
        picture(f"source-{row}", *((48, 24) if row % 2 else (32, 32))).save(folder / source)
        prompt = f"a {['red', 'green', 'blue', 'yellow'][row % 4]} {['circle', 'square'][row // 4]}"
        record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": prompt}
        named = {
            "id": f"train-{row}",
            "split": "train",
            "category": "single_object",
            "prompt": prompt,
            "target": f"images/{row}.png",
            "record": record,
        }
        rows.append({**named, "capability": "t2i"})
        edit = {
            "id": f"train-edit-{row}",
            "category": "subject-add",
            "prompt": f"make the background {prompt.split()[1]}",
            "source": source,
        }
        rows.append({**named, **edit, "capability": "local_edit", "record": {}})
    for tag, clauses in ASKED.items():
        for number in range(2):  # fewer have no standard error
            include = [{"count": 1, **clause} for clause in clauses]
            words = " and a ".join(clause["class"] for clause in include)
            prompt = f"{['a photo of a', 'a drawing of a'][number]} {words}, {tag.replace('_', ' ')}"
            record = {"tag": tag, "include": include, "prompt": prompt}
            rows.append(
                {
                    "id": f"eval-{tag}-{number}",
                    "split": "eval",
                    "capability": "t2i",
                    "category": tag,
                    "prompt": prompt,
                    "record": record,
                }
            )
    for row, category in enumerate(LOCAL_EDITS * 2):
        picture(f"eval-{row}", *((48, 24) if row % 2 else (32, 32))).save(folder / "images" / f"eval-{row}.png")
        named = {
            "id": f"eval-edit-{row}",
            "split": "eval",
            "capability": "local_edit",
            "category": category,
            "source": f"images/eval-{row}.png",
            "record": {},
        }
        rows.append(
            {**named, "prompt": f"play e{row} on a {['white', 'gray'][row % 2]} background"}
        )  # which the judge on loopback finds good
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def put_params(project: Path, family: str, judge: str) -> None:
    """The preset of the paper's first composition, cut down to these weights."""
    document = read_yaml(project / "presets" / "zimage_t2i_edit.yaml")
    for key, value in OVERRIDES.items():
        section, name = key.split(".")
        if section in ("sampling", "distill", "absorb", "score", "gate") or name == "resamples":
            document[section][name] = value
    changes: dict[str, dict[str, Any]] = {
        "backbone": {
            "name": family,
            "pretrained": {
                "precision": "float32",
                "device": "cpu",
                "resolution": EDGE,
                "max_tokens": 48,
                "offload": False,
            },
        },
        "sampling": {"images_per_prompt": 1},
        "routing": {
            "routes": [
                {"capability": "t2i", "teacher": "realism", "weight": 1.0},
                {"capability": "local_edit", "teacher": "local", "weight": 1.0},
            ]
        },
        "execution": {"precision": "fp32"},
        "benchmark": {"detector": "weights/detector", "classifier": "weights/clip"},
        "judge": {"model": MODEL},
        "curate": {
            "min_edge": 16,
            "minimum_train": {"t2i": 4, "local_edit": 4},
            "minimum_eval": {"t2i": 4, "local_edit": 4},
        },
        "distill": {"start": "merged", "rank": 8, "alpha": 8},
        "absorb": {
            "routes": [
                {"capability": "t2i", "teacher": "realism", "weight": 1.0, "field": {"guidance": 2.0, "steps": 2}},
                {"capability": "local_edit", "teacher": "student", "weight": 1.0, "field": {"steps": 2}},
            ],
            "rollout_steps": 2,
        },
        "gate": {"capabilities": ["t2i", "local_edit"], "retention": 0.0, "min_prompts": {"geneval": 1, "gedit": 1}},
        "teachers": {
            "sources": {
                "base": {"capability": "t2i", "kind": "base", "uri": "weights/base", "sha256": ""},
                "realism": {"capability": "t2i", "kind": "adapter", "uri": "weights/realism", "sha256": ""},
                "local": {
                    "capability": "local_edit",
                    "kind": "adapter",
                    "uri": "weights/local/lora.safetensors",
                    "sha256": "",
                },
            }
        },
    }
    for section, values in changes.items():
        document[section] |= values
    document["judge"]["server"] |= {"base_url": judge, "key_variable": "", "provider": "test"}
    write_json(project / "params.yaml", document)


def run_stages(project: Path) -> None:
    """All but the frozen teachers, as `dvc repro` leaves them: made, in DVC's cache and in dvc.lock."""

    def dvc(*arguments: str) -> str:
        line, environment = [sys.executable, "-m", "dvc", *arguments], for_children(sys.executable)
        ended = subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    stages = read_yaml(project / "dvc.yaml")["stages"]
    commands = {name: shlex.split(stage["cmd"]) for name, stage in stages.items() if name != "teachers"}
    assert [main(command[3:]) for command in commands.values()] == [0] * (len(STAGES) - 1)
    dvc("commit", "--force", *commands)
    assert "Running stage" not in dvc("repro")  # tests/test_flow.py has DVC start the stages


def save_weights(project: Path, family: str) -> None:
    """A base, two adapters in different styles, and the networks that look at images."""
    save_family(project / "weights" / "base", family)
    backbone = load_backbone(project / "weights" / "base", need=("transformer",))
    realism, local = (some_adapter(backbone.network, own_layers(backbone), seed=seed) for seed in (1, 2))
    write_peft(project / "weights" / "realism", realism)
    (project / "weights" / "local").mkdir()
    write_comfyui(project / "weights" / "local" / "lora.safetensors", local, family)
    tiny_mask2former(project / "weights" / "detector")
    tiny_clip(project / "weights" / "clip")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["sd3", "zimage"])
def test_from_weights_of_ones_own_to_a_champion_in_use(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = copy_project(tmp_path / "project")
    monkeypatch.chdir(project)
    save_weights(project, family)
    save_examples(project / "data" / "examples")

    with judge_server({}) as server:
        put_params(project, family, server.url)
        subprocess.run(
            ["git", "-c", "user.name=ann", "-c", "user.email=ann@localhost", "commit", "--quiet", "-am", "own weights"],
            cwd=project,
            check=True,
        )
        preflight()
        pull("data/teachers", project, lambda _: None)
        run_stages(project)
    assert read_json(project / "data" / "encoded" / "encoded.json")["shapes"] == SHAPES
    judged = gate.judge_files(project, load_params(gate.Params, "gate", project / "params.yaml"))
    assert judged["passed"], [rule for rule in judged["rules"] if not rule["passed"]]
    submitted = submission.submit_files(
        project, load_params(gate.Params, "gate", project / "params.yaml"), "auto", "ann", "own weights"
    )
    assert submitted["status"] == "champion"

    uri = f"models:/{versions.MODEL}@{versions.CHAMPION}"
    source = project / "data" / "examples" / "images" / "eval-1.png"
    assert sample.cli(["--model", uri, "--prompt", "a red circle", "--out", "drawn", "--steps", "2"]) == 0
    assert (
        sample.cli(
            ["--model", uri, "--prompt", "make it night", "--source", str(source), "--out", "edited", "--steps", "2"]
        )
        == 0
    )
    pictures = [np.asarray(Image.open(project / name / "000.png").convert("RGB")) for name in ("drawn", "edited")]
    assert pictures[0].shape == (EDGE, EDGE, 3)  # as it was trained, not the family's 1024 px
    assert pictures[1].shape[1] == 2 * pictures[1].shape[0]
    for kind in FORMS:
        line = ["--model", uri, "--format", kind, "--out", f"exported/{kind}"]
        if family == "sd3" and kind in ("diffusers", "comfyui"):
            with pytest.raises(UserError, match="this SD3 reads a source image"):
                export.cli(line)
        else:
            assert export.cli(line) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry_server.local_uri(project))
    frame = pd.DataFrame(
        {
            "prompt": ["a red circle", "make it night"],
            "source": ["", png_of(np.asarray(Image.open(source).convert("RGB")))],
        }
    )
    answer = mlflow.pyfunc.load_model(uri).predict(frame, params={"steps": 2})
    assert [pixels(text).shape for text in answer["image"]] == [one.shape for one in pictures]
    assert abs(pixels(answer["image"][0]).astype(int) - pictures[0]).max() <= 1  # the edit's noise is that of row 1
    capsys.readouterr()
    assert lineage.cli([uri]) == 0 and "missing" not in capsys.readouterr().out
    states = {row["stage"]: row["state"] for row in plan.plan(project / "params.yaml", project)["stages"]}
    assert states.pop("teachers") == "frozen" and set(states.values()) == {"cached"}
