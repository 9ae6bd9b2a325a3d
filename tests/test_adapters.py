"""Property: an adapter file in any common key style gives the same network, to the bit where nothing has to be
rescaled; a file that does not fit whole is refused with every fault; what is written is loaded by PEFT and by diffusers
to the same output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from data.errors import UserError
from model.networks.adapters import (
    Adapter,
    adapter_file,
    concatenated,
    fused_names,
    linear_modules,
    read_adapter,
    write_comfyui,
    write_peft,
)
from model.randomness import torch_generator

RANK, ALPHA = 3, 6
SD3_LAYERS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "ff.net.0.proj",
)
ZIMAGE_LAYERS = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def sd3() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
    ).eval()


def zimage() -> Any:
    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    ).eval()


FAMILIES = {"sd3": (sd3, SD3_LAYERS), "zimage": (zimage, ZIMAGE_LAYERS)}


def adapter_for(network: nn.Module, ends: tuple[str, ...], rank: int = RANK, alpha: int = ALPHA) -> Adapter:
    tensors = {}
    for slot, (name, (out, into)) in enumerate(sorted(linear_modules(network).items())):
        if name.endswith(ends):
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=torch_generator(0, 0, slot, "A"))
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(out, rank, generator=torch_generator(0, 0, slot, "B"))
    return Adapter(tensors, tuple(sorted({key.rsplit(".lora_", 1)[0] for key in tensors})), rank, alpha)


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        name: adapter.tensors[f"{name}.lora_B.weight"].float()
        @ adapter.tensors[f"{name}.lora_A.weight"].float()
        * (adapter.alpha / adapter.rank)
        for name in adapter.modules
    }


def assert_same(read: Adapter, written: Adapter) -> None:
    expected = deltas(written)
    assert set(read.modules) == set(written.modules)
    for name, delta in deltas(read).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-6, atol=1e-7)


def merged(network: nn.Module, adapter: Adapter) -> nn.Module:
    with torch.no_grad():
        for name, delta in deltas(adapter).items():
            network.get_submodule(name).weight += delta  # type: ignore[operator]
    return network


def output(family: str, network: Any) -> torch.Tensor:
    x = torch.randn(1, 4, 4, 4, generator=torch_generator(1, 0, 0, "x"))
    text = torch.randn(1, 5, 16, generator=torch_generator(1, 0, 0, "text"))
    with torch.no_grad():
        if family == "sd3":
            return network(
                hidden_states=x,
                timestep=torch.tensor([500.0]),
                encoder_hidden_states=text,
                pooled_projections=text[:, 0],
                return_dict=False,
            )[0]
        return network([x[0].unsqueeze(1)], torch.tensor([0.5]), [text[0]], return_dict=False)[0][0]


def styled(adapter: Adapter, style: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the keys of one style."""
    pairs = {
        name: (adapter.tensors[f"{name}.lora_A.weight"], adapter.tensors[f"{name}.lora_B.weight"])
        for name in adapter.modules
    }
    made: dict[str, torch.Tensor] = {}
    for name, (down, up) in pairs.items():
        flat, alpha = name.replace(".", "_"), torch.tensor(float(adapter.alpha))
        if style == "kohya":
            made |= {
                f"lora_unet_{flat}.lora_down.weight": down,
                f"lora_unet_{flat}.lora_up.weight": up,
                f"lora_unet_{flat}.alpha": alpha,
            }
        elif style == "onetrainer":
            made |= {
                f"lora_transformer_{flat}.lora_down.weight": down,
                f"lora_transformer_{flat}.lora_up.weight": up,
                f"lora_transformer_{flat}.alpha": alpha,
            }
        elif style == "comfyui":
            made |= {
                f"diffusion_model.{name}.lora_A.weight": down,
                f"diffusion_model.{name}.lora_B.weight": up,
                f"diffusion_model.{name}.alpha": alpha,
            }
        elif style == "diffusers old":
            made |= {
                f"transformer.{name}.lora.down.weight": down,
                f"transformer.{name}.lora.up.weight": up,
                f"transformer.{name}.alpha": alpha,
            }
        elif style == "peft default":
            made |= {
                f"base_model.model.{name}.lora_A.default.weight": down,
                f"base_model.model.{name}.lora_B.default.weight": up,
                f"{name}.alpha": alpha,
            }
    return made


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[str, Any, Adapter]:
    make, ends = FAMILIES[request.param]
    network = make()
    return request.param, network, adapter_for(network, ends)


