"""Defends: the local judge runs the real Qwen2.5-VL network on what it should see, and a network that has learnt
nothing earns no score."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.judge.local import LocalModel, chat, inputs_of, load_local, local_judge
from benchmarks.judge.protocol import Question, Reply, ask_once_or_twice, outcome
from benchmarks.judge.wording import SEMANTIC
from data.errors import UserError
from tests.gedit_sets import png, settings

NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = [f"<|{name}|>" for name in NAMES]


def byte_letters() -> list[str]:
    """The 256 letters that byte-level tokenizers write bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint with the real classes and random weights: two layers, a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("qwen")
    vocabulary = {letter: index for index, letter in enumerate(byte_letters())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=SPECIAL)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> LocalModel:
    return load_local(checkpoint, "cpu", "float32")


def question(images: int = 2, size: tuple[int, int] = (84, 56), text: str = "Grade it.") -> Question:
    return Question(SEMANTIC, text, tuple(png(f"image {index}", size) for index in range(images)), "image/png", 0)


def test_the_chat_is_framed_as_the_model_was_trained() -> None:
    text = chat(question(1), [("7", "again")], text_first=False)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}Grade it.<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    )
    assert f"Grade it.{image}" in chat(question(1), [], text_first=True)


def test_every_image_has_its_own_tokens(local: LocalModel) -> None:
    inputs = inputs_of(local, question(), [], True)
    counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    assert counts == [6, 6]  # 84 x 56 px are 3 x 2 merged patches of 28 px
    assert int(inputs["mm_token_type_ids"].sum()) == 12 and inputs["pixel_values"].shape == (48, 3 * 2 * 14 * 14)
    words = local.tokenizer.decode(inputs["input_ids"][0])  # type: ignore[attr-defined]
    assert words.replace("<|image_pad|>" * 6, "<|image_pad|>") == chat(question(), [], True)
    with pytest.raises(UserError, match="remove it from the wording"):
        inputs_of(local, question(text="<|image_pad|>"), [], True)


def test_the_network_sees_the_images(local: LocalModel) -> None:
    with torch.inference_mode():
        inputs = inputs_of(local, question(), [], True)
        logits = local.model(**inputs).logits[0, -1]
        swapped = inputs_of(local, Question(SEMANTIC, "Grade it.", question().images[::-1], "image/png", 0), [], True)
        other = local.model(**swapped).logits[0, -1]
    assert torch.isfinite(logits).all() and not torch.allclose(logits, other)


def test_a_network_that_has_learnt_nothing_earns_no_score(local: LocalModel) -> None:
    ask = local_judge(settings(kind="local", max_tokens=6), local)
    replies = ask_once_or_twice(ask, question())
    assert outcome(replies).status == "unparseable" and outcome(replies).scores == () and len(replies) == 2
    assert replies[0].usage["completion_tokens"] <= 6 and replies[0].model == local.name
    assert replies[0].finish_reason in ("stop", "length")
    assert ask(question(), ()).text == replies[0].text


def test_what_the_network_writes_is_what_is_read(local: LocalModel, monkeypatch) -> None:
    text = '{"score": [8, 6.5], "reasoning": "héllo"}'

    def generate(**inputs):
        tokens = local.tokenizer(text + "<|im_end|>", return_tensors="pt", add_special_tokens=False)  # type: ignore
        ids = tokens["input_ids"]
        return torch.cat([inputs["input_ids"], ids], 1)

    monkeypatch.setattr(local.model, "generate", generate)
    reply = local_judge(settings(kind="local"), local)(question(), ())
    assert isinstance(reply, Reply) and (reply.text, reply.finish_reason) == (text, "stop")
    assert outcome([reply]).scores == (8.0, 6.5)


def test_what_is_no_such_checkpoint_is_named(tmp_path: Path, checkpoint: Path, local: LocalModel) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_local(tmp_path / "none", "cpu", "float32")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}), encoding="utf-8")
    with pytest.raises(UserError, match="not a usable Qwen2.5-VL checkpoint"):
        load_local(tmp_path, "cpu", "float32")
    with pytest.raises(UserError, match="dtype = 'int4'"):
        load_local(checkpoint, "cpu", "int4")
    with pytest.raises(UserError, match="must be 0"):
        local_judge(settings(kind="local", temperature=1.0), local)


def test_pictures_of_any_size_are_taken(local: LocalModel) -> None:
    buffer = io.BytesIO()
    Image.new("L", (30, 200)).save(buffer, format="PNG")
    inputs = inputs_of(local, Question(SEMANTIC, "?", (buffer.getvalue(),), "image/png", 0), [], True)
    assert int(inputs["mm_token_type_ids"].sum()) == int(inputs["image_grid_thw"].prod()) // 4
