"""A backbone binds a network family to the conventions of model/fields/base.py, and knows nothing of training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from data.errors import UserError
from data.files import read_json
from model.families import FAMILIES
from model.fields.base import Condition, Prompts

PARTS = ("transformer", "text", "vae")
TRANSFORMER = ("transformer",)  # all that training reads
MAX_TOKENS = 256


def check_sizes(backbone: Backbone, sizes: Iterable[tuple[int, int]]) -> None:
    """Raises UserError for a picture (width, height in px) that is larger than the network has positions for, or no
    whole number of its patches."""
    for width, height in sizes:
        size, largest, multiple = f"{width} x {height} px", backbone.largest_edge, backbone.size_multiple
        if max(width, height) > largest:
            raise UserError(f"{size}: the network has positions for edges of up to {largest} px; choose a smaller one")
        if width % multiple or height % multiple:
            raise UserError(f"{size}: expected multiples of {multiple} px, as the network's latents and patches need")


class Backbone(Protocol):
    """One frozen base network with what belongs to it."""

    name: str  # of its family
    network: Any  # the base, an nn.Module with diffusers' adapter methods
    latent_shape: tuple[int, int, int]  # (C, H, W) of the network's usual picture; examples bring their own H and W
    scheduler: dict[str, Any]  # type and shift, as the checkpoint says
    adapter_targets: tuple[str, ...]  # module names that a LoRA adapter covers
    blocks: tuple[str, ...]  # names of the network's lists of transformer blocks
    modulations: tuple[str, ...]  # module names within a block that scale and shift by the time, not the hidden states
    # Pattern of diffusers' module name -> the original checkpoint's; {qkv} marks three modules that one fused layer
    # holds in that order.
    original_names: tuple[tuple[str, str], ...]
    comfyui_prefix: str | None  # of adapter keys, before diffusers' module names; None where ComfyUI cannot run it
    supports_edits: bool  # whether the network reads a source image
    no_pipeline: str  # why neither diffusers' pipelines nor ComfyUI run it; "" where they do
    pixels_per_latent: int
    size_multiple: int  # px: height and width of a picture are multiples of it
    largest_edge: int  # px: what the network has positions for
    max_tokens: int  # of a prompt
    edit_prompts: bool  # whether edits read their prompts in another form than T2I

    def encode_prompts(self, prompts: Sequence[str], edits: bool = False) -> Prompts:
        """The prompts as T2I reads them, or as edits do."""
        ...

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserErrors for words that the text encoder does not know: drawn, they would mean nothing."""
        ...

    def truncated(self, prompts: Sequence[str], edits: bool = False) -> dict[str, int]:
        """Text encoder -> how many of the prompts are cut."""
        ...

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, C, h, w)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> (B, 3, H, W) in [0, 1]."""
        ...

    def velocity(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's answer in our convention: (B, C, h, w) float32."""
        ...

    def release(self, *names: str) -> None:
        """Frees parts that are no longer needed ("text", "vae")."""
        ...

    def save(self, folder: Path, network: nn.Module | None = None) -> None:
        """Writes the base with all that belongs to it, or `network` in its place, as a folder for `load_backbone`."""
        ...


def family_of(folder: Path) -> str:
    """The family of a pipeline folder, from its model_index.json. Raises UserError for a pipeline of no family here."""
    kind = read_json(folder / "model_index.json").get("_class_name")
    known = {pipeline: name for name, family in FAMILIES.items() for pipeline in family.pipelines}
    if kind not in known:
        index = folder / "model_index.json"
        raise UserError(f"{index}: _class_name = {kind!r}: choose a checkpoint of one of {sorted(known)}")
    return known[kind]


def backbone_class(family: str) -> Any:
    """The class of a family's backbones, imported now."""
    module, name = FAMILIES[family].path.split(":")
    return getattr(import_module(module), name)


def load_backbone(
    folder: Path,
    *,
    need: Collection[str] = PARTS,
    dtype: torch.dtype | str = torch.float32,
    max_tokens: int = MAX_TOKENS,
    device: torch.device | str = "cpu",
    resolution: int | None = None,
) -> Backbone:
    """The frozen base of a pipeline folder. `need`: the parts of `PARTS` that are read; training needs the transformer
    alone.

    `dtype` is the network's and the text encoders' (the micro backbone and every VAE stay in fp32); prompts of more
    than `max_tokens` tokens are cut; `device` "auto" is the GPU where there is one; `resolution` (px) sets the usual
    picture's edge where the checkpoint's own is not wanted. The micro backbone takes none of these: it is what its
    folder says. Raises UserError for a folder that is missing, damaged, pickled or of no known family.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": dtype, "max_tokens": max_tokens, "device": device, "resolution": resolution}
    made: Backbone = backbone_class(family_of(folder)).load(folder, need=frozenset(need), **options)
    return made
