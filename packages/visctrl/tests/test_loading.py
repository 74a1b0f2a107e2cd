"""Models as people load and arrange them: single files, offloading, casting, backends, several adapters; and every way out."""

import contextlib
import copy
import dataclasses
import re

import accelerate
import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from visctrl.config import ModelSettings, VisCtrlConfig
from visctrl.data import load_model
from visctrl.engine import VisCtrl
from visctrl.errors import UnsupportedModelError
from visctrl.pipelines import VisCtrlCallback, VisCtrlStableDiffusionPipeline
from visctrl.video import edit_video
from visctrl_tiny import flux, picture, sd, sd3

from tenfold import UserError

CONFIG = VisCtrlConfig(steps=4, start=0.5, layers="0:", rounds=1, refine=2, guard=False, guidance=2.0)


def edited(pipe, config=CONFIG):
    pipe.set_progress_bar_config(disable=True)
    return VisCtrl(pipe, config).edit(picture(0), picture(1), prompt="a").images


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_layout(pipe):
    """The weights of a pipeline under the names of the original Stable Diffusion files (one layer per block)."""
    out = {}
    for name, x in pipe.unet.state_dict().items():
        new = name
        for a, b in {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}.items():
            new = new.replace(a, b)
        for a, b in {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}.items():
            new = b + new.removeprefix(a) if new.startswith(a) else new
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", new)
        new = new.replace("mid_block.attentions.0", "middle_block.1")
        for side, first in (("down", 1), ("up", 0)):
            there = "input_blocks" if side == "down" else "output_blocks"
            for kind, place in (("resnets", 0), ("attentions", 1)):
                new = re.sub(
                    rf"{side}_blocks\.(\d)\.{kind}\.(\d)",
                    lambda m, first=first, there=there, place=place: (
                        f"{there}.{first + 2 * int(m[1]) + int(m[2])}.{place}"
                    ),
                    new,
                )
        new = new.replace("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op")
        new = new.replace("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv")
        if re.match(r"(input|output)_blocks\.\d\.0\.|middle_block\.[02]\.", new):
            for a, b in RESNET.items():
                new = re.sub(rf"\.{a}\.", f".{b}.", new)
        out[f"model.diffusion_model.{new}"] = x
    blocks = len(pipe.vae.config.up_block_types)
    for name, x in pipe.vae.state_dict().items():
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out").replace("to_q", "q").replace("to_k", "k").replace("to_v", "v")
            x = x[:, :, None, None] if x.ndim == 2 else x
        out[f"first_stage_model.{new}"] = x
    for name, x in pipe.text_encoder.state_dict().items():
        out[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = x
    return {name: x.contiguous().clone() for name, x in out.items()}


def test_a_single_file_in_the_original_layout_loads_with_a_folder_of_configurations(tmp_path):
    pipe = sd(tmp_path)
    pipe.save_pretrained(tmp_path / "m")
    for weights in (tmp_path / "m").rglob("*.safetensors"):
        weights.unlink()
    save_file(original_layout(pipe), tmp_path / "model.safetensors")
    settings = ModelSettings(
        model=str(tmp_path / "model.safetensors"), model_config=str(tmp_path / "m"), device="cpu", dtype="fp32"
    )
    loaded = load_model(settings)
    assert (edited(loaded) - edited(pipe)).abs().max() < 1e-5
    for model, config, said in (
        (tmp_path / "m", tmp_path / "m", "--model_config is for a .safetensors file"),
        (tmp_path / "model.safetensors", tmp_path, "no model_index.json"),
    ):
        with pytest.raises(UserError, match=said):
            load_model(ModelSettings(model=str(model), model_config=str(config), device="cpu"))


def hooked(pipe):
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload_with_hook(part, "cpu")


def sequential(pipe):
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"), offload_buffers=True)


def grouped(pipe):
    for part in (pipe.unet, pipe.vae):
        part.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def sliced(pipe):
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


ARRANGED = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "hooks of accelerate": hooked,
    "sequential offload": sequential,
    "group offload": grouped,
    "sliced and tiled decoding": sliced,
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_what_moves_parts_of_the_model_about_changes_no_edit(name, tmp_path):
    pipe = sd(tmp_path)
    configs = [dataclasses.replace(CONFIG, bank=bank) for bank in ("memory", "stream")]
    want = [edited(pipe, config) for config in configs]
    ARRANGED[name](pipe)
    for config, x in zip(configs, want, strict=True):
        assert (edited(pipe, config) - x).abs().max() < 1e-4
    forward = pipe.unet.forward
    edited(pipe)
    assert pipe.unet.forward == forward


def test_weights_stored_in_eight_bits_are_computed_in_the_format_that_was_asked_for(tmp_path):
    pipe = sd(tmp_path)
    want = edited(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = edited(pipe)
    assert torch.isfinite(found).all()
    assert (found - want).abs().mean() < 0.1 * want.abs().mean()


@pytest.mark.parametrize("build", [sd, sd3, flux])
def test_an_attention_backend_that_is_chosen_globally_gives_the_same_edit(build, tmp_path):
    pipe = build(tmp_path)
    config = dataclasses.replace(CONFIG, mode="union", bias=1.0)
    want = edited(pipe, config)
    with attention_backend("_native_math"):
        assert (edited(pipe, config) - want).abs().max() < 1e-3
    part = pipe.unet if build is sd else pipe.transformer
    if hasattr(part, "set_attention_backend"):
        part.set_attention_backend("_native_math")
        assert (edited(pipe, config) - want).abs().max() < 1e-3
        part.reset_attention_backend()


def test_a_backend_without_masks_injects_without_weights_and_says_what_weights_need(tmp_path):
    pipe = flux(tmp_path)
    want = edited(pipe)
    with attention_backend("_native_flash"):
        assert (edited(pipe) - want).abs().max() < 1e-3
        with pytest.raises(UnsupportedModelError, match="attention backend that takes masks, such as native"):
            edited(pipe, dataclasses.replace(CONFIG, mode="union", bias=1.0))


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def adapter(pipe, seed):
    """Weights of an IP-Adapter."""
    g = torch.Generator().manual_seed(seed)
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
    return tensors


def photo(seed):
    x = (picture(seed)[0] + 1) / 2
    return Image.fromarray((255 * x.clamp(0, 1).permute(1, 2, 0).numpy()).astype(np.uint8))


def test_several_ip_adapters_keep_their_effects_and_ask_for_as_many_pictures(tmp_path):
    pipe = sd(tmp_path)
    torch.manual_seed(1)
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8)).eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
    )
    names = ["a.safetensors", "b.safetensors"]
    for seed, name in enumerate(names):
        save_file(adapter(pipe, seed), tmp_path / name)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=names, image_encoder_folder=None)
    made = VisCtrlStableDiffusionPipeline.from_pipe(pipe)

    def shown(*scales, pictures=(2, 3)):
        made.set_ip_adapter_scale(list(scales))
        given = [photo(seed) for seed in pictures]
        return np.asarray(made(photo(0), photo(1), config=CONFIG, ip_adapter_image=given).images[0], int)

    off = shown(0.0, 0.0)
    for scales in ((1.0, 0.0), (0.0, 1.0)):
        assert abs(shown(*scales) - off).max() > 3
    assert abs(shown(1.0, 1.0) - shown(1.0, 1.0, pictures=(3, 2))).max() > 3
    with pytest.raises(UnsupportedModelError, match="2 IP-Adapters"):
        shown(1.0, 1.0, pictures=(2,))


