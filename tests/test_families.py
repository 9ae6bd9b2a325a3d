"""Property: with the same checkpoint, prompt and noise, our rollout is the library's own pipeline, step for step, for SD3 and Z-Image, T2I and edits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, ZImageOmniPipeline, ZImagePipeline
from PIL import Image

from model.backbones import family_of, load_backbone
from model.field import Condition, Guided, VelocityField, condition_of
from model.rollout import euler_grid
from model.teachers import NetworkField
from tests.tiny_families import CHANNELS, MAX_TOKENS, SHIFT, save_family

PROMPTS = ["a red circle", "a photo of two blue squares on a white background and a green cross over it", "make it night"]
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
        num_inference_steps=STEPS, sigmas=sigmas, height=2 * SIZE[0], width=2 * SIZE[1], latents=noise(), output_type="latent", max_sequence_length=MAX_TOKENS,
        callback_on_step_end=keep, **given,
    )  # fmt: skip
    return found


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) == STEPS
    for step in range(STEPS):
        torch.testing.assert_close(one[step], other[step], rtol=0, atol=1e-5, msg=lambda text, step=step: f"after step {step + 1}: {text}")
    assert float((one[-1] - noise()).abs().max()) > 0.1  # it went somewhere


@pytest.mark.parametrize("family", ["sd3", "zimage"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_our_rollout_is_the_pipelines(folders: dict[str, Path], family: str, scale: float) -> None:
    backbone, field, condition = ours(folders[family])
    assert family_of(folders[family]) == family == backbone.name
    # Z-Image's pipeline writes guidance as pos + s (pos - neg), so its s is ours less one.
    given = scale if family == "sd3" else scale - 1.0
    pipeline = LIBRARY[family].from_pretrained(folders[family], torch_dtype=torch.float32)
    assert_same(states(Guided(field, scale), condition, noise()), theirs(pipeline, prompt=list(PROMPTS), guidance_scale=given))


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
        assert_same(states(Guided(field, scale), condition, noise()), theirs(pipeline, prompt=list(PROMPTS), guidance_scale=scale - 1.0, **given))


def test_sd3s_edit_reads_the_source_beside_the_noise(folders: dict[str, Path]) -> None:
    """As InstructPix2Pix and UltraEdit call it: the transformer itself, on noise and source concatenated."""
    source = noise(seed=1)
    _, field, condition = ours(folders["sd3-edit"], source)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folders["sd3-edit"], torch_dtype=torch.float32)
    embeds, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS)
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
