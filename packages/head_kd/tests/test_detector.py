import copy

import pytest
import torch
from head_kd import small
from head_kd.balance import gradient_norms
from head_kd.heads import fcos_head, rcnn_head, rcnn_train_cfg
from head_kd.losses import mimic_loss
from head_kd.proposals import Proposals, Provenance
from head_kd.regions import collect_regions
from head_kd.signals import capturing, resolve
from head_kd.teacher import Renormalize, TeacherView
from mmengine.config import Config, ConfigDict
from tiny_detectors import STUDENTS, batch_for, build, raw_batch, teacher_config, total, wrap

from tenfold import NonFiniteError, UserError

ROI = {"kind": "roi", "normalize": True}


def gradients(loss, *modules):
    """Whether each module gets a gradient that is not zero."""
    parameters = [list(m.parameters()) for m in modules]
    found = torch.autograd.grad(loss, [p for ps in parameters for p in ps], allow_unused=True, retain_graph=True)
    out, start = [], 0
    for ps in parameters:
        out.append(any(g is not None and bool(g.any()) for g in found[start : start + len(ps)]))
        start += len(ps)
    return out


@pytest.mark.parametrize("kind", STUDENTS)
def test_without_extras_training_is_plain_training_bit_for_bit(kind):
    plain, wrapped = build(STUDENTS[kind]).train(), wrap(STUDENTS[kind])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))
    for model in (plain, wrapped):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(2):
            torch.manual_seed(step)
            loss = total(model, model.loss(*batch_for(model, 2, 2 * step)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), wrapped.state_dict().values(), strict=False)
    )


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_assistants_leave_the_students_start_and_random_stream_alone(kind, teacher):
    """With a weight of 0 the terms change nothing either, though regions are sampled."""
    plain = build(STUDENTS[kind]).train()
    wrapped = wrap(STUDENTS[kind], assistants=[ROI], teacher=teacher, schedule={"warmup": 10})
    names = list(plain.state_dict())
    assert list(wrapped.state_dict())[: len(names)] == names
    assert all(torch.equal(plain.state_dict()[n], wrapped.state_dict()[n]) for n in names)
    results = []
    for model in (plain, wrapped):
        torch.manual_seed(5)
        losses = model.loss(*batch_for(model))
        results.append((losses, torch.rand(())))
    assert torch.equal(results[0][1], results[1][1])
    for name, value in results[0][0].items():
        for a, b in zip(*(v if isinstance(v, list) else [v] for v in (value, results[1][0][name])), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_checkpoint_is_the_plain_students(kind, teacher, tmp_path):
    """Keys in order, no teacher, stock loading, equal predictions."""
    from mmengine.runner import load_checkpoint

    model = wrap(STUDENTS[kind], assistants=[ROI], teacher=teacher).eval()
    names = list(build(STUDENTS[kind]).state_dict())
    keys = list(model.state_dict())
    assert keys[: len(names)] == names
    assert all(k.startswith("head_kd.") for k in keys[len(names) :])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    plain = build(STUDENTS[kind]).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    load_checkpoint(plain, str(tmp_path / "a.pth"), map_location="cpu", logger="silent")
    with torch.no_grad():
        ours, theirs = (m.predict(*batch_for(m)) for m in (model, plain))
        raw = [m(batch_for(m)[0], batch_for(m)[1], mode="tensor") for m in (model, plain)]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes)
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)
    flat = [[t for part in r for t in (part if isinstance(part, list | tuple) else [part])] for r in raw]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


def test_prediction_needs_no_teacher(teacher, teacher_file, tmp_path):
    """Its file may be gone, and it is never called."""
    gone = tmp_path / "t.pth"
    gone.write_bytes(teacher_file.read_bytes())
    model = wrap(STUDENTS["retinanet"], assistants=[ROI], teacher={**teacher, "checkpoint": str(gone)})
    gone.unlink()

    def never(*args):
        raise AssertionError("the teacher ran")

    model.teacher.detector.extract_feat = never
    with torch.no_grad():
        assert len(model.eval().predict(*batch_for(model))) == 2


