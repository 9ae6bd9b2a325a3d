"""The published networks' real sizes with random weights, for measuring speed and memory where the weights are not at
hand.

Configurations as in transformer/config.json of stabilityai/stable-diffusion-3.5-medium, -large and Tongyi-MAI/Z-Image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel
from torch import nn

from model.backbones import Backbone
from model.backbones.parts import SCHEDULER
from model.backbones.sd3 import SD3Backbone
from model.backbones.zimage import ZImageBackbone
from model.fields.base import Condition
from model.randomness import torch_generator

SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SD35_LARGE: dict[str, Any] = {
    **SD35_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
ZIMAGE: dict[str, Any] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
SHIFT = 3.0  # of both published schedulers
PIXELS_PER_LATENT = 8
T5_TOKENS, CAPTION_TOKENS, EDIT_PARTS = 256, 128, (8, 144, 8)


def _sd3(config: dict[str, Any], edits: bool) -> tuple[Callable[[], Any], type]:
    wide = {**config, "in_channels": (2 if edits else 1) * config["out_channels"]}
    return lambda: SD3Transformer2DModel(**wide), SD3Backbone


SIZES: dict[str, Callable[[bool], tuple[Callable[[], Any], type]]] = {
    "sd35-m": lambda edits: _sd3(SD35_MEDIUM, edits),
    "sd35-l": lambda edits: _sd3(SD35_LARGE, edits),
    "zimage": lambda edits: (lambda: ZImageTransformer2DModel(**ZIMAGE), ZImageBackbone),
}


def random_network(make: Callable[[], Any], device: torch.device | str, dtype: torch.dtype, seed: int) -> Any:
    """A frozen network with random weights, matrices of half the usual deviation so that depth does not explode.

    Made on the meta device and filled where it will live, so that memory holds it once; on device "meta" it has shapes
    alone.
    """
    with torch.device("meta"):
        network = make()
    network = nn.Module.to(network, dtype)
    if str(device) != "meta":
        network.to_empty(device=device)
        generator = torch.Generator(device=device).manual_seed(seed)
        with torch.no_grad():
            for key, value in network.state_dict().items():
                if value.ndim < 2:
                    value.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
                else:
                    value.normal_(std=0.5 / value[0].numel() ** 0.5, generator=generator)
    network.requires_grad_(False)
    network.eval()
    return network


def random_backbone(
    name: str, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, edits: bool = False, seed: int = 0
) -> Backbone:
    """A frozen base of the published size `name` (a key of SIZES), its weights normal and small enough that activations
    stay finite.

    Made on the meta device and filled where it will live, so that memory holds it once. `edits` gives SD3 the doubled
    input channels. On device "meta" it has shapes alone. It has neither text encoder nor VAE.
    """
    make, family = SIZES[name](edits)
    network = random_network(make, device, dtype, seed)
    backbone: Backbone = family(Path(name), network, {"type": SCHEDULER, "shift": SHIFT}, PIXELS_PER_LATENT, T5_TOKENS)
    return backbone


def latent_shape(resolution: int) -> tuple[int, int, int]:
    """Of a square picture of `resolution` px."""
    return 16, resolution // PIXELS_PER_LATENT, resolution // PIXELS_PER_LATENT


def random_condition(
    backbone: Backbone, batch: int, resolution: int, *, device: torch.device | str, edits: bool = False, seed: int = 0
) -> Condition:
    """Prompts of the usual number of tokens (T5's 256 after CLIP's 77; 128 for Z-Image) and, for an edit, a source, all
    standard normal.
    """

    def normal(*shape: int, purpose: str) -> torch.Tensor:
        return torch.randn(shape, generator=torch_generator(seed, 0, 0, purpose))

    source = normal(batch, *latent_shape(resolution), purpose="source") if edits else None
    if backbone.name == "sd3":
        tokens, config = 77 + T5_TOKENS, backbone.network.config
        embeds, pooled = (
            normal(batch, tokens, config.joint_attention_dim, purpose="embeds"),
            normal(batch, config.pooled_projection_dim, purpose="pooled"),
        )
        return Condition(embeds, pooled, torch.zeros_like(embeds[0]), torch.zeros_like(pooled[0]), source).to(device)
    segments = torch.tensor([EDIT_PARTS if edits else (CAPTION_TOKENS,)] * batch)
    width = backbone.network.config.cap_feat_dim
    embeds = normal(batch, int(segments[0].sum()), width, purpose="embeds")
    empty = normal(int(segments[0].sum()), width, purpose="empty")
    nothing = torch.zeros(batch, 0)
    return Condition(embeds, nothing, empty, nothing[0], source, segments.sum(1), segments, segments[0]).to(device)
