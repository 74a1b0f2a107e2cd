"""What several verbs read and write: the student's config on its data, a trained student, the exported one."""

import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from head_kd.compose import use_data
from head_kd.config import TrainSettings
from head_kd.configs import innermost, named_classes, resolve_config
from head_kd.data import check_config_data, read_splits
from head_kd.export import export_student
from tenfold import UserError, runs
from tenfold.files import replacing
from tenfold.runs import Run


def student_config(
    student: Any,
    data: str | None,
    run: Run | None,
    scratch: str | Path = "",
    *,
    split: Sequence[str] = ("train", "val"),
    skip_bad: bool = False,
    order: Sequence[str] | None = None,
) -> Any:
    """The student's config, on other data where ``--data`` says so, its data checked.

    What was left out or filled in is said on stderr, and stands in the run's ``data/notes.txt``.

    Args:
        student: mmdet config.
        data: ``coco:DIR`` or ``voc:DIR``, of which the classes that the config itself names are taken, else all; None keeps
            the config's own data.
        run: folder that mended annotations, and the COCO files of a VOC folder, are written to.
        scratch: folder for them where there is no run.
        split: the splits of ``data`` that are trained on and measured; one name stands for both.
        skip_bad: whether bad images and boxes are left out instead of refused.
        order: the classes in the order that ``data`` must have; default: that of its first split.
    """
    cfg = copy.deepcopy(resolve_config(student))
    with tempfile.TemporaryDirectory(prefix="head-kd-") as checking:
        # into a folder of its own first: a run folder that is refused leaves nothing behind
        here = Path(checking) if run is not None else Path(scratch)
        if data is None:
            notes = check_config_data(cfg, here, skip_bad=skip_bad)
        else:
            named = named_classes(cfg) if order is None else None
            train, val = read_splits(data, here, names=split, skip_bad=skip_bad, order=order, classes=named)
            notes = list(dict.fromkeys((*train.notes, *val.notes)))
            use_data(cfg, train, val)
        if run is not None:
            _adopt(cfg, run, here)
    if notes:
        sys.stderr.write("\n".join(notes) + "\n")
        if run is not None:
            _write(run, "data/notes.txt", "\n".join(notes) + "\n")
    return cfg


def _adopt(cfg: Any, run: Run, folder: Path) -> None:
    """Move what was written to ``folder`` into the run, and let the config name it there."""
    for file in sorted(folder.glob("*.json")):
        place = _write(run, f"data/{file.name}", file.read_text(encoding="utf-8"))
        for name in ("train", "val", "test"):
            loader = cfg.get(f"{name}_dataloader")
            part, evaluator = innermost((loader or {}).get("dataset")), cfg.get(f"{name}_evaluator")
            for holder in (part, evaluator):
                if holder is not None and holder.get("ann_file") == str(file.resolve()):
                    holder.ann_file = str(place.resolve())


def _write(run: Run, name: str, text: str) -> Path:
    """A file that is prepared for the work, written by every process: each reads it, and all write the same."""
    place = run.own(name, result=False)
    place.parent.mkdir(exist_ok=True)
    with replacing(place) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return place


def check_teacher(config: str | None, weights: str | None) -> None:
    """Check that a teacher's config can be read and that its weights are there, before anything that takes time.

    Raises:
        UserError: they are not.
    """
    if config is not None:
        resolve_config(config)
    if weights is not None and not Path(weights).exists():
        raise UserError(f"--teacher_weights {weights}: no such file")


def trained(run: str, student: str | None, file: str) -> tuple[Path, Any]:
    """The weights that ``--run`` names, and the config of their student.

    Args:
        run: folder of a finished `head-kd train`, or a file of weights, in one or from elsewhere.
        student: config that was given; None takes the run's.
        file: file of a run folder that is meant where the folder is given.

    Raises:
        UserError: no such file or finished run, or weights from elsewhere without ``--student``.
    """
    path = Path(run).expanduser()
    if path.is_file():
        if student is not None:
            return path, student
        if not any((parent / runs.MANIFEST).is_file() for parent in path.parents):
            raise UserError(f"--run {run}: this file is in no run of `head-kd train`: give --student CONFIG")
    found = runs.read(path, TrainSettings, package="head-kd", verb="train")
    return (path if path.is_file() else found.path / file), student or str(found.path / "student.py")


def export(run: Run, weights: str | Path, plain: Any, *, name: str = "student", verify: bool = True) -> dict[str, Any]:
    """``NAME.safetensors`` and ``NAME.pth`` out of a checkpoint; numbers of tensors and whether they were verified."""
    for suffix in ("safetensors", "pth"):
        run.own(f"{name}.{suffix}")
    return export_student(weights, plain, run.path / name, verify=verify)
