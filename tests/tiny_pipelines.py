"""Tiny diffusers pipelines with random weights, built without a hub from the real classes.

They draw noise-like pictures, but run every line of code that a trained pipeline runs.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("red", "apple", "green", "rocket", "cat", "face", "blue", "sun", "heart", "fish")


def word_tokenizer(length: int = 8, words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "</s>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=length,
    )


def flux(seed: int = 0, double: int = 2, single: int = 2, guidance_embeds: bool = False) -> FluxPipeline:
    """FluxPipeline: 16 px pictures in 4x4 tokens, 8 text tokens, width 32."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    words = len(tokenizer)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=8,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
        )
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=words, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )
    vae = _autoencoder()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    _wake(transformer)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=tokenizer,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = 8
    pipe.tokenizer_max_length = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_dev(seed: int = 0) -> FluxPipeline:
    """As `flux`, in the form of FLUX.1-dev: two tokenizers of other words and lengths, a guidance scale that
    is read, latents that are shifted and scaled, times shifted by the number of tokens."""
    pipe = flux(seed, guidance_embeds=True)
    pipe.register_modules(
        tokenizer_2=word_tokenizer(12, WORDS[::-1]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipe.vae.register_to_config(shift_factor=0.1159, scaling_factor=0.3611)
    return pipe


def sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """StableDiffusion3Pipeline: 16 px pictures in 4x4 tokens, 8 + 12 text tokens, width 32."""
    plain = flux(seed)
    plain.vae.register_to_config(shift_factor=0.0609, scaling_factor=1.5305)
    encoder = CLIPTextModelWithProjection(plain.text_encoder.config)
    other = CLIPTextModelWithProjection(plain.text_encoder.config)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    _wake(transformer)
    t5 = T5EncoderModel(
        T5Config(vocab_size=13, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=plain.vae,
        text_encoder=encoder.eval(),
        tokenizer=plain.tokenizer,
        text_encoder_2=other.eval(),
        tokenizer_2=plain.tokenizer,
        text_encoder_3=t5.eval(),
        tokenizer_3=word_tokenizer(12, WORDS[::-1]),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan(seed: int = 0, layers: int = 2) -> WanPipeline:
    """WanPipeline: a token for 8 x 8 pixels of two frames, 8 text tokens, width 32."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
        )
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=4,
        in_channels=48,
        out_channels=48,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    _wake(transformer)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart(seed: int = 0, layers: int = 2) -> PixArtSigmaPipeline:
    """PixArtSigmaPipeline: 16 px pictures in 4x4 tokens, 8 text tokens, width 32."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
        )
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
    )
    _wake(transformer)
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=_autoencoder().eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _autoencoder() -> AutoencoderKL:
    """Of 4 channels and half the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def _wake(model: torch.nn.Module) -> None:
    """Replace every weight by random values of a size at which each of them shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
