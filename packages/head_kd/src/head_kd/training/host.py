"""The user's config as our loop takes it: what works as in mmengine's own runner, and what is replaced, by name."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
import os
from pathlib import Path
from typing import Any

import torch.distributed
from mmengine.dist import is_distributed

from head_kd.checkpoints import read_weights
from head_kd.config import RunnerSettings
from head_kd.configs import transforms
from head_kd.stack import build
from tenfold import UserError
from tenfold.config import Precision
from tenfold.devices import choose_precision

ALWAYS_REPLACED = "default_hooks.checkpoint, .logger, .visualization, visualizer, log_level, work_dir"
OWN_HOOKS = ("GuardHook", "ExportHook")
"""Hooks that a composed config brings for mmengine's own runner; a run folder has its own of them."""
_SHUFFLING = ("DefaultSampler", "InfiniteSampler", "KeyedSampler", None)
_LOOPS = ("EpochBasedTrainLoop", "IterBasedTrainLoop", "ExactTrainLoop")
_REMEMBERING = ("CachedMosaic", "CachedMixUp")


def prepare(cfg: Any, settings: RunnerSettings, device: str) -> tuple[Any, list[str]]:
    """A config as our runner takes it: exact loop, keyed data, plain checkpoints; and what of it does not act, a line each.

    Raises:
        UserError: a setting that cannot be kept and may not vanish: a loop of another kind, a `load_from` of another model.
    """
    cfg = copy.deepcopy(cfg)
    notes = [f"replaced by the run folder: {ALWAYS_REPLACED}"]
    notes += _weights(cfg)
    _loop(cfg, settings)
    notes += _data(cfg, settings)
    notes += _precision(cfg, settings, device)
    stated = (cfg.get("randomness") or {}).get("seed")
    if stated is not None and stated != settings.seed:
        notes.append(f"randomness.seed {stated} of the config: --seed {settings.seed} is used")
    cfg.randomness = {"seed": settings.seed, "deterministic": False}
    hooks = [hook for hook in cfg.get("custom_hooks") or [] if hook.get("type") not in OWN_HOOKS]
    if not any(hook.get("type") == "PlainCheckpointHook" for hook in hooks):
        hooks.append({"type": "PlainCheckpointHook"})
    cfg.custom_hooks = hooks
    cfg.launcher = settings.launcher
    cfg.setdefault("default_scope", "mmdet")
    return cfg, notes


def _weights(cfg: Any) -> list[str]:
    """`load_from` starts the student, as in mmengine; `resume` is the run folder's."""
    notes = []
    if cfg.get("resume"):
        notes.append("resume of the config: a run is continued by --resume, from its own folder")
        cfg.resume = False
    source = cfg.get("load_from")
    if source and Path(str(source)).exists():
        model = cfg.model.get("student", cfg.model)
        expected = {name: tuple(t.shape) for name, t in build(model).state_dict().items()}
        given = read_weights(source).state_dict
        fitting = [n for n, shape in expected.items() if n in given and tuple(given[n].shape) == shape]
        if not fitting:
            raise UserError(f"load_from {source}: none of its {len(given)} tensors is one of the student")
        left = [n for n in expected if n not in fitting]
        lacking = f"; not: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}" if left else ""
        notes.append(f"load_from {source}: {len(fitting)} of {len(expected)} tensors start the student{lacking}")
    elif source:
        notes.append(f"load_from {source}: mmengine loads it; what of it fits is not looked at")
    return notes


def _loop(cfg: Any, settings: RunnerSettings) -> None:
    loop = dict(cfg.train_cfg or {})
    kind = loop.get("type") or ("EpochBasedTrainLoop" if loop.get("by_epoch", True) else "IterBasedTrainLoop")
    if kind not in _LOOPS:
        raise UserError(f"train_cfg.type {kind} is a loop of another kind: expected {_LOOPS[0]} or {_LOOPS[1]}")
    by_epoch = kind == "EpochBasedTrainLoop" or (kind == "ExactTrainLoop" and loop.get("val_by_epoch", True))
    dynamic = loop.get("dynamic_intervals")
    epochs, steps = settings.epochs, settings.steps
    if epochs is None and steps is None:
        epochs, steps = (loop.get("max_epochs"), None) if by_epoch else (None, loop.get("max_iters"))
    cfg.train_cfg = {
        "type": "ExactTrainLoop",
        "max_epochs": epochs,
        "max_iters": steps,
        "val_interval": settings.validate_every or int(loop.get("val_interval", 1 if by_epoch else 1000)),
        "val_by_epoch": by_epoch and not settings.validate_every,
        "val_begin": int(loop.get("val_begin", 1)),
        "dynamic_intervals": None if settings.validate_every or not dynamic else [tuple(pair) for pair in dynamic],
        "seed": settings.seed,
    }


