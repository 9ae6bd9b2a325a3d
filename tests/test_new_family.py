"""Property: a network family is one file and one entry: a made-up one is read, encoded, trained and read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from data.files import read_json, write_json
from model.backbones import family_of, load_backbone
from model.backbones.micro import MicroBackbone
from model.families import FAMILIES, Family
from model.networks.student import RECORD, load_student
from tasks.params.reading import load_params
from tasks.stages import distill as distilling
from tests import tiny
from tests.tiny import write_params


class MadeUpBackbone(MicroBackbone):
    """Counts time the other way round, and says so by its name alone."""

    name = "made_up"
    adapter_targets = ("to_q", "to_v")

    def velocity(self, network: nn.Module, x_t: Any, t: Any, condition: Any) -> Any:
        return -super().velocity(network, x_t, 1.0 - t, condition)

    def save(self, folder: Path, network: nn.Module | None = None) -> None:
        super().save(folder, network)
        index = read_json(folder / "model_index.json")
        write_json(folder / "model_index.json", {**index, "_class_name": "MadeUpPipeline", "backbone": self.name})


def test_a_family_is_a_file_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Family(f"{__name__}:MadeUpBackbone", ("MadeUpPipeline",), size=None, steps=4, text_tokens=8)
    monkeypatch.setitem(FAMILIES, "made_up", entry)
    monkeypatch.setattr(tiny, "MicroBackbone", MadeUpBackbone)
    monkeypatch.chdir(tmp_path)
    folders = tiny.build(tmp_path / "tiny")  # teachers of the family, and their examples encoded
    assert family_of(folders.teachers / "base") == "made_up"
    small = {"steps": 2, "batch": 4, "rollout_steps": 4, "trainable": "adapter", "start": "base", "optimizer": "adamw"}
    params = load_params(distilling.Params, "distill", write_params(tmp_path / "params.yaml", **small))
    params = replace(params, backbone=replace(params.backbone, name="made_up"))
    distilling.distill(params, encoded=folders.encoded, teachers=folders.teachers, out=tmp_path / "student")
    record = read_json(tmp_path / "student" / RECORD)
    backbone = load_backbone(folders.teachers / "base")
    student = load_student(tmp_path / "student", backbone, record["base_sha256"])
    assert record["backbone"] == backbone.name == "made_up" and isinstance(backbone, MadeUpBackbone)
    assert {name.split(".")[-4] for name in student.parameters} == {"to_q", "to_v"}
