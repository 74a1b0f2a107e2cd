"""A user's walk through the commands, in process, on tiny rendered hands."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from handmstn.cli import main
from handmstn.models import load_model
from PIL import Image
from safetensors.torch import load_file

from tenfold.testing import assert_user_error

NETS = ["--aligner.backbone", "hand:loc", "--aligner.loc_size", "32", "--recognizer.palm", "hand:cnn4"]
NETS += ["--recognizer.finger", "hand:cnn4", "--recognizer.dim", "8", "--recognizer.palm_size", "24"]
NETS += ["--recognizer.finger_size", "16,8", "--aligner.batch_size", "8", "--device", "cpu", "--quiet"]
TINY = [*NETS, "--aligner.steps", "3", "--steps", "3", "--people", "3", "--views", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rendered hands on disk, and a model that was trained on others."""
    root = tmp_path_factory.mktemp("walk")
    assert (
        main(
            [
                "simulate",
                "--people",
                "5",
                "--views",
                "4",
                "--size",
                "64",
                "--out",
                str(root / "hands"),
                "--seed",
                "9",
                "--gallery_each",
                "1",
            ]
        )
        == 0
    )
    words = ["train", "--data", "hands", "--reading.size", "64", "--reading.people", "6", "--reading.views", "4", *TINY]
    assert main([*words, "--joint_steps", "1", "--log_every", "1", "--out", str(root / "model")]) == 0
    return root


