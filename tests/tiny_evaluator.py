"""GenEval's networks in tiny, with the real classes and random weights: folders as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.geneval.prompts import CLASSES, COLORS

# the labels as COCO itself spells them
COCO = [
    {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}.get(name, name)
    for name in CLASSES
]


def tiny_mask2former(folder: Path) -> None:
    """80 classes, 12 queries. The class head is scaled up so that random features give confident detections."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=12,
        id2label=dict(enumerate(COCO)),
        label2id={name: index for index, name in enumerate(COCO)},
    )
    network = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        network.class_predictor.weight.normal_(0.0, 2.0)
    network.save_pretrained(folder)


def tiny_clip(folder: Path, activation: str = "quick_gelu") -> None:
    """The three templates' words as whole tokens, the rest by letter; a vision tower of 32 pixels."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz-"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(folder)
    end = vocabulary.index("<|endoftext|>")
    common = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
        "projection_dim": 12,
    }
    text = {
        **common,
        "vocab_size": len(vocabulary),
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "max_position_embeddings": 77,
    }
    vision = {**common, "image_size": 32, "patch_size": 8}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    network.save_pretrained(folder)


__all__ = ["COCO", "COLORS", "tiny_clip", "tiny_mask2former"]
