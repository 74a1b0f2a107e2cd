"""mmengine's runner around a run folder: one call from a config to checkpoints, metrics and scores."""

import head_kd.ops_fallback  # before mmdet

# isort: split
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from torch import Tensor

import head_kd.training.hooks
import head_kd.training.loop  # noqa: F401  # registers
from head_kd.config import RunnerSettings
from head_kd.stack import quiet_stack, said_nothing, start, use_device
from head_kd.training.host import prepare, start_ranks
from tenfold import UserError
from tenfold.errors import did_you_mean
from tenfold.runs import Metrics, Run, read_metrics
from tenfold.terminal import track

LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"
_numbers = itertools.count()


class RunHook(Hook):  # type: ignore[misc]
    """Writes a run folder: metrics, checkpoints that appear whole, progress. Registered beside the config's hooks.

    Args:
        run: the folder; None keeps everything in memory.
        settings: how often rows of ``metrics.csv`` and checkpoints are due; the end always has both.
        cfg: the user's config, whose ``save_best`` is kept up and whose gradients may be accumulated.
        quiet: whether to show no progress.
        description: what the progress line says.
        texts: files by name that are written when the training begins.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        run: Run | None,
        settings: RunnerSettings,
        cfg: Any,
        *,
        quiet: bool,
        description: str,
        texts: Mapping[str, str],
    ) -> None:
        self.run, self.settings, self.texts = run, settings, texts
        checkpoint = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
        self.best = Best.of(checkpoint)
        self.accumulated = int((cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1))
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
            file = None if self.run is None else self.run.path / "metrics.csv"
            if self.best is not None and file is not None and file.exists():
                self.best.read(read_metrics(file))
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
        if self.best is not None and self.best.improves(metrics or {}) and self.run is not None:
            self._write(runner, BEST)

    def after_step(self, runner: Any) -> None:
        """Save a checkpoint where one is due."""
        step = runner.iter
        due = step // self.settings.checkpoint_every > max(self._saved, 0) // self.settings.checkpoint_every
        whole = step % self.accumulated == 0  # gradients that are not applied yet are in no checkpoint
        if (due and whole) or step >= runner.max_iters:
            self.save(runner)

    def save(self, runner: Any) -> None:
        """``checkpoints/last.ckpt``, whole or not at all."""
        if self.run is None or self._saved == runner.iter:
            return
        self._saved = runner.iter
        if self.metrics is not None:
            self.metrics.flush()
        self._write(runner, LAST)

    def _write(self, runner: Any, name: str) -> None:
        assert self.run is not None
        with self.run.replacing(name) as temporary:
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            runner.save_checkpoint(str(temporary.parent), temporary.name, meta=meta, by_epoch=False)


class Best:
    """The best validation so far, by the ``save_best`` of mmengine's checkpoint hook.

    Args:
        key: name of the metric; auto is the first that there is.
        greater: whether more is better.
    """

    def __init__(self, key: str, *, greater: bool) -> None:
        self.key, self.greater = key, greater
        self.value: float | None = None

    @classmethod
    def of(cls, hook: Mapping[str, Any]) -> "Best | None":
        """What a config of mmengine's checkpoint hook asks for; None where it asks for nothing.

        Raises:
            UserError: it asks for several metrics.
        """
        key = hook.get("save_best")
        if not key:
            return None
        if not isinstance(key, str):
            raise UserError(
                f"default_hooks.checkpoint.save_best {list(key)}: a run keeps the best by one metric, name one"
            )
        greater = hook.get("rule", "less" if "loss" in key else "greater") == "greater"
        return cls(key, greater=greater)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether a validation is the best so far, which it is from then on; one without any detection counts as 0.

        Raises:
            UserError: the validation has no such metric.
        """
        if not metrics:
            return self._better(0.0)
        key = next(iter(metrics)) if self.key == "auto" else self.key
        if key not in metrics:
            raise UserError(f"default_hooks.checkpoint.save_best {key}: {did_you_mean(key, metrics)}")
        return self._better(float(metrics[key]))

    def read(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Take up the best of ``metrics.csv`` after a resume."""
        name = "bbox_mAP" if self.key == "auto" else self.key.rpartition("/")[2]
        for _, row in rows:
            if f"val_{name}" in row:
                self._better(row[f"val_{name}"])

    def _better(self, value: float) -> bool:
        if self.value is not None and (value <= self.value if self.greater else value >= self.value):
            return False
        self.value = value
        return True


def _run_quietly(cfg: Any, work_dir: str) -> None:
    """Leave out of a config what prints, draws or saves: a run folder does that. mmengine wants a folder all the same."""
    hooks = {k: v for k, v in (cfg.get("default_hooks") or {}).items() if k != "visualization"}
    cfg.default_hooks = {**hooks, "logger": None, "checkpoint": None}
    cfg.work_dir, cfg.log_level = work_dir, "ERROR"
    cfg.visualizer = {"type": "Visualizer", "vis_backends": [], "name": f"head_kd_{next(_numbers)}"}
    cfg.experiment_name = f"head_kd_{next(_numbers)}_{time.time_ns()}"


def build_runner(cfg: Any, settings: RunnerSettings, work_dir: str, last: Path | None) -> tuple[Any, Any, list[str]]:
    """mmengine's runner for a config, its data not built yet; the config that runs; what of the given one does not act.

    Args:
        cfg: the config.
        settings: settings of the training.
        work_dir: a folder for what mmengine writes.
        last: checkpoint to go on from.
    """
    start()
    device = use_device(settings.device)
    prepared, notes = prepare(cfg, settings, device)
    start_ranks(prepared, device)
    quiet = copy.deepcopy(prepared)
    if last is not None:
        quiet.load_from, quiet.resume = str(last), True
    _run_quietly(quiet, work_dir)
    if device == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid, thousands of fills per step
    object.__setattr__(quiet, "_format_python_code", False)  # yapf takes seconds for mmengine's copy of the config
    with said_nothing():
        runner = Runner.from_cfg(quiet)
        if device == "cpu":
            runner.model = revert_sync_batchnorm(runner.model)
    quiet_stack()
    return runner, prepared, notes


def fit(
    cfg: Any,
    settings: RunnerSettings,
    run: Run | None,
    *,
    quiet: bool = False,
    description: str = "training",
    hooks: Sequence[Hook] = (),
    texts: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """Train what a config describes, from the run's last checkpoint where there is one.

    Args:
        cfg: config of ``head_kd.compose.pair``, or any of mmdet's.
        settings: settings of the training.
        run: the folder; None keeps metrics in memory and writes no checkpoint.
        quiet: whether to show no progress.
        description: what the progress line says.
        hooks: more of mmengine's hooks.
        texts: files by name that are written to the run when the training begins, beside ``config.py``, which shows what
            runs.
        say: takes a line for each setting of the config that does not act as in mmengine's own runner.

    Returns:
        the runner; ``runner.run_hook.last_validation`` has the last metrics.

    Raises:
        UserError: the data or the config is at fault, or a loss is not finite (the term and the step are named).
    """
    cfg = copy.deepcopy(cfg)
    last = run.path / LAST if run is not None and run.resumed and (run.path / LAST).exists() else None
    with tempfile.TemporaryDirectory(prefix="head-kd-") as scratch:
        runner, prepared, notes = build_runner(cfg, settings, scratch, last)
        for note in notes:
            say(note)
        written = {"config.py": prepared.pretty_text, **(texts or {})} if run is not None else {}
        runner.run_hook = RunHook(run, settings, cfg, quiet=quiet, description=description, texts=written)
        for hook in (*hooks, runner.run_hook):
            runner.register_hook(hook)
        with said_nothing():
            runner.train()
    return runner


def scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """An evaluator's metrics without their prefix; those of sizes that the data do not hold (pycocotools: -1) are left out.

    mmdet's gives none where nothing at all was detected: AP is 0 then.
    """
    if not metrics:
        return {"bbox_mAP": 0.0, "bbox_mAP_50": 0.0, "bbox_mAP_75": 0.0}
    return {k.rpartition("/")[2]: float(v) for k, v in metrics.items() if float(v) >= 0 or "mAP" not in k}


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
        "load_from",  # mmengine would load it over what is measured
    ):
        cfg[key] = None
    cfg.resume, cfg.launcher = False, "none"
    cfg.custom_hooks = []
    if "student" in cfg.model:
        cfg.model = cfg.model.student
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
