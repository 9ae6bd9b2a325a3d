"""Z-Image (diffusers' ZImageTransformer2DModel): T2I by its ordinary call, edits by its multi-image call, where the
source is clean and the target noisy.

The network takes 1 - t and returns -v. It takes lists: prompts keep their own lengths. An edit's prompt is cut into
three parts, as ZImageOmniPipeline writes them, with the source after the first and the target after the second; SigLIP
features are not used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from model.backbones import parts
from model.fields.base import Condition, Prompts

DEFAULT_EDGE = 1024  # px


class ZImageBackbone:
    """See `Backbone`. Made by `load`."""

    name = "zimage"
    edit_prompts = True
    blocks: tuple[str, ...] = ("noise_refiner", "context_refiner", "siglip_refiner", "layers")
    modulations: tuple[str, ...] = ("adaLN_modulation",)
    adapter_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    supports_edits = True

    def __init__(
        self, folder: Path, network: Any, scheduler: dict[str, Any], pixels_per_latent: int, max_tokens: int
    ) -> None:
        self.folder, self.network, self.scheduler, self.max_tokens = folder, network, scheduler, max_tokens
        self.pixels_per_latent = pixels_per_latent
        edge = DEFAULT_EDGE // pixels_per_latent
        self.latent_shape = (network.config.in_channels, edge, edge)
        self.size_multiple = pixels_per_latent * min(network.config.all_patch_size)
        self.largest_edge = self.size_multiple * min(network.config.axes_lens[1:])
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
    ) -> ZImageBackbone:
        """A frozen base from a pipeline folder; `need` names the parts that are read ("transformer", "text", "vae").

        Raises UserError for a part that is missing, damaged or of another family, for latents of VAE and network that
        differ, and for a scheduler not followed.
        """
        network = parts.load_network(
            ZImageTransformer2DModel, folder / "transformer", dtype, device, weights="transformer" in need
        )
        backbone = cls(folder, network, parts.read_scheduler(folder), parts.pixels_per_latent(folder), max_tokens)
        backbone.latent_shape = parts.check_latents(
            folder, backbone.latent_shape, resolution, backbone.pixels_per_latent
        )
        if "vae" in need:
            backbone.vae = parts.load_vae(folder, device)
        if "text" in need:
            backbone._texts = parts.load_text(folder, "text_encoder", dtype, device)
        return backbone

    def release(self, *names: str) -> None:
        """Frees "text" or "vae": the text encoder is needed for prompts alone."""
        if "text" in names:
            self._texts = None
        if "vae" in names:
            self.vae = None

    def _pipeline(self, edits: bool) -> tuple[Any, Any]:
        with parts.quiet():  # importing them says what else could be installed
            from diffusers import ZImageOmniPipeline, ZImagePipeline

        tokenizer, encoder = _loaded(self._texts, "text encoder")
        given = {"scheduler": None, "vae": None, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": None}
        return ZImageOmniPipeline(**given, siglip=None, siglip_processor=None) if edits else ZImagePipeline(
            **given
        ), next(encoder.parameters()).device

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], edits: bool = False) -> Prompts:
        """embeds (B, L, D) padded to the longest, with lengths and segments: one part for T2I, three for edits. pooled
        is empty (B, 0).
        """
        pipeline, device = self._pipeline(edits)
        images = {"num_condition_images": 1} if edits else {}
        with parts.quiet():
            found, _ = pipeline.encode_prompt(
                list(prompts),
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_tokens,
                **images,
            )
        split = [list(row) if edits else [row] for row in found]
        segments = torch.tensor([[len(part) for part in row] for row in split], dtype=torch.int64)
        embeds = torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in split], batch_first=True)
        return Prompts(embeds, embeds.new_zeros(len(split), 0), segments.sum(1), segments)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Nothing: the tokenizers read every word."""

    def truncated(self, prompts: Sequence[str], edits: bool = False) -> dict[str, int]:
        """How many of the prompts lose their end: those of more than `max_tokens` tokens with the chat's frame."""
        tokenizer, _ = _loaded(self._texts, "text encoder")
        if edits:
            framed = [
                f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>" for prompt in prompts
            ]
        else:
            framed = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=True,
                )
                for prompt in prompts
            ]
        with parts.quiet():
            return {"text_encoder": sum(len(ids) > self.max_tokens for ids in tokenizer(framed).input_ids)}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return parts.encode_image(_loaded(self.vae, "VAE"), images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return parts.decode(_loaded(self.vae, "VAE"), latents)

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
            answer = network(
                [list(pair) for pair in zip(clean, noisy, strict=True)],
                time,
                captions,
                siglip_feats=[None] * len(noisy),
                image_noise_mask=[[0, 1]] * len(noisy),
                return_dict=False,
            )[0]
        return -torch.stack([part.float() for part in answer]).squeeze(2)

    def save(self, folder: Path, network: nn.Module | None = None) -> None:
        """A pipeline folder that diffusers loads: this base, or `network` in its transformer's place; the other parts
        are copied from where it came from.
        """
        net: Any = self.network if network is None else network
        parts.save_pipeline(folder, self.folder, net, parts.plain_state(net))


def _captions(condition: Condition, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Every row's own tokens, in its parts: B lists of (L_i, D)."""
    if condition.segments is None or condition.lengths is None:
        raise RuntimeError("Z-Image's prompts have lengths and segments; encode them with this backbone")
    rows = zip(condition.embeds.to(dtype), condition.lengths.tolist(), condition.segments.tolist(), strict=True)
    return [list(row[:length].split(segments)) for row, length, segments in rows]


def _loaded(part: Any, what: str) -> Any:
    if part is None:
        raise RuntimeError(f"the {what} was not loaded; name it in `need`")
    return part