def state(pipe, engine):
    """All that an edit might leave behind."""
    modules = dict(pipe.unet.named_modules())
    return {
        "processors": {n: m.processor for n, m in modules.items() if hasattr(m, "processor")},
        "names": {n: sorted(m.__dict__) for n, m in modules.items()},
        "children": {n: list(m._modules) for n, m in modules.items()},
        "hooks": {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in modules.items()},
        "training": {n: m.training for n, m in modules.items()},
        "weights": {n: copy.deepcopy(p.state_dict()) for n, p in (("unet", pipe.unet), ("vae", pipe.vae))},
        "dtype": (pipe.unet.dtype, pipe.vae.dtype),
        "scheduler": (dict(pipe.scheduler.config), pipe.scheduler.num_inference_steps),
        "config": engine.config,
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a is b or a == b


PATHS = {
    "invert": lambda e, pipe: e.invert(picture(0), "a"),
    "features": lambda e, pipe: e.features(e.reference(picture(1))),
    "edit": lambda e, pipe: e.edit(picture(0), e.reference(picture(1)), provenance=True),
    "sweep": lambda e, pipe: list(e.sweep(picture(0), e.reference(picture(1)), {"strength": [0.5, 1.0]})),
    "video": lambda e, pipe: list(edit_video(e, [picture(0), picture(2)], e.reference(picture(1)), keyframes=1)),
    "callback": lambda e, pipe: _called(e, pipe),
    "pipeline": lambda e, pipe: VisCtrlStableDiffusionPipeline.from_pipe(pipe)(photo(0), photo(1), config=e.config),
}


def _called(engine, pipe):
    with VisCtrlCallback(engine, engine.reference(picture(1)), guidance_scale=2.0).attach():
        scheduler, pipe.scheduler = pipe.scheduler, copy.deepcopy(pipe.scheduler)
        try:
            pipe("a", num_inference_steps=4, guidance_scale=2.0, output_type="latent", height=16, width=16)
        finally:
            pipe.scheduler = scheduler


@pytest.mark.parametrize("path", PATHS)
def test_model_processors_and_settings_are_as_they_were_after_every_path_and_every_way_out(path, tmp_path):
    pipe = sd(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    engine = VisCtrl(pipe, CONFIG)
    before = state(pipe, engine)
    PATHS[path](engine, pipe)
    calls = engine.rows
    assert same(state(pipe, engine), before)
    for fault in (RuntimeError, KeyboardInterrupt):
        for at in {1, max(2, calls // 4)}:
            left = iter(range(at - 1))

            def fail(*_, left=left, fault=fault):
                if next(left, None) is None:
                    raise fault("planted")

            hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
            with pytest.raises(fault, match="planted"):
                PATHS[path](engine, pipe)
            hook.remove()
            assert same(state(pipe, engine), before), (fault, at)


def test_a_video_that_is_given_up_in_its_midst_leaves_everything_as_it_was(tmp_path):
    pipe = sd(tmp_path)
    engine = VisCtrl(pipe, CONFIG)
    before = state(pipe, engine)
    with contextlib.closing(edit_video(engine, [picture(0)] * 3, engine.reference(picture(1)))) as results:
        next(results)
    assert same(state(pipe, engine), before)
