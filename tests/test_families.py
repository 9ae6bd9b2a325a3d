"""Property: with the same checkpoint, prompt and noise, our rollout is the library's own pipeline, step for step, for
SD3 and Z-Image, T2I and edits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, ZImageOmniPipeline, ZImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from data.errors import UserError
from model.backbones import family_of, load_backbone
from model.backbones.sd3 import widen_for_edits
from model.backbones.sizes import SIZES, random_backbone
from model.fields.base import Condition, VelocityField, condition_of
from model.fields.guided import Guided
from model.networks.network import NetworkField
from model.rollout import euler_grid
from tests.tiny_families import CHANNELS, MAX_TOKENS, SHIFT, edit_config, save_family

PROMPTS = [
    "a red circle",
    "a photo of two blue squares on a white background and a green cross over it",
    "make it night",
]
STEPS = 6
SIZE = (16, 12)  # latent, not square
LIBRARY = {"sd3": StableDiffusion3Pipeline, "zimage": ZImagePipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        "sd3": save_family(root / "sd3", "sd3", wide=False),
        "sd3-edit": save_family(root / "sd3-edit", "sd3"),
        "zimage": save_family(root / "zimage", "zimage"),
    }


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(len(PROMPTS), CHANNELS, *SIZE, generator=torch.Generator().manual_seed(seed))


def states(field: VelocityField, condition: Condition, start: torch.Tensor) -> list[torch.Tensor]:
    """The Euler rollout's states after every step."""
    x, found, grid = start.clone(), [], euler_grid(STEPS, SHIFT)
    with torch.no_grad():
        for now, after in pairwise(grid):
            x = x + (after - now) * field(x, now.expand(len(x)), condition)
            found.append(x)
    return found


def ours(folder: Path, source: torch.Tensor | None = None) -> tuple[Any, NetworkField, Condition]:
    backbone = load_backbone(folder, max_tokens=MAX_TOKENS)
    edits = source is not None
    condition = condition_of(backbone.encode_prompts(PROMPTS, edits), backbone.encode_prompts([""], edits), source)
    return backbone, NetworkField(backbone, backbone.network), condition


def theirs(pipeline: Any, **given: Any) -> list[torch.Tensor]:
    """The latents that the library's pipeline has after every step."""
    found: list[torch.Tensor] = []
    pipeline.set_progress_bar_config(disable=True)

    def keep(_: Any, step: int, time: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found.append(values["latents"].clone())
        return values

    sigmas = torch.linspace(1.0, 1.0 / STEPS, STEPS).tolist()
    pipeline(
        num_inference_steps=STEPS,
        sigmas=sigmas,
        height=2 * SIZE[0],
        width=2 * SIZE[1],
        latents=noise(),
        output_type="latent",
        max_sequence_length=MAX_TOKENS,
        callback_on_step_end=keep,
        **given,
    )
    return found


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) == STEPS
    for step in range(STEPS):
        torch.testing.assert_close(
            one[step], other[step], rtol=0, atol=1e-5, msg=lambda text, step=step: f"after step {step + 1}: {text}"
        )
    assert float((one[-1] - noise()).abs().max()) > 0.1  # it went somewhere


