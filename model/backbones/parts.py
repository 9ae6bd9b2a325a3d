"""The parts of a diffusers pipeline folder, read strictly: only safetensors, every key matched, every value finite, and
a scheduler that we follow.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data.errors import UserError
from data.files import read_json

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# What changes the noise levels beyond the shift. Each is off in every published checkpoint of the families here.
UNFOLLOWED = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
    "shift_terminal",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Type and shift of the pipeline's scheduler. Raises UserError for one whose noise levels are not those of
    model.rollout.euler_grid.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind != SCHEDULER:
        raise UserError(
            f"{path}: _class_name = {kind!r}: only {SCHEDULER} is followed; give the checkpoint its flow-matching scheduler"
        )
    on = [name for name in UNFOLLOWED if config.get(name)]
    if on:
        raise UserError(
            f"{path}: {on[0]} = {config[on[0]]!r} is not followed; only a constant shift is, with {', '.join(UNFOLLOWED)} off"
        )
    shift = config.get("shift", 1.0)
    if not isinstance(shift, int | float) or not shift > 0:
        raise UserError(f"{path}: shift = {shift!r}: expected a number above 0")
    return {"type": SCHEDULER, "shift": float(shift)}


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors files of one part, in order: one file, or the shards that its index names.

    Raises UserError when there is none, where only pickled weights lie (they run code when read), or when an index
    names a file that is missing or elsewhere.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if not names or strange:
            raise UserError(f"{index}: names {strange or 'no file'}; shards are safetensors files beside the index")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder / missing[0]}: no such file, and {index.name} names it ({len(missing)} of {len(names)} missing); fetch the checkpoint again"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle file, which runs code when it is read; only safetensors are loaded, convert it"
        )
    raise UserError(f"{single}: no such file; a pipeline folder holds its weights as safetensors")


def load_weights(network: nn.Module, files: list[Path], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Fills a network (made on the meta device) tensor by tensor, so that memory holds it once.

    Raises UserError when a key is missing or extra, a shape differs, a value is not finite or a file is damaged.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found: dict[str, torch.Tensor] = {}
    faults: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                for name in list(opened.keys()):
                    if name not in expected:
                        faults.append(f"extra key {name!r}")
                    elif tuple(opened.get_slice(name).get_shape()) != expected[name]:
                        faults.append(
                            f"{name!r} is {tuple(opened.get_slice(name).get_shape())}, expected {expected[name]}"
                        )
                    elif not faults:
                        value = opened.get_tensor(name)
                        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                            raise UserError(
                                f"{path}: tensor {name!r} holds values that are not finite; the checkpoint is damaged"
                            )
                        found[name] = value.to(
                            device=device, dtype=dtype if value.is_floating_point() else value.dtype, copy=True
                        )
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
    missing = sorted(expected.keys() - found.keys()) if not faults else []
    faults += [f"missing key {name!r}" for name in missing]
    if faults:
        shown = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise UserError(f"{files[0].parent}: the weights do not fit the network of config.json: {shown}")
    network.load_state_dict(found, assign=True)


def load_network(
    cls: Any, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", weights: bool = True
) -> Any:
    """A frozen network of class `cls` from folder/config.json and its safetensors; without `weights` only its shape, on
    the meta device, at no cost.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") != cls.__name__:
        raise UserError(
            f"{folder / 'config.json'}: _class_name = {config.get('_class_name')!r}, expected {cls.__name__}; this is another family's network"
        )
    with torch.device("meta"):
        network = cls.from_config(config)
    if not weights:
        network = nn.Module.to(network, dtype)
    else:
        load_weights(network, weight_files(folder), dtype, device)
    network.requires_grad_(False)
    network.eval()
    return network


def load_vae(folder: Path, device: torch.device | str) -> Any:
    """The pipeline's AutoencoderKL in fp32: its decoder overflows in half precision for some checkpoints, and it is
    small.
    """
    from diffusers import AutoencoderKL

    return load_network(AutoencoderKL, folder / "vae", torch.float32, device)


