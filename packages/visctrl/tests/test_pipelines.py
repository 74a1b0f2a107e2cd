import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from visctrl.config import VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.errors import UnsupportedModelError
from visctrl.pipelines import VisCtrlCallback, VisCtrlStableDiffusionPipeline
from visctrl_tiny import picture, sd, sd3, sdxl

CONFIG = VisCtrlConfig(steps=4, start=0.5, layers="0:", rounds=1, refine=2, guard=False, partial=False, guidance=3.0)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def processors_of(model):
    return {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}


@pytest.mark.parametrize("build", [sd, sdxl, sd3])
@pytest.mark.parametrize("rows", ["cond", "match"])
def test_a_stock_pipeline_with_the_callback_gives_the_engines_latents(build, rows, tmp_path):
    pipe = build(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    engine = VisCtrl(pipe, dataclasses.replace(CONFIG, guidance_rows=rows))
    reference = engine.reference(picture(1))
    want = engine.edit(picture(0), reference, prompt="c").latents
    before = processors_of(engine.adapter.model)
    trajectory = engine.invert(picture(0), "c")
    callback = VisCtrlCallback(engine, engine.reference(picture(1)))
    call = {
        "prompt": "c",
        "latents": trajectory.latents[-1],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": callback.tensor_inputs,
    }
    with callback.attach():
        got = pipe(**call).images
    assert (got - want).abs().max() < 2e-4 * want.abs().max()
    assert all(processors_of(engine.adapter.model)[name] is x for name, x in before.items())
    free = pipe(**call).images
    assert (free - want).abs().max() > 1e-3


def test_the_callback_holds_the_background_as_the_engine_does(tmp_path):
    pipe = sd(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    engine, mask = VisCtrl(pipe, CONFIG), torch.zeros(16, 16)
    mask[4:12, 4:12] = 1
    want = engine.edit(picture(0), picture(1), mask=mask).latents
    trajectory = engine.invert(picture(0))
    with pytest.raises(ValueError, match="trajectory"):
        VisCtrlCallback(engine, engine.reference(picture(1)), mask=mask)
    callback = VisCtrlCallback(engine, engine.reference(picture(1)), mask=mask, trajectory=trajectory)
    with callback.attach():
        got = pipe(
            "",
            latents=trajectory.latents[-1],
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=callback.tensor_inputs,
        ).images
    assert (got - want).abs().max() < 2e-4 * want.abs().max()


def photo(seed, width=16, height=16):
    x = ((picture(seed, size=max(width, height))[0] + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(x[:height, :width]))


def test_a_pipeline_made_of_another_shares_its_parts_and_edits_pictures_of_odd_sizes(tmp_path):
    pipe = sd(tmp_path)
    made = VisCtrlStableDiffusionPipeline.from_pipe(pipe)
    assert made.unet is pipe.unet
    config = dataclasses.replace(CONFIG, rounds=2)
    out = made([photo(0, 15, 13), photo(2, 15, 13)], photo(1), prompt="c", config=config)
    assert [x.size for x in out.images] == [(15, 13)] * 2
    assert out.nsfw_content_detected is None
    assert out.edit.rounds == [2, 2]


def test_a_safety_checker_is_asked_and_what_it_blanks_is_black(tmp_path):
    torch.manual_seed(2)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=8))
    parts = sd(tmp_path).components | {
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
    }
    pipe = VisCtrlStableDiffusionPipeline.from_pipe(StableDiffusionPipeline(**parts))
    found = {}
    for level in (-2.0, 2.0):
        checker.concept_embeds_weights.data.fill_(level)
        checker.special_care_embeds_weights.data.fill_(level)
        out = pipe(photo(0), photo(1), config=CONFIG)
        found[level] = np.asarray(out.images[0]).max()
        assert out.nsfw_content_detected == [level < 0]
    assert found[-2.0] == 0 < found[2.0]


def test_an_ip_adapter_keeps_its_effect_and_is_asked_for_its_picture(tmp_path):
    pipe = sd(tmp_path)
    torch.manual_seed(1)
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8)).eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
    )
    g = torch.Generator().manual_seed(3)
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * 16, 8, generator=g),
        "image_proj.proj.bias": torch.zeros(4 * 16),
        "image_proj.norm.weight": torch.ones(16),
        "image_proj.norm.bias": torch.zeros(16),
    }
    crossing = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossing):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{key}.weight"] = torch.randn(width, 16, generator=g)
    save_file(tensors, tmp_path / "ip-adapter.safetensors")
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    with pytest.raises(UnsupportedModelError, match="ip_adapter_image"):
        VisCtrl(pipe, CONFIG).conditions()
    made = VisCtrlStableDiffusionPipeline.from_pipe(pipe)
    before = processors_of(pipe.unet)
    outs = []
    for scale in (1.0, 0.0):
        made.set_ip_adapter_scale(scale)
        outs.append(np.asarray(made(photo(0), photo(1), config=CONFIG, ip_adapter_image=photo(2)).images[0], int))
    assert abs(outs[0] - outs[1]).max() > 3
    assert all(processors_of(pipe.unet)[name] is x for name, x in before.items())
