"""GenEval's colour classifier: CLIP ViT-L/14 asked, object by object, which of ten colours it has.

Facts follow djghosh13/geneval (evaluation/evaluate_images.py), clip-benchmark (zero-shot head) and open_clip (image
transform). OpenAI's weights were trained with QuickGELU; with the plain GELU they load without an error and answer
otherwise, so the activation is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.geneval.detector import Instance, check_loaded, full_precision, model_folder
from benchmarks.geneval.prompts import COLORS
from data.errors import UserError
from data.files import weights_digest

TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)  # the article is always "a"
BACKGROUND = (0x99, 0x99, 0x99)  # painted over everything outside the object's mask
SIZE = 224  # px, of the network's input
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOKENS = 77
ACTIVATION = "quick_gelu"


@dataclass(frozen=True)
class Classifier:
    """A loaded CLIP. `heads` caches, by class name, the ten colours' directions (10, D)."""

    network: Any
    tokenizer: Any
    device: str
    size: int  # px
    heads: dict[str, torch.Tensor] = field(default_factory=dict)


def check_activation(network: Any) -> None:
    """Raises UserError unless both towers of a CLIP compute QuickGELU, by their configuration and by the modules that
    were built.
    """
    towers = {"text": network.config.text_config.hidden_act, "vision": network.config.vision_config.hidden_act}
    wrong = [f"{tower}: {name}" for tower, name in towers.items() if name != ACTIVATION]
    x = torch.linspace(-3, 3, 7)
    built = [module.activation_fn for name, module in network.named_modules() if name.endswith(".mlp")]
    wrong += (
        []
        if built and all(torch.allclose(function(x), x * torch.sigmoid(1.702 * x), atol=1e-5) for function in built)
        else ["a layer computes another function"]
    )
    if wrong:
        raise UserError(
            f"colour classifier: the activation must be {ACTIVATION}, as in OpenAI's training ({'; '.join(wrong)}); use openai/clip-vit-large-patch14"
        )


def classifier_identity(source: str) -> dict[str, Any]:
    """What a result made with this classifier names. Raises UserError as `model_folder` does."""
    return {
        "architecture": "clip",
        "weights": weights_digest(model_folder(source, "colour classifier")),
        "activation": ACTIVATION,
        "background": "#999999",
        "crop": True,
    }


def load_classifier(source: str, device: str) -> Classifier:
    """Loads CLIP in float32. Raises UserError for another architecture or activation, incomplete or pickled weights."""
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    folder = model_folder(source, "colour classifier")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "clip":
        raise UserError(
            f"colour classifier {folder}: model_type = {config.model_type!r}; a CLIP is needed, e.g. openai/clip-vit-large-patch14"
        )
    network, info = CLIPModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    check_loaded(f"colour classifier {folder}", info)
    check_activation(network)
    return Classifier(
        network.to(device).eval(), AutoTokenizer.from_pretrained(folder), device, int(config.vision_config.image_size)
    )


def crop_of(image: np.ndarray, instance: Instance) -> Image.Image:
    """The object on flat grey, cut to its box. `image` (H, W, 3) uint8. An empty box gives the whole grey picture's
    first pixel.
    """
    painted = Image.fromarray(np.where(instance.mask[..., None], image, np.array(BACKGROUND, dtype=np.uint8)))
    x0, y0, x1, y1 = (round(coordinate) for coordinate in instance.box)
    return painted.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))


def transform(crop: Image.Image, size: int = SIZE) -> torch.Tensor:
    """(3, size, size) float32: the shorter side to `size` (bicubic), the middle cut out (elongated objects lose their
    ends), normalised.
    """
    width, height = crop.size
    scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    crop = crop.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0)
    pixels = (
        torch.from_numpy(np.array(crop.crop((left, top, left + size, top + size)))).permute(2, 0, 1).float() / 255.0
    )
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _features(output: Any) -> torch.Tensor:
    """(N, D) of unit length."""
    vectors = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


@torch.no_grad()
def head(classifier: Classifier, name: str) -> torch.Tensor:
    """The colours' directions for a class, (10, D): a colour is the normalised mean of its three sentences' normalised
    embeddings. Made once a class.
    """
    if name not in classifier.heads:
        sentences = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        tokens = classifier.tokenizer(
            sentences, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).to(classifier.device)
        with full_precision():
            vectors = _features(
                classifier.network.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
            )
        classifier.heads[name] = torch.nn.functional.normalize(
            vectors.reshape(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1
        )
    return classifier.heads[name]


@torch.no_grad()
def classify(classifier: Classifier, image: np.ndarray, instances: Sequence[Instance]) -> list[str]:
    """The most likely of COLORS for each of an image's instances, all of one class or of several. `image` (H, W, 3)
    uint8.
    """
    if not instances:
        return []
    pixels = torch.stack([transform(crop_of(image, instance), classifier.size) for instance in instances]).to(
        classifier.device
    )
    with full_precision():
        vectors = _features(classifier.network.get_image_features(pixel_values=pixels))  # (N, D)
    logits = [
        100.0 * vector @ head(classifier, instance.class_name).T
        for vector, instance in zip(vectors, instances, strict=True)
    ]
    return [COLORS[int(values.argmax())] for values in logits]