def with_model(folder, verb, out, *more):
    words = [verb, "--run", str(folder / "model"), "--data", f"csv:{folder / 'hands/hands.csv'}", "--device", "cpu"]
    return [*words, "--out", str(out), *more, "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def everything_is_seen():
    """A model of three steps sees hands nowhere or everywhere; here its answer does not matter."""
    patch = pytest.MonkeyPatch()
    patch.setattr("handmstn.recognizer.SEEN", -1.0)
    yield
    patch.undo()


def test_train_writes_model_course_and_overlays(folder):
    names = {p.name for p in (folder / "model").rglob("*") if p.is_file()}
    assert {"model.safetensors", "config.json", "config.yaml", "report.html", "course.png", "points.png"} <= names
    assert {"metrics.align.csv", "metrics.identity.csv", "metrics.joint.csv"} <= names
    model, card = load_model(folder / "model")
    assert card["size"] == 64
    assert [p.name for p in model.parts] == ["palm", "thumb", "index", "middle", "ring", "little"]


def test_a_folder_is_enrolled_searched_and_a_person_removed(folder, tmp_path, capsys):
    gallery = str(tmp_path / "gallery")
    assert main(with_model(folder, "enroll", tmp_path / "e", "--gallery", gallery, "--purpose", "a walk")) == 0
    assert "10 pictures" not in capsys.readouterr().out
    enrolled = json.loads((tmp_path / "e/enrolled.json").read_text())
    assert enrolled["added"] == 5
    assert main(with_model(folder, "search", tmp_path / "s", "--gallery", gallery, "--sheets", "2", "--top", "3")) == 0
    found = json.loads((tmp_path / "s/candidates.json").read_text())
    assert len(found["answers"]) == 15
    assert len(found["answers"][0]["candidates"]) == 3
    assert set(found["answers"][0]["visibility"]) == {"palm", "thumb", "index", "middle", "ring", "little"}
    page = (tmp_path / "s/sheets/0001.html").read_text()
    assert "no proof of identity" in page
    assert "http" not in page
    assert "not at hand" not in page
    with Image.open(tmp_path / "s/sheets/0002.png") as sheet:
        assert sheet.width > 800
    person = found["answers"][0]["candidates"][0]["person"]
    assert main(["remove", "--gallery", gallery, "--person", person, "--purpose", "asked for it"]) == 0
    assert main(with_model(folder, "search", tmp_path / "s2", "--gallery", gallery, "--sheets", "0")) == 0
    again = json.loads((tmp_path / "s2/candidates.json").read_text())
    assert all(c["person"] != person for a in again["answers"] for c in a["candidates"])
    assert main(["inspect", "--gallery", gallery]) == 0
    out = capsys.readouterr().out
    assert "remove" in out
    assert "asked for it" in out
    assert_user_error(
        main, ["remove", "--gallery", gallery, "--person", "x y", "--purpose", "p"], capsys, "nobody of this id"
    )
    assert_user_error(
        main,
        with_model(folder, "enroll", tmp_path / "e9", "--gallery", gallery, "--purpose", "x", "--images_each", "3"),
        capsys, "--images_each asks for 3", "has 1 picture",
    )  # fmt: skip
    assert_user_error(
        main, with_model(folder, "enroll", tmp_path / "e8", "--gallery", gallery, "--purpose", " "), capsys, "--purpose"
    )
    for value, message in (("nan", "--threshold: expected a number"), ("2", "--threshold: expected")):
        words = with_model(folder, "search", tmp_path / "s9", "--gallery", gallery, "--threshold", value)
        assert_user_error(main, words, capsys, message)
    other = ["train", "--data", "hands", "--reading.size", "64", "--reading.people", "4", "--reading.views", "2", *TINY]
    assert main([*other, "--seed", "5", "--people", "2", "--out", str(tmp_path / "other")]) == 0
    words = with_model(folder, "search", tmp_path / "s3", "--gallery", gallery)
    words[2] = str(tmp_path / "other")
    assert_user_error(main, words, capsys, "enrolled with the model", "enroll the pictures again")


@pytest.mark.filterwarnings("default:enrolled for several people:UserWarning")
def test_a_picture_that_is_enrolled_for_somebody_else_already_is_warned_of(folder, tmp_path, capsys):
    gallery = str(tmp_path / "g")
    assert main(with_model(folder, "enroll", tmp_path / "e", "--gallery", gallery, "--purpose", "x")) == 0
    assert "several people" not in capsys.readouterr().err
    picture = sorted((folder / "hands/pictures/9-0001").iterdir())[0]
    copied = tmp_path / "known/Berta"
    copied.mkdir(parents=True)
    shutil.copy(picture, copied / "under another name.png")
    words = with_model(folder, "enroll", tmp_path / "f", "--gallery", gallery, "--purpose", "x")
    words[4] = f"imagefolder:{tmp_path / 'known'}"
    assert main(words) == 0
    told = capsys.readouterr().err
    assert "enrolled for several people now: 1 picture, the first" in told
    assert "for '9-0001' and 'Berta'" in told


def test_pictures_of_whom_nobody_knows_are_searched_for_and_refused_where_ids_are_needed(folder, tmp_path, capsys):
    gallery = str(tmp_path / "g")
    assert main(with_model(folder, "enroll", tmp_path / "e", "--gallery", gallery, "--purpose", "x")) == 0
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, file in enumerate(sorted((folder / "hands/pictures").rglob("*.png"))[1:3]):
        shutil.copy(file, loose / f"unknown {number}.png")
    for number, path in enumerate((loose, loose / "unknown 1.png")):
        words = with_model(folder, "search", tmp_path / f"s{number}", "--gallery", gallery, "--sheets", "0")
        words[4] = f"pictures:{path}"
        assert main(words) == 0
        answers = json.loads((tmp_path / f"s{number}/candidates.json").read_text())["answers"]
        assert [a["picture"] for a in answers] == ["unknown 0.png", "unknown 1.png"][number:]
        assert all(a["candidates"] and "side unknown" in a["guessed"] for a in answers)
    for verb, more in (("enroll", ["--gallery", gallery, "--purpose", "x"]), ("evaluate", []), ("calibrate", [])):
        words = with_model(folder, verb, tmp_path / verb, *more)
        words[4] = f"pictures:{loose}"
        assert_user_error(main, words, capsys, "it is not known whose hands these are; expected imagefolder:DIR")
    assert_user_error(
        main, ["train", "--data", f"pictures:{loose}", *TINY, "--out", str(tmp_path / "t")], capsys, "not known whose"
    )


def test_pictures_for_testing_are_not_trained_on_and_the_refusal_says_so(folder, tmp_path, capsys):
    words = ["train", "--data", f"csv:{folder / 'hands/hands.csv'}", "--reading.size", "64", *TINY]
    assert_user_error(
        main,
        [*words, "--out", str(tmp_path / "t")],
        capsys,
        "has 1 picture, batches of --views 2",
        "15 of 20 pictures are for testing by the data's own parts",
    )
    words = ["simulate", "--views", "3", "--gallery_each", "3", "--out", str(tmp_path / "s")]
    assert_user_error(main, words, capsys, "--gallery_each: expected fewer than --views 3")


def test_an_index_that_is_not_installed_is_refused_before_any_picture_is_read(folder, tmp_path, capsys, monkeypatch):
    gallery = str(tmp_path / "g")
    assert main(with_model(folder, "enroll", tmp_path / "e", "--gallery", gallery, "--purpose", "x")) == 0
    monkeypatch.setitem(sys.modules, "faiss", None)
    words = with_model(folder, "search", tmp_path / "s", "--gallery", gallery, "--index", "faiss-hnsw")
    words[4] = "csv:nowhere.csv"
    assert_user_error(main, words, capsys, "--index faiss-hnsw", "handmstn[faiss]")


def test_a_picture_without_a_hand_is_not_assessable_and_has_no_identity(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("handmstn.recognizer.SEEN", 2.0)
    words = with_model(folder, "enroll", tmp_path / "e", "--gallery", str(tmp_path / "g"), "--purpose", "x")
    assert_user_error(main, words, capsys, "none of 5 pictures is assessable; of 5: too little of a hand is seen")
    assert not (tmp_path / "g").exists()
    monkeypatch.setattr("handmstn.recognizer.SEEN", -1.0)
    assert main(words) == 0
    monkeypatch.setattr("handmstn.recognizer.SEEN", 2.0)
    assert main(with_model(folder, "search", tmp_path / "s", "--gallery", str(tmp_path / "g"))) == 0
    found = json.loads((tmp_path / "s/candidates.json").read_text())
    assert all(a["answer"].startswith("not assessable") and not a["candidates"] for a in found["answers"])


def as_torchreid_evaluates(distmat, q_pids, g_pids, q_camids, g_camids):
    """Rank 1 and mAP of a distance matrix as re-identification toolboxes compute them: a loop over queries."""
    firsts, precisions = [], []
    for row, pid, camera in zip(distmat, q_pids, q_camids, strict=True):
        order = np.argsort(row, kind="stable")
        order = order[~((g_pids[order] == pid) & (g_camids[order] == camera))]
        hits = g_pids[order] == pid
        firsts.append(hits[0])
        precisions.append((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())
    return np.mean(firsts), np.mean(precisions)


@pytest.mark.parametrize("protocol", ["closed", "open", "verify", "cross"])
def test_evaluate_by_each_protocol(folder, tmp_path, capsys, protocol):
    more = ["--protocol", protocol, "--distances", "true"]
    words = with_model(folder, "evaluate", tmp_path / "v", *more)
    if protocol == "cross":
        words[4] = "hands"
        words += ["--reading.people", "4", "--reading.views", "3"]
    assert main(words) == 0
    assert ("smallest FAR that can be told" in capsys.readouterr().out) == (protocol != "closed")
    found = json.loads((tmp_path / "v/evaluation.json").read_text())
    assert ("closed" in found) == (protocol != "verify")
    assert ("open" in found) == (protocol in {"open", "cross"})
    assert ("verification" in found) == (protocol != "closed")
    pictures = {p.name for p in (tmp_path / "v/figures").iterdir()}
    assert pictures == {"closed": {"cmc.png"}, "verify": {"det.png"}}.get(protocol, {"cmc.png", "det.png"})
    if protocol == "closed":
        with np.load(tmp_path / "v/distances.npz") as file:
            assert file["distmat"].shape == (len(file["q_pids"]), len(file["g_pids"])) == (15, 5)
            rank1, precision = as_torchreid_evaluates(**file)
        assert found["closed"]["rank-1"]["value"] == pytest.approx(rank1)
        assert found["closed"]["mAP (step)"]["value"] == pytest.approx(precision)


def test_pls_random_galleries_and_a_refused_cross_evaluation(folder, tmp_path, capsys):
    assert main(with_model(folder, "evaluate", tmp_path / "p", "--matcher", "pls", "--components", "3")) == 0
    assert main(with_model(folder, "evaluate", tmp_path / "d", "--draws", "3")) == 0
    found = json.loads((tmp_path / "d/evaluation.json").read_text())
    assert found["closed"]["probes"] == 3 * 15
    words = with_model(folder, "evaluate", tmp_path / "x", "--protocol", "cross")
    words += ["--train_data", f"csv:{folder / 'hands/hands.csv'}"]
    assert_user_error(main, words, capsys, "5 identities are in the training data as well: 9-0000")


def test_calibrated_scores_are_likelihood_ratios(folder, tmp_path, capsys):
    assert main(with_model(folder, "calibrate", tmp_path / "c", "--edges", "0.5")) == 0
    assert "Cllr" in capsys.readouterr().out
    kept = json.loads((tmp_path / "c/calibration.json").read_text())
    assert len(kept["slopes"]) == 2
    gallery = str(tmp_path / "g")
    assert main(with_model(folder, "enroll", tmp_path / "e", "--gallery", gallery, "--purpose", "x")) == 0
    more = ["--gallery", gallery, "--calibration", str(tmp_path / "c"), "--sheets", "1"]
    assert main(with_model(folder, "search", tmp_path / "s", *more)) == 0
    answers = json.loads((tmp_path / "s/candidates.json").read_text())["answers"]
    assert all(isinstance(c["llr"], float) for a in answers for c in a["candidates"])
    assert "likelihood ratio 10^" in (tmp_path / "s/sheets/0001.html").read_text()
    assert (
        main(
            with_model(folder, "evaluate", tmp_path / "v", "--protocol", "verify", "--calibration", str(tmp_path / "c"))
        )
        == 0
    )
    assert_user_error(
        main,
        with_model(folder, "search", tmp_path / "t", *more[:2], "--calibration", str(tmp_path)),
        capsys,
        "--calibration",
    )


def test_predict_writes_embeddings_and_crops(folder, tmp_path):
    assert main(with_model(folder, "predict", tmp_path / "p", "--pictures", "2", "--reading.side", "auto")) == 0
    with np.load(tmp_path / "p/embeddings.npz") as file:
        assert file["fused"].shape == (20, 48)
        assert np.allclose(np.linalg.norm(file["fused"], axis=1), 1, atol=1e-5)
    assert (tmp_path / "p/crops/0002.png").exists()
    assert (tmp_path / "p/figures/points.png").stat().st_size > 5000


def test_a_guessed_side_is_marked_in_every_report(folder, tmp_path, capsys):
    lines = (folder / "hands/hands.csv").read_text().splitlines()
    blank = [lines[0], *(line.replace(",right,", ",,") for line in lines[1:])]
    (folder / "hands/unknown.csv").write_text("\n".join(blank) + "\n")
    for side, text in (("auto", "side guessed"), ("unknown", "side unknown")):
        words = with_model(folder, "enroll", tmp_path / side, "--gallery", str(tmp_path / f"g{side}"), "--purpose", "x")
        words[4] = f"csv:{folder / 'hands/unknown.csv'}"
        assert main([*words, "--reading.side", side]) == 0
        assert all(text in v for v in json.loads((tmp_path / side / "enrolled.json").read_text())["guessed"].values())
        words = with_model(
            folder, "search", tmp_path / f"s{side}", "--gallery", str(tmp_path / f"g{side}"), "--sheets", "1"
        )
        words[4] = f"csv:{folder / 'hands/unknown.csv'}"
        assert main([*words, "--reading.side", side]) == 0
        assert text in (tmp_path / f"s{side}/sheets/0001.html").read_text()
        assert text in json.loads((tmp_path / f"s{side}/candidates.json").read_text())["answers"][0]["guessed"]
        words = with_model(folder, "evaluate", tmp_path / f"v{side}", "--reading.side", side)
        words[4] = f"csv:{folder / 'hands/unknown.csv'}"
        capsys.readouterr()
        assert main(words) == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["torch-export", "onnx", "safetensors"])
def test_export_gives_the_models_outputs_at_another_batch_size(folder, tmp_path, kind):
    assert (
        main(["export", "--run", str(folder / "model"), "--format", kind, "--out", str(tmp_path / "x"), "--quiet"]) == 0
    )
    model, _ = load_model(folder / "model")
    images = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    if kind == "safetensors":
        assert set(load_file(tmp_path / "x/model.safetensors")) == set(model.state_dict())
        return
    if kind == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "x/model.onnx")
        names = [o.name for o in session.get_outputs()]
        out = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
        fused, visible, palm = out["embedding"], out["visibility"], out["crop_palm"]
    else:
        found = torch.export.load(tmp_path / "x/model.pt2").module()(images)
        palm, fused, visible = found[0].detach(), found[6].detach(), found[7].detach()
    crops = model.grid.crops(images, model.grid(expected.points))
    assert np.allclose(palm, crops[0].detach(), atol=1e-4)
    assert np.allclose(fused, expected.fused, atol=1e-4)
    assert np.allclose(visible, expected.visibility, atol=1e-4)


def test_convert_and_inspect(folder, tmp_path, capsys):
    source = f"csv:{folder / 'hands/hands.csv'}"
    assert main(["convert", "--data", source, "--out", str(tmp_path / "c")]) == 0
    first = (tmp_path / "c/hands.csv").read_text().splitlines()
    assert len(first) == 21
    assert len(first[0].split(",")) == 5 + 78
    assert main(["inspect", "--run", str(folder / "model"), "--data", source]) == 0
    out = capsys.readouterr().out
    assert "embedding of 48 numbers" in out
    assert "with points" in out
    assert_user_error(main, ["inspect"], capsys, "expected one of --run, --gallery and --data")
    plain = tmp_path / "plain"
    shutil.copytree(folder / "hands/pictures", plain)
    lines = (folder / "hands/hands.csv").read_text().splitlines()
    names = lines[0].split(",")
    for line in lines[1:]:
        name = line.split(",")[0]
        (plain / name.removeprefix("pictures/")).rename(
            plain / name.removeprefix("pictures/").replace("/", "/" + name.split("/")[1] + "-")
        )
    marks = ["path," + ",".join(names[5:])]
    marks += [",".join(["-".join(line.split(",")[0].split("/")[1:]), *line.split(",")[5:]]) for line in lines[1:]]
    (tmp_path / "marks.csv").write_text("\n".join(marks) + "\n")
    words = ["convert", "--data", f"imagefolder:{plain}", "--landmarks", f"csv:{tmp_path / 'marks.csv'}"]
    assert main([*words, "--out", str(tmp_path / "d")]) == 0
    assert "20 with all points" in capsys.readouterr().out
    assert_user_error(
        main, ["convert", "--data", f"imagefolder:{plain}", "--out", str(tmp_path / "e")], capsys, "no landmarks"
    )


def test_training_on_a_list_takes_over_an_aligner_unchanged(folder, tmp_path):
    words = ["train", "--data", f"csv:{folder / 'hands/hands.csv'}", "--reading.size", "64", *TINY]
    words += ["--losses.kind", "arcface", "--people", "2", "--teacher_weights", str(folder / "model")]
    (folder / "hands/all.csv").write_text(
        (folder / "hands/hands.csv").read_text().replace("gallery", "train").replace("probe", "train")
    )
    words[2] = f"csv:{folder / 'hands/all.csv'}"
    assert main([*words, "--out", str(tmp_path / "t")]) == 0
    a, b = (load_file(p / "model.safetensors") for p in (folder / "model", tmp_path / "t"))
    own = [name for name in a if name.startswith("aligner.")]
    assert own
    assert all(torch.equal(a[name], b[name]) for name in own)
    assert not torch.equal(a["nets.0.blocks.0.0.weight"], b["nets.0.blocks.0.0.weight"])


def test_eeprnet_hand21_and_self_made_warps_train(folder, tmp_path):
    base = ["train", "--data", "hands", "--reading.size", "48", "--reading.people", "4", "--reading.views", "2", *TINY]
    for name, more in {
        "palm": ["--preset", "eeprnet"],
        "segments": ["--preset", "hand21"],
        "warps": ["--aligner.warps", "always"],
        "whole": ["--preset", "whole"],
        "given": ["--given_points", "true"],
    }.items():
        assert main([*base, *more, "--people", "2", "--out", str(tmp_path / name)]) == 0
    card = json.loads((tmp_path / "given/config.json").read_text())
    assert not card["aligner"]


def test_compare_arms(tmp_path, capsys):
    words = [
        "compare",
        "--data",
        "hands",
        "--reading.size",
        "48",
        "--reading.people",
        "8",
        "--reading.views",
        "3",
        *TINY,
    ]
    words += [
        "--people",
        "2",
        "--arms",
        "whole,box,palm,all,oracle",
        "--seeds",
        "0,1",
        "--steps",
        "1",
        "--aligner.steps",
        "1",
    ]
    assert main([*words, "--out", str(tmp_path / "c")]) == 0
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert list(summary["arms"]) == ["whole", "box", "palm", "all", "oracle"]
    assert len(summary["claims"]) == 4
    assert yaml.safe_load((tmp_path / "c/config.yaml").read_text())["seeds"] == [0, 1]
    assert "rank-1 of all" in capsys.readouterr().out


def test_faults_of_a_training_are_one_line_before_any_work(tmp_path, capsys):
    base = ["train", "--data", "hands", "--reading.size", "48", "--reading.people", "4", "--reading.views", "2", *TINY]
    out = ["--out", str(tmp_path / "m")]
    assert_user_error(main, [*base, *out, "--views", "3"], capsys, "has 2 pictures, batches of --views 3")
    assert_user_error(main, [*base, *out, "--people", "9"], capsys, "4 identities do not fill a batch of --people 9")
    assert_user_error(main, [*base, *out, "--people", "2", "--recognizer.palm", "timm:resnt18"], capsys, "did you mean")
    assert_user_error(
        main,
        [*base, *out, "--people", "2", "--preset", "whole", "--joint_steps", "2"],
        capsys,
        "--joint_steps: there is no aligner",
    )
    assert not (tmp_path / "m").exists()


SCRIPT = """
import os, sys
import handmstn.training as t
calls = [0]
step = t.{task}.training_step
def counted(self, batch, number):
    calls[0] += 1
    if calls[0] > {after}:
        os.kill(os.getpid(), 9)
    return step(self, batch, number)
t.{task}.training_step = counted
from handmstn.cli import main
sys.exit(main({words!r}))
"""


RESUMED = ["train", "--data", "hands", "--reading.size", "48", "--reading.people", "4", "--reading.views", "2", *TINY]
RESUMED += ["--people", "2", "--checkpoint_every", "2", "--log_every", "1", "--steps", "5", "--aligner.steps", "4"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A training that nobody killed."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("unbroken") / "run"
    assert main([*RESUMED, "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize(("task", "after"), [("AlignTask", 1), ("IdentityTask", 3)])
def test_a_stage_killed_before_or_after_its_checkpoint_resumes_to_the_same_weights(unbroken, tmp_path, task, after):
    killed = [*RESUMED, "--out", str(tmp_path / "killed")]
    script = SCRIPT.format(task=task, after=after, words=killed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main([*killed, "--resume"]) == 0
    a, b = (load_file(path / "model.safetensors") for path in (unbroken, tmp_path / "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for stage in ("align", "identity"):
        rows = [(path / f"metrics.{stage}.csv").read_text() for path in (unbroken, tmp_path / "killed")]
        assert rows[0] == rows[1]
