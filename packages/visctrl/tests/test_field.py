"""Pipelines as people load them, and what public bug reports tell of."""

import copy
import dataclasses

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
    UNetMotionModel,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from visctrl.config import ModelSettings, VisCtrlConfig
from visctrl.data import load_model
from visctrl.engine import VisCtrl
from visctrl.errors import UnsupportedModelError
from visctrl.pipelines import VisCtrlCallback
from visctrl_tiny import picture, sd, sdxl, tiny_unet

from tenfold import UserError

CONFIG = VisCtrlConfig(steps=4, start=0.5, layers="0:", rounds=1, refine=2, guard=False, guidance=2.0)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    made = sd(tmp_path_factory.mktemp("sd"))
    made.set_progress_bar_config(disable=True)
    return made


def edited(pipe, config=CONFIG):
    return VisCtrl(pipe, config).edit(picture(0), picture(1), prompt="a").images


SCHEDULERS = {
    "DDIM, velocity (Stable Diffusion 2.1)": (DDIMScheduler, {"prediction_type": "v_prediction"}),
    "DDIM, linspace": (DDIMScheduler, {"timestep_spacing": "linspace"}),
    "DDIM, trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "DDIM, zero terminal signal": (
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "PNDM, as Stable Diffusion 1.5 comes": (PNDMScheduler, {"skip_prk_steps": True}),
    "DPM-Solver": (DPMSolverMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_is_swapped_by_name_inverts_and_comes_back(pipe, name):
    kind, changes = SCHEDULERS[name]
    engine = VisCtrl(
        pipe,
        dataclasses.replace(CONFIG, refine=15, steps=8),
        scheduler=kind.from_config(pipe.scheduler.config, **changes),
    )
    z = engine.encode(picture(0))
    told = engine.conditions("")
    back = engine.denoise(engine.invert(picture(0), conditions=told).latents[-1], told)
    plain = VisCtrl(pipe, dataclasses.replace(engine.config, refine=1), scheduler=engine.adapter.scheduler)
    worse = plain.denoise(plain.invert(picture(0), conditions=told).latents[-1], told)
    error, other = ((x - z).square().mean().sqrt() for x in (back, worse))
    assert error < 0.5 * other


def test_a_saved_variant_loads_by_its_name_and_sliced_or_tiled_decoding_changes_nothing(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m", variant="fp16")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(ModelSettings(model=str(tmp_path / "m"), device="cpu"))
    loaded = load_model(ModelSettings(model=str(tmp_path / "m"), variant="fp16", device="cpu"))
    want = edited(pipe)
    assert (edited(loaded) - want).abs().max() < 1e-4
    loaded.vae.enable_slicing()
    assert (edited(loaded) - want).abs().max() < 1e-5


def test_a_loaded_lora_works_fused_and_unfused(pipe, tmp_path):
    own = sd(tmp_path)
    want = edited(own)
    own.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    loose = edited(own)
    own.fuse_lora()
    assert (edited(own) - loose).abs().max() < 1e-3
    own.unfuse_lora()
    assert (edited(own) - loose).abs().max() < 1e-3
    assert (loose - want).abs().max() > 1e-2


def test_a_compiled_denoiser_is_taken_as_the_network_inside(pipe, tmp_path):
    own = sd(tmp_path)
    want = edited(own)
    inner = own.unet
    own.unet = torch.compile(inner, backend="eager")
    assert torch.equal(edited(own), want)
    assert VisCtrl(own, CONFIG).adapter.model is inner


def test_attention_slicing_and_the_plain_processor_give_the_same_edit(pipe, tmp_path):
    own = sd(tmp_path)
    want = edited(own)
    for change in (own.enable_attention_slicing, own.unet.set_default_attn_processor):
        change()
        assert (edited(own) - want).abs().max() < 1e-4


def test_fused_projections_are_refused_with_the_way_back_and_work_after_it(pipe, tmp_path):
    own = sd(tmp_path)
    want = edited(own)
    own.fuse_qkv_projections(vae=False)
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        edited(own)
    own.unfuse_qkv_projections(vae=False)
    assert (edited(own) - want).abs().max() < 1e-5


def test_a_controlnet_works_beside_the_callback(pipe, tmp_path):
    torch.manual_seed(7)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    for block in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.1)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    controlled = StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    engine = VisCtrl(pipe, CONFIG)
    noise = engine.invert(picture(0)).latents[-1]
    call = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    hint = (picture(3) + 1) / 2
    free = controlled("a", hint.clamp(0, 1), **call).images
    with VisCtrlCallback(engine, engine.reference(picture(1))).attach():
        both = controlled("a", hint.clamp(0, 1), **call).images
        alone = pipe("a", **call).images
    assert (both - free).abs().max() > 1e-3
    assert (both - alone).abs().max() > 1e-3


def test_an_autoencoder_that_overflows_in_half_precision_is_widened_and_put_back(pipe, tmp_path):
    own = sd(tmp_path)
    own.vae.register_to_config(force_upcast=True)
    want = VisCtrl(own, CONFIG).encode(picture(0))
    own.vae.to(torch.float16)
    before = copy.deepcopy(own.vae.state_dict())
    engine = VisCtrl(own, CONFIG)
    z = engine.encode(picture(0))
    assert (z - want).abs().max() < 1e-2 * want.abs().max()
    assert own.vae.dtype == torch.float16
    assert all(torch.equal(x, before[name]) for name, x in own.vae.state_dict().items())


def test_a_strongly_guided_inversion_stays_finite_and_its_residual_says_what_it_is_worth(pipe):
    residuals = []
    for guidance in (1.0, 2000.0):
        engine = VisCtrl(pipe, dataclasses.replace(CONFIG, inversion_guidance=guidance, refine=6))
        found = engine.invert(picture(0), "a")
        assert torch.isfinite(found.latents[-1]).all()
        residuals.append(float(found.residual))
    assert residuals[1] > 3 * residuals[0]
    guarded = VisCtrl(pipe, dataclasses.replace(engine.config, guard=True, max_residual=0.01))
    with pytest.warns(UserWarning, match="residual"):
        guarded.edit(picture(0), picture(1), prompt="a")


def with_parts(pipe, kind=StableDiffusionPipeline, **changes):
    """A pipeline of another class or with other parts."""
    return kind(**pipe.components | changes, requires_safety_checker=False)


def animated(pipe):
    motion = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return AnimateDiffPipeline(**parts, unet=UNetMotionModel.from_unet2d(pipe.unet, motion), motion_adapter=motion)


def with_adapter(pipe):
    adapter = T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)
    parts = {k: x for k, x in pipe.components.items() if k != "image_encoder"}
    return StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)


