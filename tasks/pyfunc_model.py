"""What MLflow loads from a registered student: `mlflow.pyfunc.load_model("models:/danceopd@champion").predict(frame)`
draws images.

The artifact holds safetensors and JSON only; its MLmodel names this module as the loader, so the code is the project's
own and nothing is unpickled or carried along to be run. Load and serve from the project's folder and environment
(`mlflow models serve --env-manager local`).

    frame    one row a picture: column `prompt`; optional column `source`, the image to edit as base64 of a PNG or JPEG
(empty: draw anew)
    params   steps and guidance (0: the student's own), seed, resolution (px, 0: the model's own)
    answer   a frame with column `image`: base64 of a PNG
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from data.errors import UserError
from data.images import encode_png
from tasks.student.opening import DEFAULTS, Drawing, Model, draw, open_model
from tasks.weights.sources import Source

BATCH = 4


class Sampler:
    """A student behind MLflow's `predict`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One PNG a row. Raises UserError for an input without prompts, or a source that is no image."""
        frame = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(model_input)
        if "prompt" not in frame.columns or not len(frame):
            came = f"{len(frame)} rows with the columns {list(frame.columns)}"
            raise UserError(f"expected one row a picture with a column 'prompt', found {came}")
        given = {**DEFAULTS, **(params or {})}
        how = Drawing(**{name: type(value)(given[name]) for name, value in DEFAULTS.items()})
        prompts = [str(prompt) for prompt in frame["prompt"]]
        encoded = list(frame["source"]) if "source" in frame.columns else [None] * len(frame)
        sources = [
            None if text is None or pd.isna(text) or not text else picture_of(str(text), row)
            for row, text in enumerate(encoded)
        ]
        pictures = draw(self.model, prompts, sources, how, batch=BATCH)
        return pd.DataFrame({"image": [png_of(picture) for picture in pictures]})


def picture_of(text: str, row: int) -> np.ndarray:
    """(H, W, 3) uint8 from base64, with or without a data URL's head. Raises UserError for a text that is no image."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text.partition("base64,")[2] or text, validate=True))) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"row {row}: source is no image in base64 ({error})") from error


def png_of(picture: np.ndarray) -> str:
    """A PNG of (H, W, 3) uint8 as base64."""
    return base64.b64encode(encode_png(picture)).decode()


def _load_pyfunc(path: str) -> Sampler:
    """The name that MLflow calls, with the artifact's folder."""
    return Sampler(open_model(Source(path, Path(path), "", "", {}), Path.cwd(), device="auto"))
