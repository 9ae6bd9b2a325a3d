"""Property: teachers are adapters switched on one base in memory, and teachers that do not belong together are refused
with every fault at once.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import UserError, UserErrors
from data.files import sha256_file
from model.networks.network import NetworkField, switch_adapter
from model.networks.teachers import (
    ADAPTER_WEIGHTS,
    BASE,
    RECORD,
    WEIGHTS,
    compatibility_faults,
    file_faults,
    load_base,
    load_teachers,
    read_records,
    weights_sha256,
)
from tests.tiny import Tiny, build, probe

NAMES = [BASE, "local", "global"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """Teachers that a test may damage."""
    return Path(shutil.copytree(tiny.teachers, tmp_path / "teachers"))


def edit(folder: Path, teacher: str, **changes: Any) -> None:
    path = folder / teacher / RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, name: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights under a record that vouches for them."""
    save_file(tensors, folder / name / file)
    edit(folder, name, sha256=sha256_file(folder / name / file))


def test_an_adapter_teacher_is_switched_on_the_one_base(tiny: Tiny) -> None:
    alone = load_base(tiny.teachers)
    expected = probe(NetworkField(alone, alone.network), alone)
    backbone, fields = load_teachers(tiny.teachers, NAMES)
    assert fields["local"].network is fields[BASE].network is backbone.network
    pointers = {name: value.data_ptr() for name, value in backbone.network.state_dict().items()}
    for _ in range(2):  # off, on, off, on: nothing of one is left in the other
        assert torch.equal(probe(fields[BASE], backbone), expected)
        assert not torch.allclose(probe(fields["local"], backbone), expected, atol=1e-3)
    assert torch.equal(probe(fields[BASE], backbone), expected)
    assert {name: value.data_ptr() for name, value in backbone.network.state_dict().items()} == pointers


def test_the_adapter_is_the_base_plus_its_scaled_product(tiny: Tiny) -> None:
    backbone, _ = load_teachers(tiny.teachers, ["local"])
    record, module = read_records(tiny.teachers)["local"], "transformer_blocks.1.ff.net.2"
    stored = load_file(tiny.teachers / "local" / ADAPTER_WEIGHTS)
    a, b = (stored[f"{module}.lora_{part}.weight"].float() for part in "AB")
    layer, x = (
        backbone.network.get_submodule(module),
        torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(0)),
    )
    switch_adapter(backbone.network, "local")
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x) - layer.base_layer(x), record.alpha / record.rank * (x @ a.T @ b.T), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("order", [NAMES, ["global", "local", BASE], ["local", "global"]])
def test_a_full_teacher_stands_alone_whatever_is_loaded_before_it(tiny: Tiny, order: list[str]) -> None:
    backbone, fields = load_teachers(tiny.teachers, order)
    network = fields["global"].network
    assert network is not backbone.network and set(fields) == set(order)
    stored = load_file(tiny.teachers / "global" / "transformer" / WEIGHTS)
    assert all(torch.equal(value, stored[name].float()) for name, value in network.state_dict().items())
    assert not {value.data_ptr() for value in network.state_dict().values()} & {
        value.data_ptr() for value in backbone.network.state_dict().values()
    }


def test_loaded_teachers_are_frozen_and_full_precision(tiny: Tiny) -> None:
    _, fields = load_teachers(tiny.teachers, NAMES)
    for field in fields.values():
        assert not field.network.training
        assert all(value.dtype == torch.float32 and not value.requires_grad for value in field.network.parameters())


def test_teachers_that_belong_together_have_no_faults(tiny: Tiny) -> None:
    assert compatibility_faults(tiny.teachers, NAMES) == []
    records = read_records(tiny.teachers)
    assert {record.base_sha256 for record in records.values()} == {records[BASE].sha256}
    assert json.loads((tiny.teachers / "local" / RECORD).read_text()) == asdict(records["local"])


def test_every_fault_is_named_at_once(folder: Path) -> None:
    shutil.copytree(folder / "local", folder / "other")
    shutil.copytree(folder / "local", folder / "broken")
    edit(
        folder,
        "other",
        name="other",
        base_sha256="f" * 64,
        scheduler={"type": "DDIM", "shift": 3.0},
        latent_shape=[16, 3, 3],
    )
    (folder / "broken" / RECORD).write_text("{")
    (folder / "local" / ADAPTER_WEIGHTS).unlink()
    weights = folder / "global" / "transformer" / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    names = [BASE, "local", "global", "other", "broken", "glboal"]
    faults = compatibility_faults(folder, names)
    for parts in (
        ("local", "no such file"),
        ("global", "SHA-256"),
        ("other", "base_sha256"),
        ("other", "scheduler =", "DDIM"),
        ("other", "latent_shape ="),
        ("broken", "not valid JSON"),
        ("glboal", "no such teacher"),
    ):
        assert sum(all(part in fault for part in parts) for fault in faults) == 1, parts
    assert len(faults) == 7
    with pytest.raises(UserErrors) as caught:
        load_teachers(folder, names)
    assert caught.value.faults == faults


