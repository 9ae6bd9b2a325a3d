"""The published networks' real sizes with random weights, for measuring speed and memory where the weights are not at
hand.

Configurations as in transformer/config.json of stabilityai/stable-diffusion-3.5-medium, -large and Tongyi-MAI/Z-Image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.backbones import Backbone, backbone_class
from model.backbones.parts import SCHEDULER

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


@dataclass(frozen=True)
class NetworkSize:
    """A network's family and configuration, and the tokens of a usual T2I prompt."""

    family: str  # a key of model.families.FAMILIES
    config: dict[str, Any]
    tokens: int


SIZES = {
    "sd35-m": NetworkSize("sd3", SD35_MEDIUM, 77 + 256),  # CLIP's tokens, then T5's
    "sd35-l": NetworkSize("sd3", SD35_LARGE, 77 + 256),
    "zimage": NetworkSize("zimage", ZIMAGE, 128),
}


def _random_network(make: Callable[[], Any], device: torch.device | str, dtype: torch.dtype, seed: int) -> Any:
    """A frozen network with random weights, matrices of half the usual deviation so that depth does not explode.

    Made on the meta device and filled where it will live, so that memory holds it once; on device "meta" it has shapes
    alone.
    """
    with torch.device("meta"):
        network = nn.Module.to(make(), dtype)
    if str(device) != "meta":
        network.to_empty(device=device)
        generator = torch.Generator(device=device).manual_seed(seed)
        with torch.no_grad():
            for key, value in network.state_dict().items():
                if value.ndim < 2:
                    value.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
                else:
                    value.normal_(std=0.5 / value[0].numel() ** 0.5, generator=generator)
    return network.requires_grad_(False).eval()


def random_backbone(
    size: NetworkSize,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    edits: bool = False,
    resolution: int | None = None,
    seed: int = 0,
) -> Backbone:
    """A frozen base of the given size, its weights normal and small enough that activations stay finite.

    `edits` gives SD3 the doubled input channels, `resolution` (px) sets the usual picture's edge. On device "meta" it
    has shapes alone. It has neither text encoder nor VAE.
    """
    kind = backbone_class(size.family)
    wide = {"in_channels": 2 * size.config["out_channels"]} if edits and "out_channels" in size.config else {}
    network = _random_network(lambda: kind.network_class(**{**size.config, **wide}), device, dtype, seed)
    scheduler = {"type": SCHEDULER, "shift": SHIFT}
    backbone: Any = kind(Path(size.family), network, scheduler, PIXELS_PER_LATENT, size.tokens)
    if resolution is not None:
        edge = resolution // PIXELS_PER_LATENT
        backbone.latent_shape = (backbone.latent_shape[0], edge, edge)
    made: Backbone = backbone
    return made
