"""LoRA adapters as files: read strictly from every common key style, written as PEFT and as the single file that
ComfyUI and diffusers load.

A LoRA adapter adds (alpha / rank) B A to a linear layer's weight (Hu et al. 2021, equation 3). Read here: PEFT and
diffusers keys, kohya and ComfyUI keys, with diffusers' module names or those of the original checkpoints, where one
fused `qkv` layer stands for three. Every key is matched or the file is refused. Which names ComfyUI accepts:
Comfy-Org/ComfyUI, comfy/lora.py, model_lora_keys_unet; comfy/utils.py, mmdit_to_diffusers and z_image_to_diffusers.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from data.errors import UserError, UserErrors
from data.files import read_json
from model.backbones import backbone_class
from model.checkpoint import read_tensors, write_tensors

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (PEFT_WEIGHTS, "pytorch_lora_weights.safetensors")  # what PEFT and diffusers call an adapter in a folder
RECORDS = ("teacher.json", "student.json")  # this pipeline's own, which hold rank and alpha
SHOWN = 3  # keys that a message names
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # dots of the module's name are underscores
ROLES = {
    "A": re.compile(r"\.(?:lora_A(?:\.(?!weight$)[^.]+)?|lora_down|lora\.down)\.weight$"),
    "B": re.compile(r"\.(?:lora_B(?:\.(?!weight$)[^.]+)?|lora_up|lora\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
# LoraConfig's fields that make more of it than plain LoRA, with the values that do not.
PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False, "peft_type": "LORA"}


@dataclass(frozen=True)
class Adapter:
    """`tensors`: "MODULE.lora_A.weight" (rank, in) and "MODULE.lora_B.weight" (out, rank), for `modules` in sorted
    order; its delta is alpha / rank * B A."""

    tensors: dict[str, torch.Tensor]
    modules: tuple[str, ...]
    rank: int
    alpha: int

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        return self.tensors[f"{module}.lora_A.weight"], self.tensors[f"{module}.lora_B.weight"]


Layers = dict[str, dict[str, torch.Tensor]]  # module -> "A", "B" and "alpha", as far as the file has them
Modules = Mapping[str, tuple[int, int]]  # name of a linear layer -> (out, in)


def linear_modules(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear layer, under its own name whether or not adapters wrap it by now."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    }


def fused_names(family: str, modules: Iterable[str]) -> dict[str, list[str]]:
    """The original checkpoint's name of a layer -> the diffusers modules that it holds, in the order of its rows."""
    fused: dict[str, dict[str, str]] = {}
    for module in modules:
        for pattern, original in backbone_class(family).original_names:
            match = re.fullmatch(pattern, module)
            if match:
                letter = match[3] if match.re.groups == 3 else ""
                fused.setdefault(match.expand(original), {})[letter] = module
    return {name: [held[letter] for letter in sorted(held, key="qkv".find)] for name, held in fused.items()}


def adapter_file(path: Path) -> Path:
    """The one safetensors file of an adapter given as a folder or a file. Raises UserError when there is none, or more
    than one to choose from."""
    if path.is_file():
        if path.suffix != ".safetensors":
            why = "other formats can carry code: convert it"
            raise UserError(f"{path}: adapters are read from .safetensors alone; {why}")
        return path
    files = [path / name for name in FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = [file.name for file in files][:SHOWN]
        raise UserError(f"{path}: {len(files)} adapter files ({names}); name the .safetensors file itself")
    return files[0]


def read_adapter(path: Path, network: nn.Module, family: str) -> Adapter:
    """An adapter for `network` from a PEFT folder or a single file in any of the styles above.

    Layers of different rank are brought to one by zero rows, layers of different alpha by scaling B: neither changes
    the delta. Raises UserErrors that name every kind of fault at once: a key nobody knows, a layer the network lacks, A
    without B, a shape or rank that does not fit, a kind of layer covered in some blocks only (a file cut short), values
    that are not finite, settings of PEFT that are more than LoRA.
    """
    file = adapter_file(path)
    tensors, modules = read_tensors(file), linear_modules(network)
    layers, faults = _matched(tensors, modules, family)
    pairs = {name: layer for name, layer in layers.items() if layer.keys() & {"A", "B"}}
    faults += _key_faults(layers, pairs) + _shape_faults(pairs, modules) + _coverage_faults(pairs, modules)
    scales, wrong = _scales(layers, *_config(path, file))
    faults += wrong + ([] if tensors else ["holds no tensor"])
    if faults:
        title = f"{file}: this adapter does not fit the base ({family}, {len(modules)} linear layers):"
        raise UserErrors(title, faults)
    return _uniform(pairs, scales)


def _matched(tensors: Mapping[str, torch.Tensor], modules: Modules, family: str) -> tuple[Layers, list[str]]:
    """The layers, and as faults the keys that match nothing, or something twice."""
    names = {name: [name] for name in modules}
    names |= {name: held for name, held in fused_names(family, modules).items() if name not in modules}
    flat = {name.replace(".", "_"): held for name, held in names.items()}
    layers: Layers = defaultdict(dict)
    unknown, foreign, twice = [], [], []
    for key, value in tensors.items():
        matches = {role: match for role, pattern in ROLES.items() if (match := pattern.search(key))}
        role, match = next(iter(matches.items()), ("", None))
        held = _held(key[: match.start()], names, flat) if match else None
        if match is None:
            unknown.append(key)
        elif held is None:
            foreign.append(key)
        else:
            if any(role in layers[module] for module in held):
                twice.append(key)
            # A fused layer has one A for all, and the rows of B by turns.
            split = role == "B" and value.ndim and value.shape[0] % len(held) == 0
            shares = value.chunk(len(held)) if split else [value] * len(held)
            for module, share in zip(held, shares, strict=True):
                layers[module][role] = share.clone()
    odd = {
        "keys that are no LoRA weight": unknown,
        "keys of layers that the base does not have": foreign,
        "keys given twice": twice,
    }
    return dict(layers), [f"{len(keys)} {words}: {_few(keys)}" for words, keys in odd.items() if keys]


def _held(stem: str, names: Mapping[str, list[str]], flat: Mapping[str, list[str]]) -> list[str] | None:
    """The modules behind a key without its ending; None where the network has none of that name."""
    for prefix in FLAT_PREFIXES:
        if stem.startswith(prefix):
            return flat.get(stem.removeprefix(prefix))
    for _ in range(2):  # base_model.model.transformer.X has two
        prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), "")
        if stem in names or not prefix:
            break
        stem = stem.removeprefix(prefix)
    return names.get(stem)


