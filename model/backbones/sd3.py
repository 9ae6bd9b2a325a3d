"""Stable Diffusion 3 and 3.5 (diffusers' SD3Transformer2DModel): T2I, and edits where the network reads the source
beside the noise.

The network takes 1000 t and returns v, which is our convention. An edit's source latents are concatenated on the
channels (in_channels = 2 C, as UltraEdit does on SD3), zeros for T2I. Prompts are what StableDiffusion3Pipeline makes
of them: CLIP-L and CLIP-G beside each other, then T5, padded to a fixed length that the network attends to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from data.errors import UserError
from data.files import read_json
from model.backbones import parts
from model.fields.base import Condition, Prompts

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class SD3Backbone:
    """See `Backbone`. Made by `load`."""

    name = "sd3"
    edit_prompts = False
    blocks: tuple[str, ...] = ("transformer_blocks",)
    modulations: tuple[str, ...] = ("norm1", "norm1_context")
    adapter_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )

    def __init__(
        self, folder: Path, network: Any, scheduler: dict[str, Any], pixels_per_latent: int, max_tokens: int
    ) -> None:
        self.folder, self.network, self.scheduler, self.max_tokens = folder, network, scheduler, max_tokens
        config = network.config
        channels = config.out_channels or config.in_channels
        if config.in_channels not in (channels, 2 * channels):
            raise UserError(
                f"{folder / 'transformer' / 'config.json'}: in_channels = {config.in_channels}: expected {channels} (T2I) or {2 * channels} (T2I and edits) "
                f"for {channels} latent channels"
            )
        self.supports_edits = config.in_channels == 2 * channels
        self.latent_shape = (channels, config.sample_size, config.sample_size)
        self.pixels_per_latent, self.size_multiple = pixels_per_latent, pixels_per_latent * config.patch_size
        self.largest_edge = self.size_multiple * config.pos_embed_max_size
        self.vae: Any = None
        self._texts: Any = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        need: Collection[str],
        dtype: torch.dtype,
        max_tokens: int,
        device: torch.device | str = "cpu",
        resolution: int | None = None,
    ) -> SD3Backbone:
        """A frozen base from a pipeline folder; `need` names the parts that are read ("transformer", "text", "vae").

        Raises UserError for a part that is missing, damaged or of another family, for latents of VAE and network that
        differ, and for a scheduler not followed.
        """
        network = parts.load_network(
            SD3Transformer2DModel, folder / "transformer", dtype, device, weights="transformer" in need
        )
        backbone = cls(folder, network, parts.read_scheduler(folder), parts.pixels_per_latent(folder), max_tokens)
        backbone.latent_shape = parts.check_latents(
            folder, backbone.latent_shape, resolution, backbone.pixels_per_latent
        )
        if "vae" in need:
            backbone.vae = parts.load_vae(folder, device)
        if "text" in need:
            backbone._texts = cls._text_pipeline(folder, network, dtype, device)
        return backbone

    @staticmethod
    def _text_pipeline(folder: Path, network: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
        from diffusers import StableDiffusion3Pipeline

        index, given = read_json(folder / "model_index.json"), dict[str, Any]()
        for part in ENCODERS:
            there = (index.get(part) or [None])[0] is not None  # SD3 may come without T5
            tokenizer, encoder = parts.load_text(folder, part, dtype, device) if there else (None, None)
            given |= {part: encoder, part.replace("text_encoder", "tokenizer"): tokenizer}
        return StableDiffusion3Pipeline(transformer=network, scheduler=None, vae=None, **given)

    def release(self, *names: str) -> None:
        """Frees "text" or "vae": the text encoders are needed for prompts alone."""
        if "text" in names:
            self._texts = None
        if "vae" in names:
            self.vae = None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], edits: bool = False) -> Prompts:
        """embeds (B, 77 + max_tokens, D), pooled (B, P). Edits read their prompts as T2I does."""
        pipeline = _loaded(self._texts, "text encoders")
        device = next(pipeline.text_encoder.parameters()).device
        with parts.quiet():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                list(prompts),
                None,
                None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_tokens,
            )
        return Prompts(embeds, pooled)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Nothing: the tokenizers read every word."""

    def truncated(self, prompts: Sequence[str], edits: bool = False) -> dict[str, int]:
        """How many of the prompts lose their end in each text encoder, by the encoder's name; CLIP reads 77 tokens, T5
        `max_tokens`.
        """
        pipeline = _loaded(self._texts, "text encoders")
        counts = {}
        with parts.quiet():
            for part in ENCODERS:
                tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
                if tokenizer is not None:
                    limit = self.max_tokens if part == "text_encoder_3" else pipeline.tokenizer_max_length
                    counts[part] = sum(len(ids) > limit for ids in tokenizer(list(prompts)).input_ids)
        return counts

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return parts.encode_image(_loaded(self.vae, "VAE"), images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return parts.decode(_loaded(self.vae, "VAE"), latents)

    def velocity(self, network: Any, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's inputs are cast to its own dtype; latents and times stay fp32 outside. Raises UserError for an
        edit that the network cannot read.
        """
        dtype = network.proj_out.weight.dtype  # of the base: an adapter's weights are fp32 whatever it adapts
        hidden = x_t
        if self.supports_edits:
            hidden = torch.cat(
                [x_t, torch.zeros_like(x_t) if condition.source is None else condition.source.to(x_t)], dim=1
            )
        elif condition.source is not None:
            raise UserError(edit_fault(self.folder))
        return network(
            hidden_states=hidden.to(dtype),
            timestep=1000.0 * t.to(x_t.device),
            encoder_hidden_states=condition.embeds.to(dtype),
            pooled_projections=condition.pooled.to(dtype),
            return_dict=False,
        )[0].float()

    def save(self, folder: Path, network: nn.Module | None = None) -> None:
        """A pipeline folder that diffusers loads: this base, or `network` in its transformer's place; the other parts
        are copied from where it came from.
        """
        net: Any = self.network if network is None else network
        parts.save_pipeline(folder, self.folder, net, parts.plain_state(net))


def _loaded(part: Any, what: str) -> Any:
    if part is None:
        raise RuntimeError(f"the {what} were not loaded; name them in `need`")
    return part


def edit_fault(folder: Path) -> str:
    return (
        f"{folder}: this base reads no source image (in_channels = latent channels), so it cannot edit; take a base with twice the channels, "
        "widen this one (model.backbones.sd3.widen_for_edits) and train it on edits, or leave the edit routes out"
    )


@torch.no_grad()
def widen_for_edits(network: Any) -> Any:
    """A T2I network as one that also reads a source: in_channels doubled, the new input weights zero, so that its
    answers stay what they were.

    The source has no effect until the input projection is trained, which an adapter on the attention does not do: train
    all parameters, or a teacher that does. Raises UserError for a network that is wide already.
    """
    config = network.config
    if config.in_channels != (config.out_channels or config.in_channels):
        raise UserError(
            f"widen for edits: in_channels = {config.in_channels} already differs from out_channels = {config.out_channels}"
        )
    wide = SD3Transformer2DModel.from_config(
        {**config, "in_channels": 2 * config.in_channels, "out_channels": config.in_channels}
    )
    state, old = parts.plain_state(network), network.pos_embed.proj.weight
    wide = nn.Module.to(wide, device=old.device, dtype=old.dtype)
    wide.load_state_dict({**state, "pos_embed.proj.weight": torch.cat([old, torch.zeros_like(old)], dim=1)})
    wide.requires_grad_(False)
    return wide.eval()
