"""What is looked at before the first step, so that a wrong teacher costs seconds and not days."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS
from mmengine.dataset import pseudo_collate
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import Tensor

from head_kd import inspection
from head_kd.config import TrainSettings
from head_kd.configs import innermost
from head_kd.detector import HEADDetector
from head_kd.training.runner import evaluate
from tenfold import UserError
from tenfold.randomness import keyed
from tenfold.runs import Run

HIGH_RATIO = 10.0
"""Share of the detection loss's gradient from which a term is warned about (ours)."""


@HOOKS.register_module()
class GuardHook(Hook):  # type: ignore[misc]
    """Looks at the pair before the first step.

    Classes and their order, the input's normalization, what was copied, the teacher's AP on some validation images, the
    gradients of the terms and the semantic gap; at the end, that the teacher is the same to the bit. ``guard.json`` has
    it all.

    Args:
        images: validation images that the teacher is measured on; 0 checks classes, normalization and gradients only, and
            -1 checks nothing.
        min_teacher_ap: AP of the teacher, in percent, below which the training does not start.
        other_classes: whether the teacher may know other classes than the data has.
        run: run folder that ``guard.json`` goes to; default: the runner's ``work_dir``.
        say: takes each line for the person at the terminal; default: the runner's log.
    """

    priority = "LOW"

    def __init__(
        self,
        images: int = TrainSettings.guard,
        min_teacher_ap: float = 0.0,
        other_classes: bool = False,
        run: Run | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.images, self.min_teacher_ap, self.other_classes = images, min_teacher_ap, other_classes
        self.run, self.say = run, say
        self._fingerprint = ""

    def before_train(self, runner: Any) -> None:
        """Make the checks; after a resume, take the fingerprint alone."""
        model = getattr(runner.model, "module", runner.model)
        if not isinstance(model, HEADDetector):
            return
        if model.teacher is not None:
            self._fingerprint = model.teacher.fingerprint()
        if runner.iter > 0 or self.images < 0:
            return
        with keyed(model.seed):  # the run's own draws go on as if nobody had looked
            lines, found = self._look(runner, model)
        for line in lines:
            (self.say or runner.logger.info)(line)
        if self.run is not None:
            self.run.write_json("guard.json", {**found, "lines": lines})
        elif is_main_process():
            content = json.dumps({**found, "lines": lines}, indent=2) + "\n"
            (Path(runner.work_dir) / "guard.json").write_text(content, encoding="utf-8")

    def _look(self, runner: Any, model: HEADDetector) -> tuple[list[str], dict[str, Any]]:
        loader = runner.train_loop.dataloader
        lines, found = look(
            model,
            loader.dataset.metainfo.get("classes"),
            runner.cfg,
            images=self.images,
            min_ap=self.min_teacher_ap,
            other_classes=self.other_classes,
        )
        lines += data_lines(loader.dataset)
        preprocessed = [split(model.data_preprocessor(batch, True)) for batch in _few(loader, 2)]
        if model.assistants or model.head_kd.neck is not None:
            numbers = inspection.measure(model, preprocessed)
            found |= numbers
            lines += number_lines(numbers)
        return lines, found

    def after_train(self, runner: Any) -> None:
        """Check that the teacher is what it was."""
        model = getattr(runner.model, "module", runner.model)
        if self._fingerprint and model.teacher.fingerprint() != self._fingerprint:
            raise RuntimeError("the teacher's weights changed while the student trained")


def number_lines(numbers: Mapping[str, Any]) -> list[str]:
    """What ``inspection.measure`` found, in words, with what to do where a number is a bad sign."""
    lines = []
    for name, ratio in numbers["gradient_ratio"].items():
        lines.append(f"gradient of {name}: {ratio:.2f} of the detection loss's, before warm-up")
        if ratio > HIGH_RATIO:
            lines.append(
                f"warning: {name} would rule the training: lower its weight, or let --distill.balance 0.5 choose the weights"
            )
    for name, gap in numbers["gap_r2"].items():
        if gap is None:
            lines.append(f"semantic gap of {name}: R2 not measurable (fewer than four regions)")
            continue
        lines.append(f"semantic gap of {name}: R2 {gap:.2f}")
        if gap < 0:
            lines.append(
                f"warning: what a linear map fits of {name} does not carry over: too few regions to say, or a teacher that"
                " sees other inputs or classes; look again with head-kd inspect --images 64"
            )
    return lines


def data_lines(dataset: Any) -> list[str]:
    """How many images and boxes train, as mmdet itself has parsed them."""
    parts = [dataset.get_data_info(i) for i in range(len(dataset))] if hasattr(dataset, "get_data_info") else []
    if not parts or not all(isinstance(part, dict) and "instances" in part for part in parts):
        return []
    boxes = [box for part in parts for box in part["instances"]]
    ignored = sum(int(box.get("ignore_flag", 0)) for box in boxes)
    empty = sum(not part["instances"] for part in parts)
    return [
        f"data: {len(parts)} images train, {empty} of them empty, with {len(boxes)} boxes, {ignored} of them ignored"
    ]


def look(
    model: HEADDetector,
    classes: Sequence[str] | None,
    cfg: Any,
    *,
    images: int,
    min_ap: float = 0.0,
    other_classes: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """What can be said of a pair without a training batch: lines for a person, and values.

    Args:
        model: the pair.
        classes: the data's classes in order, where known.
        cfg: the student's config, for its validation data.
        images: validation images that the teacher is measured on.
        min_ap: the teacher's lowest AP in percent.
        other_classes: whether classes may differ.

    Raises:
        UserError: classes differ, or the teacher is weaker than ``min_ap``.
    """
    lines: list[str] = []
    found: dict[str, Any] = {}
    if model.teacher is not None:
        names = model.teacher.classes
        lines.append(check_classes(classes, names, other_classes=other_classes))
        lines.append(normalization_line(model))
        missing = model.teacher.missing
        if missing:
            lines.append(
                f"teacher: {len(missing)} tensors are not in its file and stay random ({', '.join(missing[:3])}); no term reads"
                " them, and its AP is not measured"
            )
        same = not missing and (names is None or classes is None or tuple(names) == tuple(classes))
        if images > 0 and cfg.get("test_dataloader") is not None and same:
            share, count = teacher_ap(cfg, model.teacher.detector, images)
            ap = 100 * share
            found["teacher_ap"] = ap
            lines.append(f"teacher: AP {ap:.1f} on {count} validation images")
            if ap < min_ap:
                raise UserError(
                    f"the teacher has AP {ap:.1f} on {count} validation images, --min_teacher_ap is {min_ap:g}: wrong"
                    " weights, classes or input?"
                )
            model.teacher.detector.eval()
    lines += transfer_lines(model)
    return lines, found


def check_classes(student: Sequence[str] | None, teacher: Sequence[str] | None, *, other_classes: bool) -> str:
    """A line about the classes of both; unknown ones are said to be so.

    Raises:
        UserError: they differ, in names or in order, and ``other_classes`` does not allow it.
    """
    if student is None or teacher is None:
        return "classes: not stated by " + " and ".join(
            who for who, names in (("the data", student), ("the teacher", teacher)) if names is None
        )
    if tuple(student) == tuple(teacher):
        return f"classes: {len(student)}, the same in the same order"
    if sorted(student) == sorted(teacher):
        first = next(i for i, (a, b) in enumerate(zip(student, teacher, strict=True)) if a != b)
        what = (
            f"in another order: class {first} is '{student[first]}' in the data and '{teacher[first]}' for the teacher"
        )
    else:
        extra = [name for name in teacher if name not in student]
        lacking = [name for name in student if name not in teacher]
        what = f"{len(lacking)} of the data are unknown to the teacher ({', '.join(lacking[:3])})" + (
            f", which knows {len(extra)} others ({', '.join(extra[:3])})" if extra else ""
        )
    if not other_classes:
        raise UserError(
            f"classes of data and teacher differ, {what}; --other_classes true distills features all the same"
        )
    return f"classes: differ, {what}; only inner features are distilled"


def normalization_line(model: HEADDetector) -> str:
    """Whether the teacher's input is converted."""
    if model.teacher is None or model.teacher.renormalize is None:
        return "normalization: no teacher runs"
    convert = model.teacher.renormalize
    if convert.identity:
        return "normalization: teacher and student take the same input"
    swap = ", channels swapped" if convert.swap else ""
    return f"normalization: converted for the teacher (scale {convert.scale.flatten()[0]:.3g}, padding cleared{swap})"


def transfer_lines(model: HEADDetector) -> list[str]:
    """What of the teacher's head fits into the assistants."""
    lines = []
    for number, assistant in enumerate(model.assistants):
        total = len(assistant.head.state_dict())
        bridge = assistant.bridge
        over = "" if bridge is None else f", over a bridge {bridge.in_channels} -> {bridge.out_channels}"
        if f"assistant{number}" in model.untransferred:
            left = model.untransferred[f"assistant{number}"]
            fits = f"{total - len(left)} of {total} tensors come from the teacher's head"
            lines.append(f"assistant {number}: {fits}{over}" + (f"; not: {', '.join(left[:4])}" if left else ""))
        else:
            lines.append(f"assistant {number}: {total} tensors, initialized from scratch{over}")
    return lines


def teacher_ap(cfg: Any, detector: Any, count: int) -> tuple[float, int]:
    """AP in [0, 1] of a detector on the first validation images of a config, and how many they were.

    Args:
        cfg: config whose test data is taken.
        detector: the detector.
        count: number of images; there may be fewer.
    """
    cfg = copy.deepcopy(cfg)
    dataset = innermost(cfg.test_dataloader.dataset)
    source = Path(dataset.get("data_root") or "") / dataset["ann_file"]
    content = json.loads(source.read_text(encoding="utf-8"))
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    with tempfile.TemporaryDirectory(prefix="head-kd-") as scratch:
        part = Path(scratch).resolve() / "annotations.json"
        part.write_text(json.dumps(content), encoding="utf-8")
        dataset["ann_file"] = str(part)
        cfg.test_evaluator = {"type": "CocoMetric", "ann_file": str(part), "metric": "bbox"}
        return max(0.0, evaluate(cfg, model=detector).get("bbox_mAP", 0.0)), len(content["images"])


def _few(loader: Any, count: int) -> list[Any]:
    """Some batches of a loader's data set, drawn outside of its order."""
    size = loader.batch_sampler.inner.batch_size if hasattr(loader.batch_sampler, "inner") else 2
    size = min(int(size), len(loader.dataset))
    return [
        pseudo_collate([loader.dataset[(i * size + j) % len(loader.dataset)] for j in range(size)])
        for i in range(count)
    ]


def split(data: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
    """Images and data samples of a preprocessed batch."""
    return data["inputs"], data["data_samples"]
