"""Students of mmdet's own configs that behave otherwise than the classes that they derive from."""

import pytest
import torch
from head_kd.decoders import dense_decoder
from head_kd.proposals import dense_proposals
from head_kd.signals import head_signals
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from tiny_detectors import ONE_STAGE, TWO_STAGE, batch_for, build, stock, teacher_config, wrap

from tenfold import UserError

ROI = {"kind": "roi", "normalize": True}


@pytest.fixture(autouse=True)
def first_epoch():
    MessageHub.get_current_instance().update_info("epoch", 0)  # TOOD's head asks for it, as a run says it


def flat(losses):
    return {
        f"{name}.{i}": part
        for name, value in losses.items()
        for i, part in enumerate(value if isinstance(value, list | tuple) else [value])
    }


@pytest.mark.parametrize("kind", [*ONE_STAGE, *TWO_STAGE])
def test_with_a_weight_of_zero_each_is_its_hosts_own_baseline_bit_for_bit(kind, teacher):
    """Dynamic R-CNN, PISA, Double-Head, Libra and OHEM have heads or samplers of their own; so do the one-stage ones."""
    config = stock({**ONE_STAGE, **TWO_STAGE}[kind])
    plain = build(config).train()
    wrapped = wrap(config, assistants=[ROI], teacher=teacher, schedule={"warmup": 10})
    results = []
    for model in (plain, wrapped):
        torch.manual_seed(5)
        results.append((flat(model.loss(*batch_for(model))), torch.rand(())))
    assert torch.equal(results[0][1], results[1][1])
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name
    assert float(results[1][0]["akd0.loss_fc1.0"].detach()) == 0


@pytest.mark.parametrize("kind", [*ONE_STAGE, *TWO_STAGE])
def test_all_terms_reach_its_neck_and_head(kind, teacher):
    model = wrap(stock({**ONE_STAGE, **TWO_STAGE}[kind]), assistants=[ROI], teacher=teacher)
    losses = model.loss(*batch_for(model))
    neck = next(p for p in model.student.neck.parameters() if p.requires_grad and p.dim() > 1)
    for name in ("akd0.loss_fc1", "akd0.loss_fc2", "ckd0.loss"):
        assert torch.isfinite(losses[name])
        gradient = torch.autograd.grad(losses[name], neck, retain_graph=True)[0]
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("kind", ONE_STAGE)
@pytest.mark.parametrize("training", [True, False])
def test_decoded_boxes_are_those_that_the_head_itself_predicts(kind, training):
    detector = build(stock(ONE_STAGE[kind])).eval()
    head = detector.bbox_head
    with torch.no_grad():
        features = detector.extract_feat(torch.randn(1, 3, 128, 128))
        theirs = head.predict_by_feat(
            *head(features),
            batch_img_metas=[{"img_shape": (128, 128), "scale_factor": (1.0, 1.0)}],
            cfg=ConfigDict(
                nms_pre=10**6,
                score_thr=-1.0,
                min_bbox_size=-1,
                nms={"type": "nms", "iou_threshold": 1.0},
                max_per_img=10**6,
            ),
            rescale=False,
        )[0]
        head.train(training)
        for module in head.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()  # normalized by its batch, the head would give other outputs
        decoder = dense_decoder(head)
        logits, boxes = decoder.split(head(features))
        ours = dense_proposals(
            logits,
            boxes,
            decoder.priors([tuple(t.shape[2:]) for t in logits], torch.device("cpu")),
            decoder.decode,
            [(128, 128)],
            nms_pre=10**6,
            iou_threshold=1.0,
            max_per_image=10**6,
            min_size=-1,
        )[0]
    clipped = theirs.bboxes.clamp(0, 128)  # TOOD and YOLOX leave boxes outside of the image
    distance = torch.cdist(ours.boxes, clipped, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, _index = distance.min(dim=1)
    inside = (ours.boxes[:, 2:] > ours.boxes[:, :2]).all(dim=1)
    assert float(nearest[inside].max()) < 1e-2
    best = theirs.scores.max()
    assert abs(float(ours.scores.max() - best)) < 1e-4


def test_a_head_that_overrides_its_bases_decoding_is_not_decoded_like_it():
    from mmdet.models.dense_heads import FCOSHead
    from tiny_detectors import STUDENTS

    head = build(STUDENTS["fcos"]).bbox_head

    class Other(FCOSHead):
        def _predict_by_feat_single(self, *args, **more):
            raise AssertionError

    head.__class__ = Other
    with pytest.raises(UserError, match="Other gives no proposals with a known cell"):
        dense_decoder(head)


def test_towers_of_heads_with_a_list_of_layers_have_one_signal_for_each_level():
    for kind in ("rtmdet", "yolox"):
        assert set(head_signals(build(stock(ONE_STAGE[kind])).bbox_head)) == {"cls_tower", "reg_tower"}


def test_a_cascade_student_trains_with_the_default_preset(tmp_path, teacher_file):
    from head_kd import pair, small
    from mmengine.config import Config

    cascade = Config({"model": small.faster_rcnn(8, 16, fc=48, regions=16, stages=3)})
    cfg = pair(cascade, Config({"model": teacher_config()}), teacher_file)
    model = build(cfg.model).train()
    model.schedule = type(model.schedule)(warmup=0)
    losses = model.loss(*batch_for(model))
    assert float(losses["akd0.loss_fc1"].detach()) > 0
    with pytest.raises(UserError, match="method direct lets the student's head imitate"):
        pair(cascade, Config({"model": teacher_config()}), teacher_file, "direct")
