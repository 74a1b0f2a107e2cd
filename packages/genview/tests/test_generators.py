"""Generators: the noise of an embedding, seeds of single pictures, folders as others saved them."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableUnCLIPImg2ImgPipeline
from diffusers.models.embeddings import get_timestep_embedding
from genview import tiny
from genview.captions import asked_complexity, complexity, guidance_of
from genview.encoders import build_encoder
from genview.generators import Img2ImgGenerator, UnCLIPGenerator, choose_dtype, noised, sinusoid

from tenfold import UserError


@pytest.fixture(scope="module")
def made(generator):
    return UnCLIPGenerator.from_pretrained(generator, steps=2)


def test_the_code_of_a_level_is_diffusers_own():
    levels = torch.tensor([0, 100, 999])
    expected = get_timestep_embedding(levels, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(sinusoid(levels, 32), expected, atol=1e-4)


@pytest.mark.parametrize("level", [0, 300, 700])
def test_our_noised_embedding_is_the_pipelines(made, level):
    c, noise = torch.randn(5, 8), torch.randn(5, 8)
    theirs = made.pipe.noise_image_embeddings(c, level, noise=noise)
    n = made.pipe.image_normalizer
    abar = made.pipe.image_noising_scheduler.alphas_cumprod
    ours = noised(c, torch.full((5,), level), noise, abar, n.mean[0], n.std[0])
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_noised_embedding_has_the_mean_and_the_variance_of_its_level():
    abar = tiny.build_tiny_unclip(tiny.TinySize(embedding=8, channels=(8,))).image_noising_scheduler.alphas_cumprod
    c = torch.full((20000, 1), 2.0)
    for level in (0, 400):
        out = noised(c, torch.full((20000,), level), torch.randn(20000, 1), abar, torch.zeros(1), torch.ones(1))[:, 0]
        a = float(abar[level])
        assert float(out.mean()) == pytest.approx(2 * a**0.5, abs=4 * (1 - a) ** 0.5 / 20000**0.5 + 1e-6)
        assert float(out.std()) == pytest.approx((1 - a) ** 0.5, rel=0.05)
    assert float((1 - abar[0]) ** 0.5) == pytest.approx(0.0064, abs=2e-4)


def test_a_picture_does_not_depend_on_its_batch_or_its_order(made):
    c = torch.randn(6, 8)
    seeds = [11, 12, 13, 14, 15, 16]
    together = made.generate(c, 200, seeds, guidance=2.0).astype(int)
    backward = made.generate(c.flip(0), 200, seeds[::-1], guidance=2.0).astype(int)[::-1]
    single = np.concatenate([made.generate(c[i : i + 1], 200, [seeds[i]], guidance=2.0) for i in range(6)]).astype(int)
    assert abs(together - backward).max() <= 1
    assert abs(together - single).max() <= 1
    assert abs(together - made.generate(c, 200, [s + 1 for s in seeds], guidance=2.0).astype(int)).max() > 1


def test_a_saved_pipeline_gives_the_same_pictures_through_diffusers_alone(made, generator):
    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(generator, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    c, text = torch.randn(2, 8), torch.zeros(2, 1, tiny.CONTEXT)
    seeds = [torch.Generator().manual_seed(i) for i in (3, 4)]
    options = {"prompt_embeds": text, "negative_prompt_embeds": text, "num_inference_steps": 2, "output_type": "np"}
    out = pipe(image_embeds=c, noise_level=100, generator=seeds, guidance_scale=3.0, **options).images
    assert abs(np.rint(out * 255) - made.generate(c, 100, [3, 4], guidance=3.0)).max() <= 1


def test_what_a_generator_cannot_be_asked_for_is_refused(made):
    with pytest.raises(ValueError, match=r"0\.\.999"):
        made.generate(torch.randn(1, 8), 1000, [1], guidance=2.0)
    with pytest.raises(ValueError, match="one seed per picture"):
        made.generate(torch.randn(2, 8), 0, [1], guidance=2.0)
    with pytest.raises(UserError, match="no text encoder"):
        made.generate(torch.randn(1, 8), 0, [1], guidance=2.0, prompts=["a cat"])
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_dtype("fp16", "cpu")


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda f: shutil.rmtree(f / "image_normalizer"), "no image_normalizer"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
        (lambda f: (f / "model_index.json").write_text("[1"), "model_index.json"),
        (lambda f: [p.unlink() for p in f.rglob("*.safetensors")], "unpickled"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x"), "cannot be loaded"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(generator, tmp_path, break_it, text):
    copy = tmp_path / "copy"
    shutil.copytree(generator, copy)
    break_it(copy)
    with pytest.raises(UserError, match=text) as error:
        UnCLIPGenerator.from_pretrained(copy)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_not_looked_for_on_a_hub():
    for path in ("./none", "/none/at/all", "none"):
        with pytest.raises(UserError, match="no such folder"):
            UnCLIPGenerator.from_pretrained(path)


def test_an_index_that_leaves_the_text_encoder_out_is_read(generator, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(generator, copy)
    index = json.loads((copy / "model_index.json").read_text())
    for name in ("text_encoder", "tokenizer"):
        index[name] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert UnCLIPGenerator.from_pretrained(copy, steps=1).embed(torch.rand(1, 3, 20, 30)).shape == (1, 8)


@pytest.mark.parametrize("part", [".", "unet"])
def test_parts_that_have_files_of_a_variant_alone_are_found(generator, tmp_path, part):
    copy = tmp_path / "copy"
    shutil.copytree(generator, copy)
    for file in list((copy / part).rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert UnCLIPGenerator.from_pretrained(copy, steps=1).id != UnCLIPGenerator.from_pretrained(generator, steps=1).id


def test_the_encoder_of_a_generator_is_known_by_its_weights_and_not_by_its_folder(generator, tmp_path):
    shutil.copytree(generator, tmp_path / "elsewhere")
    names = {build_encoder(f"generator:{folder}").name for folder in (generator, tmp_path / "elsewhere")}
    assert names == {UnCLIPGenerator.from_pretrained(generator).encoder.name}


@pytest.fixture(scope="module")
def img2img(tmp_path_factory):
    """A pipeline of the real class with a small autoencoder and without text, as somebody may save it."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionImg2ImgPipeline(
        vae=vae,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
        **parts,
    )
    folder = tmp_path_factory.mktemp("img2img") / "tiny"
    pipe.save_pretrained(folder)
    return folder


