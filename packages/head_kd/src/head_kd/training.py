"""The glue to mmengine's runner: one call from a config to a run folder, a checkpoint to a plain student."""

import contextlib
import copy
import io
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

import head_kd
import head_kd.ops_fallback  # noqa: F401  # before mmdet
from head_kd.checkpoints import read_weights, resolve_config, student_weights
from head_kd.compose import first_drop
from head_kd.config import TrainSettings
from tenfold import UserError, checkpoints
from tenfold.cli import track
from tenfold.runs import Metrics, Run

LAST = "checkpoints/last.ckpt"
METHOD = "head_kd.student"
_numbers = itertools.count()


def quiet_stack() -> None:
    """mmengine prints one line a parameter and a table a validation; our progress and results stand alone."""
    for name in ("mmengine", "mmdet", "mmcv", "head_kd"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"mm(engine|det|cv)")
    warnings.filterwarnings("ignore", message=r".*(torch\.meshgrid|lr_scheduler\.step).*")


class RunHook(Hook):  # type: ignore[misc]
    """Writes a run folder: metrics, checkpoints that appear whole, progress. Registered beside the config's hooks.

    Args:
        run: the folder; None keeps everything in memory.
        log_every: iterations between two rows of ``metrics.csv``.
        checkpoint_every: iterations between two checkpoints; the end has one always.
        quiet: no progress.
        description: of the progress line.
    """

    priority = "VERY_LOW"

    def __init__(self, run: Run | None, *, log_every: int, checkpoint_every: int, quiet: bool, description: str) -> None:
        self.run = run
        self.log_every = log_every
        self.checkpoint_every = checkpoint_every
        self.quiet = quiet
        self.description = description
        self.metrics = None if run is None or not run.writes else Metrics(run.own("metrics.csv"))
        self.last_validation: dict[str, float] = {}
        self.history: list[tuple[int, dict[str, float]]] = []
        self._bar: Iterator[int] | None = None
        self._saved = -1

    def before_train(self, runner: Any) -> None:
        """Cut the metrics back to the checkpoint, and start the progress."""
        if self.metrics is not None:
            self.metrics.cut_after(runner.iter)
        self._saved = runner.iter
        left = range(runner.iter, runner.max_iters)
        self._bar = iter(track(left, self.description, len(left), quiet=self.quiet))
        next(self._bar, None)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Log a row."""
        step = runner.iter + 1
        if step % self.log_every == 0 or step == runner.max_iters or step == 1:
            values = {k: float(v) for k, v in (outputs or {}).items() if isinstance(v, Tensor | float | int)}
            values["lr"] = float(runner.optim_wrapper.get_lr()["lr"][0])
            self.history.append((step, values))
            if self.metrics is not None:
                self.metrics.log(step, values)
        assert self._bar is not None
        next(self._bar, None)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Log a validation."""
        self.last_validation = {k.rpartition("/")[2]: float(v) for k, v in (metrics or {}).items()}
        if self.metrics is not None and runner.iter > 0:
            self.metrics.log(runner.iter, {f"val_{k}": v for k, v in self.last_validation.items()})

    def after_step(self, runner: Any) -> None:
        """Save a checkpoint where one is due."""
        step = runner.iter
        if step % self.checkpoint_every == 0 or step >= runner.max_iters:
            self.save(runner)

    def save(self, runner: Any) -> None:
        """``checkpoints/last.ckpt``, whole or not at all."""
        if self.run is None or self._saved == runner.iter:
            return
        self._saved = runner.iter
        if self.metrics is not None:
            self.metrics.flush()
        with self.run.replacing(LAST) as temporary:
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            runner.save_checkpoint(str(temporary.parent), temporary.name, meta=meta, by_epoch=False)


