"""Stable Diffusion 3 and 3.5 (diffusers' SD3Transformer2DModel): T2I, and edits where the network reads the source
beside the noise.

The network takes 1000 t and returns v, which is our convention. An edit's source latents are concatenated on the
channels (in_channels = 2 C, as UltraEdit does on SD3), zeros for T2I. Prompts are what StableDiffusion3Pipeline makes
of them: CLIP-L and CLIP-G beside each other, then T5, padded to a fixed length that the network attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
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
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ORIGINAL_NAMES = (  # see Backbone.original_names
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_([qkv])", r"joint_blocks.\1.x_block.\2.qkv"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (r"transformer_blocks\.(\d+)\.(attn)\.add_([qkv])_proj", r"joint_blocks.\1.context_block.\2.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"context_embedder", r"context_embedder"),
)


class SD3Backbone(parts.PipelineBackbone):
    """See `Backbone`. Made by `load`."""

    name = "sd3"
    network_class = SD3Transformer2DModel
    edit_prompts = False
    blocks: tuple[str, ...] = ("transformer_blocks",)
    modulations: tuple[str, ...] = ("norm1", "norm1_context")
    adapter_targets: tuple[str, ...] = ADAPTED
    original_names: tuple[tuple[str, str], ...] = ORIGINAL_NAMES
    comfyui_prefix: str | None = "transformer."

    def __init__(self, *given: Any) -> None:
        """Raises UserError where the input channels are neither those of the latents nor twice as many."""
        super().__init__(*given)
        config = self.network.config
        channels = config.out_channels or config.in_channels
        if config.in_channels not in (channels, 2 * channels):
            place = f"{self.folder / 'transformer' / 'config.json'}: in_channels = {config.in_channels}"
            wanted = f"{channels} (T2I) or {2 * channels} (T2I and edits) for {channels} latent channels"
            raise UserError(f"{place}: expected {wanted}")
        self.supports_edits = config.in_channels == 2 * channels
        if self.supports_edits:
            self.no_pipeline = (
                f"this SD3 reads a source image beside the noise (in_channels = {config.in_channels}), which neither "
                "diffusers' StableDiffusion3Pipeline nor ComfyUI gives it"
            )
        self.latent_shape = (channels, config.sample_size, config.sample_size)
        self.size_multiple = self.pixels_per_latent * config.patch_size
        self.largest_edge = self.size_multiple * config.pos_embed_max_size

    def load_texts(self, dtype: torch.dtype, device: torch.device | str) -> Any:
        from diffusers import StableDiffusion3Pipeline

        index, given = read_json(self.folder / "model_index.json"), dict[str, Any]()
        for part in ENCODERS:
            there = (index.get(part) or [None])[0] is not None  # SD3 may come without T5
            tokenizer, encoder = parts.load_text(self.folder, part, dtype, device) if there else (None, None)
            given |= {part: encoder, parts.name_of_tokenizer(part): tokenizer}
        return StableDiffusion3Pipeline(transformer=self.network, scheduler=None, vae=None, **given)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], edits: bool = False) -> Prompts:
        """embeds (B, 77 + max_tokens, D), pooled (B, P). Edits read their prompts as T2I does."""
        pipeline = self.loaded("texts")
        how = {"device": next(pipeline.text_encoder.parameters()).device, "max_sequence_length": self.max_tokens}
        with parts.quiet():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                list(prompts), None, None, do_classifier_free_guidance=False, **how
            )
        return Prompts(embeds, pooled)

    def truncated(self, prompts: Sequence[str], edits: bool = False) -> dict[str, int]:
        """How many prompts each text encoder cuts; CLIP reads 77 tokens, T5 `max_tokens`."""
        pipeline, counts = self.loaded("texts"), {}
        with parts.quiet():
            for part in ENCODERS:
                tokenizer = getattr(pipeline, parts.name_of_tokenizer(part))
                if tokenizer is not None:
                    limit = self.max_tokens if part == "text_encoder_3" else pipeline.tokenizer_max_length
                    counts[part] = sum(len(ids) > limit for ids in tokenizer(list(prompts)).input_ids)
        return counts

    def velocity(self, network: Any, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's inputs are cast to its own dtype; latents and times stay fp32 outside. Raises UserError for an
        edit that the network cannot read."""
        dtype = network.proj_out.weight.dtype  # of the base: an adapter's weights are fp32 whatever it adapts
        hidden = x_t
        if self.supports_edits:
            source = torch.zeros_like(x_t) if condition.source is None else condition.source.to(x_t)
            hidden = torch.cat([x_t, source], dim=1)
        elif condition.source is not None:
            raise UserError(edit_fault(self.folder))
        return network(
            hidden_states=hidden.to(dtype),
            timestep=1000.0 * t.to(x_t.device),
            encoder_hidden_states=condition.embeds.to(dtype),
            pooled_projections=condition.pooled.to(dtype),
            return_dict=False,
        )[0].float()


def edit_fault(folder: Path) -> str:
    return (
        f"{folder}: this base reads no source image (in_channels = latent channels), so it cannot edit; take a base "
        "with twice the channels, widen this one (model.backbones.sd3.widen_for_edits) and train it on edits, or leave "
        "the edit routes out"
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
        both = f"in_channels = {config.in_channels} already differs from out_channels = {config.out_channels}"
        raise UserError(f"widen for edits: {both}")
    channels = {"in_channels": 2 * config.in_channels, "out_channels": config.in_channels}
    wide = SD3Transformer2DModel.from_config({**config, **channels})
    state, old = parts.plain_state(network), network.pos_embed.proj.weight
    wide = nn.Module.to(wide, device=old.device, dtype=old.dtype)
    wide.load_state_dict({**state, "pos_embed.proj.weight": torch.cat([old, torch.zeros_like(old)], dim=1)})
    wide.requires_grad_(False)
    return wide.eval()
