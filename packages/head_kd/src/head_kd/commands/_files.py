"""What several verbs read and write: the student's config on its data, a trained student, the exported one."""

import copy
from pathlib import Path
from typing import Any

from head_kd.compose import use_data
from head_kd.config import TrainSettings
from head_kd.configs import resolve_config
from head_kd.data import check_config_data, read_splits
from head_kd.export import export_student
from tenfold import UserError, runs
from tenfold.runs import Run


def student_config(student: Any, data: str | None, run: Run | None, scratch: str | Path = "") -> Any:
    """The student's config, on other data where ``--data`` says so, its COCO files checked.

    Args:
        student: mmdet config.
        data: ``coco:DIR`` or ``voc:DIR``; None keeps the config's own data.
        run: folder that the COCO files of a VOC folder are written to.
        scratch: folder for them where there is no run.
    """
    cfg = copy.deepcopy(resolve_config(student))
    if data is None:
        check_config_data(cfg)
        return cfg
    if run is not None and data.startswith("voc:"):
        for split in ("train", "val"):
            run.own(f"data/{split}.json", result=False)
    use_data(cfg, *read_splits(data, scratch if run is None else run.path / "data"))
    return cfg


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


def export(run: Run, weights: str | Path, plain: Any, *, verify: bool = True) -> dict[str, Any]:
    """``student.safetensors`` and ``student.pth`` out of a checkpoint; numbers of tensors and whether they were verified."""
    for suffix in ("safetensors", "pth"):
        run.own(f"student.{suffix}")
    return export_student(weights, plain, run.path / "student", verify=verify)
