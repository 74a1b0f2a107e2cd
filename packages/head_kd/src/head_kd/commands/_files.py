"""What several verbs read and write: the student's config on its data, the exported student."""

import copy
from pathlib import Path
from typing import Any

from head_kd.compose import use_data
from head_kd.configs import resolve_config
from head_kd.data import check_config_data, read_splits
from head_kd.export import export_student
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
    splits = read_splits(data, scratch if run is None else run.path / "data")
    if run is not None and data.startswith("voc:"):
        for split in splits:
            run.own(f"data/{split.annotations.name}")
    use_data(cfg, *splits)
    return cfg


def export(run: Run, checkpoint: str | Path, plain: Any, *, verify: bool = True) -> dict[str, Any]:
    """``student.safetensors`` and ``student.pth`` out of a checkpoint; numbers of tensors and whether they were verified."""
    for suffix in ("safetensors", "pth"):
        run.own(f"student.{suffix}")
    return export_student(checkpoint, plain, run.path / "student", verify=verify)
