"""mmengine's runner around a run folder: one call from a config to checkpoints, metrics and scores."""

import head_kd.ops_fallback  # before mmdet

# isort: split
import copy
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

import head_kd.training.loop  # noqa: F401  # registers
from head_kd.compose import first_drop
from head_kd.config import RunnerSettings
from head_kd.detector import HEADDetector
from head_kd.stack import quiet_stack, said_nothing, start, use_device
from tenfold.devices import choose_precision
from tenfold.runs import Metrics, Run
from tenfold.terminal import track

LAST = "checkpoints/last.ckpt"
_numbers = itertools.count()


class RunHook(Hook):  # type: ignore[misc]
    """Writes a run folder: metrics, checkpoints that appear whole, progress. Registered beside the config's hooks.

    Args:
        run: the folder; None keeps everything in memory.
        settings: how often rows of ``metrics.csv`` and checkpoints are due; the end always has both.
        quiet: whether to show no progress.
        description: what the progress line says.
        texts: files by name that are written when the training begins.
    """

    priority = "VERY_LOW"

    def __init__(
        self, run: Run | None, settings: RunnerSettings, *, quiet: bool, description: str, texts: Mapping[str, str]
    ) -> None:
        self.run, self.settings, self.texts = run, settings, texts
        self.quiet, self.description = quiet, description
        self.metrics = None if run is None or not run.writes else Metrics(run.own("metrics.csv"))
        self.last_validation: dict[str, float] = {}
        self._bar: Iterator[int] | None = None
        self._saved = -1

    def before_train(self, runner: Any) -> None:
        """Write the texts, cut the metrics back to the checkpoint, start the progress."""
        if self.run is not None:
            for name, text in self.texts.items():
                self.run.write_text(name, text)
        if self.metrics is not None:
            self.metrics.cut_after(runner.iter)
        self._saved = runner.iter
        left = range(runner.iter, runner.max_iters)
        self._bar = iter(track(left, self.description, len(left), quiet=self.quiet))
        next(self._bar, None)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Log a row."""
        step = runner.iter + 1
        if step % self.settings.log_every == 0 or step == runner.max_iters or step == 1:
            values = {k: float(torch.as_tensor(v).detach()) for k, v in (outputs or {}).items()}
            values["lr"] = float(runner.optim_wrapper.get_lr()["lr"][0])
            if self.metrics is not None:
                self.metrics.log(step, values)
        assert self._bar is not None
        next(self._bar, None)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Log a validation."""
        self.last_validation = scores(metrics or {})
        if self.metrics is not None and runner.iter > 0:
            self.metrics.log(runner.iter, {f"val_{k}": v for k, v in self.last_validation.items()})

    def after_step(self, runner: Any) -> None:
        """Save a checkpoint where one is due."""
        step = runner.iter
        if step % self.settings.checkpoint_every == 0 or step >= runner.max_iters:
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


def prepare(cfg: Any, settings: RunnerSettings, device: str) -> Any:
    """A config as our runner takes it: exact loop, keyed data, plain checkpoints."""
    cfg = copy.deepcopy(cfg)
    loop = dict(cfg.train_cfg or {})
    by_epoch = loop.get("type", "EpochBasedTrainLoop") == "EpochBasedTrainLoop" and loop.get("by_epoch", True)
    epochs, steps = settings.epochs, settings.steps
    if epochs is None and steps is None:
        epochs, steps = (loop.get("max_epochs"), None) if by_epoch else (None, loop.get("max_iters"))
    interval = settings.validate_every or int(loop.get("val_interval", 1))
    cfg.train_cfg = {
        "type": "ExactTrainLoop",
        "max_epochs": epochs,
        "max_iters": steps,
        "val_interval": interval,
        "val_by_epoch": by_epoch and not settings.validate_every,
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
    if settings.optimizer.lr is not None:
        cfg.optim_wrapper.optimizer.lr = settings.optimizer.lr
        schedulers = cfg.get("param_scheduler") or []
        for scheduler in schedulers if isinstance(schedulers, list | tuple) else [schedulers]:
            if scheduler.get("type") == "OneCycleLR":  # it sets the rate itself
                scheduler["eta_max"] = settings.optimizer.lr
    precision = choose_precision(settings.precision, device)
    if precision != "32-true":
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.dtype = "bfloat16" if precision == "bf16-mixed" else "float16"
    cfg.randomness = {"seed": settings.seed, "deterministic": False}
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "PlainCheckpointHook"}]
    cfg.launcher = settings.launcher
    cfg.setdefault("default_scope", "mmdet")
    return cfg