@pytest.mark.parametrize("style", ["kohya", "onetrainer", "comfyui", "diffusers old", "peft default"])
def test_every_key_style_is_read_with_its_alpha(family: tuple[str, Any, Adapter], style: str, tmp_path: Path) -> None:
    name, network, adapter = family
    save_file(styled(adapter, style), tmp_path / "lora.safetensors")
    read = read_adapter(tmp_path / "lora.safetensors", network, name)
    assert (read.rank, read.alpha, read.modules) == (RANK, ALPHA, adapter.modules)
    assert read.tensors.keys() == adapter.tensors.keys() and all(
        torch.equal(value, adapter.tensors[key]) for key, value in read.tensors.items()
    )


def test_fused_layers_of_the_original_checkpoint_are_split(family: tuple[str, Any, Adapter], tmp_path: Path) -> None:
    """kohya's and ComfyUI's names for SD3 and Z-Image: one qkv layer, whose A is shared and whose B is stacked."""
    name, network, adapter = family
    fused = fused_names(name, adapter.modules)
    assert any(len(held) == 3 for held in fused.values())
    shared = {held[0]: adapter.tensors[f"{held[0]}.lora_A.weight"] for held in fused.values()}
    tensors, expected = {}, dict(adapter.tensors)
    for index, (original, held) in enumerate(fused.items()):
        stem = f"lora_unet_{original.replace('.', '_')}" if index % 2 else f"diffusion_model.{original}"
        tensors[f"{stem}.lora_down.weight"] = shared[held[0]].clone()
        tensors[f"{stem}.lora_up.weight"] = torch.cat([adapter.tensors[f"{module}.lora_B.weight"] for module in held])
        tensors[f"{stem}.alpha"] = torch.tensor(float(ALPHA))
        expected |= {f"{module}.lora_A.weight": shared[held[0]] for module in held}
    rest = [module for module in adapter.modules if not any(module in held for held in fused.values())]
    for module in rest:
        stem, down, up = (
            f"diffusion_model.{module}",
            adapter.tensors[f"{module}.lora_A.weight"],
            adapter.tensors[f"{module}.lora_B.weight"],
        )
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(float(ALPHA)),
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    read = read_adapter(tmp_path / "lora.safetensors", network, name)
    assert read.tensors.keys() == expected.keys() and all(
        torch.equal(read.tensors[key], value) for key, value in expected.items()
    )


def test_peft_loads_what_is_written_and_it_is_read_back(family: tuple[str, Any, Adapter], tmp_path: Path) -> None:
    name, network, adapter = family
    write_peft(tmp_path, adapter)
    assert_same(read_adapter(tmp_path, network, name), adapter)
    expected = output(name, merged(FAMILIES[name][0](), adapter))
    wrapped = PeftModel.from_pretrained(FAMILIES[name][0](), str(tmp_path)).eval()
    torch.testing.assert_close(output(name, wrapped), expected, rtol=0, atol=1e-5)
    assert float((expected - output(name, network)).abs().max()) > 1e-3  # the adapter does something


def test_diffusers_loads_the_single_file_and_it_is_read_back(family: tuple[str, Any, Adapter], tmp_path: Path) -> None:
    """The key style that ComfyUI maps for the family is also what the family's own pipeline of diffusers loads."""
    from diffusers.loaders import SD3LoraLoaderMixin, ZImageLoraLoaderMixin

    name, network, adapter = family
    write_comfyui(tmp_path / "lora.safetensors", adapter, name)
    assert_same(read_adapter(tmp_path / "lora.safetensors", network, name), adapter)
    mixin = {"sd3": SD3LoraLoaderMixin, "zimage": ZImageLoraLoaderMixin}[name]
    fresh = FAMILIES[name][0]()
    mixin.load_lora_into_transformer(
        mixin.lora_state_dict(str(tmp_path / "lora.safetensors")), transformer=fresh, adapter_name="lora"
    )
    torch.testing.assert_close(
        output(name, fresh), output(name, merged(FAMILIES[name][0](), adapter)), rtol=0, atol=1e-5
    )
    keys = list(load_file(tmp_path / "lora.safetensors"))
    assert all(key.startswith({"sd3": "transformer.", "zimage": "diffusion_model."}[name]) for key in keys)


def test_the_config_beside_the_file_and_the_metadata_in_it_are_honoured(tmp_path: Path) -> None:
    network = sd3()
    adapter = adapter_for(network, SD3_LAYERS)
    write_peft(tmp_path / "peft", adapter)
    assert read_adapter(tmp_path / "peft", network, "sd3").alpha == ALPHA
    keys = {f"transformer.{key}": value for key, value in adapter.tensors.items()}
    fields = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.target_modules": ["to_q"]}
    save_file(keys, tmp_path / "said.safetensors", metadata={"lora_adapter_metadata": json.dumps(fields)})
    said = read_adapter(tmp_path / "said.safetensors", network, "sd3")
    assert said.alpha == ALPHA
    save_file(keys, tmp_path / "silent.safetensors")
    silent = read_adapter(tmp_path / "silent.safetensors", network, "sd3")
    assert silent.alpha == RANK
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for changes, words in (
        ({"use_dora": True}, "use_dora"),
        ({"r": 5}, "rank 3"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["x"]}, "modules_to_save"),
    ):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=words):
            read_adapter(tmp_path / "peft", network, "sd3")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    stabilised = deltas(read_adapter(tmp_path / "peft", network, "sd3"))
    for name, delta in deltas(adapter).items():
        torch.testing.assert_close(stabilised[name], delta * RANK**0.5, rtol=1e-5, atol=1e-6)


