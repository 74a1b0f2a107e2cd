import json

import pytest
import torch
from head_kd.cache import TargetCache, choose_boxes, move_boxes, weights_digest, write_cache
from head_kd.teacher import TeacherView
from tiny_detectors import STUDENTS, batch_for, build, total, wrap

from tenfold import UserError


@pytest.fixture
def view(teacher):
    return TeacherView.load(teacher["config"], teacher["checkpoint"])


def write(path, view, storage="fp32", count=4, boxes=16):
    preprocess = build(STUDENTS["retinanet"])
    batches = (batch_for(preprocess, 2, i) for i in range(0, count, 2))

    def numbered():
        for number, (images, samples) in enumerate(batches):
            for i, sample in enumerate(samples):
                sample.set_metainfo({"img_id": 2 * number + i + 1})
            yield images, samples

    return write_cache(
        path, view, numbered(), count, names=["fc1", "fc2"], data="d", boxes_per_image=boxes, storage=storage
    )


@pytest.mark.parametrize(("storage", "tolerance"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 1e-2)])
def test_a_cache_is_the_live_teacher_at_the_same_boxes(view, storage, tolerance, tmp_path):
    """Bitwise in fp32, within 1e-3 in fp16."""
    cache = write(tmp_path, view, storage)
    images, samples = batch_for(build(STUDENTS["retinanet"]))
    boxes, targets = cache.regions(samples, torch.device("cpu"))
    rois = torch.cat([torch.cat([torch.full((16, 1), float(i)), p.boxes], dim=1) for i, p in enumerate(boxes)])
    live = view.at_rois(view.features(images, samples), rois, ["fc1", "fc2"])
    for name, value in live.items():
        found = torch.cat([t[name] for t in targets])
        assert float((found - value).norm()) <= tolerance * float(value.norm())


def test_training_with_a_cache_builds_no_teacher(view, teacher, tmp_path):
    write(tmp_path, view)
    settings = {"kind": "roi", "normalize": True, "rois_per_image": 8}
    model = wrap(STUDENTS["retinanet"], assistants=[settings], teacher={**teacher, "cache": str(tmp_path)})
    assert model.teacher is None
    assert model.untransferred == {"assistant0": []}
    losses = model.loss(*batch_for(model))
    total(model, losses).backward()
    assert float(losses["akd0.loss_fc2"]) > 0
    assert float(losses["ckd0.loss"]) > 0
    assert all(p.grad is not None for p in model.head_kd.parameters())
    assert not any("backbone" in name for name, _ in model.head_kd.named_parameters())


def test_with_a_cache_a_step_costs_student_and_assistant(view, teacher, tmp_path):
    """FLOPs: at most 3 percent above the student with an assistant on labels, on the same regions."""
    from head_kd.inspection import training_flops
    from tiny_detectors import teacher_config

    write(tmp_path, view)
    settings = {"kind": "roi", "normalize": True, "rois_per_image": 8}
    model = wrap(STUDENTS["retinanet"], assistants=[settings], teacher={**teacher, "cache": str(tmp_path)})
    images, samples = batch_for(model)
    head = teacher_config()
    alone = wrap(
        STUDENTS["retinanet"],
        assistants=[
            {
                **settings,
                "head": head["roi_head"],
                "train_cfg": head["train_cfg"]["rcnn"],
                "akd_weight": 0,
                "ckd_weight": 0,
            }
        ],
    )
    assert training_flops(model, images, samples) <= 1.03 * training_flops(alone, images, samples)


def test_a_two_stage_students_own_regions_are_not_in_a_cache(view, teacher, tmp_path):
    """Its rows would be paired with targets at other boxes."""
    write(tmp_path, view)
    cached = {**teacher, "cache": str(tmp_path)}
    with pytest.raises(UserError, match="ckd_weight: a cache has no targets at the regions"):
        wrap(STUDENTS["faster"], assistants=[{"kind": "roi"}], teacher=cached)
    model = wrap(STUDENTS["faster"], assistants=[{"kind": "roi", "ckd_weight": 0.0}], teacher=cached)
    assert float(model.loss(*batch_for(model))["akd0.loss_fc2"]) > 0


def test_another_teacher_or_other_data_is_refused(view, teacher, tmp_path):
    write(tmp_path / "c", view)
    cache = TargetCache.open(tmp_path / "c")
    with pytest.raises(UserError, match="other annotations"):
        cache.check_data("e")
    state = torch.load(teacher["checkpoint"], weights_only=True)
    state["state_dict"]["roi_head.bbox_head.fc_cls.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="made with another teacher"):
        wrap(
            STUDENTS["retinanet"],
            assistants=[{}],
            teacher={**teacher, "checkpoint": str(tmp_path / "other.pth"), "cache": str(tmp_path / "c")},
        )
    assert weights_digest(state["state_dict"]) != json.loads((tmp_path / "c/cache.json").read_text())["teacher"]
    with pytest.raises(UserError, match=r"no finished cache"):
        TargetCache.open(tmp_path)
    for name in ("boxes.npy", "cache.json"):
        (tmp_path / "c" / name).write_bytes((tmp_path / "c" / name).read_bytes()[:60])
        with pytest.raises(UserError, match="this cache is damaged"):
            TargetCache.open(tmp_path / "c")
    images, samples = batch_for(build(STUDENTS["retinanet"]))
    samples[0].set_metainfo({"img_id": 99})
    with pytest.raises(UserError, match="holds no image 99"):
        cache.regions(samples, images.device)


def test_boxes_follow_resizing_flips_and_homographies():
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    meta = {"img_shape": (200, 100), "ori_shape": (100, 50), "scale_factor": (2.0, 2.0)}
    assert move_boxes(boxes, meta).tolist() == [[20, 40, 60, 120]]
    assert move_boxes(boxes, {**meta, "flip": True, "flip_direction": "horizontal"}).tolist() == [[40, 40, 80, 120]]
    assert move_boxes(boxes, {**meta, "flip": True, "flip_direction": "vertical"}).tolist() == [[20, 80, 60, 160]]
    shift = [[2.0, 0, -10], [0, 2, -50], [0, 0, 1]]
    assert move_boxes(boxes, {**meta, "homography_matrix": shift}).tolist() == [[10, 0, 50, 70]]
    with pytest.raises(UserError, match="let PackDetInputs pack 'homography_matrix'"):
        move_boxes(boxes, {**meta, "img_shape": (120, 100)})


def test_chosen_boxes_hold_the_truth_and_stay_inside():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[5.0, 5, 20, 30], [50, 60, 90, 99]])
    proposals = torch.rand(100, 4, generator=generator) * 40 + torch.tensor([0.0, 0, 50, 50])
    for given in (truth, truth[:0]):
        boxes = choose_boxes(proposals, given, (100, 100), 32, generator)
        assert boxes.shape == (32, 4)
        assert torch.equal(boxes[: len(given)], given)
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert boxes.max() <= 100
    assert choose_boxes(proposals[:0], truth[:0], (100, 100), 8, generator).shape == (8, 4)
