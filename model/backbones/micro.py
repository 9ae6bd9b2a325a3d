"""The micro world's backbone: the class of Stable Diffusion 3.5 (diffusers' SD3Transformer2DModel), tiny, on the
latents of a linear codec.

One latent token is one 8x8-pixel cell. The source image of an edit is concatenated on the channels, zeros for T2I (as
UltraEdit does on SD3). The network takes 1000 t and returns v, which is SD3's own convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from data.errors import UserError, UserErrors
from data.files import read_json, write_json
from model.backbones import parts
from model.backbones.sd3 import ORIGINAL_NAMES, SD3Backbone
from model.checkpoint import read_tensors, write_tensors
from model.fields.base import Condition, Prompts

MAX_WORDS = 16
WEIGHTS = "diffusion_pytorch_model.safetensors"
PAD, UNKNOWN = 0, 1  # rows of the embedding table


class LinearCodec(nn.Module):
    """Pixels to latents and back by principal components of 8x8x3 patches, partly whitened. Buffers: mean (192), basis
    (C, 192), scale (C)."""

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    def __init__(self, channels: int, patch: int = 8) -> None:
        super().__init__()
        self.patch = patch
        self.register_buffer("mean", torch.zeros(3 * patch * patch))
        self.register_buffer("basis", torch.zeros(channels, 3 * patch * patch))
        self.register_buffer("scale", torch.ones(channels))

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        b, c, h, w = images.shape
        p = self.patch
        cells = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(b, h // p, w // p, c * p * p)

    def fit(self, images: torch.Tensor) -> float:
        """In closed form, from images (B, 3, H, W) in [0, 1]; returns the share of pixel variance that is lost."""
        patches = self._patches(images).reshape(-1, self.mean.numel()).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        channels = len(self.scale)
        top, basis = values.flip(0)[:channels].clamp_min(1e-12), vectors.flip(1)[:, :channels].T
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * torch.where(largest < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
        scale = top.pow(-0.25)  # half way to white: the latents' deviations are the square roots of the components' own
        scale = scale / (top * scale.square()).mean().sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.scale.copy_(scale)
        return float(1.0 - top.sum() / values.sum())

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (((self._patches(images) - self.mean) @ self.basis.T) * self.scale).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        b, _, h, w = latents.shape
        p = self.patch
        patches = (latents.permute(0, 2, 3, 1) / self.scale) @ self.basis + self.mean
        return patches.reshape(b, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h * p, w * p).clamp(0.0, 1.0)


def words_of(prompt: str) -> list[str]:
    return prompt.lower().replace(",", " ").replace(".", " ").split()


class WordEncoder(nn.Module):
    """A fixed vocabulary, positions, and one convolution that reads each word among its neighbours ("red" beside
    "circle"), as a text encoder does.

    Two words become one token, which also makes the text stream half as long. Trained with the base, then frozen.
    """

    def __init__(self, vocabulary: Sequence[str], width: int) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.index = {word: row for row, word in enumerate(self.vocabulary, start=2)}
        self.words = nn.Embedding(len(self.vocabulary) + 2, width)
        self.positions = nn.Embedding(MAX_WORDS, width)
        self.window = nn.Conv1d(width, 2 * width, kernel_size=7, stride=2, padding=3)
        self.project = nn.Linear(2 * width, width)
        self.gates = nn.Embedding(MAX_WORDS, width)  # lets the pooled vector tell "a left of b" from "b left of a"

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserErrors with every word outside the vocabulary, and the known words spelled most like it."""
        unknown: dict[str, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            for word in dict.fromkeys(words_of(prompt)):
                if word not in self.index:
                    unknown.setdefault(word, []).append(prompt)
        faults = []
        for word, where in unknown.items():
            nearest = ", ".join(get_close_matches(word, self.vocabulary, n=3, cutoff=0.0))
            others = f" and {len(where) - 1} more" if len(where) > 1 else ""
            faults.append(f"{word!r} (prompt {where[0]!r}{others}): use one of the nearest known words: {nearest}")
        if faults:
            count = len(self.vocabulary)
            raise UserErrors(f"the micro text encoder knows {count} words, and these are not among them:", faults)

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, MAX_WORDS) word ids. Raises UserError for a longer prompt, whose end would be lost without a word."""
        ids = torch.full((len(prompts), MAX_WORDS), PAD, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = words_of(prompt)
            if len(words) > MAX_WORDS:
                counts = f"{len(words)} words, the micro backbone reads {MAX_WORDS}"
                raise UserError(f"prompt of {counts}: {prompt!r}; shorten it or let the curate stage reject it")
            ids[row, : len(words)] = torch.tensor([self.index.get(word, UNKNOWN) for word in words], dtype=torch.long)
        return ids

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        words = self.words(ids)  # (B, MAX_WORDS, D)
        placed = words + self.positions.weight
        pairs = placed.unflatten(1, (MAX_WORDS // 2, 2)).mean(2)  # (B, L, D), L = MAX_WORDS / 2
        tokens = pairs + self.project(nn.functional.gelu(self.window(placed.mT).mT))
        gated = (words * (1.0 + self.gates.weight) * (ids != PAD).unsqueeze(-1)).sum(1)
        return tokens, gated / MAX_WORDS**0.5 + tokens.mean(1)  # (B, L, D), (B, D)


def cell_codes(grid: int, width: int) -> torch.Tensor:
    """Position codes of the cells: (1, grid * grid, width), one block of the width for the row, one for the column.

    Sinusoids made for hundreds of positions barely tell three apart; with them the micro base did not learn "left of"
    in 3000 steps.
    """
    block = width // 2 // grid
    codes = torch.zeros(grid, grid, width)
    for index in range(grid):
        codes[index, :, index * block : (index + 1) * block] = 1.5
        codes[:, index, width // 2 + index * block : width // 2 + (index + 1) * block] = 1.5
    return codes.reshape(1, grid * grid, width)


@dataclass(frozen=True)
class MicroSize:
    """Of a new network: `grid` cells an edge, `width` split evenly over `heads`, latents of `channels`."""

    grid: int
    width: int
    layers: int
    heads: int
    channels: int


class MicroBackbone:
    """See `Backbone`."""

    name = "micro"
    supports_edits = True
    edit_prompts = False
    max_tokens = MAX_WORDS
    blocks: tuple[str, ...] = ("transformer_blocks",)
    modulations: tuple[str, ...] = ("norm1", "norm1_context")
    adapter_targets: tuple[str, ...] = (*SD3Backbone.adapter_targets, "net.0.proj", "net.2")
    original_names: tuple[tuple[str, str], ...] = ORIGINAL_NAMES
    comfyui_prefix: str | None = None
    no_pipeline = (
        "the micro world's text encoder and codec are the project's own, which neither diffusers' pipelines nor "
        "ComfyUI have"
    )

    def __init__(
        self, network: SD3Transformer2DModel, text: WordEncoder, codec: LinearCodec, scheduler: dict[str, Any]
    ) -> None:
        self.network, self.text, self.codec, self.scheduler = network, text, codec, scheduler
        self.latent_shape = (network.config.out_channels, network.config.sample_size, network.config.sample_size)
        self.pixels_per_latent = self.size_multiple = codec.patch
        self.largest_edge = network.config.pos_embed_max_size * network.config.patch_size * codec.patch

    @classmethod
    def new(cls, vocabulary: Sequence[str], size: MicroSize, shift: float, seed: int) -> MicroBackbone:
        """An untrained one; weights depend on `seed` alone."""
        width = size.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = SD3Transformer2DModel(
                sample_size=size.grid,
                patch_size=1,
                in_channels=2 * size.channels,
                out_channels=size.channels,
                num_layers=size.layers,
                attention_head_dim=width // size.heads,
                num_attention_heads=size.heads,
                joint_attention_dim=width,
                caption_projection_dim=width,
                pooled_projection_dim=width,
                pos_embed_max_size=size.grid,
                qk_norm="rms_norm",
            )
            network.pos_embed.pos_embed.copy_(cell_codes(size.grid, width))
            text = WordEncoder(vocabulary, width)
            for table, deviation in ((text.words, 1.0), (text.positions, 0.5), (text.gates, 0.5)):
                nn.init.normal_(table.weight, std=deviation)
        return cls(network, text, LinearCodec(size.channels), {"type": parts.SCHEDULER, "shift": shift})

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text(self.text.tokens(prompts))

    def encode_prompts(self, prompts: Sequence[str], edits: bool = False) -> Prompts:
        return Prompts(*self.encode_prompt(prompts))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.text.check(prompts)

    def truncated(self, prompts: Sequence[str], edits: bool = False) -> dict[str, int]:
        return {}  # a prompt too long is refused

    def release(self, *names: str) -> None:
        """Nothing: all parts together are smaller than one layer of the others."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.codec.encode(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.codec.decode(latents)

    def velocity(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        source = torch.zeros_like(x_t) if condition.source is None else condition.source
        return network(
            hidden_states=torch.cat([x_t, source], dim=1),
            timestep=1000.0 * t,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]

    def freeze(self) -> None:
        for module in (self.network, self.text, self.codec):
            module.requires_grad_(False).eval()

    def save(self, folder: Path, network: nn.Module | None = None) -> None:
        """A folder in diffusers' layout, with weights in half precision."""
        net: Any = self.network if network is None else network
        parts.save_transformer(folder / "transformer", net, _half(net))
        (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "text_encoder" / WEIGHTS, _half(self.text))
        (folder / "vae").mkdir(parents=True, exist_ok=True)
        # The codec stays in fp32: it is tiny, and rounding its basis would cost exact decoding.
        write_tensors(folder / "vae" / WEIGHTS, self.codec.state_dict())
        words = {"vocabulary": list(self.text.vocabulary), "width": self.text.words.embedding_dim}
        scheduler = {"_class_name": self.scheduler["type"], "shift": self.scheduler["shift"]}
        write_json(folder / "text_encoder" / "config.json", words)
        write_json(folder / "vae" / "config.json", {"channels": len(self.codec.scale), "patch": self.codec.patch})
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        write_json(folder / "model_index.json", {"_class_name": "MicroPipeline", "backbone": self.name})

    @classmethod
    def load(cls, folder: Path, **unused: Any) -> MicroBackbone:
        """Frozen, in fp32 on the CPU. Raises UserError for a missing, truncated or mismatched part."""
        config = {k: v for k, v in read_json(folder / "transformer" / "config.json").items() if not k.startswith("_")}
        words, vae = read_json(folder / "text_encoder" / "config.json"), read_json(folder / "vae" / "config.json")
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        network = SD3Transformer2DModel(**config)
        text, codec = WordEncoder(words["vocabulary"], words["width"]), LinearCodec(vae["channels"], vae["patch"])
        for part, module in (("transformer", network), ("text_encoder", text), ("vae", codec)):
            load_weights(module, folder / part / WEIGHTS)
        backbone = cls(network, text, codec, {"type": scheduler["_class_name"], "shift": scheduler["shift"]})
        backbone.freeze()
        return backbone


def _half(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.to(torch.float16) for key, value in module.state_dict().items()}


def load_weights(module: nn.Module, path: Path) -> None:
    """Every key must match, in name and shape, and every value be finite; in fp32. Raises UserError otherwise."""
    tensors, expected = read_tensors(path), module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    sizes = {key: (tuple(tensors[key].shape), tuple(expected[key].shape)) for key in expected.keys() & tensors.keys()}
    shapes = sorted(f"{key} is {given}, expected {wanted}" for key, (given, wanted) in sizes.items() if given != wanted)
    if missing or extra or shapes:
        shown = f"missing keys {missing[:3]}, extra keys {extra[:3]}, shapes {shapes[:3]}"
        raise UserError(f"{path}: does not fit this model ({shown}); take the weights that belong to it")
    module.load_state_dict({key: value.to(torch.float32) for key, value in tensors.items()})