def test_layers_of_different_rank_and_alpha_keep_their_deltas(tmp_path: Path) -> None:
    network = sd3()
    one, other = (
        adapter_for(network, ("attn.to_q",), rank=2, alpha=1),
        adapter_for(network, ("attn.to_k",), rank=5, alpha=10),
    )
    save_file(styled(one, "kohya") | styled(other, "kohya"), tmp_path / "lora.safetensors")
    read = read_adapter(tmp_path / "lora.safetensors", network, "sd3")
    assert (read.rank, read.alpha) == (5, 5)
    expected = deltas(one) | deltas(other)
    for name, delta in deltas(read).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-6, atol=1e-7)


def test_a_concatenation_is_the_weighted_sum() -> None:
    network = sd3()
    one, other = (
        adapter_for(network, ("attn.to_q", "attn.to_k"), rank=2, alpha=1),
        adapter_for(network, ("attn.to_k", "attn.to_v"), rank=3, alpha=9),
    )
    joined = concatenated([(one, 0.25), (other, 0.75)])
    assert joined.rank == 5 and set(joined.modules) == set(one.modules) | set(other.modules)
    first, second = deltas(one), deltas(other)
    for name, delta in deltas(joined).items():
        expected = 0.25 * first.get(name, torch.zeros_like(delta)) + 0.75 * second.get(name, torch.zeros_like(delta))
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_refused_with_every_fault(tmp_path: Path) -> None:
    network = sd3()
    adapter = adapter_for(network, SD3_LAYERS)
    good = styled(adapter, "kohya")
    stem = "lora_unet_transformer_blocks_0_attn_to_q"
    damages: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "extra": (
            {**good, "lora_unet_transformer_blocks_9_attn_to_q.lora_down.weight": torch.zeros(3, 16)},
            "1 keys of layers that the base does not have",
        ),
        "text": (
            {**good, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(3, 16)},
            "layers that the base does not have: lora_te1",
        ),
        "dora": ({**good, f"{stem}.dora_scale": torch.zeros(3)}, "1 keys that are no LoRA weight"),
        "no B": (
            {key: value for key, value in good.items() if key != f"{stem}.lora_up.weight"},
            "missing key: lora_B of transformer_blocks.0.attn.to_q",
        ),
        "no alpha": (
            {key: value for key, value in good.items() if key != f"{stem}.alpha"},
            "missing key: alpha of transformer_blocks.0.attn.to_q",
        ),
        "block lost": (
            {key: value for key, value in good.items() if not key.startswith(stem)},
            r"transformer_blocks.\*.attn.to_q is covered in 1 of 2 blocks",
        ),
        "shape": (
            {**good, f"{stem}.lora_down.weight": torch.zeros(3, 7)},
            r"transformer_blocks.0.attn.to_q: A is \(3, 7\)",
        ),
        "rank": (
            {**good, f"{stem}.lora_down.weight": torch.zeros(4, 16)},
            r"transformer_blocks.0.attn.to_q: A is \(4, 16\) and B \(16, 3\)",
        ),
        "twice": ({**good, "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(3, 16)}, "1 keys given twice"),
        "nan": ({**good, f"{stem}.lora_down.weight": torch.full((3, 16), float("nan"))}, "not finite"),
        "alpha 0": ({**good, f"{stem}.alpha": torch.tensor(0.0)}, "alpha = 0.0"),
    }
    for name, (tensors, words) in damages.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=words):
            read_adapter(tmp_path / f"{name}.safetensors", network, "sd3")
    save_file({**damages["no B"][0], f"{stem}.dora_scale": torch.zeros(3)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"(?s)no LoRA weight.*missing key: lora_B"):
        read_adapter(tmp_path / "two.safetensors", network, "sd3")
    with pytest.raises(UserError, match="does not fit the base"):  # the other family's
        read_adapter(tmp_path / "extra.safetensors", zimage(), "zimage")


def test_pickle_and_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="can carry code"):
        adapter_file(tmp_path / "lora.bin")
    with pytest.raises(UserError, match="0 adapter files"):
        adapter_file(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="2 adapter files"):
        adapter_file(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert adapter_file(tmp_path).name == "adapter_model.safetensors"
