"""Defends: the detector's two ends are the reference's (sizes, padding, scores, boxes), by slow independent arithmetic;
the real classes run through.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.geneval.detector import (
    LOWEST,
    PAIRS,
    check_labels,
    detect,
    encode_mask,
    load_detector,
    model_folder,
    postprocess,
    preprocess,
    resized,
    self_test,
)
from benchmarks.geneval.prompts import CLASSES
from data.errors import UserError
from data.randomness import numpy_generator
from tests.tiny_evaluator import COCO, tiny_mask2former

# --- slow arithmetic, one number at a time ----------------------------------------------------------------------------


def slow_resize(plane: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear with half-pixel centres, edges repeated."""
    rows, columns = len(plane), len(plane[0])

    def weights(place: int, size: int, old: int) -> tuple[int, int, float]:
        at = max((place + 0.5) * old / size - 0.5, 0.0)
        low = min(math.floor(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    result = []
    for y in range(height):
        y0, y1, fy = weights(y, height, rows)
        line = []
        for x in range(width):
            x0, x1, fx = weights(x, width, columns)
            top = plane[y0][x0] * (1 - fx) + plane[y0][x1] * fx
            bottom = plane[y1][x0] * (1 - fx) + plane[y1][x1] * fx
            line.append(top * (1 - fy) + bottom * fy)
        result.append(line)
    return result


def slow_instances(class_logits, mask_logits, padded, inside, size, lowest):
    pairs = []
    for query, row in enumerate(class_logits):
        total = sum(math.exp(value) for value in row)
        pairs += [(math.exp(value) / total, query, label) for label, value in enumerate(row[:-1])]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    found = []
    for probability, query, label in pairs[:PAIRS]:
        whole = slow_resize(mask_logits[query], *padded)
        picture = slow_resize([line[: inside[1]] for line in whole[: inside[0]]], *size)
        inner = [(x, y, value) for y, line in enumerate(picture) for x, value in enumerate(line) if value > 0]
        confidence = sum(1 / (1 + math.exp(-value)) for _, _, value in inner) / (len(inner) + 1e-6)
        xs, ys = [x for x, _, _ in inner], [y for _, y, _ in inner]
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1) if inner else (0, 0, 0, 0)
        if probability * confidence >= lowest:
            found.append((CLASSES[label], probability * confidence, box, {(y, x) for x, y, _ in inner}))
    return sorted(found, key=lambda row: -row[1])


@pytest.mark.parametrize(("seed", "queries", "lowest"), [(0, 6, 0.0), (1, 9, 0.05), (2, 3, 0.0)])
def test_postprocessing_is_the_slow_arithmetic(seed: int, queries: int, lowest: float) -> None:
    rng = numpy_generator(seed, 0, 0, "logits")
    classes = rng.normal(0, 3, (queries, 81))
    masks = rng.normal(0, 2, (queries, 6, 8))
    masks[-1] = -5.0  # an empty mask
    padded, inside, size = (24, 32), (20, 29), (13, 19)
    ours = postprocess(
        torch.tensor(classes), torch.tensor(masks), padded=padded, inside=inside, size=size, lowest=lowest
    )
    slow = slow_instances(classes.tolist(), masks.tolist(), padded, inside, size, lowest)
    assert len(ours) == len(slow) and len(slow) > 3
    if lowest == 0.0:
        assert len(ours) == min(PAIRS, queries * 80) and any(one.box == (0, 0, 0, 0) and one.score == 0 for one in ours)
    for one, (name, score, box, mask) in zip(ours, slow, strict=True):
        assert (one.class_name, one.box) == (name, box)
        assert one.score == pytest.approx(score, abs=1e-6)
        assert set(zip(*map(np.ndarray.tolist, np.nonzero(one.mask)), strict=True)) == mask


def test_a_query_may_appear_under_several_classes_and_a_hundred_pairs_are_kept() -> None:
    logits = torch.full((2, 81), -9.0)
    logits[0, 3], logits[0, 16], logits[1, 80] = 4.0, 4.0, 9.0
    found = postprocess(logits, torch.full((2, 4, 4), 8.0), padded=(16, 16), inside=(16, 16), size=(16, 16))
    assert {one.class_name for one in found} == {CLASSES[3], CLASSES[16]}
    assert all(one.box == (0, 0, 16, 16) for one in found)
    many = postprocess(torch.zeros(3, 81), torch.ones(3, 4, 4), padded=(8, 8), inside=(8, 8), size=(8, 8), lowest=0.0)
    assert len(many) == PAIRS


def test_scores_at_the_boundary_are_stored() -> None:
    """Two classes share a query, so its probability is 1/2 exactly; a mask of logit 0+ scores 1/2: the product is 1/4
    to the last bit or not stored.
    """
    logits = torch.full((1, 81), -1e9)
    logits[0, 0] = logits[0, 1] = 0.0
    mask = torch.full((1, 2, 2), 30.0)  # sigmoid is 1 in float32
    sizes = {"padded": (2, 2), "inside": (2, 2), "size": (2, 2)}
    (first, _) = found = postprocess(logits, mask, **sizes, lowest=0.4)
    score = first.score
    assert score == pytest.approx(0.5, abs=1e-6) and [one.class_name for one in found] == list(CLASSES[:2])
    assert len(postprocess(logits, mask, **sizes, lowest=score)) == 2
    assert postprocess(logits, mask, **sizes, lowest=float(np.nextafter(score, 1))) == []
    assert LOWEST == 0.05


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the sides: what is tested does not depend on them."""
    monkeypatch.setattr("benchmarks.geneval.detector.SHORT_SIDE", 80)
    monkeypatch.setattr("benchmarks.geneval.detector.LONG_SIDE", 133)


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (800, 800)),
        (1024, 1024, (800, 800)),
        (480, 640, (800, 1067)),
        (640, 480, (1067, 800)),
        (500, 1000, (667, 1333)),
        (1000, 500, (1333, 667)),
    ],
)
def test_the_aspect_is_kept_within_800_and_1333(height: int, width: int, expected: tuple[int, int]) -> None:
    assert resized(height, width) == expected


def test_pixels_are_resized_padded_with_grey_and_normalised_in_this_order(small: None) -> None:
    image = numpy_generator(0, 0, 0, "image").integers(0, 256, (10, 17, 3), dtype=np.uint8)
    pixels, inside = preprocess(image)
    assert inside == (78, 133) and pixels.shape == (3, 96, 160) and pixels.dtype == torch.float32
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    levels = pixels.permute(1, 2, 0).double().numpy() * std + mean
    assert np.allclose(levels[78:], 128.0, atol=1e-3) and np.allclose(levels[:, 133:], 128.0, atol=1e-3)
    assert np.allclose(levels, levels.round(), atol=1e-3)  # whole levels, as bytes are resized
    red = slow_resize(image[..., 0].astype(float).tolist(), *inside)
    assert np.abs(levels[:78, :133, 0] - np.array(red)).max() <= 0.51
    flat, _ = preprocess(np.full((64, 64, 3), (255, 0, 10), dtype=np.uint8))
    assert flat.shape == (3, 96, 96)
    assert flat[:, 40, 40].numpy() == pytest.approx((np.array([255, 0, 10]) - mean) / std, abs=1e-5)


# --- masks ------------------------------------------------------------------------------------------------------------


def decode_mask(value: dict[str, Any]) -> np.ndarray:
    """The mask of `encode_mask`, (H, W) bool, by COCO's rule: runs down the columns, zeros first."""
    height, width = value["size"]
    counts = value["counts"]
    assert sum(counts) == height * width
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape((height, width), order="F")


def test_masks_survive_their_text() -> None:
    rng = numpy_generator(0, 0, 0, "masks")
    for mask in (rng.random((7, 5)) > 0.5, np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(6, dtype=bool)):
        value = encode_mask(mask)
        assert (decode_mask(value) == mask).all() and sum(value["counts"][1::2]) == mask.sum()
    assert encode_mask(np.array([[True, False], [True, True]])) == {
        "size": [2, 2],
        "counts": [0, 2, 1, 1],
    }  # down the columns, zeros first


# --- the real classes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("detector")
    tiny_mask2former(folder)
    return load_detector(str(folder), "cpu")


def test_a_real_network_gives_its_images_instances(detector: Any, small: None) -> None:
    rng = numpy_generator(0, 0, 0, "pictures")
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 40, 3), (30, 50, 3), (40, 40, 3))]
    self_test(detector)
    together, alone = detect(detector, images), [detect(detector, [image])[0] for image in images]
    assert any(together)
    for image, found, single in zip(images, together, alone, strict=True):
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert [one.class_name for one in found] == [one.class_name for one in single]
        assert [one.score for one in found] == pytest.approx([one.score for one in single], abs=1e-4)
        for one in found:
            assert one.mask.shape == image.shape[:2] and LOWEST <= one.score <= 1
            rows, columns = np.nonzero(one.mask)
            assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_network_whose_answers_are_not_finite_is_refused(detector: Any, small: None) -> None:
    bias = detector.class_predictor.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        self_test(detector)
    with torch.no_grad():
        bias.copy_(before)


