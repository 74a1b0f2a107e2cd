"""What a user's config asks of the host: it acts as in mmengine's own runner, or is named."""

import copy
import csv
import json

import pytest
import torch
from head_kd.cli import main
from head_kd.config import RunnerSettings
from head_kd.stack import said_nothing
from head_kd.training.host import prepare
from head_kd.training.loop import KeyedDataset, KeyedSampler
from head_kd.training.runner import BEST, Best, evaluate, fit
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from tiny_detectors import STUDENTS, build, pair_words, teacher_config, train_words

from tenfold import UserError
from tenfold.testing import assert_user_error


@pytest.fixture
def student(project):
    return Config.fromfile(project / "student.py")


def prepared(cfg, **settings):
    return prepare(cfg, RunnerSettings(**settings), "cpu")


def test_load_from_never_overwrites_what_is_measured(student, tmp_path):
    other = build(STUDENTS["retinanet"])
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    torch.save({"state_dict": other.state_dict()}, tmp_path / "zero.pth")
    weights = build(STUDENTS["retinanet"]).state_dict()
    before = evaluate(student, weights)
    student.load_from, student.resume = str(tmp_path / "zero.pth"), True
    assert evaluate(student, weights) == before
    teacher = build(teacher_config())
    kept = {k: v.clone() for k, v in teacher.state_dict().items()}
    evaluate(student, model=teacher)
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())


def test_load_from_starts_the_student_and_is_named(student, tmp_path):
    torch.save({"state_dict": build(STUDENTS["retinanet"]).state_dict()}, tmp_path / "start.pth")
    student.load_from = str(tmp_path / "start.pth")
    assert any("tensors start the student" in note for note in prepared(student)[1])
    student.resume = True
    cfg, notes = prepared(student)
    assert not cfg.resume
    assert any(note.startswith("resume of the config") for note in notes)
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    student.load_from = str(tmp_path / "other.pth")
    with pytest.raises(UserError, match="none of its 1 tensors is one of the student"):
        prepared(student)


def test_samplers_and_wrappers_of_the_user_stay(student):
    student.train_dataloader.sampler = {"type": "ClassAwareSampler", "num_sample_class": 1}
    inner = copy.deepcopy(student.train_dataloader.dataset)
    student.train_dataloader.dataset = {"type": "RepeatDataset", "times": 2, "dataset": inner}
    cfg, _ = prepared(student)
    assert cfg.train_dataloader.sampler.inner.type == "ClassAwareSampler"
    assert cfg.train_dataloader.dataset.dataset.type == "RepeatDataset"
    with said_nothing():
        data = KeyedDataset(DATASETS.build(inner), seed=1)
        sampler = KeyedSampler(data, seed=1, inner={"type": "ClassAwareSampler", "num_sample_class": 1})
    sampler.set_epoch(2)
    order = list(sampler)
    assert order == list(sampler)
    assert all(2 * len(data) <= key < 3 * len(data) for key in order)
    assert len(order) == len(sampler)
    sampler.set_epoch(3)
    assert [key % len(data) for key in sampler] != [key % len(data) for key in order]


def test_a_pipeline_that_a_hook_switches_is_the_one_that_runs(student):
    """As mmdet's ``PipelineSwitchHook`` does: it sets ``pipeline`` of the loader's data set."""
    with said_nothing():
        data = KeyedDataset(DATASETS.build(student.train_dataloader.dataset), seed=1)
    data.pipeline = lambda info: {"switched": info["img_id"]}
    assert "switched" in data[3]
    assert data.metainfo["classes"] == data.dataset.metainfo["classes"]
    assert data.get_cat_ids(8) == data.dataset.get_cat_ids(0)


