"""Property: a student starts exactly where it is told to, trains what it is told to, and comes back from disk bit for
bit, or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.errors import UserError
from model.networks.network import NetworkField, add_adapter
from model.networks.student import (
    STUDENT,
    Student,
    load_student,
    merged_weights,
    plain_weights,
    save_student,
    start_student,
    student_adapter,
)
from model.networks.teachers import ADAPTER_WEIGHTS, BASE, WEIGHTS, load_base, load_teachers, read_records
from tests.tiny import LOCAL_ALPHA, LOCAL_RANK, Tiny, build, disturb, probe

NAMES = [BASE, "local", "global"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


def started(tiny: Tiny, start: str, trainable: str) -> tuple[Student, dict[str, NetworkField]]:
    backbone, fields = load_teachers(tiny.teachers, NAMES)
    return start_student(backbone, fields, start, trainable, 4, 8, seed=5), fields


def record_of(tiny: Tiny) -> dict[str, object]:
    return {"base_sha256": read_records(tiny.teachers)[BASE].sha256, "rank": 4, "alpha": 8}


@pytest.mark.parametrize("trainable", ["all", "adapter"])
@pytest.mark.parametrize("start", [BASE, "global"])
def test_a_start_without_an_adapter_of_its_own_is_exact(tiny: Tiny, start: str, trainable: str) -> None:
    student, fields = started(tiny, start, trainable)
    assert torch.equal(probe(student.field, student.backbone), probe(fields[start], student.backbone))


@pytest.mark.parametrize("trainable", ["all", "adapter"])
def test_an_adapter_teacher_is_folded_into_the_weights_with_its_alpha(tiny: Tiny, trainable: str) -> None:
    student, fields = started(tiny, "local", trainable)
    torch.testing.assert_close(
        probe(student.field, student.backbone), probe(fields["local"], student.backbone), rtol=1e-4, atol=1e-5
    )
    values = dict(fields["local"].network.named_parameters())
    module = "transformer_blocks.0.attn.to_q"
    delta = (
        values[f"{module}.lora_B.local.weight"] @ values[f"{module}.lora_A.local.weight"] * (LOCAL_ALPHA / LOCAL_RANK)
    )
    folded = plain_weights(fields["local"])[f"{module}.weight"]
    torch.testing.assert_close(folded, values[f"{module}.base_layer.weight"] + delta)
    assert float((folded - values[f"{module}.base_layer.weight"]).abs().max()) > 0.01


@pytest.mark.parametrize("routed", [NAMES, ["local", "global"], [BASE, "global"]])
def test_merged_is_the_mean_of_every_routed_teacher(tiny: Tiny, routed: list[str]) -> None:
    """The base among them, where it is routed: T2I and an editor merge into half an editor, not into the editor."""
    backbone, fields = load_teachers(tiny.teachers, NAMES)
    weights = [plain_weights(fields[name]) for name in routed]
    student = start_student(backbone, {name: fields[name] for name in routed}, "merged", "all", 4, 4, seed=0)
    for name, value in student.network.state_dict().items():
        torch.testing.assert_close(value, sum(each[name] for each in weights) / len(weights), rtol=0, atol=1e-6)
    alone = merged_weights(fields[BASE], {"global": fields["global"]})
    for name, value in plain_weights(fields["global"]).items():
        torch.testing.assert_close(alone[name], value, rtol=0, atol=1e-6)


def test_an_unknown_start_is_refused_with_the_choices(tiny: Tiny) -> None:
    backbone, fields = load_teachers(tiny.teachers, [BASE, "local"])
    for start in ("loacl", "global"):
        with pytest.raises(UserError, match=f"start = '{start}'.*local"):
            start_student(backbone, fields, start, "all", 4, 4, seed=0)
    with pytest.raises(UserError, match="merged"):
        start_student(backbone, {BASE: fields[BASE]}, "merged", "all", 4, 4, seed=0)
    with pytest.raises(UserError, match="trainable = 'lora'"):
        start_student(backbone, fields, BASE, "lora", 4, 4, seed=0)


def test_an_adapter_on_the_base_shares_its_memory_and_any_other_start_does_not(tiny: Tiny) -> None:
    backbone, fields = load_teachers(tiny.teachers, NAMES)
    storages = {value.data_ptr() for name, value in backbone.network.state_dict().items()}
    student = start_student(backbone, fields, BASE, "adapter", 4, 4, seed=0)
    shared = {name: value for name, value in student.network.state_dict().items() if f".{STUDENT}." not in name}
    assert {value.data_ptr() for value in shared.values()} == storages
    assert all(f".{STUDENT}." in name and value.requires_grad for name, value in student.parameters.items())
    assert sorted(name for name, value in student.network.named_parameters() if value.requires_grad) == sorted(
        student.parameters
    )
    for start, trainable in ((BASE, "all"), ("global", "all"), ("global", "adapter"), ("merged", "adapter")):
        own = start_student(backbone, fields, start, trainable, 4, 4, seed=0)
        assert not storages & {value.data_ptr() for value in own.network.state_dict().values()}
        assert all(value.dtype == torch.float32 and value.requires_grad for value in own.parameters.values())


def test_a_fresh_adapter_follows_from_its_seed_alone(tiny: Tiny) -> None:
    torch.manual_seed(123)
    one = started(tiny, BASE, "adapter")[0].parameters
    state = torch.get_rng_state()
    torch.manual_seed(321)
    two = started(tiny, BASE, "adapter")[0].parameters
    torch.set_rng_state(state)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert all(bool((value == 0).all()) == ("lora_B" in name) for name, value in one.items())


@pytest.mark.parametrize("start", [BASE, "merged"])
@pytest.mark.parametrize("trainable", ["all", "adapter"])
def test_saved_and_loaded_is_the_same_student_bit_for_bit(
    tiny: Tiny, tmp_path: Path, start: str, trainable: str
) -> None:
    student, _ = started(tiny, start, trainable)
    disturb({name: value.detach() for name, value in student.parameters.items()}, 0.03, seed=6)
    expected = probe(student.field, student.backbone)
    save_student(tmp_path, student, record_of(tiny))
    backbone = load_base(tiny.teachers)
    loaded = load_student(tmp_path, backbone, read_records(tiny.teachers)[BASE].sha256)
    assert loaded.parameters.keys() == student.parameters.keys()
    for name, value in student.parameters.items():
        assert torch.equal(loaded.parameters[name], value) and loaded.parameters[name].requires_grad
    assert torch.equal(probe(loaded.field, backbone), expected)
    assert (loaded.network is backbone.network) == (start == BASE and trainable == "adapter")
    assert (tmp_path / "transformer").exists() == (
        loaded.network is not backbone.network
    )  # the base is not stored twice
    if trainable == "adapter" and start != BASE:
        assert not torch.equal(
            probe(NetworkField(backbone, loaded.network), backbone), expected
        )  # the adapter counts, on top of its start


def test_a_frozen_copy_stays_when_the_student_moves(tiny: Tiny) -> None:
    student, _ = started(tiny, BASE, "adapter")
    frozen, before = student.frozen_copy(), probe(student.field, student.backbone)
    disturb({name: value.detach() for name, value in student.parameters.items()}, 0.05, seed=6)
    assert torch.equal(probe(frozen, student.backbone), before)
    assert not torch.equal(probe(student.field, student.backbone), before)


def test_a_frozen_copy_has_every_layer_of_the_students_adapter(tiny: Tiny) -> None:
    """Also those that the family's adapters do not cover, where the student starts from an adapter that does."""
    backbone, fields = load_teachers(tiny.teachers, [BASE])
    other = add_adapter(backbone, backbone.network, "other", 2, 2, seed=4, targets=["context_embedder"])
    disturb({name: value.detach() for name, value in other.items()}, 0.5, seed=4)
    fields["other"] = NetworkField(backbone, backbone.network, "other")
    student = start_student(backbone, fields, "other", "adapter", 4, 4, seed=0)
    expected = probe(student.field, backbone)
    assert not torch.allclose(expected, probe(fields[BASE], backbone), atol=1e-3)
    assert torch.equal(probe(student.frozen_copy(), backbone), expected)


