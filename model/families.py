"""The network families: one entry each. Without torch, so that params.yaml and the plan ask it at no cost.

A new family is one file in model/backbones/, which keeps the protocol `Backbone`, and one entry of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """What others ask of a family before one of its networks is loaded."""

    path: str  # MODULE:CLASS of its backbone: model.backbones.backbone_class imports it
    pipelines: tuple[str, ...]  # `_class_name` in model_index.json
    size: str | None  # the published network (model.backbones.sizes.SIZES); None: this project makes its networks
    steps: int  # Euler steps of a picture where nobody says how many
    text_tokens: int  # of a usual T2I prompt
    images_of_edit: int = 1  # 2 where an edit's source has tokens of its own, 1 where it lies beside the noise
    tera: Mapping[int, tuple[float, float]] = field(default_factory=dict)  # px -> 1e12 operations a forward: T2I, edit


# Operations of Z-Image: counted over its tokens (docs/results.md); 28 steps as DanceOPD samples.
FAMILIES = {
    "micro": Family("model.backbones.micro:MicroBackbone", ("MicroPipeline",), None, 16, 8),
    "sd3": Family("model.backbones.sd3:SD3Backbone", ("StableDiffusion3Pipeline",), "sd35-m", 28, 333),
    "zimage": Family(
        "model.backbones.zimage:ZImageBackbone",
        ("ZImagePipeline", "ZImageOmniPipeline"),
        "zimage",
        28,
        128,
        images_of_edit=2,
        tera={512: (13.7, 27.4), 1024: (56.6, 128.8)},
    ),
}
