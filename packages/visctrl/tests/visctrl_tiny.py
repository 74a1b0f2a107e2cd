"""Tiny networks of diffusers' own classes with random weights."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def tiny_unet(**changes):
    """Attention in the down, the middle and the up block: 6 self-attention layers."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**settings | changes).eval()


def tiny_unconditional(**changes):
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**settings | changes).eval()


def ddim(**changes):
    return DDIMScheduler(**SCHEDULE | {"steps_offset": 1, "set_alpha_to_one": False} | changes)


def latents(seed, rows=1, size=8):
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(seed))


CHANNELS = 4


def tiny_vae(channels=CHANNELS, seed=3):
    torch.manual_seed(seed)
    return AutoencoderKL(
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=5.0,  # latents of about unit size, as those of trained autoencoders
    ).eval()


def clip_tokenizer(folder):
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def clip_text(kind=CLIPTextModel, width=16):
    torch.manual_seed(4)
    return kind(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            projection_dim=width,
        )
    ).eval()


def t5(folder):
    letters = [chr(c) for c in range(97, 123)]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((x, -2.0) for x in letters), ("\u2581", -2.0)]
    file = folder / "t5.json"
    Tokenizer(Unigram(words, unk_id=2)).save(str(file))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    torch.manual_seed(5)
    config = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def sd(folder, **changes):
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder),
        unet=tiny_unet(),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **changes,
    )


def sdxl(folder):
    tokenizer = clip_tokenizer(folder)
    unet = tiny_unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=ddim(),
        add_watermarker=False,
    )


def sd3(folder):
    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=clip_text(CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux(folder):
    tokenizer, encoder = t5(folder)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def pixart(folder):
    tokenizer, encoder = t5(folder)
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        caption_channels=16,
        out_channels=8,
        use_additional_conditions=False,
    ).eval()
    # the last layer begins at zero, and a network that says nothing shows nothing
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=tiny_vae(), transformer=transformer, scheduler=ddim()
    )


def unconditional(_):
    return DDIMPipeline(tiny_unconditional(in_channels=3, out_channels=3, sample_size=16), ddim())


FAMILIES = {"sd": sd, "sdxl": sdxl, "pixart": pixart, "sd3": sd3, "flux": flux, "unconditional": unconditional}


def picture(seed, rows=1, size=16):
    """Smooth colors."""
    x = torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, (size, size), mode="bilinear").clamp(-2, 2) / 2