def prepare(cfg: Any, settings: TrainSettings, work_dir: Path) -> Any:
    """A config as our runner takes it: exact loop, keyed data, quiet, plain checkpoints."""
    cfg = copy.deepcopy(cfg)
    loop = dict(cfg.train_cfg or {})
    by_epoch = loop.get("type", "EpochBasedTrainLoop") == "EpochBasedTrainLoop" and loop.get("by_epoch", True)
    epochs, steps = settings.max_epochs, settings.max_steps
    if epochs is None and steps is None:
        epochs, steps = (loop.get("max_epochs"), None) if by_epoch else (None, loop.get("max_iters"))
    interval = settings.val_every or int(loop.get("val_interval", 1))
    cfg.train_cfg = {
        "type": "ExactTrainLoop",
        "max_epochs": epochs,
        "max_iters": steps,
        "val_interval": interval,
        "val_by_epoch": by_epoch and not settings.val_every,
        "val_begin": int(loop.get("val_begin", 1)),
        "seed": settings.seed,
    }
    data = cfg.train_dataloader
    if settings.batch_size is not None:
        data.batch_size = settings.batch_size
    if settings.workers is not None:
        for name in ("train", "val", "test"):
            if cfg.get(f"{name}_dataloader") is not None:
                cfg[f"{name}_dataloader"].num_workers = settings.workers
    for name in ("train", "val", "test"):
        loader = cfg.get(f"{name}_dataloader")
        if loader is not None and not loader.get("num_workers"):
            loader.persistent_workers = False
    data.dataset = {"type": "KeyedDataset", "dataset": data.dataset, "seed": settings.seed}
    shuffle = bool((data.get("sampler") or {}).get("shuffle", True))
    data.sampler = {"type": "KeyedSampler", "shuffle": shuffle, "seed": settings.seed}
    data.batch_sampler = {
        "type": "ResumableBatchSampler",
        "inner": data.get("batch_sampler"),
        "drop_last": bool(data.pop("drop_last", False)),
    }
    if settings.lr is not None:
        cfg.optim_wrapper.optimizer.lr = settings.lr
    if settings.precision in ("bf16", "16"):
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.dtype = {"bf16": "bfloat16", "16": "float16"}[settings.precision]
    cfg.randomness = {"seed": settings.seed, "deterministic": False}
    cfg.default_hooks = _own_hooks(cfg)
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "PlainCheckpointHook"}]
    cfg.work_dir = str(work_dir)
    cfg.log_level = "ERROR"
    cfg.visualizer = {"type": "Visualizer", "vis_backends": [], "name": f"head_kd_{next(_numbers)}"}
    cfg.experiment_name = f"head_kd_{next(_numbers)}_{time.time_ns()}"
    cfg.launcher = settings.launcher
    cfg.setdefault("default_scope", "mmdet")
    return cfg


def _own_hooks(cfg: Any) -> dict[str, Any]:
    """The config's default hooks without those that print, draw or save, which a run folder does."""
    hooks = {k: v for k, v in (cfg.get("default_hooks") or {}).items() if k != "visualization"}
    return {**hooks, "logger": None, "checkpoint": None}


def build_runner(cfg: Any, settings: TrainSettings, run: Run | None, work_dir: Path, *, quiet: bool, description: str) -> Any:
    """A runner with its ``RunHook`` (as ``runner.run_hook``), its model initialized, the schedule's open ends filled in."""
    from mmdet.utils import register_all_modules
    from mmengine.runner import Runner

    import head_kd.detector
    import head_kd.loop  # noqa: F401  # registers

    quiet_stack()
    register_all_modules(init_default_scope=True)
    prepared = prepare(cfg, settings, work_dir)
    if settings.device in ("auto", "cpu") and not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
    with _said_nothing():
        runner = Runner.from_cfg(prepared)
    quiet_stack()
    hook = RunHook(
        run, log_every=settings.log_every, checkpoint_every=settings.checkpoint_every, quiet=quiet, description=description
    )
    runner.register_hook(hook, "VERY_LOW")
    runner.run_hook = hook
    return runner