def test_the_teacher_stays_what_it_was(teacher_file):
    """With BatchNorm that would learn and with dropout."""
    config = teacher_config()
    config["backbone"]["norm_eval"] = False
    detector = build(config)
    detector.neck.drop = torch.nn.Dropout(0.5)
    view = TeacherView(detector)
    model = wrap(
        STUDENTS["retinanet"],
        assistants=[{**ROI, "head": config["roi_head"], "train_cfg": config["train_cfg"]["rcnn"]}],
        teacher=view,
    )
    before = view.fingerprint()
    model.train()
    assert not any(m.training for m in view.detector.modules())
    ids = {id(p) for p in view.detector.parameters()}
    assert not ids & {id(p) for p in model.parameters()}
    assert not any("teacher" in name for name, _ in model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        total(model, model.loss(*batch_for(model, 2, step))).backward()
        optimizer.step()
    assert view.fingerprint() == before
    assert copy.deepcopy(model).teacher is view
    assert model.double().teacher.detector.backbone.conv1.weight.dtype == torch.float64
    model.float()


def test_akd_reaches_what_it_should(teacher):
    model = wrap(STUDENTS["retinanet"], assistants=[{**ROI, "ckd_weight": 0.0}], teacher=teacher)
    losses = model.loss(*batch_for(model))
    loss = sum(v for k, v in losses.items() if k.startswith("akd"))
    head = model.assistants[0].head.bbox_head
    assert gradients(loss, model.backbone, model.neck, head.shared_fcs, model.assistants[0].akd) == [True] * 4
    assert gradients(loss, model.bbox_head, head.fc_cls, head.fc_reg) == [False] * 3


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "atss", "gfl"])
def test_ckd_reaches_the_class_tower_alone(kind, teacher):
    model = wrap(STUDENTS[kind], assistants=[{**ROI, "akd_weight": 0.0}], teacher=teacher)
    loss = model.loss(*batch_for(model))["ckd0.loss"]
    head = model.bbox_head
    last = resolve(head, ["cls_tower", "reg_tower"], "head")
    assert gradients(loss, head.cls_convs, model.neck, model.backbone, model.assistants[0].ckd) == [True] * 4
    assert (
        gradients(loss, head.reg_convs, last["cls_tower"], last["reg_tower"], model.assistants[0].head) == [False] * 4
    )