def test_without_a_base_the_others_faults_are_still_told(folder: Path) -> None:
    shutil.rmtree(folder / BASE)
    (folder / "local" / ADAPTER_WEIGHTS).unlink()
    faults = compatibility_faults(folder, ["local", "global"])
    assert len(faults) == 2 and "base is missing" in faults[0] and "no such file" in faults[1]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"kind": "lora"}, "kind = 'lora'"),
        ({"backbone": "sd35"}, "backbone = 'sd35'"),
        ({"name": "student"}, "'student'"),
        ({"extra": 1}, "not a teacher record"),
    ],
)
def test_a_record_that_cannot_be_meant_is_refused(folder: Path, change: dict[str, Any], part: str) -> None:
    edit(folder, "local", **change)
    assert any(part in fault for fault in compatibility_faults(folder, ["local"]))


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(UserErrors, match="dvc pull"):
        read_records(tmp_path)


def test_every_key_of_an_adapter_must_match(folder: Path) -> None:
    stored = load_file(folder / "local" / ADAPTER_WEIGHTS)
    first = sorted(stored)[0]
    for tensors in (
        {name: value for name, value in stored.items() if name != first},
        {**stored, "transformer_blocks.9.attn.to_q.lora_A.weight": stored[first].clone()},
        {**stored, first: stored[first][:, :-1].contiguous()},
    ):
        rewrite(folder, "local", ADAPTER_WEIGHTS, tensors)
        with pytest.raises(UserError, match="does not fit this adapter"):
            load_teachers(folder, ["local"])
    rewrite(folder, "local", ADAPTER_WEIGHTS, stored)
    edit(folder, "local", rank=8)
    with pytest.raises(UserError, match="rank"):
        load_teachers(folder, ["local"])


def test_every_key_of_a_full_checkpoint_must_match_and_be_finite(folder: Path) -> None:
    file = f"transformer/{WEIGHTS}"
    stored = load_file(folder / "global" / file)
    first = "proj_out.weight"
    for tensors, part in (
        ({name: value for name, value in stored.items() if name != first}, "missing key"),
        ({**stored, first: stored[first].fill_(float("nan"))}, "not finite"),
    ):
        rewrite(folder, "global", file, tensors)
        with pytest.raises(UserError, match=part):
            load_teachers(folder, ["global"])


def test_a_damaged_base_is_refused_before_anything_is_built_on_it(folder: Path) -> None:
    weights = folder / BASE / "transformer" / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    with pytest.raises(UserError, match="SHA-256"):
        load_base(folder)


def test_a_record_of_other_weights_is_refused(folder: Path) -> None:
    """Hash and name alone would let a record say another precision or rank than the weights have."""
    edit(folder, "global", precision="float32")
    edit(folder, "local", rank=8)
    faults = "\n".join(compatibility_faults(folder, NAMES))
    assert "global: precision = 'float32', the weights are float16" in faults
    assert "local: rank = 8, the weights have [4]" in faults


def test_weights_in_shards_are_hashed_as_one(folder: Path) -> None:
    whole = folder / "global" / "transformer" / WEIGHTS
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, whole.with_name(shard))
    whole.unlink()
    index = whole.with_name(f"{WEIGHTS}.index.json")
    index.write_text(json.dumps({"weight_map": {name: shard for shard, held in shards.items() for name in held}}))
    edit(folder, "global", sha256=weights_sha256(folder / "global", "full"))
    assert compatibility_faults(folder, NAMES) == []
    save_file({name: tensors[name] + 1 for name in shards["part-2.safetensors"]}, whole.with_name("part-2.safetensors"))
    assert "SHA-256" in "\n".join(compatibility_faults(folder, NAMES))
    whole.with_name("part-2.safetensors").unlink()
    assert "part-2.safetensors: no such file" in "\n".join(compatibility_faults(folder, NAMES))
    index.write_text(json.dumps({"weight_map": {"x": "../part-1.safetensors"}}))
    assert "outside its folder" in "\n".join(compatibility_faults(folder, NAMES))


def test_what_comes_along_with_a_base_is_verified(folder: Path) -> None:
    config = folder / BASE / "scheduler" / "scheduler_config.json"
    edit(folder, BASE, files={"scheduler/scheduler_config.json": sha256_file(config), "vae/gone.json": "0" * 64})
    assert [fault.split(": ")[1] for fault in file_faults(folder, [])] == [
        "no such file, but base/teacher.json names it; make the teachers again"
    ]
    config.write_text("{}")
    assert len(file_faults(folder, [])) == 2