@pytest.mark.parametrize("family", ["sd3", "zimage"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_our_rollout_is_the_pipelines(folders: dict[str, Path], family: str, scale: float) -> None:
    backbone, field, condition = ours(folders[family])
    assert family_of(folders[family]) == family == backbone.name
    # Z-Image's pipeline writes guidance as pos + s (pos - neg), so its s is ours less one.
    given = scale if family == "sd3" else scale - 1.0
    pipeline = LIBRARY[family].from_pretrained(folders[family], torch_dtype=torch.float32)
    assert_same(
        states(Guided(field, scale), condition, noise()), theirs(pipeline, prompt=list(PROMPTS), guidance_scale=given)
    )


def test_z_images_edit_is_the_multi_image_pipelines(folders: dict[str, Path]) -> None:
    source = noise(seed=1)

    class WithoutSiglip(ZImageOmniPipeline):
        """The pipeline with our latents for its pictures, and without SigLIP features."""

        def prepare_image_latents(self, **_: Any) -> list[list[torch.Tensor]]:
            return [[row.unsqueeze(1)] for row in source]

        def prepare_siglip_embeds(self, **_: Any) -> list[list[torch.Tensor]]:
            return [[] for _ in source]

    parts = ZImagePipeline.from_pretrained(folders["zimage"], torch_dtype=torch.float32).components
    pipeline = WithoutSiglip(**parts, siglip=None, siglip_processor=None)
    pipeline.image_processor.check_image_input = lambda image: None  # it wants 64 pixels; ours are stood in for anyway
    given = {"image": Image.new("RGB", (2 * SIZE[1], 2 * SIZE[0]))}
    _, field, condition = ours(folders["zimage"], source)
    for scale in (1.0, 3.0):
        assert_same(
            states(Guided(field, scale), condition, noise()),
            theirs(pipeline, prompt=list(PROMPTS), guidance_scale=scale - 1.0, **given),
        )


def test_sd3s_edit_reads_the_source_beside_the_noise(folders: dict[str, Path]) -> None:
    """As InstructPix2Pix and UltraEdit call it: the transformer itself, on noise and source concatenated."""
    source = noise(seed=1)
    _, field, condition = ours(folders["sd3-edit"], source)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folders["sd3-edit"], torch_dtype=torch.float32)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
    )
    pipeline.scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / STEPS, STEPS).tolist())
    x, found = noise(), []
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            v = pipeline.transformer(torch.cat([x, source], 1), embeds, pooled, t.expand(len(x)), return_dict=False)[0]
            x = pipeline.scheduler.step(v, t, x, return_dict=False)[0]
            found.append(x)
    assert_same(states(field, condition, noise()), found)


@pytest.mark.parametrize(("family", "edits"), [("sd3", False), ("sd3-edit", True), ("zimage", False), ("zimage", True)])
def test_a_batch_of_unequal_prompts_is_its_rows(folders: dict[str, Path], family: str, edits: bool) -> None:
    _, field, condition = ours(folders[family], noise(seed=1) if edits else None)
    x, t = noise(), torch.tensor([1.0, 0.6, 0.1])
    with torch.no_grad():
        together = field(x, t, condition)
        for row in range(len(PROMPTS)):
            one = torch.tensor([row])
            torch.testing.assert_close(field(x[one], t[one], condition[one]), together[one], rtol=1e-5, atol=1e-5)


# --- refused ----------------------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    return path, load_file(path)


def lose_a_key(folder: Path) -> None:
    path, tensors = tensors_of(folder)
    save_file(
        {name: value for name, value in tensors.items() if "proj_out" not in name and "x_pad_token" not in name}, path
    )


def add_a_key(folder: Path) -> None:
    path, tensors = tensors_of(folder)
    save_file({**tensors, "stowaway": torch.zeros(2)}, path)


def put_nan(folder: Path) -> None:
    path, tensors = tensors_of(folder)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


def reshape(folder: Path) -> None:
    path, tensors = tensors_of(folder)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.cat([tensors[name], tensors[name]])}, path)


def cut_short(folder: Path) -> None:
    path, _ = tensors_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def pickle_it(folder: Path) -> None:
    path, _ = tensors_of(folder)
    path.unlink()
    path.with_suffix(".bin").write_bytes(b"\x80\x04.")


def hide_a_shard(folder: Path) -> None:
    path, _ = tensors_of(folder)
    path.rename(path.with_name("part-1.safetensors"))
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))


