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
from collections.abc import Iterable, Mapping
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
ROLES = (
    (re.compile(r"\.(?:lora_A(?:\.(?!weight$)[^.]+)?|lora_down|lora\.down)\.weight$"), "A"),
    (re.compile(r"\.(?:lora_B(?:\.(?!weight$)[^.]+)?|lora_up|lora\.up)\.weight$"), "B"),
    (re.compile(r"\.alpha$"), "alpha"),
)


@dataclass(frozen=True)
class Adapter:
    """`tensors`: "MODULE.lora_A.weight" (rank, in) and "MODULE.lora_B.weight" (out, rank), for `modules` in sorted
    order; its delta is alpha / rank * B A.

    `alpha_from` says where alpha came from: "config", "keys", "metadata", or "rank" where the file names none and the
    libraries' rule alpha = rank holds.
    """

    tensors: dict[str, torch.Tensor]
    modules: tuple[str, ...]
    rank: int
    alpha: int
    alpha_from: str

    @property
    def precision(self) -> str:
        kinds = {str(value.dtype).removeprefix("torch.") for value in self.tensors.values()}
        return kinds.pop() if len(kinds) == 1 else "mixed"


def linear_modules(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear layer, under its own name whether or not adapters wrap it by now."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            found[name.removesuffix(".base_layer")] = (module.out_features, module.in_features)
    return found


def fused_names(family: str, modules: Iterable[str]) -> dict[str, list[str]]:
    """The original checkpoint's name of a layer -> the diffusers modules that it holds, in the order of its rows."""
    fused: dict[str, dict[str, str]] = {}
    for module in modules:
        for pattern, original in backbone_class(family).original_names:
            match = re.fullmatch(pattern, module)
            if match:
                part = match[3] if match.re.groups == 3 else ""
                fused.setdefault(match.expand(original), {})[part] = module
    return {name: [parts[part] for part in sorted(parts, key="qkv".find)] for name, parts in fused.items()}


def adapter_file(path: Path) -> Path:
    """The one safetensors file of an adapter given as a folder or a file. Raises UserError when there is none, or more
    than one to choose from.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: adapters are read from .safetensors alone; other formats can carry code: convert it"
            )
        return path
    named = [path / name for name in FILES if (path / name).is_file()]
    found = named or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(
            f"{path}: {len(found)} adapter files ({[file.name for file in found][:SHOWN]}); name the .safetensors file itself"
        )
    return found[0]


def read_adapter(path: Path, network: nn.Module, family: str) -> Adapter:
    """An adapter for `network` from a PEFT folder or a single file in any of the styles above.

    Layers of different rank are brought to one by zero rows, layers of different alpha by scaling B: neither changes
    the delta. Raises UserErrors that name every kind of fault at once: a key nobody knows, a layer the network lacks, A
    without B, a shape or rank that does not fit, a kind of layer covered in some blocks only (a file cut short), values
    that are not finite, settings of PEFT that are more than LoRA.
    """
    file = adapter_file(path)
    tensors = read_tensors(file)
    modules = linear_modules(network)
    faults: list[str] = []
    parts, alphas = _matched(tensors, modules, family, faults)
    _shape_faults(parts, modules, faults)
    _coverage_faults(parts, modules, faults)
    ranks = {name: pair["A"].shape[0] for name, pair in parts.items() if "A" in pair and pair["A"].ndim == 2}
    said, alpha_from = _settings(path, file, ranks, alphas, faults)
    if not tensors:
        faults.append("holds no tensor")
    if faults:
        raise UserErrors(
            f"{file}: this adapter does not fit the base ({family}, {len(modules)} linear layers):", faults
        )
    return _uniform({name: (pair["A"], pair["B"]) for name, pair in parts.items()}, said, alpha_from)


def _matched(
    tensors: Mapping[str, torch.Tensor], modules: Mapping[str, tuple[int, int]], family: str, faults: list[str]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """Module -> {"A", "B"} and module -> alpha; keys that match nothing, or something twice, become faults."""
    fused = fused_names(family, modules)
    names = {name: [name] for name in modules} | {name: held for name, held in fused.items() if name not in modules}
    flat = {name.replace(".", "_"): held for name, held in names.items()}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown, foreign, twice = [], [], []
    for key, value in tensors.items():
        role, stem = next(
            ((role, key[: match.start()]) for pattern, role in ROLES if (match := pattern.search(key))), (None, key)
        )
        if role is None:
            unknown.append(key)
            continue
        held = _held(stem, names, flat)
        if held is None:
            foreign.append(key)
            continue
        if role == "alpha":
            repeated = [module for module in held if module in alphas]
            alphas |= dict.fromkeys(held, float(value.float().reshape(-1)[0]) if value.numel() == 1 else float("nan"))
        else:
            whole = role == "A" or value.shape[0] % len(
                held
            )  # a fused layer has one A for all, and the rows of B by turns
            shares = [value.clone() for _ in held] if whole else [share.clone() for share in value.chunk(len(held))]
            repeated = [module for module in held if role in parts.get(module, {})]
            for module, share in zip(held, shares, strict=True):
                parts.setdefault(module, {})[role] = share
        if repeated:
            twice.append(key)
    for keys, words in (
        (unknown, "keys that are no LoRA weight"),
        (foreign, "keys of layers that the base does not have"),
        (twice, "keys given twice"),
    ):
        if keys:
            faults.append(
                f"{len(keys)} {words}: {', '.join(sorted(keys)[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
            )
    for first, second in (("A", "B"), ("B", "A")):
        lone = sorted(name for name, pair in parts.items() if first in pair and second not in pair)
        if lone:
            faults.append(
                f"missing key: lora_{second} of {', '.join(lone[:SHOWN])}{f' and {len(lone) - SHOWN} more' if len(lone) > SHOWN else ''}"
            )
    without = sorted(alphas.keys() - parts.keys())
    if without:
        faults.append(f"alpha without weights: {', '.join(without[:SHOWN])}")
    if alphas and parts.keys() - alphas.keys():
        faults.append(
            f"missing key: alpha of {', '.join(sorted(parts.keys() - alphas.keys())[:SHOWN])}, which other layers have"
        )
    return parts, alphas


def _held(stem: str, names: Mapping[str, list[str]], flat: Mapping[str, list[str]]) -> list[str] | None:
    for prefix in FLAT_PREFIXES:
        if stem.startswith(prefix):
            return flat.get(stem.removeprefix(prefix))
    for _ in range(2):  # base_model.model.transformer.X has two
        prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), "")
        if stem in names or not prefix:
            break
        stem = stem.removeprefix(prefix)
    return names.get(stem)


def _shape_faults(
    parts: Mapping[str, dict[str, torch.Tensor]], modules: Mapping[str, tuple[int, int]], faults: list[str]
) -> None:
    for name, pair in sorted(parts.items()):
        if {"A", "B"} - pair.keys():
            continue
        (out, into), down, up = modules[name], tuple(pair["A"].shape), tuple(pair["B"].shape)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[1] != into or up[0] != out:
            faults.append(f"{name}: A is {down} and B {up}; the base's layer needs (rank, {into}) and ({out}, rank)")


def _coverage_faults(parts: Mapping[str, Any], modules: Mapping[str, tuple[int, int]], faults: list[str]) -> None:
    """An adapter covers a kind of layer in every block or in none: what covers it in some has lost keys."""
    kinds: dict[str, list[str]] = {}
    for name in modules:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1), []).append(name)
    for kind, members in sorted(kinds.items()):
        lacking = [name for name in members if name not in parts]
        if lacking and len(lacking) < len(members):
            faults.append(
                f"missing keys: {kind} is covered in {len(members) - len(lacking)} of {len(members)} blocks; not in {', '.join(lacking[:SHOWN])}"
            )


def _settings(
    path: Path, file: Path, ranks: Mapping[str, int], alphas: Mapping[str, float], faults: list[str]
) -> tuple[dict[str, tuple[float, int]], str]:
    """Module -> (alpha, rank), and where alpha came from: the keys, PEFT's config beside the file, diffusers' metadata
    in it, or the rank.
    """
    bad = [name for name, alpha in alphas.items() if not alpha > 0]
    if bad:
        faults.append(f"{bad[0]}: alpha = {alphas[bad[0]]}; expected one number above 0")
    config = _config(path, file)
    origin = "metadata" if config is None else "config"
    config = _metadata(file) if config is None else config
    if config is None:
        return {
            name: (alphas.get(name, float(rank)), rank) for name, rank in ranks.items()
        }, "keys" if alphas else "rank"
    for key, plain in (
        ("use_dora", False),
        ("bias", "none"),
        ("modules_to_save", None),
        ("lora_bias", False),
        ("peft_type", "LORA"),
    ):
        if config.get(key, plain) not in (plain, None, [], {}):
            faults.append(
                f"{key} = {config[key]!r}: more than plain LoRA; only adapters of plain LoRA can be distilled or switched on the base"
            )
    wrong = [
        name for name, rank in ranks.items() if rank != _patterned(config, "rank_pattern", name, config.get("r", rank))
    ]
    if wrong:
        faults.append(
            f"{wrong[0]}: rank {ranks[wrong[0]]} in the weights, but r = {config.get('r')} in {origin}; they do not belong together"
        )
    if alphas:  # a scale inside the file is the file's own
        return {name: (alphas.get(name, float(rank)), rank) for name, rank in ranks.items()}, "keys"
    settings = {}
    for name, rank in ranks.items():
        alpha = float(_patterned(config, "alpha_pattern", name, config.get("lora_alpha", rank)))
        settings[name] = (
            alpha * rank**0.5 if config.get("use_rslora") else alpha,
            rank,
        )  # rank-stabilised: alpha / sqrt(rank)
    return settings, origin


def _config(path: Path, file: Path) -> dict[str, Any] | None:
    """LoraConfig's fields from the JSON beside the weights: PEFT's, or a record of this pipeline's own (teacher.json,
    student.json).
    """
    if not path.is_dir() and file.name != PEFT_WEIGHTS:
        return None
    if (file.parent / PEFT_CONFIG).is_file():
        return dict(read_json(file.parent / PEFT_CONFIG))
    for name in RECORDS:
        if (file.parent / name).is_file():
            record = read_json(file.parent / name)
            return {"r": record.get("rank"), "lora_alpha": record.get("alpha")}
    return None


def _patterned(config: Mapping[str, Any], key: str, module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that the module's name ends with, or else the common value."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _metadata(file: Path) -> dict[str, Any] | None:
    """What diffusers writes into the file's header: LoraConfig's fields under "transformer."."""
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("lora_adapter_metadata")
        if text is None:
            return None
        fields = {
            key.removeprefix("transformer."): value
            for key, value in json.loads(text).items()
            if key.startswith("transformer.") or "." not in key
        }
    except (SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: its LoRA metadata cannot be read ({error}); write the file again") from error
    return fields or None


def _uniform(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], said: Mapping[str, tuple[float, int]], alpha_from: str
) -> Adapter:
    """One rank and one whole alpha for all layers; the tensors are left as they are where the file has that already."""
    rank = max(rank for _, rank in said.values())
    kinds = set(said.values())
    alpha, same = next(iter(kinds))[0], len(kinds) == 1
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(pairs):
        down, up = pairs[name]
        if not (same and alpha == int(alpha)):
            own_alpha, own_rank = said[name]
            down, up = down.float(), up.float() * (own_alpha / own_rank)
            if own_rank < rank:
                down = torch.cat([down, down.new_zeros(rank - own_rank, down.shape[1])])
                up = torch.cat([up, up.new_zeros(up.shape[0], rank - own_rank)], dim=1)
        tensors |= {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up.contiguous()}
    return Adapter(
        tensors, tuple(sorted(pairs)), rank, int(alpha) if same and alpha == int(alpha) else rank, alpha_from
    )


def concatenated(adapters: Iterable[tuple[Adapter, float]]) -> Adapter:
    """One adapter whose delta is the weighted sum of the given ones' deltas, exactly: ranks add up, scales go into B,
    alpha = rank. In fp32.
    """
    members = list(adapters)
    rank = sum(adapter.rank for adapter, _ in members)
    modules = sorted({name for adapter, _ in members for name in adapter.modules})
    tensors: dict[str, torch.Tensor] = {}
    for name in modules:
        shapes = {
            (a.tensors[f"{name}.lora_A.weight"].shape[1], a.tensors[f"{name}.lora_B.weight"].shape[0])
            for a, _ in members
            if name in a.modules
        }
        ((into, out),) = shapes
        downs, ups = [], []
        for adapter, weight in members:
            if name in adapter.modules:
                downs.append(adapter.tensors[f"{name}.lora_A.weight"].float())
                ups.append(adapter.tensors[f"{name}.lora_B.weight"].float() * (weight * adapter.alpha / adapter.rank))
            else:
                downs.append(torch.zeros(adapter.rank, into))
                ups.append(torch.zeros(out, adapter.rank))
        tensors |= {f"{name}.lora_A.weight": torch.cat(downs), f"{name}.lora_B.weight": torch.cat(ups, dim=1)}
    return Adapter(tensors, tuple(modules), rank, rank, "rank")


def write_peft(folder: Path, adapter: Adapter) -> None:
    """A folder that `peft.PeftModel.from_pretrained(network, folder)` loads; `read_adapter` too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PEFT_WEIGHTS, {f"base_model.model.{key}": value for key, value in adapter.tensors.items()})
    LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.modules), inference_mode=True
    ).save_pretrained(str(folder))


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
        key: value.float() * scale if key.endswith("lora_B.weight") else value.float()
        for key, value in adapter.tensors.items()
    }
    write_tensors(file, {f"{prefix}{key}": value for key, value in tensors.items()})
