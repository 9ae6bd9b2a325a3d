"""GenEval's colour classifier: CLIP ViT-L/14 tells which of ten colours an object has.

Facts follow djghosh13/geneval (evaluation/evaluate_images.py), clip-benchmark (zero-shot head) and open_clip (image
transform). OpenAI's weights were trained with QuickGELU; with the plain GELU they load without an error and answer
otherwise, so the activation is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from benchmarks.geneval.detector import Instance, full_precision, load_network, model_folder
from benchmarks.geneval.prompts import COLORS
from benchmarks.geneval.rules import CLASSIFIER
from data.errors import UserError
from data.files import weights_digest

# the article is always "a"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)  # painted over everything outside the object's mask
SIZE = 224  # px, of the network's input
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOKENS = 77
ACTIVATION = "quick_gelu"
WHAT = "colour classifier"


@dataclass(frozen=True)
class Classifier:
    """A loaded CLIP. `heads` caches, by class name, the ten colours' directions (10, D)."""

    network: Any
    tokenizer: Any
    heads: dict[str, torch.Tensor] = field(default_factory=dict)


def check_activation(network: Any) -> None:
    """Raises UserError unless both towers of a CLIP compute QuickGELU, by their configuration and by their modules."""
    towers = {"text": network.config.text_config.hidden_act, "vision": network.config.vision_config.hidden_act}
    wrong = [f"{tower}: {name}" for tower, name in towers.items() if name != ACTIVATION]
    x = torch.linspace(-3, 3, 7)
    built = [module.activation_fn for name, module in network.named_modules() if name.endswith(".mlp")]
    if not built or not all(torch.allclose(function(x), x * torch.sigmoid(1.702 * x), atol=1e-5) for function in built):
        wrong.append("a layer computes another function")
    if wrong:
        fault = f"the activation must be {ACTIVATION}, as in OpenAI's training ({'; '.join(wrong)})"
        raise UserError(f"colour classifier: {fault}; use {CLASSIFIER}")


def classifier_identity(source: str) -> dict[str, Any]:
    """What a result made with this classifier names. Raises UserError as `model_folder` does."""
    weights = weights_digest(model_folder(source, WHAT))
    painted = {"background": "#" + bytes(BACKGROUND).hex(), "crop": True}
    return {"architecture": "clip", "weights": weights, "activation": ACTIVATION, **painted}


@lru_cache(maxsize=1)
def load_classifier(source: str, device: str) -> Classifier:
    """Loads CLIP. Raises UserError as `load_network` and `check_activation` do."""
    from transformers import AutoTokenizer, CLIPModel

    folder, network = load_network(WHAT, source, "clip", CLIPModel, CLASSIFIER)
    check_activation(network)
    return Classifier(network.to(device), AutoTokenizer.from_pretrained(folder))


def crop_of(image: np.ndarray, instance: Instance) -> Image.Image:
    """The object on flat grey, cut to its box. `image` (H, W, 3) uint8. An empty box gives the grey picture's first
    pixel."""
    painted = Image.fromarray(np.where(instance.mask[..., None], image, np.array(BACKGROUND, dtype=np.uint8)))
    x0, y0, x1, y1 = (round(coordinate) for coordinate in instance.box)
    return painted.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))


def transform(crop: Image.Image, size: int = SIZE) -> torch.Tensor:
    """(3, size, size) float32: the shorter side to `size` (bicubic), the middle cut out (elongated objects lose their
    ends), normalised."""
    width, height = crop.size
    scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    crop = crop.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0)
    pixels = np.array(crop.crop((left, top, left + size, top + size)))
    levels = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255.0
    return (levels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _features(output: Any) -> torch.Tensor:
    """(N, D) of unit length."""
    return normalize(output.pooler_output.float(), dim=-1)


@torch.no_grad()
def head(classifier: Classifier, name: str) -> torch.Tensor:
    """The colours' directions for a class, (10, D), made once a class: a colour is the normalised mean of its three
    sentences' normalised embeddings."""
    if name not in classifier.heads:
        sentences = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens = classifier.tokenizer(sentences, **options).to(classifier.network.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with full_precision():
            vectors = _features(classifier.network.get_text_features(input_ids=ids, attention_mask=mask))
        means = vectors.reshape(len(COLORS), len(TEMPLATES), -1).mean(1)
        classifier.heads[name] = normalize(means, dim=-1)
    return classifier.heads[name]


@torch.no_grad()
def classify(classifier: Classifier, image: np.ndarray, instances: Sequence[Instance]) -> list[str]:
    """The most likely of COLORS for each of an image's instances, of any classes. `image` (H, W, 3) uint8."""
    if not instances:
        return []
    size = int(classifier.network.config.vision_config.image_size)
    crops = [transform(crop_of(image, instance), size) for instance in instances]
    pixels = torch.stack(crops).to(classifier.network.device)
    with full_precision():
        vectors = _features(classifier.network.get_image_features(pixel_values=pixels))  # (N, D)
    pairs = zip(vectors, instances, strict=True)
    logits = [100.0 * vector @ head(classifier, instance.class_name).T for vector, instance in pairs]
    return [COLORS[int(values.argmax())] for values in logits]