def _data(cfg: Any, settings: RunnerSettings) -> list[str]:
    notes = []
    data = cfg.train_dataloader
    if settings.batch_size is not None:
        data.batch_size = settings.batch_size
    for name in ("train", "val", "test"):
        loader = cfg.get(f"{name}_dataloader")
        if loader is None:
            continue
        if settings.workers is not None:
            loader.num_workers = settings.workers
        if not loader.get("num_workers"):
            loader.persistent_workers = False
    remembering = sorted({str(t.get("type")) for t in transforms(data.dataset)} & set(_REMEMBERING))
    if remembering:
        notes.append(
            f"pictures of earlier steps are kept by {', '.join(remembering)}: a run that was resumed is not bit for bit the"
            " unbroken one"
        )
    sampler = dict(data.get("sampler") or {})
    data.dataset = {"type": "KeyedDataset", "dataset": data.dataset, "seed": settings.seed}
    data.sampler = {"type": "KeyedSampler", "shuffle": bool(sampler.get("shuffle", True)), "seed": settings.seed}
    if sampler.get("type") not in _SHUFFLING:
        data.sampler["inner"] = sampler
    data.batch_sampler = {
        "type": "ResumableBatchSampler",
        "inner": data.get("batch_sampler"),
        "drop_last": bool(data.pop("drop_last", False)),
    }
    return notes


def _precision(cfg: Any, settings: RunnerSettings, device: str) -> list[str]:
    notes = []
    optimizer = cfg.optim_wrapper
    if settings.optimizer.lr is not None:
        optimizer.optimizer.lr = settings.optimizer.lr
        schedulers = cfg.get("param_scheduler") or []
        for scheduler in schedulers if isinstance(schedulers, list | tuple) else [schedulers]:
            if scheduler.get("type") == "OneCycleLR":  # it sets the rate itself
                scheduler["eta_max"] = settings.optimizer.lr
    precision = check_precision(settings.precision, device)
    if precision != "32-true":
        optimizer.type = "AmpOptimWrapper"
        optimizer.dtype = "bfloat16" if precision == "bf16-mixed" else "float16"
    elif optimizer.get("type") == "AmpOptimWrapper" and device == "cpu":
        notes.append("optim_wrapper AmpOptimWrapper needs a GPU: this run computes in 32 bits")
        optimizer.type = "OptimWrapper"
        for key in ("dtype", "loss_scale", "use_fsdp"):
            optimizer.pop(key, None)
    return notes


def check_precision(precision: Precision, device: str) -> str:
    """The precision by Lightning's name.

    Raises:
        UserError: mixed precision on a CPU, which mmengine does not have.
    """
    found = choose_precision(precision, device)
    if found != "32-true" and device == "cpu":
        raise UserError(f"--precision {precision} on a CPU: mmengine's mixed precision needs a GPU, take 32 or auto")
    return str(found)


def start_ranks(cfg: Any, device: str) -> None:
    """Let several processes of a launcher find each other on a CPU; mmengine's own start of them wants CUDA.

    Raises:
        UserError: a launcher other than torchrun.
    """
    if device != "cpu" or cfg.launcher == "none":
        return
    if cfg.launcher != "pytorch":
        raise UserError(f"--launcher {cfg.launcher} on a CPU: only pytorch (torchrun) is supported there")
    if "RANK" not in os.environ:
        raise UserError("--launcher pytorch: no process of torchrun (RANK is not set)")
    if not is_distributed():
        torch.distributed.init_process_group("gloo")
    wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
    cfg.model_wrapper_cfg = {**wrapper, "find_unused_parameters": bool(cfg.get("find_unused_parameters", False))}
