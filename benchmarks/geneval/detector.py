"""GenEval's detector: Mask2Former (Swin-S, COCO instances) through transformers, with the reference's preprocessing and
postprocessing.

The image processor of transformers squashes to 384 x 384 and scores masks there; GenEval's reference (mmdet 2.x,
mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco) keeps the aspect at a short side of 800 and scores at the image's size.
So preprocessing and postprocessing are written here, after mmdet's. The weights are Meta's release and not OpenMMLab's:
scores differ near the thresholds, and every result names its detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.geneval.images import some
from benchmarks.geneval.prompts import CLASSES
from benchmarks.geneval.rules import DETECTOR
from data.errors import UserError
from data.files import weights_digest

SHORT_SIDE, LONG_SIDE = 800, 1333  # px
MULTIPLE = 32  # px, of the padded sides
PADDING = 128.0  # grey, before normalisation
MEAN = (123.675, 116.28, 103.53)  # RGB, 0 to 255
STD = (58.395, 57.12, 57.375)
PAIRS = 100  # (query, class) pairs kept of an image
LOWEST = 0.05  # detections with this score or more are stored: every threshold in use lies above
SIZES = {"short_side": SHORT_SIDE, "long_side": LONG_SIDE, "multiple": MULTIPLE, "padding": PADDING}
PREPROCESSING = {**SIZES, "mean": list(MEAN), "std": list(STD), "pairs": PAIRS}
# alias:name of COCO's things, as label files have them
_ALIASES = (
    "motorbike:motorcycle aeroplane:airplane sofa:couch tvmonitor:tv doughnut:donut mouse:computermouse "
    "remote:tvremote keyboard:computerkeyboard hairdryer:hairdrier"
)
ALIASES = dict(pair.split(":") for pair in _ALIASES.split())
HARMLESS = ("relative_position_index", "num_batches_tracked", "criterion.")  # buffers that a checkpoint may lack
Box = tuple[float, float, float, float]
Size = tuple[int, int]  # (height, width) in px


@dataclass(frozen=True, eq=False)
class Instance:
    """A detected object. `score` in [0, 1]; `box` (x0, y0, x1, y1) in pixels of the image, the last row and column
    outside; `mask` (H, W) bool."""

    class_name: str
    score: float
    box: Box
    mask: np.ndarray


def resized(height: int, width: int) -> Size:
    """The size with the aspect kept, as large as fits a short side of 800 and a long side of 1333. E.g. 512 x 512
    gives 800 x 800."""
    factor = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def _interpolate(values: Tensor, size: Size) -> Tensor:
    """(C, H, W) to (C, *size), bilinear, without anti-aliasing."""
    return functional.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]


def preprocess(image: np.ndarray) -> tuple[Tensor, Size]:
    """(H, W, 3) uint8 RGB -> pixels (3, h, w) float32, normalised and padded right and below, and the size (h0, w0)
    before padding.

    Rounded to whole levels after resizing, as the reference resizes bytes."""
    height, width = resized(*image.shape[:2])
    pixels = _interpolate(torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), (height, width))
    below, right = -height % MULTIPLE, -width % MULTIPLE
    pixels = functional.pad(pixels.round().clamp(0, 255), (0, right, 0, below), value=PADDING)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], (height, width)


def postprocess(
    class_logits: Tensor, mask_logits: Tensor, *, padded: Size, inside: Size, size: Size, lowest: float = LOWEST
) -> list[Instance]:
    """An image's instances, most confident first, from class logits (Q, 81) (the last is "no object") and mask logits
    (Q, h, w).

    `padded` is the network input's (height, width), `inside` that of the picture in it, `size` the image's. The PAIRS
    most probable of all (query, class) pairs are taken, so a query may appear under several classes. Score = class
    probability x mean of the mask's sigmoid where its logit is above 0; the box spans the mask (zeros for an empty
    one). Instances with a score below `lowest` are left out."""
    classes = class_logits.shape[-1] - 1
    probabilities = class_logits.float().softmax(-1)[:, :-1].flatten()
    ranked = torch.sort(probabilities, descending=True, stable=True)  # ties in the order of queries, on every device
    shapes: dict[int, tuple[np.ndarray, float, Box]] = {}
    instances = []
    for probability, pair in zip(ranked.values[:PAIRS].tolist(), ranked.indices[:PAIRS].tolist(), strict=True):
        if probability < lowest:
            break  # a mask's score is at most 1
        query, label = divmod(pair, classes)
        if query not in shapes:
            shapes[query] = _shape(mask_logits[query], padded, inside, size)
        mask, confidence, box = shapes[query]
        score = float(np.float32(probability) * np.float32(confidence))
        if score >= lowest:
            instances.append(Instance(CLASSES[label], score, box, mask))
    return sorted(instances, key=lambda instance: -instance.score)


def _shape(logits: Tensor, padded: Size, inside: Size, size: Size) -> tuple[np.ndarray, float, Box]:
    """A query's mask (H, W) bool, its mean sigmoid over the mask, and the tight box."""
    whole = _interpolate(logits.float()[None], padded)
    picture = _interpolate(whole[:, : inside[0], : inside[1]], size)[0]
    mask = picture > 0
    confidence = float((picture.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
    binary = mask.cpu().numpy()
    rows, columns = np.flatnonzero(binary.any(1)), np.flatnonzero(binary.any(0))
    if not len(rows):
        return binary, confidence, (0.0, 0.0, 0.0, 0.0)
    return binary, confidence, (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def model_folder(source: str, what: str) -> Path:
    """The folder of a model given as a folder or as a name on the hub (owner/name or owner/name@revision), which is
    then fetched into the cache.

    Raises UserError for a folder without safetensors weights, or a name that cannot be fetched."""
    folder = Path(source)
    if not folder.is_dir():
        name, _, revision = source.partition("@")
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise UserError(f"{what} {source!r}: no such folder, and not a name on the hub (owner/name); give either")
        from huggingface_hub import snapshot_download

        try:
            files = ["*.safetensors", "*.json", "*.txt"]
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
        except Exception as error:  # the hub's client raises many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            advice = "check the name and the network, or give a folder that holds it"
            raise UserError(f"{what} {source!r}: cannot be fetched ({reason}); {advice}") from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        advice = "pickled weights are not read: convert them to safetensors"
        raise UserError(f"{what} {folder}: config.json or safetensors weights are missing; {advice}")
    return folder


def _plain(label: str) -> str:
    name = label.lower().replace(" ", "").replace("_", "").replace("-", "")
    return ALIASES.get(name, name)


def check_labels(id2label: dict[Any, str]) -> None:
    """Raises UserError unless the labels are COCO's 80 things in COCO's order, under one of their usual names."""
    names = [str(id2label[key]) for key in sorted(id2label, key=int)]
    pairs = enumerate(zip(names, CLASSES, strict=False))
    wrong = [f"{index}: {a!r}, expected {b!r}" for index, (a, b) in pairs if _plain(a) != _plain(b)]
    if len(names) != len(CLASSES) or wrong:
        needs = f"COCO's {len(CLASSES)} things are needed in COCO's order ({some(wrong) or 'the first agree'})"
        raise UserError(f"detector: {len(names)} labels, {needs}; use a COCO instance model")


def load_network(what: str, source: str, model_type: str, network_class: Any, example: str) -> tuple[Path, Any]:
    """The folder of a model and its network in float32, in evaluation mode.

    Raises UserError as `model_folder`, for another `model_type`, or for a checkpoint that lacks weights: the network
    would keep random ones, and score as any other."""
    from transformers import AutoConfig

    folder = model_folder(source, what)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != model_type:
        raise UserError(f"{what} {folder}: model_type = {config.model_type!r}; {model_type} is needed, e.g. {example}")
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    network, info = network_class.from_pretrained(folder, **options)
    names = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in info.get(kind, ())]
    lost = sorted(name for name in names if not any(part in name for part in HARMLESS))
    if lost:
        fault = f"{len(lost)} weights are missing in the checkpoint or have another shape, e.g. {lost[0]}"
        raise UserError(f"{what} {folder}: {fault}; config and weights do not belong together")
    return folder, network.eval()


def detector_identity(source: str) -> dict[str, Any]:
    """What a result made with this detector names: its weights' digest and the preprocessing. Raises UserError as
    `model_folder` does."""
    weights = weights_digest(model_folder(source, "detector"))
    return {"architecture": "mask2former", "weights": weights, "lowest": LOWEST, **PREPROCESSING}


@lru_cache(maxsize=1)
def load_detector(source: str, device: str) -> Any:
    """Loads Mask2Former and tests it. Raises UserError as `load_network`, `check_labels` and `self_test` do."""
    from transformers import Mask2FormerForUniversalSegmentation as Network

    _, network = load_network("detector", source, "mask2former", Network, DETECTOR)
    check_labels(network.config.id2label)
    self_test(network.to(device))
    return network


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
def detect(network: Any, images: Sequence[np.ndarray]) -> list[list[Instance]]:
    """Every image's instances. Images (H, W, 3) uint8 RGB of any sizes; those of equal size pass the network
    together."""
    by_size: dict[Size, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault((image.shape[0], image.shape[1]), []).append(index)
    instances: list[list[Instance]] = [[] for _ in images]
    for size, members in by_size.items():
        prepared, insides = zip(*(preprocess(images[index]) for index in members), strict=True)
        pixels = torch.stack(prepared).to(network.device)  # (B, 3, h, w)
        with full_precision():
            output = network(pixel_values=pixels)
        padded = (pixels.shape[2], pixels.shape[3])
        answers = zip(members, output.class_queries_logits, output.masks_queries_logits, insides, strict=True)
        for index, classes, masks, inside in answers:
            instances[index] = postprocess(classes, masks, padded=padded, inside=inside, size=size)
    return instances


def self_test(network: Any) -> None:
    """Raises UserError when the network's answers are not finite, or differ between an image alone and in a batch:
    signs of a broken build or device."""
    y, x = np.mgrid[0:96, 0:128]
    ramp = np.stack([x * 2, y * 2, 255 - x], axis=-1).astype(np.uint8)
    disc = np.where(((x - 64) ** 2 + (y - 48) ** 2 < 900)[..., None], np.uint8(200), np.uint8(40)).repeat(3, axis=-1)
    pixels = torch.stack([preprocess(ramp)[0], preprocess(disc)[0]]).to(network.device)
    with torch.no_grad(), full_precision():
        alone, batch = (network(pixel_values=part).class_queries_logits for part in (pixels[:1], pixels))
    where = f"detector on {network.device}"
    if not (torch.isfinite(alone).all() and torch.isfinite(batch).all()):
        raise UserError(f"{where}: its scores are not finite; the weights or the device's kernels are broken")
    difference = float((alone.softmax(-1) - batch[:1].softmax(-1)).abs().max())
    if difference > 0.01:
        fault = f"an image's probabilities differ by {difference:.3f} alone and in a batch"
        raise UserError(f"{where}: {fault}; the device's kernels are broken")


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> COCO's uncompressed run lengths {"size": [H, W], "counts"}: column by column, zeros first."""
    flat = np.asarray(mask, dtype=bool).flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[:1].any() else runs}