def test_self_distillation_leaves_the_assistant_alone():
    """An assistant's gradients are the same with TF-HEAD's term and without."""
    found = []
    for weight in (0.0, 1.3):
        tf = {
            "kind": "roi",
            "akd_weight": 0.0,
            "ckd_weight": weight,
            "transfer": False,
            "head": rcnn_head(6, 16, [8, 16, 32, 64]),
            "train_cfg": rcnn_train_cfg(16),
        }
        model = wrap(STUDENTS["retinanet"], assistants=[tf])
        losses = model.loss(*batch_for(model))
        if weight:
            assert float(losses["ckd0.loss"]) > 0
            assert gradients(losses["ckd0.loss"], model.bbox_head.cls_convs, model.assistants[0].head) == [True, False]
        total(model, losses).backward()
        found.append([p.grad.clone() for p in model.assistants[0].head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_perfect_assistant_has_nothing_to_learn(teacher_file):
    """The teacher's own backbone, neck and strides, and an adapter that is the identity."""
    config = teacher_config()
    model = wrap(
        config,
        assistants=[{"kind": "roi", "ckd_weight": 0.0}],
        teacher={"config": Config({"model": config}), "checkpoint": str(teacher_file)},
    )
    model.backbone.load_state_dict(model.teacher.detector.backbone.state_dict())
    model.neck.load_state_dict(model.teacher.detector.neck.state_dict())
    for phi in model.assistants[0].akd.values():
        torch.nn.init.eye_(phi.weight)
        torch.nn.init.zeros_(phi.bias)
    model.backbone.eval()
    losses = model.loss(*batch_for(model))
    assert float(losses["akd0.loss_fc1"]) == 0
    assert float(losses["akd0.loss_fc2"]) == 0
    images, samples = batch_for(model)
    rois = torch.tensor([[0.0, 3, 4, 50, 60], [1.0, 20, 20, 90, 100]])
    own = model.assistants[0].at_rois(model.extract_feat(images), rois, ["fc1", "fc2"])
    theirs = model.teacher.at_rois(model.teacher.features(images, samples), rois, ["fc1", "fc2"])
    assert all(torch.equal(own[n], theirs[n]) for n in own)


def test_regions_are_followed_back_to_their_cells():
    """With ground truth before the proposals, without, and with none in the image."""
    from mmdet.models.task_modules.samplers import SamplingResult

    def result(pos, neg):
        r = SamplingResult.__new__(SamplingResult)
        r.pos_inds, r.neg_inds = torch.tensor(pos, dtype=torch.int64), torch.tensor(neg, dtype=torch.int64)
        r.pos_priors, r.neg_priors = torch.zeros(len(pos), 4), torch.ones(len(neg), 4)
        return r

    def proposals(count):
        cells = torch.arange(count)
        return Proposals(
            torch.zeros(count, 4), torch.zeros(count), Provenance(cells, cells + 10, cells + 20, cells % 9)
        )

    added = collect_regions([result([0, 1, 3], [4]), result([], [0, 2])], [proposals(5), proposals(3)], [2, 0], True)
    assert added.provenance.level.tolist() == [-1, -1, 1, 2, 0, 2]
    assert added.positive.tolist() == [True, True, True, False, False, False]
    assert added.image.tolist() == [0, 0, 0, 0, 1, 1]
    assert added.index.tolist() == [-2, -1, 1, 2, 0, 2]
    off = collect_regions([result([1], [4])], [proposals(5)], [2], False)
    assert off.provenance.y.tolist() == [11, 14]


@pytest.mark.parametrize("inplace", [True, False])
def test_signals_are_after_the_activation(inplace):
    from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead

    head = Shared2FCBBoxHead(
        fc_out_channels=7, in_channels=3, roi_feat_size=2, num_classes=4, loss_bbox={"type": "L1Loss"}
    )
    head.relu.inplace = inplace
    x = torch.randn(9, 3, 2, 2)
    with capturing(resolve(head, ["fc1", "fc2"], "head")) as seen:
        head(x)
    fc1 = torch.relu(head.shared_fcs[0](x.flatten(1)))
    assert torch.equal(seen["fc1"][0], fc1)
    assert torch.equal(seen["fc2"][0], torch.relu(head.shared_fcs[1](fc1)))
    dense = build(STUDENTS["retinanet"]).bbox_head
    maps = [torch.randn(1, 16, 4, 4)]
    with capturing(resolve(dense, ["cls_tower"], "head")) as seen:
        dense(maps)
    tower = maps[0]
    for conv in dense.cls_convs:
        tower = conv(tower)
    assert torch.equal(seen["cls_tower"][0], tower)
    assert float(tower.min()) >= 0
    assert not any(m._forward_pre_hooks for m in dense.modules())


def test_the_schedule_is_saved_with_the_model(teacher):
    model = wrap(STUDENTS["retinanet"], assistants=[ROI], teacher=teacher, schedule={"warmup": 4, "stop": 3})
    weights = []
    for step in range(4):
        weights.append(model.weight())
        losses = model.loss(*batch_for(model, 2, step))
    assert weights == [0, 0.25, 0.5, 0]
    assert float(losses["akd0.loss_fc1"]) == 0
    assert losses["akd0.loss_fc1"].requires_grad  # every adapter keeps a gradient, so that ranks do not wait
    again = wrap(STUDENTS["retinanet"], assistants=[ROI], teacher=teacher, schedule={"warmup": 40})
    again.load_state_dict(model.state_dict())
    assert again.weight() == 0.1
    model.eval().predict(*batch_for(model))
    assert int(model.head_kd.step) == 4


@pytest.mark.parametrize("case", ["no ground truth", "no proposals", "only ground truth"])
@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_empty_batches_keep_every_gradient(kind, case, teacher):
    extra = {"proposals": {"min_size": 1e5}} if case != "no ground truth" else {}
    model = wrap(STUDENTS[kind], assistants=[{**ROI, "ckd_on": "positive"}], teacher=teacher, **extra)
    truth = None if case == "only ground truth" else "none"
    losses = model.loss(*batch_for(model, truth=truth))
    loss = total(model, losses)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.head_kd.parameters())


def test_a_teachers_input_is_its_own():
    """BGR with another mean and unit deviation, out of an RGB batch with padding."""
    student = build(STUDENTS["retinanet"]).data_preprocessor
    caffe = build(
        {
            **teacher_config(),
            "data_preprocessor": {
                "type": "DetDataPreprocessor",
                "mean": [103.53, 116.28, 123.675],
                "std": [1.0, 1.0, 1.0],
                "bgr_to_rgb": False,
                "pad_size_divisor": 32,
            },
        }
    ).data_preprocessor
    data = raw_batch(2)
    data["inputs"] = [data["inputs"][0][:, :100, :90], data["inputs"][1]]
    expected = caffe(copy.deepcopy(data), False)["inputs"]
    convert = Renormalize(student, caffe)
    found = convert(student(copy.deepcopy(data), False)["inputs"], [(100, 90), (128, 128)])
    assert not convert.identity
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert not found[0, :, 100:].any()
    assert not found[0, :, :, 90:].any()
    assert Renormalize(student, student).identity


def test_a_cascade_is_mirrored_stage_by_stage(tmp_path):
    """A cascade teacher, one-stage and two-stage students; the same regions at each stage."""
    config = teacher_config(stages=3)
    torch.save({"state_dict": build(config).state_dict()}, tmp_path / "c.pth")
    for kind in ("retinanet", "faster"):
        model = wrap(
            STUDENTS[kind],
            assistants=[ROI],
            teacher={"config": Config({"model": config}), "checkpoint": str(tmp_path / "c.pth")},
        )
        calls = {"teacher": [], "assistant": []}
        for name, head in (("teacher", model.teacher.detector.roi_head), ("assistant", model.assistants[0].head)):
            original = head._bbox_forward

            def spy(stage, x, rois, seen=calls[name], original=original):
                seen.append((stage, rois.clone()))
                return original(stage, x, rois)

            head._bbox_forward = spy
        losses = model.loss(*batch_for(model))
        assert [s for s, _ in calls["assistant"]] == [0, 1, 2]
        for (a, own), (b, theirs) in zip(calls["assistant"], calls["teacher"], strict=True):
            assert a == b
            assert torch.equal(own, theirs)
        assert sum(k.startswith("akd0") for k in losses) == 6
        assert {f"assist0.s{s}.loss_cls" for s in range(3)} <= set(losses)


@pytest.mark.parametrize("student", ["retinanet", "fcos", "faster"])
@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "GFL", "ATSS"])
def test_dense_teachers_teach_one_and_two_stage_students(student, kind, tmp_path):
    """The reverse direction, and one dense head by another; strides that the neck lacks are made."""
    config = small.retinanet(8, 32) if kind == "RetinaNet" else small.point_detector(kind, 8, 32)
    torch.save({"state_dict": build(config).state_dict()}, tmp_path / "d.pth")
    settings = {"kind": "dense", "ckd_weight": 0.0 if student == "faster" else 1.0}
    model = wrap(
        STUDENTS[student],
        assistants=[settings],
        teacher={"config": Config({"model": config}), "checkpoint": str(tmp_path / "d.pth")},
    )
    losses = model.loss(*batch_for(model))
    total(model, losses).backward()
    assert float(losses["akd0.loss_cls_tower"]) > 0
    assert ("ckd0.loss" in losses) == (student != "faster")
    assert all(p.grad is not None for p in model.head_kd.parameters())