def pixels_per_latent(folder: Path) -> int:
    return int(2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1))


@torch.no_grad()
def encode_image(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> normalised latents (B, C, h, w) float32; the posterior's mode, so that equal pictures
    give equal latents.
    """
    latents = vae.encode(2.0 * images.to(vae.device, torch.float32) - 1.0).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, C, h, w) -> (B, 3, H, W) in [0, 1] on the CPU."""
    images = vae.decode(
        latents.to(vae.device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    ).sample
    return (images / 2.0 + 0.5).clamp(0.0, 1.0).float().cpu()


def load_text(folder: Path, part: str, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, Any]:
    """Tokenizer and frozen text encoder of a part such as "text_encoder_2", of the classes that model_index.json names.

    Raises UserError for a class that transformers does not have, or weights that do not fit.
    """
    import transformers

    index, classes = read_json(folder / "model_index.json"), []
    for name in (part.replace("text_encoder", "tokenizer"), part):
        library, kind = (index.get(name) or [None, None])[:2]
        if library != "transformers" or not hasattr(transformers, str(kind)):
            raise UserError(
                f"{folder / 'model_index.json'}: {name} = {index.get(name)!r}: expected a class of transformers"
            )
        classes.append(getattr(transformers, kind))
    weight_files(folder / part, "model")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = classes[0].from_pretrained(
                folder / part.replace("text_encoder", "tokenizer"), local_files_only=True
            )
            encoder, info = classes[1].from_pretrained(
                folder / part, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{folder / part}: cannot be read as {classes[1].__name__} ({str(error).splitlines()[0]}); fetch the checkpoint again"
            ) from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        raise UserError(
            f"{folder / part}: the weights do not fit {classes[1].__name__}: {wrong}; fetch the checkpoint again"
        )
    bad = [
        key
        for key, value in encoder.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise UserError(
            f"{folder / part}: tensor {bad[0]!r} holds values that are not finite; the checkpoint is damaged"
        )
    encoder.requires_grad_(False)
    return tokenizer, encoder.eval().to(device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries' own progress bars and warnings stay out of a stage's log: what matters is raised, and cut prompts
    are counted.
    """
    from diffusers.utils import logging as diffusion
    from transformers.utils import logging as text

    levels = diffusion.get_verbosity(), text.get_verbosity()
    diffusion.set_verbosity_error()
    text.set_verbosity_error()
    text.disable_progress_bar()
    try:
        yield
    finally:
        diffusion.set_verbosity(levels[0])
        text.set_verbosity(levels[1])
        text.enable_progress_bar()


def plain_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's own weights under its own names, whatever adapters it carries."""
    return {
        name.replace(".base_layer", ""): value for name, value in network.state_dict().items() if "lora_" not in name
    }


def save_pipeline(folder: Path, origin: Path, network: Any, tensors: dict[str, torch.Tensor]) -> None:
    """A whole pipeline folder: the parts of `origin` copied, its transformer replaced by `network`'s configuration and
    `tensors`.
    """
    from model.checkpoint import write_tensors

    index = read_json(origin / "model_index.json")
    for name, value in index.items():
        if isinstance(value, list) and value[0] is not None and name != "transformer" and (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, dirs_exist_ok=True)
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    (folder / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": type(network).__name__, **config}, indent=2), encoding="utf-8"
    )
    write_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def check_latents(
    folder: Path, shape: tuple[int, int, int], resolution: int | None, pixels: int
) -> tuple[int, int, int]:
    """The usual picture's latent shape (C, H, W), at `resolution` px where one is wanted. Raises UserError for a VAE
    whose channels are not the network's.
    """
    channels = read_json(folder / "vae" / "config.json").get("latent_channels")
    if channels != shape[0]:
        raise UserError(
            f"{folder}: the VAE has {channels} latent channels, the transformer {shape[0]}; they are of different models"
        )
    return shape if resolution is None else (shape[0], resolution // pixels, resolution // pixels)
