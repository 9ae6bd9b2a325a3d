"""A judge on this machine: Qwen2.5-VL through transformers, greedy, one question at a time.

The chat's frame is the one that the model was trained on; the image processor is the one without torchvision. Greedy
decoding makes every repeat equal."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.judge.protocol import Ask, JudgeSettings, Question, Reply, Turn
from data.errors import UserError

SYSTEM = "You are a helpful assistant."  # the model's own default, without which its replies drift
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PAD, END = "<|image_pad|>", "<|im_end|>"


@dataclass(frozen=True)
class LocalModel:
    """The network, and what turns text and images into its inputs."""

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: AutoTokenizer
    images: Qwen2VLImageProcessorPil
    name: str


def load_local(path: str | Path, device: str, dtype: str) -> LocalModel:
    """Loads a checkpoint folder (config, safetensors, tokenizer, image processor). Nothing is downloaded. `dtype` is
    torch's name ("bfloat16", "float32"). Raises UserError for another folder, or an unknown dtype or device."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"local judge: dtype = {dtype!r}; choose bfloat16, float16 or float32")
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; the local judge needs a Qwen2.5-VL checkpoint there")
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=kind, local_files_only=True)
        model = model.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        processor = Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        fault = str(error).splitlines()[0]
        raise UserError(f"{path}: not a usable Qwen2.5-VL checkpoint for {device}, {dtype} ({fault})") from error
    return LocalModel(model, tokenizer, processor, Path(path).name)


def chat(question: Question, turns: Sequence[Turn], text_first: bool) -> str:
    """The chat as one string, each image one pad token."""
    images = IMAGE * len(question.images)
    first = question.text + images if text_first else images + question.text
    lines = [("system", SYSTEM), ("user", first)]
    for reply, answer in turns:
        lines += [("assistant", reply), ("user", answer)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in lines) + "<|im_start|>assistant\n"


def inputs_of(
    local: LocalModel, question: Question, turns: Sequence[Turn], text_first: bool
) -> dict[str, torch.Tensor]:
    """The model's inputs: `input_ids` and `attention_mask` (1, T), `mm_token_type_ids` (1, T) 1 at image tokens,
    `pixel_values`, `image_grid_thw` (images, 3). An image has one pad token for each of its merged patches."""
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in question.images]
    pixels = local.images(images=images, return_tensors="pt")
    counts = [int(grid.prod()) // local.images.merge_size**2 for grid in pixels["image_grid_thw"]]
    pieces = chat(question, turns, text_first).split(PAD)
    if len(pieces) != len(counts) + 1:
        raise UserError(f"local judge: the text itself holds {PAD}; remove it from the wording or the instruction")
    text = pieces[0] + "".join(PAD * count + piece for count, piece in zip(counts, pieces[1:], strict=True))
    ids = local.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    is_image = (ids == local.model.config.image_token_id).long()
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": is_image}
    return {**texts, "pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["image_grid_thw"]}


def local_judge(settings: JudgeSettings, local: LocalModel) -> Ask:
    """A judge that runs the network itself. Threads take turns on the device. Raises UserError for a temperature:
    decoding is greedy."""
    if settings.temperature:
        raise UserError(f"local judge: temperature = {settings.temperature}; it decodes greedily, so it must be 0")
    end, turn = local.tokenizer.convert_tokens_to_ids(END), threading.Lock()

    @torch.inference_mode()
    def ask(question: Question, turns: Sequence[Turn]) -> Reply:
        begun, device = time.monotonic(), local.model.device
        prompt = inputs_of(local, question, turns, settings.text_first)
        inputs = {name: value.to(device) for name, value in prompt.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(local.model.dtype)
        limits = {"max_new_tokens": settings.max_tokens, "eos_token_id": end, "pad_token_id": end}
        with turn:
            output = local.model.generate(**inputs, **limits, do_sample=False)
        length = inputs["input_ids"].shape[1]
        new = output[0, length:].tolist()
        text = local.tokenizer.decode(new, skip_special_tokens=True)
        usage = {"prompt_tokens": length, "completion_tokens": len(new)}
        seconds = round(time.monotonic() - begun, 3)
        return Reply("ok", text, local.name, "stop" if end in new else "length", usage, seconds=seconds)

    return ask
