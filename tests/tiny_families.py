"""Real pipeline folders of both families, small enough for a test: the libraries' own classes with random weights,
tokenizers of a few words.

The pipelines themselves save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SENTENCE = (
    "a an the photo image of red green blue yellow circle square triangle cross on over white gray black pink and "
    "background make it night two"
)
WORDS = SENTENCE.split()
CHANNELS = 4  # latent
PIXELS = 2  # a latent
MAX_TOKENS = 24
SHIFT = 3.0
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _bytes() -> list[str]:
    """The 256 symbols of byte-level BPE (openai/gpt-2), without merges: every text can be written."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [code for code in range(256) if code not in plain]
    return [chr(code) for code in plain] + [chr(256 + index) for index in range(len(rest))]


def clip_tokenizer() -> CLIPTokenizer:
    """Words of WORDS are one token each, other words fall into letters."""
    symbols = [*_bytes(), *(f"{symbol}</w>" for symbol in _bytes())]
    vocab, merges = {symbol: index for index, symbol in enumerate(symbols)}, []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces = ["".join(pair), *pieces[2:]]
            vocab.setdefault(pieces[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)]
    scores += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Qwen2Tokenizer:
    vocab = {symbol: index for index, symbol in enumerate(_bytes())}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    for special in specials:
        vocab[special] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=specials[1:])
    tokenizer.chat_template = CHAT
    return tokenizer


def randomise(module: nn.Module, seed: int, size: float = 1.0) -> None:
    """Weights that depend on `seed` alone, and none of them zero: libraries start gates and biases at zero, which would
    hide much.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) * size / value[0].numel() ** 0.5)
            else:
                value.copy_(
                    torch.randn(value.shape, generator=generator) * 0.1
                    + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
                )


def vae() -> AutoencoderKL:
    made = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomise(made, seed=20)
    return made


def sd3_network(wide: bool = True, seed: int = 1) -> SD3Transformer2DModel:
    network = SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=2 * CHANNELS if wide else CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    randomise(network, seed, size=0.6)
    return network


def zimage_network(seed: int = 2) -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 4],
        axes_lens=[256, 32, 32],
    )
    randomise(network, seed, size=0.6)
    return network


def _clip(width: int, seed: int, tokens: int) -> CLIPTextModelWithProjection:
    ends = {"eos_token_id": tokens - 1, "bos_token_id": tokens - 2, "pad_token_id": tokens - 1}
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            **ends,
        )
    )
    randomise(encoder, seed)
    return encoder


def sd3_pipeline(wide: bool = True, shift: float = SHIFT) -> StableDiffusion3Pipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    encoder = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    randomise(encoder, seed=12)
    return StableDiffusion3Pipeline(
        transformer=sd3_network(wide),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(),
        text_encoder=_clip(8, 10, len(clip)),
        tokenizer=clip,
        text_encoder_2=_clip(16, 11, len(clip)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=t5,
    )


def zimage_pipeline(shift: float = SHIFT) -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = Qwen3Model(config)
    randomise(encoder, seed=13)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return ZImagePipeline(
        scheduler=scheduler, vae=vae(), text_encoder=encoder, tokenizer=tokenizer, transformer=zimage_network()
    )


PIPELINES = {"sd3": sd3_pipeline, "zimage": zimage_pipeline}


def save_family(folder: Path, family: str, **options: Any) -> Path:
    """A pipeline folder of "sd3" (by default one that reads a source image) or "zimage", written by the pipeline."""
    pipeline = PIPELINES[family](**options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return folder


def edit_config(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
