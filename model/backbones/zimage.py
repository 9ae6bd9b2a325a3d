"""Z-Image (diffusers' ZImageTransformer2DModel): T2I by its ordinary call, edits by its multi-image call, where the
source is clean and the target noisy.

The network takes 1 - t and returns -v. It takes lists: prompts keep their own lengths. An edit's prompt is cut into
three parts, as ZImageOmniPipeline writes them, with the source after the first and the target after the second; SigLIP
features are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel

from model.backbones import parts
from model.fields.base import Condition, Prompts

DEFAULT_EDGE = 1024  # px


class ZImageBackbone(parts.PipelineBackbone):
    """See `Backbone`. Made by `load`."""

    name = "zimage"
    network_class = ZImageTransformer2DModel
    edit_prompts = True
    blocks: tuple[str, ...] = ("noise_refiner", "context_refiner", "siglip_refiner", "layers")
    modulations: tuple[str, ...] = ("adaLN_modulation",)
    adapter_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    original_names: tuple[tuple[str, str], ...] = (
        (r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(attention)\.to_([qkv])", r"\1.\2.qkv"),
        (r"((?:layers|noise_refiner|context_refiner)\.\d+)\.attention\.to_out\.0", r"\1.attention.out"),
    )
    comfyui_prefix: str | None = "diffusion_model."
    supports_edits = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        config, edge = self.network.config, DEFAULT_EDGE // self.pixels_per_latent
        self.latent_shape = (config.in_channels, edge, edge)
        self.size_multiple = self.pixels_per_latent * min(config.all_patch_size)
        self.largest_edge = self.size_multiple * min(config.axes_lens[1:])

    def load_texts(self, dtype: torch.dtype, device: torch.device | str) -> Any:
        return parts.load_text(self.folder, "text_encoder", dtype, device)

    def _pipeline(self, edits: bool) -> tuple[Any, Any]:
        with parts.quiet():  # importing them says what else could be installed
            from diffusers import ZImageOmniPipeline, ZImagePipeline

        tokenizer, encoder = self.loaded("texts")
        given = {"scheduler": None, "vae": None, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": None}
        pipeline = ZImageOmniPipeline(**given, siglip=None, siglip_processor=None) if edits else ZImagePipeline(**given)
        return pipeline, next(encoder.parameters()).device

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], edits: bool = False) -> Prompts:
        """embeds (B, L, D) padded, their lengths, segments of one part (T2I) or three (edits); pooled (B, 0)."""
        pipeline, device = self._pipeline(edits)
        how = {"device": device, "max_sequence_length": self.max_tokens} | (
            {"num_condition_images": 1} if edits else {}
        )
        with parts.quiet():
            encoded, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **how)
        split = [list(row) if edits else [row] for row in encoded]
        segments = torch.tensor([[len(part) for part in row] for row in split], dtype=torch.int64)
        embeds = torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in split], batch_first=True)
        return Prompts(embeds, embeds.new_zeros(len(split), 0), segments.sum(1), segments)

    def truncated(self, prompts: Sequence[str], edits: bool = False) -> dict[str, int]:
        """How many of the prompts lose their end: those of more than `max_tokens` tokens with the chat's frame."""
        tokenizer, _ = self.loaded("texts")
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        framed = [
            f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
            if edits
            else tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **how)
            for prompt in prompts
        ]
        with parts.quiet():
            return {"text_encoder": sum(len(ids) > self.max_tokens for ids in tokenizer(framed).input_ids)}

    def velocity(self, network: Any, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's inputs are cast to its own dtype; latents and times stay fp32 outside."""
        dtype = network.x_pad_token.dtype  # of the base: an adapter's weights are fp32 whatever it adapts
        noisy = list(x_t.to(dtype).unsqueeze(2).unbind(0))  # B of (C, 1, h, w): one frame
        time = (1000.0 - 1000.0 * t.to(x_t.device)) / 1000.0  # rounded as the library's pipeline rounds it
        captions = _captions(condition, dtype)
        if condition.source is None:
            answer = network(noisy, time, [parts_of[0] for parts_of in captions], return_dict=False)[0]
        else:
            clean = list(condition.source.to(dtype).unsqueeze(2).unbind(0))
            pairs = [list(pair) for pair in zip(clean, noisy, strict=True)]
            marks = {"siglip_feats": [None] * len(noisy), "image_noise_mask": [[0, 1]] * len(noisy)}
            answer = network(pairs, time, captions, **marks, return_dict=False)[0]
        return -torch.stack([part.float() for part in answer]).squeeze(2)


def _captions(condition: Condition, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Every row's own tokens, in its parts: B lists of (L_i, D)."""
    if condition.segments is None or condition.lengths is None:
        raise RuntimeError("Z-Image's prompts have lengths and segments; encode them with this backbone")
    rows = zip(condition.embeds.to(dtype), condition.lengths.tolist(), condition.segments.tolist(), strict=True)
    return [list(row[:length].split(segments)) for row, length, segments in rows]