def test_img2img_moves_a_picture_the_more_the_higher_the_level(img2img):
    made = Img2ImgGenerator.from_pretrained(img2img, steps=10)
    x = made.embed(torch.rand(2, 3, 20, 24))
    assert x.shape == (2, 3, 16, 16)
    low, high = (made.generate(x, level, [1, 2], guidance=1.0).astype(int) for level in (100, 900))
    base = made.generate(x, 0, [1, 2], guidance=1.0).astype(int)
    assert abs(high - base).mean() > abs(low - base).mean()
    alone = made.generate(x[:1], 900, [1], guidance=1.0).astype(int)
    assert abs(alone - high[:1]).max() <= 1


def test_an_img2img_pipeline_goes_through_plan_generate_and_merge(img2img, data, tmp_path):
    from genview.cli import main

    run = lambda *words: main([*map(str, words), "--quiet"])  # noqa: E731
    policy = ("--policy", "constant", "--levels", 300, "--guidance", 1)
    assert run("plan", "--data", f"npz:{data}", *policy, "--out", tmp_path / "plan") == 0
    views = ("--plan", tmp_path / "plan", "--views", tmp_path / "views")
    made = ("--generator", img2img, "--kind", "img2img", "--steps", 4)
    assert run("generate", *views, *made, "--out", tmp_path / "log") == 0
    assert run("merge", *views, "--out", tmp_path / "merged") == 0
    assert json.loads((tmp_path / "merged/merged.json").read_text())["counts"]["ok"] == 24


def test_captions_with_more_constraints_are_followed_less():
    captions = (
        "a dog",
        "a red dog",
        "two red dogs running on wet grass",
        "two small red dogs jumping over a wooden table near three blue chairs",
    )
    assert [complexity(caption) for caption in captions] == [1, 2, 3, 4]
    assert [guidance_of(caption) for caption in captions] == [8, 6, 4, 2]


def test_a_model_that_gives_no_digit_is_asked_again_and_then_left_to_the_rules():
    answers = iter(["perhaps", "class 12", "it is 3."])
    assert asked_complexity("a dog", lambda prompt: next(answers)) == 3
    asked = []
    assert asked_complexity("a dog", lambda prompt: asked.append(prompt) or "", retries=2) == 1
    assert len(asked) == 3
