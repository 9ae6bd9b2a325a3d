"""GenEval's detector: Mask2Former (Swin-S, COCO instances) through transformers, with the reference's preprocessing and
postprocessing.

The library's own image processor squashes to 384 x 384 and scores masks there; GenEval's reference (mmdet 2.x,
mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco) keeps the aspect at a short side of 800 and scores at the image's own
size. Both ends are therefore written here, after mmdet's configuration and its instance postprocessing. The weights are
Meta's release and not OpenMMLab's, so scores differ near the thresholds: every result names its detector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.geneval.prompts import CLASSES
from data.errors import UserError
from data.files import weights_digest

SHORT_SIDE, LONG_SIDE = 800, 1333  # px
MULTIPLE = 32  # px, of the padded sides
PADDING = 128.0  # grey, before normalisation
MEAN = (123.675, 116.28, 103.53)  # RGB, 0 to 255
STD = (58.395, 57.12, 57.375)
PAIRS = 100  # (query, class) pairs kept of an image
LOWEST = 0.05  # detections with this score or more are stored: every threshold in use lies above
PREPROCESSING = {
    "short_side": SHORT_SIDE,
    "long_side": LONG_SIDE,
    "multiple": MULTIPLE,
    "padding": PADDING,
    "mean": list(MEAN),
    "std": list(STD),
    "pairs": PAIRS,
}
# other names that label files give to COCO's things
ALIASES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "tvmonitor": "tv",
    "doughnut": "donut",
    "mouse": "computermouse",
    "remote": "tvremote",
    "keyboard": "computerkeyboard",
    "hairdryer": "hairdrier",
}
HARMLESS = (
    "relative_position_index",
    "num_batches_tracked",
    "criterion.",
)  # buffers that a checkpoint may hold or lack


@dataclass(frozen=True, eq=False)
class Instance:
    """One detected object. `score` in [0, 1]; `box` (x0, y0, x1, y1) in pixels of the image, the last row and column
    outside; `mask` (H, W) bool.
    """

    class_name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


# --- preprocessing ----------------------------------------------------------------------------------------------------


def resized(height: int, width: int) -> tuple[int, int]:
    """(height, width) with the aspect kept: as large as fits a short side of 800 and a long side of 1333. E.g. 512 x
    512 gives 800 x 800.
    """
    factor = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def preprocess(image: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
    """(H, W, 3) uint8 RGB -> pixels (3, h, w) float32, normalised and padded right and below, and the size (h0, w0)
    before padding.

    Bilinear without anti-aliasing and rounded to whole levels, as the reference resizes bytes.
    """
    height, width = resized(*image.shape[:2])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    pixels = (
        functional.interpolate(pixels[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        .round()
        .clamp(0, 255)
    )
    below, right = -height % MULTIPLE, -width % MULTIPLE
    pixels = functional.pad(pixels, (0, right, 0, below), value=PADDING)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], (height, width)


# --- postprocessing ---------------------------------------------------------------------------------------------------


def postprocess(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    padded: tuple[int, int],
    inside: tuple[int, int],
    size: tuple[int, int],
    lowest: float = LOWEST,
) -> list[Instance]:
    """One image's instances, most confident first, from (Q, 81) class logits (the last is "no object") and (Q, h, w)
    mask logits.

    `padded` is the network input's (height, width), `inside` that of the picture in it, `size` the image's own. The
    PAIRS most probable of all (query, class) pairs are taken, so a query may appear under several classes. Score =
    class probability x mean of the mask's sigmoid where its logit is above 0; the box spans the mask (zeros for an
    empty one). Instances with a score below `lowest` are left out.
    """
    classes = class_logits.shape[-1] - 1
    probabilities = class_logits.float().softmax(-1)[:, :-1].flatten()
    ranked = torch.sort(
        probabilities, descending=True, stable=True
    )  # equal probabilities in the order of queries, on every device
    kept = [
        (float(score), int(pair))
        for score, pair in zip(ranked.values[:PAIRS], ranked.indices[:PAIRS], strict=True)
        if score >= lowest
    ]
    shapes: dict[int, tuple[np.ndarray, float, tuple[float, float, float, float]]] = {}
    found = []
    for (
        probability,
        pair,
    ) in kept:  # a mask's score is at most 1, so that nothing of a lower probability could be stored
        query, label = divmod(pair, classes)
        if query not in shapes:
            shapes[query] = _shape(mask_logits[query], padded, inside, size)
        mask, confidence, box = shapes[query]
        score = float(np.float32(probability) * np.float32(confidence))
        if score >= lowest:
            found.append(Instance(CLASSES[label], score, box, mask))
    return sorted(found, key=lambda instance: -instance.score)


def _shape(
    logits: torch.Tensor, padded: tuple[int, int], inside: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, float, tuple[float, float, float, float]]:
    """A query's mask (H, W) bool, its mean sigmoid over the mask, and the tight box."""
    whole = functional.interpolate(logits.float()[None, None], size=padded, mode="bilinear", align_corners=False)
    picture = functional.interpolate(
        whole[..., : inside[0], : inside[1]], size=size, mode="bilinear", align_corners=False
    )[0, 0]
    mask = picture > 0
    confidence = float((picture.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
    binary = mask.cpu().numpy()
    rows, columns = np.flatnonzero(binary.any(1)), np.flatnonzero(binary.any(0))
    box = (
        (0.0, 0.0, 0.0, 0.0)
        if not len(rows)
        else (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    )
    return binary, confidence, box


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detector:
    """A loaded network and the torch device it is on."""

    network: Any
    device: str


def model_folder(source: str, what: str) -> Path:
    """The folder of a model given as a folder or as a name on the hub (owner/name or owner/name@revision), which is
    then fetched into the cache.

    Raises UserError for a folder without safetensors weights, or a name that cannot be fetched.
    """
    folder = Path(source)
    if not folder.is_dir():
        name, _, revision = source.partition("@")
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise UserError(
                f"{what} {source!r}: no such folder, and not a name on the hub (owner/name); give one of the two"
            )
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "*.txt"])
            )
        except Exception as error:  # the hub's client raises many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{what} {source!r}: cannot be fetched ({reason}); check the name and the network, or give a folder that holds it"
            ) from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{what} {folder}: config.json or safetensors weights are missing; pickled weights are not read: convert them to safetensors"
        )
    return folder