def lead_outside(folder: Path) -> None:
    path, _ = tensors_of(folder)
    path.with_name(f"{path.name}.index.json").write_text(
        json.dumps({"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}})
    )


def change(part: str, file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder / part / file, **values)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing key": (lose_a_key, "do not fit.*missing key"),
    "extra key": (add_a_key, "do not fit.*extra key 'stowaway'"),
    "shape": (reshape, "do not fit.*expected"),
    "NaN": (put_nan, "not finite"),
    "truncated": (cut_short, "not a whole safetensors file"),
    "pickle": (pickle_it, "a pickle file"),
    "shard": (hide_a_shard, "part-2.safetensors: no such file"),
    "index": (lead_outside, "beside the index"),
    "scheduler": (
        change("scheduler", "scheduler_config.json", _class_name="DDIMScheduler"),
        "_class_name = 'DDIMScheduler'",
    ),
    "dynamic shift": (
        change("scheduler", "scheduler_config.json", use_dynamic_shifting=True),
        "use_dynamic_shifting = True is not followed",
    ),
    "shift": (change("scheduler", "scheduler_config.json", shift=0), "shift = 0"),
    "latent channels": (change("vae", "config.json", latent_channels=CHANNELS + 1), "latent channels"),
    "another network": (
        change("transformer", "config.json", _class_name="FluxTransformer2DModel"),
        "another family's network",
    ),
    "another pipeline": (change("", "model_index.json", _class_name="FluxPipeline"), "choose a checkpoint of one of"),
}


@pytest.mark.parametrize("family", ["sd3-edit", "zimage"])
def test_a_checkpoint_that_cannot_be_meant_is_refused_in_one_message(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """Nothing is built on it: the error comes from loading."""
    for name, (damage, message) in FAULTS.items():
        folder = tmp_path / name
        for part in ("transformer", "vae", "scheduler"):
            shutil.copytree(folders[family] / part, folder / part)
        shutil.copy(folders[family] / "model_index.json", folder)
        load_backbone(folder, need=("transformer",))
        damage(folder)
        with pytest.raises(UserError, match=f"(?s){message}") as caught:
            load_backbone(folder, need=("transformer",))
        assert len(str(caught.value).splitlines()) == 1, name


def test_a_widened_network_answers_as_before_and_reads_a_source(folders: dict[str, Path]) -> None:
    narrow, wide = (
        load_backbone(folders["sd3"], need=("transformer",)),
        load_backbone(folders["sd3-edit"], need=("transformer",)),
    )
    network, source = widen_for_edits(narrow.network), noise(seed=1)
    condition = ours(folders["sd3"])[2]
    x, t = noise(), torch.tensor([1.0, 0.6, 0.1])
    with torch.no_grad():
        before = narrow.velocity(narrow.network, x, t, condition)
        for given in (condition, replace(condition, source=source)):
            torch.testing.assert_close(wide.velocity(network, x, t, given), before, rtol=0, atol=1e-6)
        network.pos_embed.proj.weight[:, CHANNELS:] = network.pos_embed.proj.weight[:, :CHANNELS]
        assert not torch.allclose(wide.velocity(network, x, t, replace(condition, source=source)), before, atol=1e-3)
    with pytest.raises(UserError, match="reads no source image"):
        narrow.velocity(narrow.network, x, t, replace(condition, source=source))
    with pytest.raises(UserError, match="already differs"):
        widen_for_edits(network)


@pytest.mark.parametrize("family", ["sd3-edit", "zimage"])
def test_half_precision_networks_take_and_give_fp32(folders: dict[str, Path], family: str) -> None:
    backbone = load_backbone(folders[family], dtype="bfloat16", max_tokens=MAX_TOKENS)
    assert {value.dtype for value in backbone.network.parameters()} == {torch.bfloat16}
    condition = condition_of(backbone.encode_prompts(PROMPTS), backbone.encode_prompts([""]))
    _, exact, _ = ours(folders[family])
    x, t = noise(), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        v = backbone.velocity(backbone.network, x, t, condition)
        gap = (v - exact(x, t, ours(folders[family])[2])).square().mean() / v.square().mean()
    assert v.dtype == torch.float32 and float(gap) < 0.05
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_image(images)
    assert (
        latents.dtype == torch.float32
        and latents.shape == (2, CHANNELS, 8, 12)
        and backbone.decode(latents).shape == images.shape
    )
    vae = backbone.vae
    raw = vae.encode(2 * images - 1).latent_dist.mode()
    torch.testing.assert_close(latents, (raw - vae.config.shift_factor) * vae.config.scaling_factor)
    torch.testing.assert_close(
        backbone.decode(latents), (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5
    )


def test_the_published_sizes_are_the_published_sizes() -> None:
    """On the meta device: shapes alone. Parameters as method and model cards give them, in billions."""
    for name, billions in (("sd35-m", 2.243), ("sd35-l", 8.057), ("zimage", 6.155)):
        backbone = random_backbone(SIZES[name], device="meta", edits=True)
        assert sum(parameter.numel() for parameter in backbone.network.parameters()) / 1e9 == pytest.approx(
            billions, abs=1e-2
        )
        assert backbone.supports_edits and backbone.latent_shape == (16, 128, 128)
        assert random_backbone(SIZES[name], device="meta", resolution=512).latent_shape == (16, 64, 64)
