import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from visctrl.cli import main
from visctrl.commands import _work, demo
from visctrl.data import color_profile, in_profile, read_mask, read_pairs, read_picture
from visctrl.engine import VisCtrl
from visctrl.inversion import Trajectory
from visctrl.toy import toy_adapter
from visctrl_tiny import sd, sdxl, unconditional

from tenfold import UserError
from tenfold.readers import read_image
from tenfold.testing import assert_user_error

QUICK = ["--control.steps", "4", "--control.start", "0.5", "--control.layers", "0:", "--control.rounds", "2"]


def run(*words):
    assert main([*map(str, words), "--quiet"]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, pictures of odd sizes and masks."""
    folder = tmp_path_factory.mktemp("place")
    sd(folder).save_pretrained(folder / "sd")
    sdxl(folder).save_pretrained(folder / "xl")
    unconditional(folder).save_pretrained(folder / "plain")
    for seed, name in enumerate(("target", "reference", "other")):
        x = torch.nn.functional.interpolate(
            torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), (21, 30), mode="bilinear"
        )
        Image.fromarray((255 * x[0].permute(1, 2, 0).numpy()).astype(np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((21, 30), np.uint8)
    mask[5:17, 6:24] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def test_an_edit_writes_its_picture_rounds_grid_provenance_and_what_happened(place, tmp_path, capsys):
    words = ["--model", place / "sd", "--target", place / "target.png", "--reference", place / "reference.png"]
    masks = ["--target_mask", place / "mask.png", "--reference_mask", place / "mask.png", "--feather", "0"]
    run("edit", *words, *masks, *QUICK, "--target_prompt", "a dog", "--size", "16", "--out", tmp_path / "out")
    out = tmp_path / "out"
    target, edited = read_image(place / "target.png"), read_image(out / "edited.png")
    inside = read_image(place / "mask.png")[..., 0] > 0
    assert np.array_equal(edited[~inside], target[~inside])
    assert not np.array_equal(edited[inside], target[inside])
    assert "edited with visctrl from reference.png" in Image.open(out / "edited.png").text["Comment"]
    about = json.loads((out / "edit.json").read_text())
    assert about["round"] in {1, 2}
    assert about["rows"] > 0
    for name in ("grid.png", "provenance.png", "history/round_1.png", "figures/edited.png", "report.html"):
        assert (out / name).is_file(), name
    assert "rows of the network" in capsys.readouterr().out
    run("evaluate", "--run", out, "--encoder", "none", "--out", tmp_path / "measured")
    found = json.loads((tmp_path / "measured/evaluation.json").read_text())["edit"]
    assert found["background PSNR"] == 100
    assert found["background SSIM"] == pytest.approx(1)
    assert found["rows"] == about["rows"]


def test_subjects_are_cut_out_edited_on_white_and_pasted_back(place, tmp_path):
    words = ["--model", place / "plain", "--target", place / "target.png", "--reference", place / "reference.png"]
    masks = ["--target_mask", place / "mask.png", "--reference_mask", place / "mask.png", "--crop", "true"]
    run("edit", *words, *masks, *QUICK, "--control.mode", "subject", "--out", tmp_path / "out")
    target, edited = read_image(place / "target.png"), read_image(tmp_path / "out/edited.png")
    inside = read_image(place / "mask.png")[..., 0] > 0
    assert np.array_equal(edited[~inside], target[~inside])
    assert not np.array_equal(edited, target)


def test_a_table_of_pairs_is_gone_through_and_a_resumed_run_keeps_what_was_done(place, tmp_path, monkeypatch):
    (place / "pairs.csv").write_text(
        "target,reference,target_mask\ntarget.png,reference.png,mask.png\nother.png,reference.png,\n"
    )
    words = ["edit", "--model", place / "plain", "--pairs", place / "pairs.csv", *QUICK, "--out", tmp_path / "out"]
    write, calls = _work.write_edit, []

    def stopping(*args):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(_work, "write_edit", stopping)
    assert main([*map(str, words), "--quiet"]) == 130
    first = (tmp_path / "out/0000-target/edited.png").read_bytes()
    monkeypatch.setattr(_work, "write_edit", write)
    run(*words, "--resume")
    assert (tmp_path / "out/0000-target/edited.png").read_bytes() == first
    run(*words[:-1], tmp_path / "whole")
    for name in ("0000-target", "0001-other"):
        a, b = (tmp_path / x / name / "edited.png" for x in ("out", "whole"))
        assert a.read_bytes() == b.read_bytes()


def killed(arguments, module, name, after):
    """``main`` in a copy of this process, which kills itself (SIGKILL) at the call of that number of a function."""
    process = os.fork()
    if not process:
        signal.alarm(600)
        function, count = getattr(module, name), iter(range(10**9))

        def counting(*args, **kwargs):
            if next(count) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(module, name, counting)
        main(arguments)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_edits_of_a_table_killed_and_resumed_are_those_of_an_unbroken_run(place, tmp_path):
    (place / "many.csv").write_text("target,reference\n" + "target.png,reference.png\nother.png,reference.png\n" * 2)
    words = ["edit", "--model", place / "plain", "--pairs", place / "many.csv", *QUICK, "--quiet", "--out"]
    given = [str(w) for w in words]
    for number in (0, 2):  # before the first result, and in the midst
        out = tmp_path / f"killed-{number}"
        killed([*given, str(out)], _work, "write_edit", number)
        assert len(list(out.rglob("edit.json"))) == number
        assert main([*given, str(out), "--resume"]) == 0
    assert main([*given, str(tmp_path / "whole")]) == 0
    want = sorted((tmp_path / "whole").rglob("*.png"))
    assert len(want) > 12
    for path in want:
        for number in (0, 2):
            again = tmp_path / f"killed-{number}" / path.relative_to(tmp_path / "whole")
            assert again.read_bytes() == path.read_bytes(), again


def test_a_bank_is_recorded_once_and_gives_the_same_edit(place, tmp_path, capsys):
    target = ["--model", place / "sd", "--target", place / "target.png", "--size", "16"]
    reference = ["--reference", place / "reference.png"]
    run("bank", "--model", place / "sd", *reference, *QUICK, "--size", "16", "--out", tmp_path / "bank")
    run("edit", *target, *reference, *QUICK, "--out", tmp_path / "a")
    run("edit", *target, "--run", tmp_path / "bank", *QUICK, "--out", tmp_path / "b")
    assert np.array_equal(read_image(tmp_path / "a/edited.png"), read_image(tmp_path / "b/edited.png"))
    rows = [json.loads((tmp_path / x / "edit.json").read_text())["rows"] for x in "ab"]
    assert rows[1] < rows[0]
    for wrong, said in (
        ([*QUICK, "--control.steps", "5"], "recorded with --control.steps 4, not 5"),
        ([*QUICK, "--control.layers", "1:"], "recorded with --control.layers 0:, not 1:"),
    ):
        words = ["edit", *target, "--run", tmp_path / "bank", *wrong, "--out", tmp_path / "c"]
        assert_user_error(main, [str(w) for w in words], capsys, said)
        assert not (tmp_path / "c").exists()
    words = [
        "edit",
        "--model",
        place / "plain",
        *target[2:],
        "--run",
        tmp_path / "bank",
        *QUICK,
        "--out",
        tmp_path / "c",
    ]
    assert_user_error(main, [str(w) for w in words], capsys, "another family: sd, expected unconditional")


def test_an_inversion_writes_its_trajectory_and_what_it_loses(place, tmp_path, capsys):
    words = ["invert", "--model", place / "plain", "--target", place / "target.png", *QUICK]
    run(*words, "--control.refine", "12", "--out", tmp_path / "out")
    about = json.loads((tmp_path / "out/invert.json").read_text())
    assert about["reconstruction_rmse"] < 0.1
    assert len(Trajectory.load(tmp_path / "out/trajectory.safetensors")) == 4
    assert "reconstruction: RMSE" in capsys.readouterr().out


def test_a_model_is_shown_with_its_layers_and_its_memory_plan(place, capsys):
    run("inspect", "--model", place / "sd")
    out = capsys.readouterr().out
    for said in ("down_blocks.0", "UNet2DConditionModel", "MB (kept under", "AttnProcessor2_0", "diffusers", "license"):
        assert said in out


def test_an_encoder_measures_fidelity_and_structure(place, tmp_path):
    pytest.importorskip("timm")
    words = ["--model", place / "plain", "--target", place / "target.png", "--reference", place / "target.png"]
    run("edit", *words, *QUICK, "--out", tmp_path / "out")
    encoder = ["--encoder", "timm:resnet10t", "--encoder_weights", "random"]
    run("evaluate", "--run", tmp_path / "out", *encoder, "--out", tmp_path / "m")
    found = json.loads((tmp_path / "m/evaluation.json").read_text())["edit"]
    assert found["before"] == pytest.approx(1, abs=1e-5)
    assert found["structure"] >= 0


def test_bad_input_is_one_line_and_leaves_nothing_behind(place, tmp_path, capsys):
    Image.fromarray(np.zeros((21, 30), np.uint8)).save(tmp_path / "empty.png")
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "photo.heic").write_bytes(b"....ftypheic")
    (tmp_path / "broken.png").write_bytes((place / "target.png").read_bytes()[:60])
    (tmp_path / "no.csv").write_text("target,references\na,b\n")
    (tmp_path / "missing.csv").write_text("target,reference\nnone.png,none.png\n")
    (tmp_path / "weights.ckpt").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    target, reference = ["--target", place / "target.png"], ["--reference", place / "reference.png"]
    plain = ["--model", place / "plain"]
    cases = (
        ([*plain], "nothing to edit"),
        ([*plain, *target], "--reference FILE, or --run DIR"),
        ([*plain, *target, "--reference", tmp_path / "none.png"], "none.png: no such file"),
        ([*plain, *target, "--reference", tmp_path / "photo.heic"], "HEIC"),
        ([*plain, *target, "--reference", tmp_path / "broken.png"], "broken.png: cannot be decoded"),
        ([*plain, *target, *reference, "--target_mask", tmp_path / "empty.png"], "no pixel of the subject"),
        (
            [*plain, *target, *reference, "--target_mask", tmp_path / "small.png"],
            "30 x 20 pixels, the picture has 30 x 21",
        ),
        ([*plain, *target, *reference, "--target_mask", "alpha"], "has no transparency"),
        ([*plain, *target, *reference, "--crop", "true"], "--crop cuts subjects out"),
        ([*plain, *target, *reference, "--control.mode", "subject"], "mode subject needs a mask"),
        ([*plain, *target, *reference, "--control.bias", "1"], "--control.bias: expected 0 in mode replace"),
        ([*plain, *target, *reference, "--control.max_bank", "x"], "expected a number of bytes"),
        ([*plain, *target, *reference, "--control.guidance", "3"], "takes no prompts"),
        ([*plain, *target, *reference, "--control.layers", "99"], "none of the layers 0 to"),
        ([*plain, *target, *reference, "--preset", "fast", "--control.steps", "3"], "leave out --control"),
        ([*plain, "--pairs", tmp_path / "no.csv"], "unknown column 'references': did you mean reference"),
        ([*plain, "--pairs", tmp_path / "missing.csv"], "line 2: target"),
        (["--model", tmp_path / "folder", *target, *reference], "no model_index.json"),
        (["--model", tmp_path / "weights.ckpt", *target, *reference], "expected a .safetensors file"),
        (["--model", "none:none", *target, *reference], "no such folder or file"),
        ([*plain, *target, *reference, "--offload", "true", "--device", "cpu"], "--offload moves parts"),
    )
    for words, said in cases:
        assert_user_error(main, [str(w) for w in ["edit", *words, "--out", tmp_path / "out"]], capsys, said)
        assert not (tmp_path / "out").exists(), said


def test_pictures_of_cameras_and_scanners_are_read_upright_in_eight_bits(place, tmp_path):
    turned = Image.open(place / "target.png").rotate(90, expand=True)
    exif = Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png"), read_picture(place / "target.png"))
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(gray).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[15, 15].tolist() == [255] * 3
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[2:5, 2:5] = [200, 0, 0, 255]
    Image.fromarray(clear).save(tmp_path / "clear.png")
    picture = read_picture(tmp_path / "clear.png")
    assert picture[0, 0].tolist() == [255] * 3
    for spec in ("alpha", "white"):
        assert read_mask(spec, tmp_path / "clear.png", picture, "--target_mask").sum() == 9


def exchanged():
    """A color profile as sRGB's with red and green exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = data[128 : 132 + 12 * int.from_bytes(data[128:132], "big")]
    for a, b in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")):
        table = table.replace(a, b)
    data[128 : 128 + len(table)] = table
    data[24:36] = bytes(12)  # when it was made
    return bytes(data)


def test_a_picture_in_a_phones_color_profile_keeps_its_numbers_and_its_profile_and_references_are_brought_to_it(
    place, tmp_path
):
    photo = read_image(place / "target.png")
    Image.fromarray(photo).save(tmp_path / "p3.png", icc_profile=exchanged())
    words = ["--model", place / "plain", "--target", tmp_path / "p3.png", "--reference", place / "reference.png"]
    run("edit", *words, "--target_mask", place / "mask.png", *QUICK, "--feather", "0", "--out", tmp_path / "out")
    inside = read_image(place / "mask.png")[..., 0] > 0
    for name in ("edited", "history/round_1"):
        with Image.open(tmp_path / f"out/{name}.png") as image:
            assert image.info["icc_profile"] == exchanged()
            assert np.array_equal(np.asarray(image)[~inside], photo[~inside])
    assert color_profile(tmp_path / "p3.png") == exchanged()
    assert color_profile(place / "target.png") is None
    moved = in_profile(photo, None, exchanged())
    assert np.abs(moved.astype(int) - photo[..., [1, 0, 2]]).max() <= 1
    assert np.array_equal(in_profile(photo, exchanged(), exchanged()), photo)


def test_profiles_of_print_and_broken_ones_are_not_written_into_pictures_in_rgb(tmp_path):
    print_profile = bytearray(exchanged())
    print_profile[16:20] = b"CMYK"
    for name, profile in (("print", bytes(print_profile)), ("broken", b"abc")):
        Image.new("CMYK", (8, 8)).save(tmp_path / f"{name}.jpg", icc_profile=profile)
        assert color_profile(tmp_path / f"{name}.jpg") is None


def test_masks_as_programs_write_them_are_understood_or_refused_by_name(place, tmp_path, capsys):
    strokes = np.zeros((21, 30, 4), np.uint8)
    strokes[5:17, 6:24] = 255
    Image.fromarray(strokes).save(tmp_path / "strokes.png")  # white strokes on nothing: on white all would be subject
    Image.fromarray((strokes[..., 3] > 0).astype(np.uint8)).save(tmp_path / "ones.png")
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    target, reference = ["--target", place / "target.png"], ["--reference", place / "reference.png"]
    for words, said in (
        ([*target, *reference, "--target_mask", tmp_path / "strokes.png"], "transparent in places: put it on black"),
        ([*target, *reference, "--target_mask", tmp_path / "ones.png"], "the largest value of this file is 1"),
        (["--target", tmp_path / "phone.jpg", *reference], "HEIC"),
    ):
        given = ["edit", "--model", place / "plain", *words, "--out", tmp_path / "out"]
        assert_user_error(main, [str(w) for w in given], capsys, said)
        assert not (tmp_path / "out").exists(), said
    Image.fromarray(strokes).quantize(4).save(tmp_path / "palette.png")
    picture = read_picture(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert np.array_equal(read_mask("alpha", tmp_path / "palette.png", picture, "x") >= 0.5, strokes[..., 3] > 0)


def test_a_row_of_a_table_may_hold_prompts_and_kinds_of_masks(place, tmp_path):
    (place / "p.csv").write_text("\ufefftarget,reference,target_mask,target_prompt\ntarget.png,other.png,white,a dog\n")
    (pair,) = read_pairs(place / "p.csv")
    assert (pair.target_mask, pair.reference_mask, pair.target_prompt) == ("white", None, "a dog")
    with pytest.raises(UserError, match="No such file"):
        read_pairs(tmp_path / "p.csv")


@pytest.mark.parametrize("name", ["sd15", "sd15-paper", "sdxl"])
def test_recipes_run_on_tiny_stand_ins_of_their_models(name, place, tmp_path):
    short = {
        "sd15": ["--control.steps", "4"],
        "sd15-paper": [],
        "sdxl": ["--control.layers", "1:", "--control.steps", "4"],
    }
    words = ["--model", place / ("xl" if name == "sdxl" else "sd"), "--size", "16", *short[name]]
    pair = ["--target", place / "target.png", "--reference", place / "reference.png"]
    run("edit", "--config", f"recipe:{name}", *words, *pair, "--out", tmp_path / "out")
    assert read_image(tmp_path / "out/edited.png").shape == (21, 30, 3)


def test_the_demonstration_runs_in_its_quick_form(tmp_path, capsys):
    run("demo", "--quick", "--out", tmp_path / "demo")
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert {claim["holds"] for claim in summary["claims"]} == {None}
    assert "Reinhard" in summary["arms"]
    assert (tmp_path / "demo/figures/edits.png").is_file()
    assert "data: rendered" in capsys.readouterr().out


def test_the_demonstration_with_photographs_draws_blobs_cut_out_of_them(monkeypatch, tmp_path):
    from visctrl.commands import _photos
    from visctrl.config import DemoSettings, VisCtrlConfig

    from tenfold.runs import Run

    _photos.check()
    photos = _photos.photographs()
    assert len(photos) == 6
    assert all(min(photo.shape[:2]) >= 64 for photo in photos)
    blobs, of = _photos.render(12, 0, photos)
    for image, mask, n in zip(blobs.images, blobs.masks, of, strict=True):
        inside = image[:, mask == 1].T.numpy()
        colors = photos[n].reshape(-1, 3)
        assert np.abs(inside[:5, None] - colors[None]).max(axis=-1).min(axis=1).max() < 1e-6
        assert (image[:, mask == 0] == image[:, mask == 0].max()).all()
    config = VisCtrlConfig(steps=2, start=0.5, layers="0:", rounds=1, refine=1, guard=False)
    with Run.open(tmp_path / "out", package="visctrl", verb="demo", settings=DemoSettings()) as run:
        captions = _photos.draw(run, "quick", 0, config, "toy", quiet=True)
    assert list(captions) == ["photos"]
    assert (tmp_path / "out/figures/photos.png").is_file()


def test_the_demonstrations_u_net_goes_through_the_same_adapter_and_engine(tmp_path):
    model, codec = demo.model_of(str(tmp_path), "quick", "unet", 0, quiet=True)
    assert type(model).__name__ == "UNet2DModel"
    again, _ = demo.model_of(str(tmp_path), "quick", "unet", 0, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    engine = VisCtrl(toy_adapter(model, codec), demo.GUARDED)
    out = engine.edit(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32))
    assert torch.isfinite(out.images).all()


def test_a_demonstration_killed_after_its_training_goes_on_from_there(tmp_path):
    words = ["demo", "--quick", "--quiet", "--out", str(tmp_path / "demo")]
    killed(words, demo, "edits", 0)
    model = tmp_path / "demo/models/seed-0.safetensors"
    before = model.stat().st_mtime_ns
    assert main([*words, "--resume"]) == 0
    assert model.stat().st_mtime_ns == before
    killed([*words, "--overwrite"], demo, "edits", 0)
    assert model.stat().st_mtime_ns > before