@contextlib.contextmanager
def _said_nothing() -> Iterator[None]:
    """pycocotools and mmengine print to stdout, which belongs to results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def fill_schedule(runner: Any, cfg: Any) -> None:
    """TF-HEAD stops at the first drop of the learning rate; in iterations, that is known with the data alone."""
    from head_kd.detector import HEADDetector

    model = getattr(runner.model, "module", runner.model)
    free = isinstance(model, HEADDetector) and model.teacher is None and model.cache is None
    if free and model.schedule.stop is None and any(a.ckd is not None for a in model.assistants):
        import dataclasses

        model.schedule = dataclasses.replace(model.schedule, stop=first_drop(cfg, len(runner._train_loop.dataloader)))


def fit(
    cfg: Any,
    settings: TrainSettings,
    run: Run | None,
    *,
    quiet: bool = False,
    description: str = "training",
    work_dir: Path | None = None,
) -> Any:
    """Train what a config describes, from the run's last checkpoint where there is one.

    Returns:
        the runner; ``runner.run_hook.last_validation`` has the last metrics.

    Raises:
        UserError: the data or the config is at fault, or a loss is not finite (the term and the step are named).
    """
    folder = work_dir or (run.path / "mmengine" if run is not None else Path("mmengine"))
    cfg = copy.deepcopy(cfg)
    if run is not None and run.resumed and (run.path / LAST).exists():
        cfg.load_from, cfg.resume = str(run.path / LAST), True
    runner = build_runner(cfg, settings, run, folder, quiet=quiet, description=description)
    with _said_nothing():
        runner._train_loop = runner.build_train_loop(runner._train_loop)  # fill_schedule needs the data's length
        fill_schedule(runner, cfg)
        runner.train()
    if run is not None:
        for left in sorted(folder.rglob("*")):
            if left.is_file():
                run.own(str(left.relative_to(run.path)))
    return runner


def evaluate(cfg: Any, state_dict: Mapping[str, Tensor] | None, work_dir: Path, *, model: Any = None) -> dict[str, float]:
    """COCO metrics of a plain student on a config's test data.

    Args:
        cfg: the student's config.
        state_dict: its weights.
        work_dir: for mmengine's log.
        model: the detector itself, instead of config and weights.
    """
    from mmdet.utils import register_all_modules
    from mmengine.runner import Runner

    quiet_stack()
    register_all_modules(init_default_scope=True)
    cfg = copy.deepcopy(cfg)
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "val_dataloader", "val_cfg", "val_evaluator"):
        cfg[key] = None
    cfg.work_dir, cfg.log_level = str(work_dir), "ERROR"
    cfg.visualizer = {"type": "Visualizer", "vis_backends": [], "name": f"head_kd_{next(_numbers)}"}
    cfg.experiment_name = f"head_kd_{next(_numbers)}_{time.time_ns()}"
    cfg.default_hooks = _own_hooks(cfg)
    if cfg.test_dataloader is not None and not cfg.test_dataloader.get("num_workers"):
        cfg.test_dataloader.persistent_workers = False
    with _said_nothing():
        runner = Runner.from_cfg(cfg)
        quiet_stack()
        target = runner.model
        if model is not None:
            runner.model = model.eval()
        elif state_dict is not None:
            target.load_state_dict(dict(state_dict), strict=True)
        found = runner.test()
    return {k.rpartition("/")[2]: float(v) for k, v in found.items()}


def export_student(
    checkpoint: str | Path, student: Any, out: str | Path, *, classes: tuple[str, ...] | None = None, verify: bool = True
) -> dict[str, Any]:
    """Write the plain student of a checkpoint as ``.safetensors`` and ``.pth`` that stock mmdet loads strictly.

    Args:
        checkpoint: of a run (``checkpoints/last.ckpt``), or any of ``HEADDetector``'s.
        student: config of the plain student.
        out: path without suffix.
        classes: for the header; default: the checkpoint's.
        verify: load both files into a fresh student and compare its outputs bit for bit with the checkpoint's.

    Returns:
        numbers of tensors kept and left out, and ``verified``.

    Raises:
        UserError: the checkpoint does not hold this student; the first keys or shapes that differ are named.
    """
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict

    quiet_stack()
    register_all_modules(init_default_scope=True)
    cfg = resolve_config(student)
    weights = read_weights(checkpoint)
    own = student_weights(weights.state_dict)
    plain = MODELS.build(ConfigDict(copy.deepcopy(dict(cfg.model))))
    checkpoints.check_shapes(checkpoint, {k: tuple(v.shape) for k, v in plain.state_dict().items()}, own)
    plain.load_state_dict(own)
    names = classes or weights.classes
    out = Path(out)
    header = {"classes": list(names) if names else None, "model": str(cfg.model.get("type"))}
    checkpoints.save(out.with_suffix(".safetensors"), own, method=METHOD, version=head_kd.__version__, config=header)
    from tenfold.runs import replacing

    with replacing(out.with_suffix(".pth")) as temporary:
        meta = {"dataset_meta": {"classes": tuple(names)}} if names else {}
        torch.save({"meta": meta, "state_dict": own}, temporary)
    report = {"kept": len(own), "left_out": len(weights.state_dict) - len(own), "verified": None}
    if verify:
        report["verified"] = _same_outputs(plain, out, cfg)
        if not report["verified"]:
            raise UserError(f"{out}: the exported files do not give the checkpoint's outputs")
    return report


def _same_outputs(plain: Any, out: Path, cfg: Any) -> bool:
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict

    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, 3, 128, 160), generator=generator)
    plain.eval()
    with torch.no_grad():
        expected = plain.extract_feat(image)
        head = plain.bbox_head if hasattr(plain, "bbox_head") else plain.rpn_head
        expected = [*expected, *head(expected)[0]]
        for suffix in (".safetensors", ".pth"):
            fresh = MODELS.build(ConfigDict(copy.deepcopy(dict(cfg.model)))).eval()
            fresh.load_state_dict(read_weights(out.with_suffix(suffix)).state_dict, strict=True)
            features = fresh.extract_feat(image)
            head = fresh.bbox_head if hasattr(fresh, "bbox_head") else fresh.rpn_head
            found = [*features, *head(features)[0]]
            if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
                return False
    return True


def stderr(text: str) -> None:
    """A line for the person at the terminal."""
    sys.stderr.write(text + "\n")