def _few(names: Iterable[str]) -> str:
    """The first names in sorted order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _key_faults(layers: Layers, pairs: Layers) -> list[str]:
    """A without B, B without A; and alpha is that of all layers with weights, or of none."""
    roles = ("B", "A", "alpha") if any("alpha" in layer for layer in layers.values()) else ("B", "A")
    lacking = {role: [name for name, layer in pairs.items() if role not in layer] for role in roles}
    words = {"B": "lora_B", "A": "lora_A", "alpha": "alpha"}
    faults = [f"missing key: {words[role]} of {_few(names)}" for role, names in lacking.items() if names]
    without = layers.keys() - pairs.keys()
    return [*faults, f"alpha without weights: {_few(without)}"] if without else faults


def _shape_faults(pairs: Layers, modules: Modules) -> list[str]:
    faults = []
    for name, pair in sorted(pairs.items()):
        if {"A", "B"} <= pair.keys():
            (out, into), down, up = modules[name], tuple(pair["A"].shape), tuple(pair["B"].shape)
            if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[1] != into or up[0] != out:
                needs = f"(rank, {into}) and ({out}, rank)"
                faults.append(f"{name}: A is {down} and B {up}; the base's layer needs {needs}")
    return faults


def _coverage_faults(pairs: Layers, modules: Modules) -> list[str]:
    """An adapter covers a kind of layer in every block or in none: what covers it in some has lost keys."""
    kinds: dict[str, list[str]] = {}
    for name in modules:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1), []).append(name)
    faults = []
    for kind, members in sorted(kinds.items()):
        lacking = [name for name in members if name not in pairs]
        if 0 < len(lacking) < len(members):
            covered = f"{len(members) - len(lacking)} of {len(members)} blocks"
            faults.append(f"missing keys: {kind} is covered in {covered}; not in {_few(lacking)}")
    return faults


def _scales(layers: Layers, config: Mapping[str, Any], origin: str) -> tuple[dict[str, tuple[float, int]], list[str]]:
    """Module -> (alpha, rank), and faults. Alpha is what the keys say, or else LoraConfig's fields (`config`, which
    come from `origin`), or else the rank, by the libraries' rule."""
    ranks = {name: layer["A"].shape[0] for name, layer in layers.items() if "A" in layer and layer["A"].ndim == 2}
    alphas = {
        name: float(layer["alpha"].reshape(-1)[0]) if layer["alpha"].numel() == 1 else float("nan")
        for name, layer in layers.items()
        if "alpha" in layer
    }
    bad = [f"{name}: alpha = {alpha}; expected one number above 0" for name, alpha in alphas.items() if not alpha > 0]
    faults = bad[:1]
    remedy = "only adapters of plain LoRA can be distilled or switched on the base"
    for key, plain in PLAIN.items():
        if config.get(key, plain) not in (plain, None, [], {}):
            faults.append(f"{key} = {config[key]!r}: more than plain LoRA; {remedy}")
    wrong = [name for name, rank in ranks.items() if rank != _patterned(config, "rank_pattern", name, "r", rank)]
    if wrong:
        said = f"rank {ranks[wrong[0]]} in the weights, but r = {config.get('r')} in {origin}"
        faults.append(f"{wrong[0]}: {said}; they do not belong together")
    scales = {}
    for name, rank in ranks.items():
        alpha = float(_patterned(config, "alpha_pattern", name, "lora_alpha", rank))
        stable = alpha * rank**0.5 if config.get("use_rslora") else alpha  # rank-stabilised: alpha / sqrt(rank)
        scales[name] = (alphas.get(name, float(rank)) if alphas else stable, rank)
    return scales, faults