def test_what_cannot_act_as_in_mmengine_is_named(student):
    student.train_dataloader.dataset.pipeline.insert(2, {"type": "CachedMosaic", "img_scale": (64, 64)})
    student.randomness = {"seed": 5}
    student.optim_wrapper.type = "AmpOptimWrapper"
    cfg, notes = prepared(student)
    said = " ".join(notes)
    for part in ("CachedMosaic", "randomness.seed 5", "AmpOptimWrapper needs a GPU", "default_hooks.checkpoint"):
        assert part in said, part
    assert cfg.optim_wrapper.type == "OptimWrapper"
    with pytest.raises(UserError, match="--precision bf16 on a CPU: mmengine's mixed precision needs a GPU"):
        prepared(student, precision="bf16")
    student.train_cfg.type = "MyLoop"
    with pytest.raises(UserError, match=r"train_cfg.type MyLoop is a loop of another kind"):
        prepared(student)


@pytest.mark.parametrize(
    ("hook", "values", "kept"),
    [
        ({"save_best": "auto"}, [0.1, 0.3, 0.2], [True, True, False]),
        ({"save_best": "coco/bbox_mAP", "rule": "less"}, [0.1, 0.3, 0.05], [True, False, True]),
    ],
)
def test_the_best_is_the_one_that_mmengine_would_keep(hook, values, kept):
    best = Best.of(hook)
    assert [best.improves({"coco/bbox_mAP": v}) for v in values] == kept
    rule = CheckpointHook(**hook).rules[0] if hook.get("rule") else "greater"
    assert (rule == "greater") == best.greater
    with pytest.raises(UserError, match="save_best coco/bbox_map: did you mean coco/bbox_mAP"):
        Best.of({"save_best": "coco/bbox_map"}).improves({"coco/bbox_mAP": 1.0})


def test_the_best_checkpoint_is_kept_and_exported(project, tmp_path):
    config = Config.fromfile(project / "student.py")
    config.default_hooks = {"checkpoint": {"type": "CheckpointHook", "save_best": "auto"}}
    config.train_cfg.val_interval = 1
    config.dump(str(tmp_path / "student.py"))
    out = tmp_path / "run"
    words = train_words(project, out, "--student", str(tmp_path / "student.py"), "--steps", "2")
    assert main(words) == 0
    assert (out / BEST).exists()
    assert (out / "student_best.safetensors").exists()
    shown = Config.fromfile(out / "config.py")
    assert shown.train_dataloader.dataset.type == "KeyedDataset"
    assert shown.train_cfg.max_iters == 2


def test_intervals_of_validation_change_where_the_config_says(student):
    student.train_cfg.dynamic_intervals = [(3, 1)]
    student.train_cfg.val_interval = 2
    cfg = copy.deepcopy(student)
    done = fit(cfg, RunnerSettings(steps=5, log_every=1, device="cpu"), None, quiet=True)
    loop = done.train_loop
    assert [n for n in range(1, 6) if loop._due(n)] == [2, 3, 4, 5]


def test_resume_with_accumulated_gradients_is_exact(project, tmp_path):
    """A checkpoint in the middle of an accumulation would lose the gradients so far."""
    config = Config.fromfile(project / "student.py")
    config.optim_wrapper.accumulative_counts = 2
    config.dump(str(tmp_path / "student.py"))
    more = ("--student", str(tmp_path / "student.py"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(train_words(project, whole, *more)) == 0
    assert_broken(project, broken, more)
    assert main([*train_words(project, broken, *more), "--resume"]) == 0
    assert (broken / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def assert_broken(project, out, more):
    """A run that stops at its third step, in the middle of an accumulation."""
    from head_kd.training import runner

    own = runner.RunHook.after_train_iter

    def stop(self, *args, **words):
        own(self, *args, **words)
        if args[0].iter == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.RunHook, "after_train_iter", stop)
        assert main(train_words(project, out, *more)) == 130
    state = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert state["meta"]["iter"] == 2


def test_mmdets_own_script_guards_stops_and_exports(project, tmp_path):
    """What ``tools/train.py`` does with the dump of a composed config: mmengine's loop, sampler and checkpoints."""
    from head_kd import pair
    from mmengine.runner import Runner

    cfg = pair(str(project / "student.py"), method="tf_head")
    cfg.param_scheduler = [{"type": "MultiStepLR", "by_epoch": True, "milestones": [2]}]
    cfg.dump(str(tmp_path / "composed.py"))
    cfg = Config.fromfile(tmp_path / "composed.py")
    cfg.work_dir, cfg.log_level = str(tmp_path / "work"), "ERROR"
    cfg.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 1}
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.visualizer = {"type": "Visualizer", "vis_backends": [], "name": "script"}
    cfg.default_hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 1}, "logger": None}
    with said_nothing():
        runner = Runner.from_cfg(cfg)
        runner.train()
    assert runner.model.schedule.stop == 2 * len(runner.train_dataloader)
    assert (tmp_path / "work" / "student.safetensors").exists()
    assert any("data: 8 images" in line for line in json.loads((tmp_path / "work" / "guard.json").read_text())["lines"])


