"""The parts of a diffusers pipeline folder, read strictly: safetensors alone, every key matched, every value finite."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data.errors import UserError
from data.files import read_json
from model.checkpoint import write_tensors

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
    """Its type and shift. Raises UserError where its noise levels are not those of model.rollout.euler_grid."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind != SCHEDULER:
        raise UserError(f"{path}: _class_name = {kind!r}: only {SCHEDULER}, a flow-matching scheduler, is followed")
    on = [name for name in UNFOLLOWED if config.get(name)]
    if on:
        named = f"{on[0]} = {config[on[0]]!r}"
        raise UserError(f"{path}: {named} is not followed; only a constant shift is, with {', '.join(UNFOLLOWED)} off")
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
            count = f"{len(missing)} of {len(names)} missing"
            raise UserError(f"{folder / missing[0]}: no such file, and {index.name} names it ({count}); fetch it again")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise UserError(f"{folder / pickles[0]}: a pickle file, which runs code when read; convert it to safetensors")
    raise UserError(f"{single}: no such file; a pipeline folder holds its weights as safetensors")


def load_weights(network: nn.Module, files: list[Path], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Fills a network (made on the meta device) tensor by tensor, so that memory holds it once.

    Raises UserError when a key is missing or extra, a shape differs, a value is not finite or a file is damaged.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    read: dict[str, torch.Tensor] = {}
    faults: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
                faults += [f"extra key {name!r}" for name in shapes if name not in expected]
                fitting = {name: shape for name, shape in shapes.items() if name in expected}
                wrong = [name for name, shape in fitting.items() if shape != expected[name]]
                faults += [f"{name!r} is {shapes[name]}, expected {expected[name]}" for name in wrong]
                for name in fitting if not faults else ():
                    value = finite(opened.get_tensor(name), path, name)
                    read[name] = value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
    faults = faults or [f"missing key {name!r}" for name in sorted(expected.keys() - read.keys())]
    if faults:
        shown = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise UserError(f"{files[0].parent}: the weights do not fit the network of config.json: {shown}")
    network.load_state_dict(read, assign=True)


def finite(value: torch.Tensor, path: Path, name: str) -> torch.Tensor:
    """The value itself. Raises UserError where a number of it is not finite."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise UserError(f"{path}: tensor {name!r} holds values that are not finite; the checkpoint is damaged")
    return value


def load_network(
    cls: Any, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", weights: bool = True
) -> Any:
    """A frozen network from config.json and safetensors; without `weights` its shapes alone, on the meta device."""
    config = read_json(folder / "config.json")
    if config.get("_class_name") != cls.__name__:
        other = f"_class_name = {config.get('_class_name')!r}"
        raise UserError(f"{folder / 'config.json'}: {other}, expected {cls.__name__}; this is another family's network")
    with torch.device("meta"):
        network = cls.from_config(config)
    if weights:
        load_weights(network, weight_files(folder), dtype, device)
    else:
        network = nn.Module.to(network, dtype)
    return network.requires_grad_(False).eval()


class PipelineBackbone:
    """What the backbones of published pipelines share; see `Backbone`. A family names `network_class`, reads its
    network's configuration in `__init__`, and loads its text encoders with `load_texts`."""

    network_class: Any
    load_texts: Callable[[torch.dtype, torch.device | str], Any]  # the text encoders with their tokenizers
    no_pipeline = ""
    latent_shape: tuple[int, int, int]

    def __init__(
        self, folder: Path, network: Any, scheduler: dict[str, Any], pixels_per_latent: int, max_tokens: int
    ) -> None:
        self.folder, self.network, self.scheduler, self.max_tokens = folder, network, scheduler, max_tokens
        self.pixels_per_latent = pixels_per_latent
        self.vae: Any = None
        self.texts: Any = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        need: Collection[str],
        dtype: torch.dtype,
        max_tokens: int,
        device: torch.device | str = "cpu",
        resolution: int | None = None,
    ) -> Self:
        """A frozen base from a pipeline folder; `need` names the parts that are read ("transformer", "text", "vae").

        Raises UserError for a part that is missing, damaged or of another family, for latents of VAE and network that
        differ, and for a scheduler not followed.
        """
        weights, vae = "transformer" in need, read_json(folder / "vae" / "config.json")
        network = load_network(cls.network_class, folder / "transformer", dtype, device, weights=weights)
        pixels = int(2 ** (len(vae["block_out_channels"]) - 1))
        backbone = cls(folder, network, read_scheduler(folder), pixels, max_tokens)
        channels, *_ = backbone.latent_shape
        if vae.get("latent_channels") != channels:
            both = f"the VAE has {vae.get('latent_channels')} latent channels, the transformer {channels}"
            raise UserError(f"{folder}: {both}; they are of different models")
        if resolution is not None:
            backbone.latent_shape = (channels, resolution // pixels, resolution // pixels)
        if "vae" in need:
            from diffusers import AutoencoderKL

            # In fp32: the decoders of some checkpoints overflow in half precision, and they are small.
            backbone.vae = load_network(AutoencoderKL, folder / "vae", torch.float32, device)
        if "text" in need:
            backbone.texts = backbone.load_texts(dtype, device)
        return backbone

    def loaded(self, part: str) -> Any:
        """The part "vae" or "texts"."""
        if getattr(self, part) is None:
            raise RuntimeError(f"{part}: not loaded; name it in `need`")
        return getattr(self, part)

    def release(self, *names: str) -> None:
        """Frees "text" or "vae": the text encoders are needed for prompts alone."""
        self.texts = None if "text" in names else self.texts
        self.vae = None if "vae" in names else self.vae

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Nothing: the tokenizers read every word."""

    @torch.no_grad()
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> normalised latents (B, C, h, w) float32: the posterior's mode, without a draw."""
        vae = self.loaded("vae")
        latents = vae.encode(2.0 * images.to(vae.device, torch.float32) - 1.0).latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, C, h, w) -> (B, 3, H, W) in [0, 1] on the CPU."""
        vae = self.loaded("vae")
        scaled = latents.to(vae.device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(scaled).sample / 2.0 + 0.5).clamp(0.0, 1.0).float().cpu()

    def save(self, folder: Path, network: nn.Module | None = None) -> None:
        """A folder that diffusers loads, with `network` in its transformer's place; other parts are copied."""
        net: Any = self.network if network is None else network
        save_pipeline(folder, self.folder, net, plain_state(net))