def test_a_dense_distillation_is_the_sum_over_levels_written_out(tmp_path):
    config = small.point_detector("FCOS", 8, 16)
    torch.save({"state_dict": build(config).state_dict()}, tmp_path / "d.pth")
    model = wrap(
        STUDENTS["retinanet"],
        assistants=[{"kind": "dense"}],
        teacher={"config": Config({"model": config}), "checkpoint": str(tmp_path / "d.pth")},
    )
    images, samples = batch_for(model)
    model.backbone.eval()
    losses = model.loss(images, samples)
    features = model.extract_feat(images)
    target = model.teacher.at_maps(model.teacher.features(images, samples), ["cls_tower"])["cls_tower"]
    with capturing(resolve(model.bbox_head, ["cls_tower"], "x")) as seen:
        model.bbox_head(features)
    expected = 2.0 * sum(
        mimic_loss(model.assistants[0].ckd(a), t) for a, t in zip(seen["cls_tower"], target, strict=True)
    )
    assert float(losses["ckd0.loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_bridge_lets_the_whole_head_be_copied(teacher):
    with_bridge = wrap(STUDENTS["retinanet"], assistants=[ROI], teacher=teacher)
    assert with_bridge.untransferred == {"assistant0": []}
    head, source = with_bridge.assistants[0].head, with_bridge.teacher.detector.roi_head
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), source.state_dict().values(), strict=True))
    without = wrap(STUDENTS["retinanet"], assistants=[{**ROI, "bridge": "off"}], teacher=teacher)
    assert without.untransferred == {"assistant0": ["bbox_head.shared_fcs.0.weight"]}