def test_a_teacher_is_loaded_or_refused(project, tmp_path, capsys):
    """Nine tenths of the tensors are there, the head that is distilled is not."""
    state = torch.load(project / "teacher.pth", weights_only=True)
    lacking = {k: v for k, v in state["state_dict"].items() if "shared_fcs.1" not in k}
    torch.save({**state, "state_dict": lacking}, tmp_path / "t.pth")
    words = train_words(project, tmp_path / "o", "--teacher_weights", str(tmp_path / "t.pth"))
    assert_user_error(main, words, capsys, "no roi_head.bbox_head.shared_fcs.1")
    other = {k: v for k, v in state["state_dict"].items() if "fc_cls" not in k}
    torch.save({**state, "state_dict": other}, tmp_path / "t.pth")
    words = train_words(
        project, tmp_path / "o", "--teacher_weights", str(tmp_path / "t.pth"), "--guard", "2", "--steps", "1"
    )
    assert main([w for w in words if w != "--quiet"]) == 0
    assert "2 tensors are not in its file" in capsys.readouterr().err


def test_classes_of_an_mmdet_2_checkpoint_are_read(project, tmp_path):
    from head_kd.checkpoints import read_weights

    torch.save({"meta": {"CLASSES": ("cat", "dog")}, "state_dict": {"x": torch.zeros(1)}}, tmp_path / "two.pth")
    assert read_weights(tmp_path / "two.pth").classes == ("cat", "dog")


def test_a_cache_of_another_backbone_or_input_is_refused(project, tmp_path, capsys):
    cache = project / "cached_host"
    words = ["cache", *pair_words(project), "--boxes", "16", "--device", "cpu", "--out", str(cache), "--quiet"]
    assert main(words) == 0
    state = torch.load(project / "teacher.pth", weights_only=True)
    name = next(k for k in state["state_dict"] if k.startswith("backbone.layer2") and k.endswith("weight"))
    state["state_dict"][name] = state["state_dict"][name] + 1
    torch.save(state, tmp_path / "t.pth")
    more = ["--cache", str(cache), "--steps", "1"]
    words = train_words(project, tmp_path / "o", "--teacher_weights", str(tmp_path / "t.pth"), *more)
    assert_user_error(main, words, capsys, "was made with another teacher")
    config = Config.fromfile(project / "teacher.py")
    config.model.data_preprocessor.mean = [0.0] * 3
    config.dump(str(tmp_path / "teacher.py"))
    words = train_words(project, tmp_path / "o", "--teacher", str(tmp_path / "teacher.py"), *more)
    assert_user_error(main, words, capsys, "another normalization of the teacher's input")


def test_rows_of_sizes_that_the_data_lack_are_left_out(trained):
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    values = [float(v) for row in rows for k, v in row.items() if k.startswith("val_bbox") and v]
    assert values
    assert min(values) >= 0


@pytest.mark.parametrize("step", ["MinIoURandomCrop", "RandomCrop", "Mosaic"])
def test_a_cache_is_refused_where_its_boxes_cannot_follow(student, step):
    from head_kd.cache import check_pipeline

    check_pipeline(student.train_dataloader.dataset)
    student.train_dataloader.dataset.pipeline.insert(2, {"type": step})
    with pytest.raises(UserError, match=f"cached boxes cannot follow {step}"):
        check_pipeline(student.train_dataloader.dataset)
    if step == "RandomCrop":
        student.train_dataloader.dataset.pipeline[-1]["meta_keys"] = ("img_id", "homography_matrix")
        check_pipeline(student.train_dataloader.dataset)