def test_a_checkpoint_that_does_not_belong_or_is_damaged_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    sha256 = read_records(tiny.teachers)[BASE].sha256
    folders = {kind: tmp_path / kind for kind in ("shared", "own", "all")}
    for kind, (start, trainable) in zip(
        folders, ((BASE, "adapter"), ("merged", "adapter"), (BASE, "all")), strict=True
    ):
        save_student(folders[kind], started(tiny, start, trainable)[0], record_of(tiny))

    def refusal(folder: Path, base: str = sha256) -> str:
        with pytest.raises(UserError) as caught:
            load_student(folder, load_base(tiny.teachers), base)
        return str(caught.value)

    assert "another base" in refusal(folders["shared"], "0" * 64) or "distil again" in refusal(
        folders["shared"], "0" * 64
    )
    for kind, name in (
        ("shared", ADAPTER_WEIGHTS),
        ("own", ADAPTER_WEIGHTS),
        ("own", f"transformer/{WEIGHTS}"),
        ("all", f"transformer/{WEIGHTS}"),
    ):
        file = folders[kind] / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert name in refusal(folders[kind]) and "SHA-256" in refusal(folders[kind])
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert name in refusal(folders[kind])
        file.unlink()
        assert "missing" in refusal(folders[kind])
        file.write_bytes(whole)
        load_student(folders[kind], load_base(tiny.teachers), sha256)
    record = json.loads((folders["all"] / "student.json").read_text())
    del record["sha256"]
    (folders["all"] / "student.json").write_text(json.dumps(record))
    assert "'sha256' is missing" in refusal(folders["all"])
    (folders["all"] / "student.json").write_text("{")
    assert "not valid JSON" in refusal(folders["all"])


