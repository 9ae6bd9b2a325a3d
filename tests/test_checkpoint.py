"""Property: a training state is on disk whole or not at all, the last two are kept, and one that is damaged or foreign
is refused in one clear message.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from data.errors import UserError
from model import checkpoint
from model.checkpoint import Ema, load_state, save_state


def tensors(seed: int = 0, size: int = 100) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(size, generator=generator),
        "step": torch.tensor(3.0),
        "matrix": torch.randn(4, 6, generator=generator).T,
    }


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_state_comes_back_bit_for_bit_and_the_newest_one(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state", "f") is None
    for step in (5, 10, 100):
        save_state(tmp_path / "state", step, tensors(step), {"fingerprint": "f", "rows": [{"loss": 0.1 + 0.2}]})
    found = load_state(tmp_path / "state", "f")
    assert found is not None
    values, record = found
    assert record["step"] == 100 and record["rows"] == [{"loss": 0.1 + 0.2}]
    assert values.keys() == tensors().keys() and all(
        torch.equal(value, tensors(100)[name]) for name, value in values.items()
    )


def test_the_last_two_are_kept_and_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".step-00000002.abcd.tmp").mkdir()
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step, tensors(), {"fingerprint": "f"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_state(tmp_path, 2, tensors(0), {"fingerprint": "f"})
    save_state(tmp_path, 2, tensors(1), {"fingerprint": "f"})
    found = load_state(tmp_path, "f")
    assert found is not None and torch.equal(found[0]["weight"], tensors(1)["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def refusal(folder: Path, fingerprint: str = "f") -> str:
    with pytest.raises(UserError) as caught:
        load_state(folder, fingerprint)
    return str(caught.value)


def test_a_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 1, tensors(), {"fingerprint": "f"})
    save_state(tmp_path, 2, tensors(), {"fingerprint": "f"})
    newest = tmp_path / "step-00000002"
    weights, record = newest / checkpoint.TENSORS, newest / checkpoint.RECORD
    whole, text = weights.read_bytes(), record.read_text()
    assert "other params" in refusal(tmp_path, "g")
    for content in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(content)
        assert str(weights) in refusal(tmp_path) and "truncated or changed" in refusal(tmp_path)
    weights.unlink()
    assert "not a whole checkpoint" in refusal(tmp_path)
    weights.write_bytes(whole)
    record.write_text(text[: len(text) // 2])
    assert "not valid JSON" in refusal(tmp_path)
    facts = json.loads(text)
    for key in ("fingerprint", "sha256", "step"):
        record.write_text(json.dumps({name: value for name, value in facts.items() if name != key}))
        assert f"'{key}' is missing" in refusal(tmp_path)
    assert "remove" in refusal(tmp_path)
    for path in (weights, record):
        path.unlink()
    newest.rmdir()  # as the messages say: then the state before it counts
    found = load_state(tmp_path, "f")
    assert found is not None and found[1]["step"] == 1


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, 1, tensors(), {"fingerprint": "f"})
    before = everything(tmp_path)

    def full(values: dict[str, torch.Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="no space left"):
        save_state(tmp_path, 2, tensors(), {"fingerprint": "f"})
    assert everything(tmp_path) == before and load_state(tmp_path, "f") is not None


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_itself_refuses_leaves_nothing_half_written(tmp_path: Path) -> None:
    save_state(tmp_path, 1, tensors(), {"fingerprint": "f"})
    before = everything(tmp_path)
    with files_at_most(2_000_000), pytest.raises(UserError, match="File too large"):
        save_state(tmp_path, 2, tensors(size=1_000_000), {"fingerprint": "f"})
    assert everything(tmp_path) == before
    save_state(tmp_path, 2, tensors(size=1_000_000), {"fingerprint": "f"})
    found = load_state(tmp_path, "f")
    assert found is not None and found[1]["step"] == 2


def test_weights_are_readable_as_other_files_are(tmp_path: Path) -> None:
    save_state(tmp_path, 1, tensors(), {"fingerprint": "f"})
    assert (tmp_path / "step-00000001" / checkpoint.TENSORS).stat().st_mode & 0o044 == 0o044


def test_ema_is_its_closed_form() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    parameters = {"w": torch.zeros(1)}
    ema = Ema(parameters, 0.9)
    expected = 0.0
    for n, value in enumerate(values.tolist()):
        parameters["w"].fill_(value)
        ema.update(parameters)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1.0 - decay) * value
        assert float(ema.shadow["w"]) == pytest.approx(expected, abs=1e-6)
    assert ema.updates == 30


def test_ema_without_decay_is_the_parameters_themselves() -> None:
    parameters = {"w": torch.tensor([0.1, 1e-8, -3.0])}
    ema = Ema(parameters, 0.0)
    parameters["w"].add_(0.7)
    ema.update(parameters)
    assert torch.equal(ema.shadow["w"], parameters["w"])
    parameters["w"].add_(1.0)
    assert not torch.equal(ema.shadow["w"], parameters["w"])  # it holds a copy
    for decay in (1.0, -0.1):
        with pytest.raises(UserError, match="ema"):
            Ema(parameters, decay)