@pytest.mark.parametrize("mimic", [{"kind": "pkd", "weight": 6.0}, {"kind": "fitnet", "normalize": True}])
def test_neck_imitation_trains_the_neck_alone(mimic, teacher):
    model = wrap(STUDENTS["retinanet"], neck_mimic=mimic, teacher=teacher)
    losses = model.loss(*batch_for(model))
    assert gradients(losses["neck.loss_mimic"], model.neck, model.backbone, model.bbox_head) == [True, True, False]
    assert model.head_kd.neck.pairs == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_balancing_gives_each_term_its_share_of_the_gradient(teacher):
    """After the measured iterations, the weighted gradients together are ratio times the detection loss's."""
    model = wrap(STUDENTS["retinanet"], assistants=[ROI], teacher=teacher, balance={"ratio": 0.6, "iterations": 1})
    images, samples = batch_for(model)
    model.backbone.eval()
    state = copy.deepcopy(model.state_dict())
    model.loss(images, samples)
    factors = model.head_kd.factors.clone()
    model.load_state_dict(state)
    features = list(model.extract_feat(images))
    losses, terms = model.unweighted(images, features, samples)
    norms = gradient_norms(losses, terms, features)
    assert torch.allclose(norms[1:] * factors, norms[0] * 0.6 / len(terms), rtol=1e-4)
    model.loss(images, samples)
    frozen = model.head_kd.factors.clone()
    model.loss(*batch_for(model, 2, 6))
    assert torch.equal(model.head_kd.factors, frozen)


def test_tf_head_has_assistants_of_both_kinds():
    from head_kd.compose import pair
    from head_kd.config import Distillation
    from mmdet.registry import MODELS

    cfg = pair(
        Config({"model": copy.deepcopy(STUDENTS["retinanet"])}),
        method="tf_head",
        distill=Distillation(rois_per_image=16),
    )
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    model.head_kd.step += 1000
    losses = model.loss(*batch_for(model))
    total(model, losses).backward()
    assert {"ckd0.loss", "ckd1.loss", "assist0.loss_cls", "assist1.loss_centerness"} <= set(losses)
    assert float(losses["ckd0.loss"]) > 0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"assistants": [{"akd_weight": 0, "ckd_weight": 0, "detection_weight": 0}]}, "does nothing"),
        ({"assistants": [{"akd_weight": -1.0}]}, "assistant.akd_weight: expected 0 or more, got -1.0"),
        ({"assistants": [{"akd_wieght": 1.0}]}, "unknown setting 'akd_wieght': did you mean akd_weight"),
        ({"assistants": [{"akd": ("fc3",)}]}, "no signal 'fc3': did you mean fc"),
        ({"assistants": [{"ckd_student": "cls_twoer"}]}, "no signal 'cls_twoer': did you mean cls_tower"),
        ({"assistants": [{"kind": "dense"}]}, "the teacher's head is of kind roi"),
        ({"schedule": {"warmup": -1}}, "schedule.warmup: expected 0 or more, got -1"),
        ({"rois": "teachers"}, "expected student or teacher"),
        ({"balance": {"ratio": 0}}, "balance.ratio: expected more than 0, got 0"),
        ({"assistants": [{"match": "centr"}]}, "assistant.match: expected one of .*did you mean center"),
    ],
)
def test_bad_settings_are_one_line(settings, message, teacher):
    with pytest.raises(UserError, match=message) as caught:
        wrap(STUDENTS["retinanet"], teacher=teacher, **settings)
    assert "\n" not in str(caught.value)


def test_what_needs_a_teacher_says_so(teacher):
    for settings, message in [
        ({"assistants": [{}]}, "to copy it from"),
        (
            {"assistants": [{"head": rcnn_head(6, 16, [8, 16, 32, 64]), "train_cfg": rcnn_train_cfg()}]},
            "akd_weight needs a teacher",
        ),
        ({"neck_mimic": {}}, "neck_mimic needs a teacher"),
        ({"rois": "teacher"}, "needs a teacher with an RPN"),
        ({"teacher": {"config": teacher["config"]}}, "config and checkpoint are both needed"),
    ]:
        with pytest.raises(UserError, match=message):
            wrap(STUDENTS["retinanet"], **settings)