def test_a_start_from_adapters_lies_in_the_students_own_adapter_on_the_shared_base(tiny: Tiny, tmp_path: Path) -> None:
    """So one base serves teachers and student, and the saved adapter alone is the student."""
    backbone, fields = load_teachers(tiny.teachers, [BASE, "local"])
    disturb(
        {
            name: value
            for name, value in add_adapter(backbone, backbone.network, "other", 2, 6, seed=4).items()
            if "lora_B" in name
        },
        0.5,
        seed=4,
    )
    fields["other"] = NetworkField(backbone, backbone.network, "other")
    mean = {name: value.clone() for name, value in merged_weights(fields[BASE], fields).items()}
    with pytest.raises(UserError, match="start = 'merged' takes rank 6 .* rank = 5"):
        start_student(backbone, fields, "merged", "adapter", 5, 5, seed=0)
    student = start_student(backbone, fields, "merged", "adapter", 7, 3, seed=0)
    assert student.network is backbone.network
    for name, value in plain_weights(student.field).items():
        torch.testing.assert_close(value, mean[name], rtol=1e-5, atol=1e-6)
    assert student_adapter(student).rank == 7 and student_adapter(student).alpha == 3
    save_student(tmp_path, student, {**record_of(tiny), "rank": 7, "alpha": 3})
    again = load_base(tiny.teachers)
    loaded = load_student(tmp_path, again, read_records(tiny.teachers)[BASE].sha256)
    assert loaded.network is again.network
    assert torch.equal(probe(loaded.field, again), probe(student.field, backbone))


def test_a_student_that_is_no_adapter_is_not_given_as_one(tiny: Tiny) -> None:
    for start, trainable, why in (
        (BASE, "all", "trained all its parameters"),
        ("global", "adapter", "lies on a start of its own"),
    ):
        student, _ = started(tiny, start, trainable)
        with pytest.raises(UserError, match=why):
            student_adapter(student)
