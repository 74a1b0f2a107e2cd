import numpy as np
import pytest
from head_kd.per_image import average_precision, contributions, difference_over_images
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def made(seed, images=12, quality=2.0):
    """Objects of three classes and noisy detections of them, among false ones."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(images):
        for _ in range(int(rng.integers(0, 5))):
            box = [*rng.uniform(0, 80, 2), *rng.uniform(10, 60, 2)]
            label = int(rng.integers(1, 3))  # class 3 has no object
            common = {"image_id": 10 * image, "category_id": label}
            objects.append({"id": len(objects) + 1, **common, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
            near = [v + rng.normal(0, quality) for v in box]
            found.append({**common, "bbox": near, "score": float(rng.uniform(0.3, 1))})
        for _ in range(3):
            false = [*rng.uniform(0, 80, 2), *rng.uniform(10, 60, 2)]
            label = int(rng.integers(1, 4))
            found.append({"image_id": 10 * image, "category_id": label, "bbox": false, "score": float(rng.uniform())})
    return {
        "images": [{"id": 10 * i, "width": 140, "height": 140} for i in range(images)],
        "annotations": objects,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
    }, found


def pycocotools_ap(annotations, detections):
    truth = COCO()
    truth.dataset = annotations
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def copies(annotations, detections, counts):
    """The data with image number i taken ``counts[i]`` times."""
    images, objects, found = [], [], []
    for entry, count in zip(annotations["images"], counts, strict=True):
        for _ in range(count):
            new = len(images)
            images.append({**entry, "id": new})
            objects += [{**a, "image_id": new} for a in annotations["annotations"] if a["image_id"] == entry["id"]]
            found += [{**d, "image_id": new} for d in detections if d["image_id"] == entry["id"]]
    objects = [{**entry, "id": i + 1} for i, entry in enumerate(objects)]
    return {**annotations, "images": images, "annotations": objects}, found


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_pycocotools(seed):
    annotations, detections = made(seed)
    ours = average_precision(contributions(annotations, detections))
    assert 0.2 < ours < 0.9
    assert ours == pytest.approx(pycocotools_ap(annotations, detections), abs=1e-12)


def test_a_resample_is_what_pycocotools_gives_for_copies_of_the_images():
    annotations, detections = made(5)
    counts = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12))
    assert (counts == 0).any()
    ours = average_precision(contributions(annotations, detections), counts)
    # pycocotools counts copies of a hit one by one, which can pass a recall in between at a lower precision
    assert ours == pytest.approx(pycocotools_ap(*copies(annotations, detections, counts)), abs=0.01)
    assert abs(ours - average_precision(contributions(annotations, detections))) > 0.02


def test_without_detections_nothing_is_found_and_crowds_are_refused():
    annotations, _ = made(0)
    assert average_precision(contributions(annotations, [])) == 0
    annotations["annotations"][0]["iscrowd"] = 1
    with pytest.raises(ValueError, match="crowd"):
        contributions(annotations, [])


def test_the_interval_of_a_paired_difference_holds_it_and_is_narrower_than_of_unpaired_ones():
    annotations, detections = made(3, images=60)
    worse = [{**d, "bbox": [d["bbox"][0] + 9, *d["bbox"][1:]]} for d in detections]
    a, b = contributions(annotations, detections), contributions(annotations, worse)
    estimate, (low, high) = difference_over_images([a], [b], draws=200)
    assert estimate == pytest.approx(average_precision(a) - average_precision(b))
    assert 0 < low < estimate < high
    other = contributions(*made(4, images=60))
    _, (unpaired_low, unpaired_high) = difference_over_images([a], [other], draws=200)
    assert high - low < unpaired_high - unpaired_low
    assert difference_over_images([a], [a], draws=20) == (0.0, (0.0, 0.0))
