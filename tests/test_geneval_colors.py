"""Defends: the colour classifier asks CLIP as the reference does: grey around the object, its box, three sentences a
colour, QuickGELU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.geneval.colors import (
    BACKGROUND,
    TEMPLATES,
    Classifier,
    check_activation,
    classify,
    crop_of,
    head,
    load_classifier,
    transform,
)
from benchmarks.geneval.detector import Instance
from benchmarks.geneval.prompts import COLORS
from data.errors import UserError
from data.randomness import numpy_generator
from tests.tiny_evaluator import tiny_clip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder)
    return load_classifier(str(folder), "cpu")


def disc(color: tuple[int, int, int], size: int = 60) -> tuple[np.ndarray, Instance]:
    y, x = np.mgrid[0:size, 0:size]
    mask = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 4) ** 2
    image = np.where(mask[..., None], np.array(color, np.uint8), np.uint8(17)).astype(np.uint8)
    rows, columns = np.nonzero(mask)
    return image, Instance("cup", 0.9, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), mask)


def test_the_object_is_cut_out_on_grey() -> None:
    image, instance = disc((255, 0, 0))
    crop = np.asarray(crop_of(image, instance))
    x0, y0, x1, y1 = (int(side) for side in instance.box)
    assert crop.shape == (y1 - y0, x1 - x0, 3)
    inside = instance.mask[y0:y1, x0:x1]
    assert (crop[inside] == (255, 0, 0)).all() and (crop[~inside] == BACKGROUND).all() and (~inside).any()
    empty = Instance("cup", 0.1, (0.0, 0.0, 0.0, 0.0), np.zeros((60, 60), bool))
    assert crop_of(image, empty).size == (1, 1)


def test_box_corners_are_rounded_half_to_even() -> None:
    image = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    whole = np.ones((10, 10), bool)
    assert crop_of(image, Instance("cup", 1.0, (0.5, 1.5, 6.5, 7.5), whole)).size == (6, 6)  # 0 to 6, 2 to 8


@pytest.mark.parametrize(("width", "height"), [(100, 40), (40, 100), (32, 32), (7, 5), (1, 1), (33, 64)])
def test_the_shorter_side_is_scaled_and_the_middle_is_kept(width: int, height: int) -> None:
    from PIL import Image

    pixels = numpy_generator(0, 0, 0, "crop").integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = transform(Image.fromarray(pixels), 32)
    assert found.shape == (3, 32, 32) and torch.isfinite(found).all()
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    levels = (found.permute(1, 2, 0) * std + mean) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3) and levels.min() > -0.01 and levels.max() < 255.01
    if (width, height) == (32, 32):
        assert (levels.round().numpy() == pixels).all()
    if (width, height) == (33, 64):  # the taller side loses both ends: rows 15 to 46 of 62
        scaled = np.asarray(Image.fromarray(pixels).resize((32, int(32 * 64 / 33)), Image.Resampling.BICUBIC))
        assert (levels.round().numpy() == scaled[15:47]).all()


def test_a_colour_s_direction_is_the_mean_of_three_sentences(classifier: Classifier) -> None:
    assert [template.format(color="red", name="cup") for template in TEMPLATES] == [
        "a photo of a red cup",
        "a photo of a red-colored cup",
        "a photo of a red object",
    ]
    vectors = []
    for template in TEMPLATES:
        tokens = classifier.tokenizer(
            [template.format(color="orange", name="cup")], return_tensors="pt"
        )  # alone and unpadded
        vector = classifier.network.get_text_features(**tokens).pooler_output[0].detach()
        vectors.append(vector / vector.norm())
    expected = torch.stack(vectors).mean(0)
    found = head(classifier, "cup")
    assert found.shape == (len(COLORS), 12)
    torch.testing.assert_close(found[COLORS.index("orange")], expected / expected.norm(), atol=1e-5, rtol=1e-4)
    assert head(classifier, "cup") is found and len(classifier.heads) == 1


def test_the_nearest_colour_wins_and_company_does_not_matter(classifier: Classifier) -> None:
    pairs = [disc(color) for color in ((255, 0, 0), (0, 0, 255), (250, 250, 250))]
    for image, instance in pairs:
        (name,) = classify(classifier, image, [instance])
        with torch.no_grad():
            features = classifier.network.get_image_features(
                pixel_values=transform(crop_of(image, instance), 32)[None]
            ).pooler_output[0]
        cosines = [
            torch.nn.functional.cosine_similarity(features, direction, dim=0).item()
            for direction in head(classifier, "cup")
        ]
        assert name == COLORS[int(np.argmax(cosines))]
        assert classify(classifier, image, [instance, instance]) == [name, name]
    assert classify(classifier, pairs[0][0], []) == []


def test_another_activation_is_refused(tmp_path: Path, classifier: Classifier) -> None:
    tiny_clip(tmp_path / "gelu", activation="gelu")
    with pytest.raises(UserError, match=r"must be quick_gelu.*text: gelu; vision: gelu"):
        load_classifier(str(tmp_path / "gelu"), "cpu")
    mlp = classifier.network.vision_model.encoder.layers[
        0
    ].mlp  # the configuration says one thing, the module does another
    before = mlp.activation_fn
    mlp.activation_fn = torch.nn.GELU()
    with pytest.raises(UserError, match="a layer computes another function"):
        check_activation(classifier.network)
    mlp.activation_fn = before
    check_activation(classifier.network)