def _plain(label: str) -> str:
    name = label.lower().replace(" ", "").replace("_", "").replace("-", "")
    return ALIASES.get(name, name)


def check_labels(id2label: dict[Any, str]) -> None:
    """Raises UserError unless the labels are COCO's 80 things in COCO's order, under one of their usual names."""
    names = [str(id2label[key]) for key in sorted(id2label, key=int)]
    wrong = [
        f"{index}: {name!r}, expected {wanted!r}"
        for index, (name, wanted) in enumerate(zip(names, CLASSES, strict=False))
        if _plain(name) != _plain(wanted)
    ]
    if len(names) != len(CLASSES) or wrong:
        shown = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        found = f"{len(names)} labels, {len(CLASSES)} of COCO's things wanted in COCO's order ({shown or 'the first ones agree'})"
        raise UserError(f"detector: {found}; use a COCO instance model")


def check_loaded(what: str, info: dict[str, Any]) -> None:
    """Raises UserError when a checkpoint left weights of the network at random, which would score as any other
    network.
    """
    lost = [
        str(name)
        for kind in ("missing_keys", "mismatched_keys")
        for name in info.get(kind, ())
        if not any(part in str(name) for part in HARMLESS)
    ]
    if lost:
        advice = "config and weights do not belong together"
        raise UserError(
            f"{what}: {len(lost)} weights are missing in the checkpoint or have another shape, e.g. {sorted(lost)[0]}; {advice}"
        )


def detector_identity(source: str) -> dict[str, Any]:
    """What a result made with this detector names: its weights' digest and the preprocessing. Raises UserError as
    `model_folder` does.
    """
    return {
        "architecture": "mask2former",
        "weights": weights_digest(model_folder(source, "detector")),
        "lowest": LOWEST,
        **PREPROCESSING,
    }


def load_detector(source: str, device: str) -> Detector:
    """Loads Mask2Former in float32. Raises UserError for other architectures, labels, incomplete weights, or pickled
    ones.
    """
    from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

    folder = model_folder(source, "detector")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "mask2former":
        raise UserError(
            f"detector {folder}: model_type = {config.model_type!r}; a Mask2Former is needed, e.g. facebook/mask2former-swin-small-coco-instance"
        )
    check_labels(config.id2label)
    network, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    check_loaded(f"detector {folder}", info)
    return Detector(network.to(device).eval(), device)


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrices and convolutions in true float32: TF32 moves scores across thresholds."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def detect(detector: Detector, images: Sequence[np.ndarray]) -> list[list[Instance]]:
    """Every image's instances. Images (H, W, 3) uint8 RGB of any sizes; those of one size pass the network together."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault((image.shape[0], image.shape[1]), []).append(index)
    found: list[list[Instance]] = [[] for _ in images]
    for size, members in by_size.items():
        prepared = [preprocess(images[index]) for index in members]
        pixels = torch.stack([each for each, _ in prepared]).to(detector.device)  # (B, 3, h, w)
        with full_precision():
            output = detector.network(pixel_values=pixels)
        for row, (index, (_, inside)) in enumerate(zip(members, prepared, strict=True)):
            found[index] = postprocess(
                output.class_queries_logits[row],
                output.masks_queries_logits[row],
                padded=(pixels.shape[2], pixels.shape[3]),
                inside=inside,
                size=size,
            )
    return found


def self_test(detector: Detector) -> None:
    """Raises UserError when the network's answers are not finite or depend on the company in the batch: signs of a
    broken build or device.
    """
    y, x = np.mgrid[0:96, 0:128]
    one = np.stack([x * 2, y * 2, 255 - x], axis=-1).astype(np.uint8)
    other = np.where(((x - 64) ** 2 + (y - 48) ** 2 < 900)[..., None], np.uint8(200), np.uint8(40)).repeat(3, axis=-1)
    pixels = torch.stack([preprocess(one)[0], preprocess(other)[0]]).to(detector.device)
    with torch.no_grad(), full_precision():
        alone, together = (
            detector.network(pixel_values=pixels[:1]).class_queries_logits,
            detector.network(pixel_values=pixels).class_queries_logits,
        )
    if not (torch.isfinite(alone).all() and torch.isfinite(together).all()):
        raise UserError(
            f"detector on {detector.device}: its scores are not finite; the weights or the device's kernels are broken"
        )
    difference = float((alone.softmax(-1) - together[:1].softmax(-1)).abs().max())
    if difference > 0.01:
        raise UserError(
            f"detector on {detector.device}: a picture's probabilities differ by {difference:.3f} alone and in a batch; the device's kernels are broken"
        )


# --- masks as text ----------------------------------------------------------------------------------------------------


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> COCO's uncompressed run lengths {"size": [H, W], "counts"}: column by column, beginning with
    zeros.
    """
    flat = np.asarray(mask, dtype=bool).flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return {
        "size": [int(side) for side in mask.shape],
        "counts": ([0] if flat.size and flat[0] else []) + [int(run) for run in runs],
    }