def load_text(folder: Path, part: str, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, Any]:
    """Tokenizer and frozen text encoder of a part such as "text_encoder_2", of the classes that model_index.json names.

    Raises UserError for a class that transformers does not have, or weights that do not fit.
    """
    import transformers

    index, classes = read_json(folder / "model_index.json"), []
    for name in (name_of_tokenizer(part), part):
        library, kind = (index.get(name) or [None, None])[:2]
        if library != "transformers" or not hasattr(transformers, str(kind)):
            place = f"{folder / 'model_index.json'}: {name} = {index.get(name)!r}"
            raise UserError(f"{place}: expected a class of transformers")
        classes.append(getattr(transformers, kind))
    weight_files(folder / part, "model")
    reader, kind = classes
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = reader.from_pretrained(folder / name_of_tokenizer(part), local_files_only=True)
            encoder, info = kind.from_pretrained(folder / part, local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{folder / part}: not to be read as {kind.__name__} ({first}); fetch it again") from error
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise UserError(f"{folder / part}: the weights do not fit {kind.__name__}: {wrong}; fetch the checkpoint again")
    for key, value in encoder.state_dict().items():
        finite(value, folder / part, key)
    encoder.requires_grad_(False)
    return tokenizer, encoder.eval().to(device)


def name_of_tokenizer(part: str) -> str:
    return part.replace("text_encoder", "tokenizer")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings: what matters is raised, and cut prompts are counted."""
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
    """The parts of `origin` copied, its transformer replaced by `network`'s configuration and `tensors`."""
    index = read_json(origin / "model_index.json")
    for name, value in index.items():
        if isinstance(value, list) and value[0] is not None and name != "transformer" and (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, dirs_exist_ok=True)
    save_transformer(folder / "transformer", network, tensors)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_transformer(folder: Path, network: Any, tensors: dict[str, torch.Tensor]) -> None:
    """config.json and safetensors, as diffusers lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    text = json.dumps({"_class_name": type(network).__name__, **config}, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