OTHERS = {
    "inpainting": (lambda p: with_parts(p, unet=tiny_unet(in_channels=9)), "takes 9 channels, the latents have 4"),
    "instructions": (lambda p: with_parts(p, unet=tiny_unet(in_channels=8)), "takes 8 channels"),
    "distilled": (lambda p: with_parts(p, unet=tiny_unet(time_cond_proj_dim=16)), "the guidance as a number"),
    "classes": (lambda p: with_parts(p, unet=tiny_unet(class_embed_type="timestep")), "class_embed_type timestep"),
    "T2I-Adapter": (with_adapter, "has a T2I-Adapter, which the engine would not call"),
    "AnimateDiff": (animated, "AnimateDiffPipeline is of no family that is known"),
    "no text encoder": (lambda p: with_parts(p, text_encoder=None), "of no family that is known"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_takes_more_than_latents_and_a_prompt_is_refused_by_name(pipe, name):
    make, said = OTHERS[name]
    with pytest.raises(UnsupportedModelError, match=said):
        VisCtrl(make(pipe), CONFIG)


def test_a_refiner_is_refused_and_a_pipeline_of_another_task_edits_as_the_text_to_image_pipeline(pipe, tmp_path):
    plain = edited(pipe)
    assert torch.equal(edited(with_parts(pipe, StableDiffusionImg2ImgPipeline)), plain)
    xl = sdxl(tmp_path)
    assert torch.equal(edited(StableDiffusionXLImg2ImgPipeline(**xl.components)), edited(xl))
    given = tiny_unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 16,
        use_linear_projection=True,
    )
    parts = xl.components | {"unet": given, "text_encoder": None, "tokenizer": None}
    with pytest.raises(UnsupportedModelError, match="takes 5 numbers about the picture, expected 6"):
        VisCtrl(StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True), CONFIG)


def test_the_sizes_that_xl_is_told_are_those_of_its_own_pipeline(tmp_path):
    xl, told = sdxl(tmp_path), []
    engine = VisCtrl(xl, CONFIG)
    handle = xl.unet.register_forward_pre_hook(
        lambda _, args, named: told.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    engine.edit(picture(0), picture(1))
    handle.remove()
    want = xl._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 16)
    assert all(torch.equal(x, want.expand(len(x), -1)) for x in told)


def test_an_autoencoder_that_names_mean_and_deviation_of_its_latents_gives_latents_of_about_unit_size(tmp_path):
    xl = sdxl(tmp_path)
    raw = xl.vae.encode(picture(0)).latent_dist.mode().detach()
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [2.0, 0.5, 1.5, 1.0]
    xl.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    engine = VisCtrl(xl, CONFIG)
    z = engine.encode(picture(0))
    for channel in range(4):
        want = (raw[:, channel] - mean[channel]) * xl.vae.config.scaling_factor / deviation[channel]
        assert torch.allclose(z[:, channel], want, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(engine.decode(z), xl.vae.decode(raw).sample, atol=1e-5)


def test_a_small_autoencoder_without_a_distribution_is_used_as_it_is(pipe):
    torch.manual_seed(0)
    sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    assert torch.isfinite(edited(with_parts(pipe, vae=vae))).all()


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (EulerDiscreteScheduler, {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (DDIMScheduler, {"thresholding": True}, "thresholding"),
        (LCMScheduler, {}, "for consistency models"),
    ],
)
def test_what_a_scheduler_asks_for_and_the_steps_here_do_not_follow_is_said(pipe, kind, changes, said):
    scheduler = kind.from_config(pipe.scheduler.config, **changes)
    with pytest.warns(UserWarning, match=said) as said_so:
        VisCtrl(pipe, CONFIG, scheduler=scheduler).edit(picture(0), picture(1))
    assert len(said_so) == 1