def _config(path: Path, file: Path) -> tuple[dict[str, Any], str]:
    """LoraConfig's fields, from the JSON beside the weights (PEFT's, or a record of this pipeline's own) or from the
    file's header, and where they come from; none where neither names any."""
    folder = file.parent
    if path.is_dir() or file.name == PEFT_WEIGHTS:
        if (folder / PEFT_CONFIG).is_file():
            return dict(read_json(folder / PEFT_CONFIG)), "config"
        for name in RECORDS:
            if (folder / name).is_file():
                record = read_json(folder / name)
                return {"r": record.get("rank"), "lora_alpha": record.get("alpha")}, "config"
    return _metadata(file), "metadata"


def _patterned(config: Mapping[str, Any], patterns: str, module: str, common: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that the module's name ends with, or else the common value."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config.get(common, otherwise)


def _metadata(file: Path) -> dict[str, Any]:
    """What diffusers writes into the file's header: LoraConfig's fields under "transformer."."""
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
        fields = json.loads(text).items()
    except (SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: its LoRA metadata cannot be read ({error}); write the file again") from error
    prefix = "transformer."
    return {key.removeprefix(prefix): value for key, value in fields if key.startswith(prefix) or "." not in key}


def _uniform(pairs: Layers, scales: Mapping[str, tuple[float, int]]) -> Adapter:
    """One rank and one whole alpha for all layers; the tensors are left as they are where the file has that already."""
    most = max(rank for _, rank in scales.values())
    first = next(iter(scales.values()))[0]
    as_it_is = len(set(scales.values())) == 1 and first == int(first)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(pairs):
        down, up = pairs[name]["A"], pairs[name]["B"]
        if not as_it_is:
            alpha, rank = scales[name]
            down = nn.functional.pad(down.float(), (0, 0, 0, most - rank))
            up = nn.functional.pad(up.float() * (alpha / rank), (0, most - rank))
        tensors |= {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up.contiguous()}
    return Adapter(tensors, tuple(sorted(pairs)), most, int(first) if as_it_is else most)


def concatenated(members: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter whose delta is the weighted sum of the given ones' deltas, exactly: ranks add up, scales go into B,
    alpha = rank. In fp32."""
    rank = sum(adapter.rank for adapter, _ in members)
    modules = sorted({name for adapter, _ in members for name in adapter.modules})
    tensors: dict[str, torch.Tensor] = {}
    for name in modules:
        down, up = next(adapter.pair(name) for adapter, _ in members if name in adapter.modules)
        downs, ups = torch.zeros(rank, down.shape[1]), torch.zeros(up.shape[0], rank)
        start = 0
        for adapter, weight in members:
            if name in adapter.modules:
                down, up = adapter.pair(name)
                downs[start : start + adapter.rank] = down
                ups[:, start : start + adapter.rank] = up.float() * (weight * adapter.alpha / adapter.rank)
            start += adapter.rank
        tensors |= {f"{name}.lora_A.weight": downs, f"{name}.lora_B.weight": ups}
    return Adapter(tensors, tuple(modules), rank, rank)


def write_peft(folder: Path, adapter: Adapter) -> None:
    """A folder that `peft.PeftModel.from_pretrained(network, folder)` loads; `read_adapter` too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PEFT_WEIGHTS, {f"base_model.model.{key}": value for key, value in adapter.tensors.items()})
    modules = list(adapter.modules)
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=modules, inference_mode=True)
    config.save_pretrained(str(folder))


def write_comfyui(file: Path, adapter: Adapter, family: str) -> None:
    """One file that ComfyUI's LoRA nodes load, and `load_lora_weights` of diffusers' pipeline of the family.

    It has no alpha keys: diffusers refuses them for SD3. So alpha / rank is multiplied into B, and both take the
    missing alpha for the rank. Raises UserError for a family that neither knows.
    """
    prefix = backbone_class(family).comfyui_prefix
    if prefix is None:
        raise UserError(f"backbone = {family!r}: no ComfyUI key style is known for it; choose another format")
    scale = adapter.alpha / adapter.rank
    tensors = {
        f"{prefix}{key}": value.float() * (scale if key.endswith("lora_B.weight") else 1.0)
        for key, value in adapter.tensors.items()
    }
    write_tensors(file, tensors)
