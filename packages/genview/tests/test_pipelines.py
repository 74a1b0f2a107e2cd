"""Pipelines of the real architecture with small random weights, as others save them, through the commands.

Text encoder, tokenizer, cross-attention and an autoencoder that learns, unlike in the tiny one of ``train-tiny``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from genview.cli import main
from genview.generators import IPAdapterGenerator, UnCLIPGenerator
from genview.store import ViewStore
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tenfold import UserError
from tenfold.readers import read_image
from tenfold.testing import assert_user_error

WIDTH, DIM, TOKENS = 16, 8, 4
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def parts(folder, class_embedding=None):
    """A denoiser with cross-attention, an autoencoder, a text encoder with its tokenizer."""
    torch.manual_seed(0)
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=12)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    classes = (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": class_embedding}
        if class_embedding
        else {}
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        **classes,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=32,
    )
    return {"tokenizer": tokenizer, "text_encoder": text.eval(), "unet": unet, "vae": vae}


def seer():
    torch.manual_seed(1)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=DIM)).eval()


@pytest.fixture(scope="module")
def unclip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unclip")
    pipe = StableUnCLIPImg2ImgPipeline(
        **parts(folder, 2 * DIM),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        image_encoder=seer(),
        image_normalizer=StableUnCLIPImageNormalizer(DIM),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type="v_prediction"),
    )
    pipe.save_pretrained(folder / "whole")
    pipe.save_pretrained(folder / "sharded", max_shard_size="40KB")
    return folder


def run(*words):
    assert main([*map(str, words), "--quiet"]) == 0


def test_a_real_architecture_goes_from_plan_to_sheet_with_two_workers_one_of_them_killed(unclip, data, tmp_path):
    whole, pictures = unclip / "whole", f"npz:{data}"
    run("fit-foreground", "--data", pictures, "--encoder", f"generator:{whole}", "--out", tmp_path / "fg")
    shared = ["--foreground", tmp_path / "fg", "--generator", whole]
    run("plan", "--data", pictures, *shared, "--unit", 4, "--guidance", 3, "--out", tmp_path / "plan")
    views = ["--plan", tmp_path / "plan", "--views", tmp_path / "views"]
    start = ["generate", *views, "--generator", whole, "--steps", 2, "--batch_size", 1, "--device", "cpu"]
    first = [str(w) for w in [*start, "--shard", "0/2", "--out", tmp_path / "log-0", "--quiet"]]
    code = "import sys; from genview.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *first])
    run(*start, "--shard", "1/2", "--out", tmp_path / "log-1")
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((tmp_path / "views/images").rglob("*.png"))) > 13:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    run("generate", *first[1:-1], "--resume")
    run("status", *views, "--verify", "true")
    scored = ["--quality_encoder", f"generator:{whole}", "--quality_foreground", tmp_path / "fg"]
    run("merge", *views, *scored, "--out", tmp_path / "merged")
    run("inspect", "--data", pictures, "--views", tmp_path / "merged", *shared[:2], "--out", tmp_path / "sheet")
    assert json.loads((tmp_path / "merged/merged.json").read_text())["counts"]["ok"] == 24
    sheet = tmp_path / "sheet/figures/sheet.png"
    assert read_image(sheet).std() > 10
    if folder := os.environ.get("GENVIEW_KEEP"):
        shutil.copy(sheet, folder)


def test_sharded_weights_are_read_and_give_the_same_pictures(unclip):
    assert list((unclip / "sharded/unet").glob("*-of-*.safetensors"))
    c = torch.randn(2, DIM)
    a, b = (
        UnCLIPGenerator.from_pretrained(unclip / name, steps=2).generate(c, 100, [1, 2], guidance=2.0)
        for name in ("whole", "sharded")
    )
    assert abs(a.astype(int) - b.astype(int)).max() <= 1


def test_a_prompt_changes_the_picture_and_none_is_the_empty_one(unclip):
    made = UnCLIPGenerator.from_pretrained(unclip / "whole", steps=2)
    c = torch.randn(1, DIM)
    none, empty, dog = (made.generate(c, 0, [1], guidance=5.0, prompts=p).astype(int) for p in (None, [""], ["dog"]))
    assert abs(none - empty).max() == 0
    assert abs(none - dog).max() > 0


def test_halves_of_a_pipeline_in_fp16_are_computed_in_fp32_on_a_cpu(unclip, tmp_path):
    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(unclip / "whole", torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    made = UnCLIPGenerator.from_pretrained(tmp_path / "half", steps=1)
    assert made.dtype == torch.float32
    assert made.generate(made.embed(torch.rand(1, 3, 40, 40)), 0, [1]).shape == (1, 32, 32, 3)


def test_what_a_safety_checker_blanks_is_an_error_and_no_view(tmp_path, data, capsys):
    found = parts(tmp_path)
    torch.manual_seed(2)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=DIM))
    checker.concept_embeds_weights.data.fill_(-2.0)  # whatever it sees is reported
    checker.special_care_embeds_weights.data.fill_(-2.0)
    pipe = StableDiffusionImg2ImgPipeline(
        **found,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    )
    pipe.save_pretrained(tmp_path / "checked")
    run("plan", "--data", f"npz:{data}", "--policy", "constant", "--levels", 500, "--out", tmp_path / "plan")
    views = ["--plan", tmp_path / "plan", "--views", tmp_path / "views"]
    made = ["--generator", tmp_path / "checked", "--kind", "img2img", "--steps", 4, "--out", tmp_path / "log"]
    words = [str(word) for word in ["generate", *views, *made, "--quiet"]]
    assert_user_error(main, words, capsys, "none of 24 views could be made")
    run("status", *views)
    assert "failed: train/0000000: black all over: blanked by the pipeline's safety checker" in capsys.readouterr().out
    assert not list((tmp_path / "views").rglob("*.png"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A pipeline and an IP-Adapter for it, in the layout of the published ones."""
    folder = tmp_path_factory.mktemp("adapted")
    found = parts(folder)
    pipe = StableDiffusionPipeline(
        **found,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "pipe")
    g = torch.Generator().manual_seed(3)
    tensors = {
        "image_proj.proj.weight": torch.randn(TOKENS * WIDTH, DIM, generator=g),
        "image_proj.proj.bias": torch.zeros(TOKENS * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    crossing = [name for name in found["unet"].attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossing):
        out = found["unet"].get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{key}.weight"] = torch.randn(out, WIDTH, generator=g)
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter/ip-adapter.safetensors")
    seer().save_pretrained(folder / "adapter/image_encoder")
    return folder


def test_an_ip_adapter_shows_its_picture_the_less_the_higher_the_level(adapted):
    made = IPAdapterGenerator.from_pretrained(adapted / "pipe", adapted / "adapter/ip-adapter.safetensors", steps=2)
    pictures = made.embed(torch.rand(2, 3, 40, 40))
    assert pictures.shape == (2, DIM)
    strong, weak = (made.generate(pictures, level, [1, 1], guidance=3.0).astype(int) for level in (0, 999))
    assert abs(strong[0] - strong[1]).mean() > abs(weak[0] - weak[1]).mean()
    alone = made.generate(pictures[1:], 0, [1], guidance=3.0).astype(int)
    assert abs(alone[0] - strong[1]).max() <= 1
    assert made.generate(pictures, 100, [1, 2], guidance=1.0).shape == (2, 32, 32, 3)


def test_an_ip_adapter_goes_through_plan_and_generate(adapted, data, tmp_path):
    kind = ["--generator", adapted / "pipe", "--kind", "ip-adapter"]
    kind += ["--adapter", adapted / "adapter/ip-adapter.safetensors"]
    policy = ["--policy", "constant", "--levels", 200, "--guidance", 3]
    run("plan", "--data", f"npz:{data}", *kind, *policy, "--out", tmp_path / "plan")
    views = ["--plan", tmp_path / "plan", "--views", tmp_path / "views"]
    run("generate", *views, *kind, "--steps", 2, "--device", "cpu", "--out", tmp_path / "log")
    assert len(ViewStore.open(tmp_path / "views").done()) == 24


def test_an_adapter_that_is_none_is_refused_in_one_line(adapted, tmp_path):
    shutil.copytree(adapted / "adapter", tmp_path / "a")
    save_file({"x": torch.zeros(1)}, tmp_path / "a/ip-adapter.safetensors")
    for file in (tmp_path / "a/ip-adapter.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="IP-Adapter") as error:
            IPAdapterGenerator.from_pretrained(adapted / "pipe", file)
        assert "\n" not in str(error.value)
