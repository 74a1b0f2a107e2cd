import pytest
import torch
from head_kd.decoders import dense_decoder
from head_kd.proposals import Provenance, center_locations, dense_proposals, gather_at
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from tiny_detectors import STUDENTS, build


def random_outputs(head, sizes, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    classes, anchors = head.num_classes, head.num_base_priors
    logits = [torch.randn((images, anchors * classes, h, w), generator=generator) for h, w in sizes]
    boxes = [0.3 * torch.randn((images, anchors * 4, h, w), generator=generator) for h, w in sizes]
    return logits, boxes


@pytest.mark.parametrize("threshold", [0.7, 0.2])
@pytest.mark.parametrize(
    ("anchors", "sizes", "shape"),
    [
        (9, [(16, 16), (8, 8), (4, 4), (2, 2)], (128, 128)),
        (9, [(13, 20), (7, 10), (4, 5), (2, 3)], (100, 157)),
        (1, [(16, 12), (8, 6), (4, 3), (2, 2)], (121, 96)),
    ],
)
def test_proposals_are_those_of_mmdets_rpn_on_the_best_class(anchors, sizes, shape, threshold):
    """The same boxes, scores and order as ``RPNHead`` gives for class-max logits.

    A low threshold removes most boxes, so that the prefix which NMS sees has to grow.
    """
    from mmdet.models.dense_heads import RPNHead

    config = STUDENTS["retinanet"]["bbox_head"]
    generator = dict(config["anchor_generator"])
    if anchors == 1:
        generator = {"type": "AnchorGenerator", "ratios": [1.0], "scales": [2], "strides": [8, 16, 32, 64]}
    head = build({**config, "anchor_generator": generator, "train_cfg": None, "test_cfg": None})
    rpn = RPNHead(in_channels=8, num_classes=1, anchor_generator=generator, bbox_coder=config["bbox_coder"])
    logits, boxes = random_outputs(head, sizes, 3)
    best = [t.view(3, anchors, -1, *t.shape[2:]).amax(dim=2) for t in logits]
    cfg = ConfigDict(nms_pre=300, max_per_img=150, nms={"type": "nms", "iou_threshold": threshold}, min_bbox_size=0)
    metas = [{"img_shape": shape, "scale_factor": (1.0, 1.0)}] * 3
    expected = rpn.predict_by_feat(best, boxes, batch_img_metas=metas, cfg=cfg, rescale=False)
    decoder = dense_decoder(head)
    found = dense_proposals(
        logits,
        boxes,
        decoder.priors(sizes, torch.device("cpu")),
        decoder.decode,
        [shape] * 3,
        nms_pre=300,
        iou_threshold=threshold,
        max_per_image=150,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.allclose(ours.boxes, theirs.bboxes, atol=1e-4)


@pytest.mark.parametrize("kind", ["retinanet", "atss", "fcos", "gfl"])
@pytest.mark.parametrize("training", [True, False])
def test_a_cells_own_prediction_gives_its_proposal(kind, training):
    """Decoding the prior of a proposal's cell with that cell's own output gives the box."""
    detector = build(STUDENTS[kind]).train(training)
    features = detector.extract_feat(torch.randn(2, 3, 128, 96))
    outputs = detector.bbox_head(features)
    sizes = [tuple(t.shape[2:]) for t in outputs[0]]
    decoder = dense_decoder(detector.bbox_head)
    priors = decoder.priors(sizes, torch.device("cpu"))
    found = dense_proposals(outputs[0], outputs[1], priors, decoder.decode, [(1000, 1000)] * 2, max_per_image=40)
    for image, proposals in enumerate(found):
        where = proposals.provenance
        assert (where.level >= 0).all()
        for k in range(0, len(where), 7):
            level, y, x, a = (int(t[k]) for t in (where.level, where.y, where.x, where.anchor))
            anchors = int(detector.bbox_head.num_base_priors)
            raw = outputs[1][level][image].view(anchors, -1, *sizes[level])[a, :, y, x]
            prior = priors[level][(y * sizes[level][1] + x) * anchors + a]
            box = decoder.decode(level, prior[None].float(), raw[None].float()).clamp(0, 1000)
            assert torch.allclose(box[0], proposals.boxes[k], atol=1e-4)


@pytest.mark.parametrize("kind", ["fcos", "gfl"])
def test_decoded_boxes_are_those_that_the_head_predicts(kind):
    """The decoder of a point head agrees with the head's own in eval mode."""
    detector = build(STUDENTS[kind]).eval()
    head = detector.bbox_head
    with torch.no_grad():
        outputs = head(detector.extract_feat(torch.randn(1, 3, 128, 128)))
        decoder = dense_decoder(head)
        sizes = [tuple(t.shape[2:]) for t in outputs[0]]
        ours = dense_proposals(
            outputs[0],
            outputs[1],
            decoder.priors(sizes, torch.device("cpu")),
            decoder.decode,
            [(128, 128)],
            nms_pre=10**6,
            iou_threshold=1.0,
            max_per_image=10**6,
            min_size=-1,
        )[0]
        cfg = ConfigDict(nms_pre=10**6, score_thr=0.0, min_bbox_size=-1, nms=None, max_per_img=10**6)
        cfg.nms = {"type": "nms", "iou_threshold": 1.0}
        theirs = head.predict_by_feat(
            *outputs, batch_img_metas=[{"img_shape": (128, 128), "scale_factor": (1.0, 1.0)}], cfg=cfg, rescale=False
        )[0].bboxes
    distance = torch.cdist(ours.boxes, theirs, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    assert float(distance.max()) < 1e-3


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 40))
def test_gather_is_a_triple_loop_and_its_gradient_goes_to_these_cells(seed, rows):
    """Values, and that a cell that is read twice gets both gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(6, 5), (3, 3), (2, 1)]
    maps = [torch.randn((2, 4, h, w), generator=generator, requires_grad=True) for h, w in sizes]
    level = torch.randint(3, (rows,), generator=generator)
    y = torch.tensor(
        [int(torch.randint(sizes[i][0], (1,), generator=generator)) for i in level.tolist()], dtype=torch.int64
    )
    x = torch.tensor(
        [int(torch.randint(sizes[i][1], (1,), generator=generator)) for i in level.tolist()], dtype=torch.int64
    )
    image = torch.randint(2, (rows,), generator=generator)
    found = gather_at(maps, image, Provenance(level, y, x, torch.zeros_like(level)))
    weight = torch.randn((rows, 4), generator=generator)
    expected = [torch.zeros_like(m) for m in maps]
    for m in range(rows):
        i, j, k, n = int(level[m]), int(y[m]), int(x[m]), int(image[m])
        for c in range(4):
            assert found[m, c] == maps[i][n, c, j, k]
            expected[i][n, c, j, k] += weight[m, c]
    (found * weight).sum().backward()
    for feature_map, gradient in zip(maps, expected, strict=True):
        assert torch.allclose(feature_map.grad, gradient, atol=1e-5)


def test_any_box_has_a_cell_and_an_anchor_sized_one_has_its_own():
    boxes = torch.tensor(
        [[0.0, 0.0, 64.0, 64.0], [100.0, 40.0, 228.0, 168.0], [-50.0, -50.0, -1.0, -1.0], [9.0, 9.0, 9.0, 9.0]]
    )
    where = center_locations(boxes, [8, 16, 32], [(32, 32), (16, 16), (8, 8)])
    assert where.level.tolist()[:2] == [0, 1]
    assert (int(where.x[0]), int(where.y[0])) == (4, 4)
    assert (int(where.x[1]), int(where.y[1])) == (10, 6)
    assert (where.x >= 0).all()
    assert (where.y >= 0).all()


def test_rows_that_follow_none_have_none():
    both = Provenance.cat([Provenance.none(2), Provenance(*(torch.tensor([1]) for _ in range(4)))])
    assert both.level.tolist() == [-1, -1, 1]
    assert len(both[torch.tensor([2])]) == 1