def test_an_assistant_takes_the_maps_that_the_student_has():
    """A head that pools from five maps, on a neck of four."""
    head = rcnn_head(6, 16, [4, 8, 16, 32, 64])
    model = wrap(STUDENTS["retinanet"], assistants=[{"head": head, "train_cfg": rcnn_train_cfg(), "akd_weight": 0}])
    assert model.assistants[0].head.bbox_roi_extractor.featmap_strides == [8, 16, 32, 64]


def test_pairs_without_a_signal_in_common_say_which(teacher, tmp_path):
    with pytest.raises(UserError, match="do not cover the dense head's"):
        wrap(STUDENTS["retinanet"], assistants=[{"kind": "dense", "head": fcos_head(6, 16, [4, 8]), "akd_weight": 0}])
    softmax = copy.deepcopy(STUDENTS["retinanet"])
    softmax["bbox_head"]["loss_cls"] = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    with pytest.raises(UserError, match="no sigmoid class scores"):
        wrap(softmax, assistants=[ROI], teacher=teacher)
    cascade = small.faster_rcnn(8, 16, fc=48, regions=16, stages=3)
    with pytest.raises(UserError, match="does not give them: set it to 0"):
        wrap(cascade, assistants=[ROI], teacher=teacher)
    model = wrap(cascade, assistants=[{**ROI, "ckd_weight": 0.0}], teacher=teacher)
    assert float(model.loss(*batch_for(model))["akd0.loss_fc1"]) > 0


def test_a_loss_that_is_not_finite_names_itself_and_the_step(teacher):
    model = wrap(STUDENTS["retinanet"], assistants=[ROI], teacher=teacher)
    model.loss(*batch_for(model))
    with torch.no_grad():
        model.assistants[0].akd["s0_fc2"].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"akd0.loss_fc2 is not finite at step 1"):
        model.loss(*batch_for(model))


def test_a_step_costs_student_assistant_and_the_teachers_part(teacher):
    """FLOPs of a step: at most 3 percent above the parts, counted one by one; the teacher's RPN never runs."""
    from head_kd.inspection import training_flops
    from torch.utils.flop_counter import FlopCounterMode

    model = wrap(STUDENTS["retinanet"], assistants=[{**ROI, "head": None}], teacher=teacher)
    model.teacher.detector.rpn_head.forward = None
    images, samples = batch_for(model)
    plain = wrap(STUDENTS["retinanet"])
    ours, student = training_flops(model, images, samples), training_flops(plain, images, samples)
    assist = wrap(
        STUDENTS["retinanet"],
        assistants=[
            {
                "head": teacher_config()["roi_head"],
                "train_cfg": teacher_config()["train_cfg"]["rcnn"],
                "akd_weight": 0,
                "ckd_weight": 0,
            }
        ],
    )
    with_assistant = training_flops(assist, images, samples)
    rois = torch.zeros(32, 5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = model.teacher.features(images, samples)
        model.teacher.at_rois(maps, rois, ["fc2"])
    parts = student + (with_assistant - student) + counter.get_total_flops()
    assert ours <= 1.03 * parts


def test_features_that_are_reused_are_the_same(teacher_file):
    view = TeacherView.load(Config({"model": teacher_config()}), teacher_file, reuse_features=True)
    model = build(STUDENTS["retinanet"])
    images, samples = batch_for(model)
    first = view.features(images, samples)
    calls = view.detector.extract_feat
    view.detector.extract_feat = None
    again = view.features(images.flip(0), samples[::-1])
    view.detector.extract_feat = calls
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(first, again, strict=True))


def test_a_repeated_anchor_map_is_an_option(teacher):
    model = wrap(STUDENTS["retinanet"], assistants=[{**ROI, "per_anchor": True}], teacher=teacher)
    total(model, model.loss(*batch_for(model))).backward()
    assert len(model.assistants[0].ckd.maps) == 9
    assert all(p.grad is not None for p in model.head_kd.parameters())
    center = wrap(STUDENTS["retinanet"], assistants=[{**ROI, "match": "center"}], teacher=teacher, rois="teacher")
    assert float(center.loss(*batch_for(center))["ckd0.loss"]) > 0


def test_aligned_strides_double_the_finest_scale(teacher):
    model = wrap(STUDENTS["retinanet"], assistants=[{**ROI, "align_strides": True}], teacher=teacher)
    assert model.assistants[0].head.bbox_roi_extractor.finest_scale == 56
    assert isinstance(model.assistants[0].head.train_cfg, ConfigDict)
