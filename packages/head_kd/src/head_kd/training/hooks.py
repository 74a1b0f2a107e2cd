"""Hooks that a composed config brings, so that mmdet's own ``tools/train.py`` does what ``head-kd train`` does."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import save_checkpoint

from head_kd.compose import first_drop
from head_kd.detector import HEADDetector
from head_kd.export import export_student


def inner(runner: Any) -> Any:
    """A runner's model without what distributes it."""
    return getattr(runner.model, "module", runner.model)


@HOOKS.register_module()
class ScheduleHook(Hook):  # type: ignore[misc]
    """TF-HEAD stops at the first drop of the learning rate; where that is, is known with the data alone."""

    priority = "HIGH"

    def before_train(self, runner: Any) -> None:
        """Fill in the iteration."""
        model = inner(runner)
        free = isinstance(model, HEADDetector) and model.teacher is None and model.cache is None
        if free and model.schedule.stop is None and any(a.ckd is not None for a in model.assistants):
            stop = first_drop(runner.cfg, len(runner.train_loop.dataloader))
            model.schedule = dataclasses.replace(model.schedule, stop=stop)


@HOOKS.register_module()
class ExportHook(Hook):  # type: ignore[misc]
    """Writes the plain student, ``student.safetensors`` and ``student.pth``, checked bit for bit, into ``work_dir``."""

    priority = "LOWEST"

    def after_train(self, runner: Any) -> None:
        """Export."""
        model = inner(runner)
        if not isinstance(model, HEADDetector) or not is_main_process():
            return
        with tempfile.TemporaryDirectory(prefix="head-kd-") as scratch:
            file = Path(scratch) / "last.pth"
            saved = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            classes = tuple(runner.train_loop.dataloader.dataset.metainfo.get("classes") or ())
            save_checkpoint({"state_dict": saved}, str(file))
            plain = {"model": copy.deepcopy(runner.cfg.model.student)}
            with torch.random.fork_rng(devices=[]):
                report = export_student(file, plain, Path(runner.work_dir) / "student", classes=classes or None)
        runner.logger.info(
            f"head-kd: {Path(runner.work_dir) / 'student.safetensors'} and .pth, {report['kept']} tensors of the plain student,"
            f" {report['left_out']} of training left out, verified {report['verified']}"
        )