def _run_quietly(cfg: Any, work_dir: str) -> None:
    """Leave out of a config what prints, draws or saves: a run folder does that. mmengine wants a folder all the same."""
    hooks = {k: v for k, v in (cfg.get("default_hooks") or {}).items() if k != "visualization"}
    cfg.default_hooks = {**hooks, "logger": None, "checkpoint": None}
    cfg.work_dir, cfg.log_level = work_dir, "ERROR"
    cfg.visualizer = {"type": "Visualizer", "vis_backends": [], "name": f"head_kd_{next(_numbers)}"}
    cfg.experiment_name = f"head_kd_{next(_numbers)}_{time.time_ns()}"


def build_runner(cfg: Any, settings: RunnerSettings, work_dir: str) -> Any:
    """mmengine's runner for a config, its model built, its data not yet."""
    start()
    device = use_device(settings.device)
    prepared = prepare(cfg, settings, device)
    _run_quietly(prepared, work_dir)
    if device == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid, thousands of fills per step
    object.__setattr__(prepared, "_format_python_code", False)  # yapf takes seconds for mmengine's copy of the config
    with said_nothing():
        runner = Runner.from_cfg(prepared)
    quiet_stack()
    return runner


def fill_schedule(runner: Any, cfg: Any) -> None:
    """TF-HEAD stops at the first drop of the learning rate; in iterations, that is known with the data alone."""
    model = getattr(runner.model, "module", runner.model)
    free = isinstance(model, HEADDetector) and model.teacher is None and model.cache is None
    if free and model.schedule.stop is None and any(a.ckd is not None for a in model.assistants):
        stop = first_drop(cfg, len(runner._train_loop.dataloader))
        model.schedule = dataclasses.replace(model.schedule, stop=stop)


def fit(
    cfg: Any,
    settings: RunnerSettings,
    run: Run | None,
    *,
    quiet: bool = False,
    description: str = "training",
    hooks: Sequence[Hook] = (),
    texts: Mapping[str, str] | None = None,
) -> Any:
    """Train what a config describes, from the run's last checkpoint where there is one.

    Args:
        cfg: config of ``head_kd.compose.pair``, or any of mmdet's.
        settings: settings of the training.
        run: the folder; None keeps metrics in memory and writes no checkpoint.
        quiet: whether to show no progress.
        description: what the progress line says.
        hooks: more of mmengine's hooks.
        texts: files by name that are written to the run when the training begins.

    Returns:
        the runner; ``runner.run_hook.last_validation`` has the last metrics.

    Raises:
        UserError: the data or the config is at fault, or a loss is not finite (the term and the step are named).
    """
    cfg = copy.deepcopy(cfg)
    if run is not None and run.resumed and (run.path / LAST).exists():
        cfg.load_from, cfg.resume = str(run.path / LAST), True
    with tempfile.TemporaryDirectory(prefix="head-kd-") as scratch:
        runner = build_runner(cfg, settings, scratch)
        runner.run_hook = RunHook(run, settings, quiet=quiet, description=description, texts=texts or {})
        for hook in (*hooks, runner.run_hook):
            runner.register_hook(hook)
        with said_nothing():
            runner._train_loop = runner.build_train_loop(runner._train_loop)  # fill_schedule needs the data's length
            fill_schedule(runner, cfg)
            runner.train()
    return runner


def scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """An evaluator's metrics without their prefix. mmdet's gives none where nothing at all was detected: AP is 0 then."""
    if not metrics:
        return {"bbox_mAP": 0.0, "bbox_mAP_50": 0.0, "bbox_mAP_75": 0.0}
    return {k.rpartition("/")[2]: float(v) for k, v in metrics.items()}


def evaluate(cfg: Any, state_dict: Mapping[str, Tensor] | None = None, *, model: Any = None) -> dict[str, float]:
    """COCO metrics of a plain student on a config's test data.

    Args:
        cfg: the student's config.
        state_dict: its weights.
        model: the detector itself, instead of config and weights.
    """
    start()
    cfg = copy.deepcopy(cfg)
    for key in (
        "train_dataloader",
        "train_cfg",
        "optim_wrapper",
        "param_scheduler",
        "val_dataloader",
        "val_cfg",
        "val_evaluator",
    ):
        cfg[key] = None
    if cfg.test_dataloader is not None and not cfg.test_dataloader.get("num_workers"):
        cfg.test_dataloader.persistent_workers = False
    with tempfile.TemporaryDirectory(prefix="head-kd-") as scratch, said_nothing():
        _run_quietly(cfg, scratch)
        runner = Runner.from_cfg(cfg)
        quiet_stack()
        if model is not None:
            runner.model = model.eval()
        elif state_dict is not None:
            runner.model.load_state_dict(dict(state_dict), strict=True)
        return scores(runner.test())
