"""Property: the micro backbone keeps the conventions of every backbone, its codec inverts, and it comes back from disk
as it was or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from data.errors import UserError
from model.backbones.micro import MAX_WORDS, LinearCodec, MicroBackbone, load_weights
from model.pixels import as_images, as_pictures
from tests.tiny import CHANNELS, PROMPTS, SHIFT, WIDTH, WORLD, condition_of, draw, new_backbone, probe

PART = "diffusion_pytorch_model.safetensors"


def pictures(count: int, category: str = "two_object") -> np.ndarray:
    return np.stack([draw(category, row)[2] for row in range(count)])


def test_a_codec_with_all_components_inverts_exactly() -> None:
    images = as_images(pictures(60))
    codec = LinearCodec(192)
    assert codec.fit(images) == pytest.approx(0.0, abs=1e-9)
    rank = int((codec.scale < codec.scale.max()).sum())
    small = LinearCodec(rank)
    small.fit(images)
    np.testing.assert_array_equal(np.stack(as_pictures(small.decode(small.encode(images)))), pictures(60))


def test_the_codec_loses_what_it_says_and_less_with_more_components() -> None:
    images = as_images(pictures(40))
    lost = []
    for channels in (4, 8, 16):
        codec = LinearCodec(channels)
        lost.append(codec.fit(images))
        patches = codec._patches(images).reshape(-1, 192)
        latents = codec.encode(images)
        assert latents.shape == (40, channels, 3, 3)
        rebuilt = (latents.permute(0, 2, 3, 1) / codec.scale) @ codec.basis + codec.mean
        gap = (rebuilt.reshape(-1, 192) - patches).square().sum() / (patches - patches.mean(0)).square().sum()
        assert lost[-1] == pytest.approx(float(gap), abs=1e-4)
        torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(channels), rtol=0, atol=1e-5)
        assert float(latents.square().mean()) == pytest.approx(1.0, abs=1e-3)
    assert lost[0] > lost[1] > lost[2] >= 0


def test_decoded_images_stay_in_range() -> None:
    backbone = new_backbone()
    images = backbone.decode(20.0 * torch.randn(4, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (4, 3, 24, 24) and float(images.min()) >= 0.0 and float(images.max()) <= 1.0


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def forward(self, **given: Any) -> tuple[torch.Tensor]:
        self.given = given
        return (given["hidden_states"][:, :CHANNELS] * 2.0,)


@pytest.mark.parametrize("edits", [False, True])
def test_the_network_takes_1000_t_and_the_source_beside_the_noise(edits: bool) -> None:
    backbone, network = new_backbone(), Recorder()
    condition = condition_of(backbone, PROMPTS, edits)
    x_t, t = (
        torch.randn(4, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, 0.5, 0.25, 0.0]),
    )
    v = backbone.velocity(network, x_t, t, condition)
    torch.testing.assert_close(v, 2.0 * x_t, rtol=0, atol=0)  # v as the network gives it, no sign turned
    assert network.given["timestep"].tolist() == [1000.0, 500.0, 250.0, 0.0]
    assert torch.equal(network.given["hidden_states"][:, :CHANNELS], x_t)
    expected = condition.source if edits else torch.zeros_like(x_t)
    assert torch.equal(network.given["hidden_states"][:, CHANNELS:], expected)


def test_velocity_depends_on_prompt_source_and_time() -> None:
    backbone = new_backbone()
    assert isinstance(backbone.network, SD3Transformer2DModel)
    condition, x_t, t = (
        condition_of(backbone, PROMPTS, edits=True),
        torch.zeros(4, CHANNELS, 3, 3),
        torch.full((4,), 0.5),
    )
    with torch.no_grad():
        v = backbone.velocity(backbone.network, x_t, t, condition)
        assert v.shape == x_t.shape and v.dtype == torch.float32
        for other in (
            backbone.velocity(backbone.network, x_t, t, condition.dropped()),
            backbone.velocity(backbone.network, x_t, t, condition_of(backbone, PROMPTS)),
            backbone.velocity(backbone.network, x_t, t + 0.25, condition),
        ):
            assert not torch.allclose(v, other, atol=1e-4)


def test_text_tells_order_apart_and_the_empty_prompt_is_the_dropped_one() -> None:
    backbone = new_backbone()
    with torch.no_grad():
        embeds, pooled = backbone.encode_prompt(
            ["a red circle left of a blue square", "a blue square left of a red circle", ""]
        )
    assert len(embeds) == 3 and embeds.shape[2] == WIDTH and pooled.shape == (3, WIDTH)
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-3)
    dropped = condition_of(backbone, PROMPTS).dropped()
    torch.testing.assert_close(dropped.embeds[0], embeds[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dropped.pooled[0], pooled[2], rtol=1e-5, atol=1e-5)


def test_a_prompt_that_would_be_cut_is_refused() -> None:
    backbone = new_backbone()
    backbone.encode_prompt([" ".join(["red"] * MAX_WORDS)])
    with pytest.raises(UserError, match=f"{MAX_WORDS + 1} words"):
        backbone.encode_prompt([" ".join(["red"] * (MAX_WORDS + 1))])


def test_weights_follow_from_the_seed_and_the_global_generator_stays() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = new_backbone(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    two, other = new_backbone(seed=1), new_backbone(seed=2)
    weights = two.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.network.state_dict().items())
    assert not torch.equal(other.network.state_dict()["proj_out.weight"], weights["proj_out.weight"])


def test_saved_in_half_precision_and_loaded_it_is_the_rounded_network(tmp_path: Path) -> None:
    backbone = new_backbone()
    backbone.save(tmp_path)
    loaded = MicroBackbone.load(tmp_path)
    assert loaded.latent_shape == backbone.latent_shape == (CHANNELS, 3, 3) and loaded.scheduler == {
        "type": "FlowMatchEulerDiscreteScheduler",
        "shift": SHIFT,
    }
    assert loaded.text.vocabulary == WORLD.vocabulary
    for part, module, other in (
        ("network", backbone.network, loaded.network),
        ("text", backbone.text, loaded.text),
        ("codec", backbone.codec, loaded.codec),
    ):
        for name, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], value if part == "codec" else value.half().float())
    assert not any(
        value.requires_grad for module in (loaded.network, loaded.text, loaded.codec) for value in module.parameters()
    )
    loaded.save(tmp_path / "again")
    again = MicroBackbone.load(tmp_path / "again")

    def field(of: MicroBackbone) -> Any:
        return lambda x, t, c: of.velocity(of.network, x, t, c)

    assert torch.equal(probe(field(again), again), probe(field(loaded), loaded))


def test_diffusers_reads_the_saved_network(tmp_path: Path) -> None:
    backbone = new_backbone()
    backbone.save(tmp_path)
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32)
    ours = MicroBackbone.load(tmp_path).network.state_dict()
    assert all(torch.equal(value.float(), ours[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_damaged_part_is_refused(tmp_path: Path, part: str) -> None:
    new_backbone().save(tmp_path)
    file = tmp_path / part / PART
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not tensors at all"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{part}.*not a whole safetensors file"):
            MicroBackbone.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"{part}.*no such file"):
        MicroBackbone.load(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    new_backbone().save(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    with pytest.raises(UserError, match=r"does not fit.*extra keys"):
        MicroBackbone.load(tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        load_weights(LinearCodec(CHANNELS + 1), tmp_path / "vae" / PART)