def test_labels_must_be_coco_s_in_coco_s_order(tmp_path: Path) -> None:
    check_labels(dict(enumerate(COCO)))
    check_labels(dict(enumerate(CLASSES)))
    check_labels(
        {
            str(index): {
                "motorcycle": "motorbike",
                "couch": "sofa",
                "tv": "tvmonitor",
                "potted plant": "pottedplant",
            }.get(name, name)
            for index, name in enumerate(COCO)
        }
    )
    swapped = [COCO[1], COCO[0], *COCO[2:]]
    with pytest.raises(UserError, match="0: 'bicycle', expected 'person'"):
        check_labels(dict(enumerate(swapped)))
    with pytest.raises(UserError, match="91 labels"):
        check_labels(dict(enumerate([*COCO, *["more"] * 11])))
    with pytest.raises(UserError, match="LABEL_0"):
        check_labels({index: f"LABEL_{index}" for index in range(80)})


def test_incomplete_pickled_and_foreign_models_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="no such folder"):
        model_folder("nowhere/at/all", "detector")
    tiny_mask2former(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    weights.pop("class_predictor.weight")
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing.*class_predictor"):
        load_detector(str(tmp_path / "whole"), "cpu")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "whole" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not read"):
        load_detector(str(tmp_path / "whole"), "cpu")
