"""Pipelines as people load them, and what public bug reports tell of."""

import copy
import dataclasses

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from visctrl.config import ModelSettings, VisCtrlConfig
from visctrl.data import load_model
from visctrl.engine import VisCtrl
from visctrl.errors import UnsupportedModelError
from visctrl.pipelines import VisCtrlCallback
from visctrl_tiny import picture, sd

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
