"""What MLflow loads from a registered student: `mlflow.pyfunc.load_model("models:/danceopd@champion").predict(frame)`
draws images.

The artifact holds safetensors and JSON only; its MLmodel names this module as the loader, so the code is the project's
own and nothing is unpickled or carried along to be run. Load and serve from the project's folder and environment
(`mlflow models serve --env-manager local`).

    frame    one row a picture: column `prompt`; optional column `source`, the image to edit as base64 of a PNG or JPEG
(empty: draw anew)
    params   steps (0: the family's own), guidance, seed, resolution (px, 0: the model's own)
    answer   a frame with column `image`: base64 of a PNG
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from data.errors import UserError
from tasks.student.opening import DEFAULTS, STEPS

if TYPE_CHECKING:
    from tasks.student.opening import Model


BATCH = 4


class Sampler:
    """A student behind MLflow's `predict`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One PNG a row. Raises UserError for an input without prompts, or a source that is no image."""
        from tasks.student.opening import draw

        frame = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(model_input)
        if "prompt" not in frame.columns or not len(frame):
            raise UserError(
                f"expected one row a picture with a column 'prompt', found {len(frame)} rows with the columns {list(frame.columns)}"
            )
        given = {**DEFAULTS, **(params or {})}
        prompts = [str(prompt) for prompt in frame["prompt"]]
        encoded = list(frame["source"]) if "source" in frame.columns else [None] * len(frame)
        sources = [
            None if text is None or pd.isna(text) or not text else picture_of(str(text), row)
            for row, text in enumerate(encoded)
        ]
        steps = int(given["steps"]) or STEPS.get(self.model.backbone.name, 28)
        pictures = draw(
            self.model,
            prompts,
            sources,
            steps=steps,
            guidance=float(given["guidance"]),
            seed=int(given["seed"]),
            batch=BATCH,
            resolution=int(given["resolution"]) or None,
        )
        return pd.DataFrame({"image": [png_of(picture) for picture in pictures]})


def picture_of(text: str, row: int) -> np.ndarray:
    """(H, W, 3) uint8 from base64, with or without a data URL's head."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text.partition("base64,")[2] or text, validate=True))) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"row {row}: source is no image in base64 ({error})") from error


def png_of(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _load_pyfunc(path: str) -> Sampler:
    """The name that MLflow calls, with the artifact's folder."""
    from tasks.student.opening import open_folder
    from tasks.weights.sources import Source

    return Sampler(open_folder(Source(path, Path(path), "", "", {}), Path.cwd(), device="auto"))
