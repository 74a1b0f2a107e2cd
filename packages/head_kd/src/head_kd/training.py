"""The glue to mmengine's runner: one call from a config to a run folder, a checkpoint to a plain student."""

import contextlib
import copy
import hashlib
import io
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

import head_kd
import head_kd.ops_fallback  # before mmdet
from head_kd.cache import TargetCache, write_cache
from head_kd.checkpoints import read_weights, resolve_config, student_weights
from head_kd.compose import first_drop, pair, set_num_classes, use_data
from head_kd.config import CacheSettings, Distillation, TrainSettings
from head_kd.data import check_coco, coco_folder, voc_folder
from tenfold import UserError, checkpoints
from tenfold.cli import track
from tenfold.datasets import parse_source
from tenfold.runs import Metrics, Run
from tenfold.trainer_config import choose_device

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

    def __init__(
        self, run: Run | None, *, log_every: int, checkpoint_every: int, quiet: bool, description: str
    ) -> None:
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
            values = {k: float(torch.as_tensor(v).detach()) for k, v in (outputs or {}).items()}
            values["lr"] = float(runner.optim_wrapper.get_lr()["lr"][0])
            self.history.append((step, values))
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


class GuardHook(Hook):  # type: ignore[misc]
    """Looks at the pair before the first step, so that a wrong teacher costs seconds and not days.

    Classes and their order, the input's normalization, what was copied, the teacher's AP on some validation images, the
    gradients of the terms and the semantic gap; at the end, that the teacher is the same to the bit. ``guard.json`` has
    it all.

    Args:
        cfg: the student's config, for its validation data.
        settings: of the training.
        run: where ``guard.json`` goes.
        say: takes each line for the person at the terminal.
    """

    def __init__(self, cfg: Any, settings: TrainSettings, run: Run | None, say: Callable[[str], None]) -> None:
        self.cfg, self.settings, self.run, self.say = cfg, settings, run, say
        self._fingerprint = ""

    def before_train(self, runner: Any) -> None:
        """The checks; after a resume, the fingerprint alone."""
        from head_kd import inspection
        from head_kd.detector import HEADDetector

        model = getattr(runner.model, "module", runner.model)
        if not isinstance(model, HEADDetector):
            return
        if model.teacher is not None:
            self._fingerprint = model.teacher.fingerprint()
        if runner.iter > 0 or self.settings.guard < 0:
            return
        loader = runner.train_loop.dataloader
        classes = loader.dataset.metainfo.get("classes")
        lines, found = guard(model, classes, self.settings, self.cfg, Path(runner.work_dir))
        preprocessed = [_split(model.data_preprocessor(batch, True)) for batch in _few(loader, 2)]
        if model.assistants or model.head_kd.neck is not None:
            numbers = inspection.measure(model, preprocessed)
            found |= numbers
            lines += [
                f"gradient of {k}: {v:.2f} of the detection loss's, before warm-up"
                for k, v in numbers["gradient_ratio"].items()
            ]
            lines += [f"semantic gap of {k}: R2 {v:.2f}" for k, v in numbers["gap_r2"].items()]
        for line in lines:
            self.say(line)
        if self.run is not None:
            self.run.write_json("guard.json", {**found, "lines": lines})

    def after_train(self, runner: Any) -> None:
        """The teacher has to be what it was."""
        model = getattr(runner.model, "module", runner.model)
        if self._fingerprint and model.teacher.fingerprint() != self._fingerprint:
            raise RuntimeError("the teacher's weights changed while the student trained")


def guard(
    model: Any, classes: Any, settings: TrainSettings, cfg: Any, work_dir: Path
) -> tuple[list[str], dict[str, Any]]:
    """What can be said of a pair without a training batch: lines for a person, and values.

    Raises:
        UserError: classes differ, or the teacher is weaker than ``min_teacher_ap``.
    """
    from head_kd import inspection

    lines: list[str] = []
    found: dict[str, Any] = {}
    if model.teacher is not None:
        names = model.teacher.classes
        lines.append(inspection.check_classes(classes, names, other_classes=settings.distill.other_classes))
        lines.append(inspection.normalization_line(model))
        same = names is None or classes is None or tuple(names) == tuple(classes)
        if settings.guard > 0 and cfg.get("test_dataloader") is not None and same:
            ap = 100 * teacher_ap(cfg, model.teacher.detector, settings.guard, work_dir)
            found["teacher_ap"] = ap
            lines.append(f"teacher: AP {ap:.1f} on {settings.guard} validation images")
            if ap < settings.min_teacher_ap:
                raise UserError(
                    f"the teacher has AP {ap:.1f} on {settings.guard} validation images, --min_teacher_ap is"
                    f" {settings.min_teacher_ap:g}: wrong checkpoint, classes or input?"
                )
            model.teacher.detector.eval()
    lines += inspection.transfer_lines(model)
    return lines, found


def teacher_ap(cfg: Any, detector: Any, count: int, work_dir: Path) -> float:
    """AP in [0, 1] of a detector on the first validation images of a config."""
    import json

    cfg = copy.deepcopy(cfg)
    dataset = cfg.test_dataloader.dataset
    source = Path(dataset.get("data_root") or "") / dataset["ann_file"]
    content = json.loads(source.read_text(encoding="utf-8"))
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    work_dir.mkdir(parents=True, exist_ok=True)
    part = work_dir / "guard_annotations.json"
    part.write_text(json.dumps(content), encoding="utf-8")
    dataset["ann_file"] = str(part.resolve())
    cfg.test_evaluator = {"type": "CocoMetric", "ann_file": str(part.resolve()), "metric": "bbox"}
    return max(0.0, evaluate(cfg, None, work_dir, model=detector)["bbox_mAP"])


def _few(loader: Any, count: int) -> list[Any]:
    """Some batches of a loader's data set, drawn outside of its order."""
    from mmengine.dataset import pseudo_collate

    size = loader.batch_sampler.inner.batch_size if hasattr(loader.batch_sampler, "inner") else 2
    size = min(int(size), len(loader.dataset))
    return [
        pseudo_collate([loader.dataset[(i * size + j) % len(loader.dataset)] for j in range(size)])
        for i in range(count)
    ]


def _split(data: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
    return data["inputs"], data["data_samples"]


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
        schedulers = cfg.get("param_scheduler") or []
        for scheduler in schedulers if isinstance(schedulers, list | tuple) else [schedulers]:
            if scheduler.get("type") == "OneCycleLR":  # it sets the rate itself
                scheduler["eta_max"] = settings.lr
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


def build_runner(
    cfg: Any, settings: TrainSettings, run: Run | None, work_dir: Path, *, quiet: bool, description: str
) -> Any:
    """A runner with its ``RunHook`` (as ``runner.run_hook``), its model initialized, the schedule's open ends filled in."""
    from mmdet.utils import register_all_modules
    from mmengine.runner import Runner

    import head_kd.detector
    import head_kd.loop  # noqa: F401  # registers

    quiet_stack()
    register_all_modules(init_default_scope=True)
    prepared = prepare(cfg, settings, work_dir)
    if choose_device(settings.device) == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid, thousands of fills a step
    object.__setattr__(prepared, "_format_python_code", False)  # yapf takes seconds for mmengine's copy of the config
    with _said_nothing():
        runner = Runner.from_cfg(prepared)
    quiet_stack()
    hook = RunHook(
        run,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        quiet=quiet,
        description=description,
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
    plain: Any = None,
) -> Any:
    """Train what a config describes, from the run's last checkpoint where there is one.

    Args:
        cfg: of ``head_kd.compose.pair``, or any of mmdet's.
        settings: of the training.
        run: the folder.
        quiet: no progress.
        description: of the progress line.
        work_dir: for mmengine's log; default: in the run's folder.
        plain: the student's own config, whose test data the guard measures the teacher on; None leaves the guard out.

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
    if plain is not None:
        runner.register_hook(GuardHook(plain, settings, run, (lambda line: None) if quiet else stderr), "LOW")
    with _said_nothing():
        runner._train_loop = runner.build_train_loop(runner._train_loop)  # fill_schedule needs the data's length
        fill_schedule(runner, cfg)
        runner.train()
    if run is not None:
        for left in sorted(folder.rglob("*")):
            if left.is_file():
                run.own(str(left.relative_to(run.path)))
    return runner


def scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """An evaluator's metrics without their prefix. mmdet's gives none where nothing at all was detected: AP is 0 then."""
    if not metrics:
        return {"bbox_mAP": 0.0, "bbox_mAP_50": 0.0, "bbox_mAP_75": 0.0}
    return {k.rpartition("/")[2]: float(v) for k, v in metrics.items()}


def evaluate(
    cfg: Any, state_dict: Mapping[str, Tensor] | None, work_dir: Path, *, model: Any = None
) -> dict[str, float]:
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
    return scores(found)


def export_student(
    checkpoint: str | Path,
    student: Any,
    out: str | Path,
    *,
    classes: tuple[str, ...] | None = None,
    verify: bool = True,
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


def compose(
    settings: TrainSettings | Any, run: Run | None, *, preset: Distillation | None = None, seed: int | None = None
) -> tuple[Any, Any]:
    """The training config and the plain student's config out of a command's settings, with checked data."""
    plain = plain_config(settings.student, settings.data, run)
    distill = preset or settings.distill
    cfg = pair(
        plain,
        settings.teacher,
        settings.teacher_checkpoint,
        distill,
        cache=settings.cache if distill.needs_teacher and distill.preset not in ("pkd", "fitnet") else None,
        seed=settings.seed if seed is None else seed,
    )
    return cfg, plain


def plain_config(student: Any, data: str | None, run: Run | None, *, splits: tuple[str, str] = ("train", "val")) -> Any:
    """The student's config, on other data where ``--data`` says so, its COCO files checked."""
    cfg = copy.deepcopy(resolve_config(student))
    if data is None:
        check_config_data(cfg)
        return cfg
    kind, path = parse_source(data, kinds=("coco", "voc"))
    assert path is not None
    if kind == "coco":
        train, val = (coco_folder(path, split) for split in splits)
    else:
        folder = run.path if run is not None else Path(tempfile.mkdtemp(prefix="head-kd-"))
        train, val = (voc_folder(path, split, folder / "data" / f"{split}.json") for split in splits)
        if run is not None:
            for split in splits:
                run.own(f"data/{split}.json")
    if train.classes != val.classes:
        raise UserError(
            f"--data {data}: classes of {splits[0]} and {splits[1]} differ: {check_difference(train.classes, val.classes)}"
        )
    use_data(cfg, train, val)
    set_num_classes(cfg.model, len(train.classes))
    return cfg


def check_difference(one: tuple[str, ...], other: tuple[str, ...]) -> str:
    """The first few classes that only one of both has."""
    return ", ".join(sorted(set(one) ^ set(other))[:5]) or "their order"


def check_config_data(cfg: Any) -> None:
    """Check the COCO files that a config trains and tests on."""
    for name in ("train", "test"):
        loader = cfg.get(f"{name}_dataloader")
        dataset = None if loader is None else loader.dataset
        while dataset is not None and "dataset" in dataset:
            dataset = dataset.dataset
        if dataset is None or dataset.get("type") != "CocoDataset":
            continue
        root = Path(dataset.get("data_root") or "")
        prefix = (dataset.get("data_prefix") or {}).get("img", "")
        check_coco(root / dataset["ann_file"], root / prefix, classes=(dataset.get("metainfo") or {}).get("classes"))


def check_cache(cfg: Any) -> None:
    """Raise ``UserError`` when the config's cache is of other data."""
    teacher = cfg.model.get("teacher") or {}
    if teacher.get("cache") is not None:
        TargetCache.open(teacher["cache"]).check_data(annotation_digest(cfg))


def annotation_digest(cfg: Any) -> str:
    """SHA-256 of a config's training annotations."""
    dataset = cfg.train_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    return hashlib.sha256((Path(dataset.get("data_root") or "") / dataset["ann_file"]).read_bytes()).hexdigest()


def make_cache(settings: CacheSettings, run: Run, *, quiet: bool) -> dict[str, Any]:
    """Run the teacher once over the training images, not augmented, and write a ``TargetCache`` into the run."""
    from mmdet.registry import DATASETS, MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict
    from mmengine.dataset import pseudo_collate

    from head_kd.signals import box_heads, head_signals
    from head_kd.teacher import Renormalize, TeacherView

    quiet_stack()
    register_all_modules(init_default_scope=True)
    cfg = plain_config(settings.student, settings.data, run)
    teacher = TeacherView.load(settings.teacher, settings.teacher_checkpoint)
    if not teacher.two_stage:
        raise UserError("a cache needs a teacher with a RoI head: the targets of a dense head depend on every pixel")
    if torch.cuda.is_available():
        teacher.detector.cuda()
    dataset = cfg.train_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    size = next(t for t in cfg.test_dataloader.dataset.pipeline if t["type"] == "Resize")
    dataset.pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        size,
        {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")},
    ]
    with _said_nothing():
        data = DATASETS.build(dataset)
    device = next(teacher.detector.parameters()).device
    preprocessor = MODELS.build(ConfigDict(copy.deepcopy(dict(cfg.model.data_preprocessor)))).to(device)
    teacher.renormalize = Renormalize(preprocessor, teacher.detector.data_preprocessor)

    def batches() -> Iterator[tuple[Tensor, list[Any]]]:
        starts = range(0, len(data), settings.batch_size)
        for start in track(starts, "caching the teacher's targets", len(starts), quiet=quiet):
            items = [data[i] for i in range(start, min(start + settings.batch_size, len(data)))]
            yield _split(preprocessor(pseudo_collate(items), False))

    names = tuple(head_signals(box_heads(teacher.detector.roi_head)[0]))
    cache = write_cache(
        run.path / "cache",
        teacher,
        batches(),
        len(data),
        names=names,
        data=annotation_digest(cfg),
        boxes_per_image=settings.boxes,
        precision=settings.precision,
        seed=settings.seed,
    )
    for file in sorted((run.path / "cache").iterdir()):
        run.own(f"cache/{file.name}")
    size_on_disk = sum(file.stat().st_size for file in (run.path / "cache").iterdir())
    return {
        "images": len(data),
        "boxes": settings.boxes,
        "signals": list(names),
        "bytes": size_on_disk,
        "path": str(cache.path),
    }


def dataset_of(cfg: Any) -> Any:
    """The innermost training data set of a config."""
    dataset = cfg.train_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    return dataset


def sample_batches(model: Any, cfg: Any, images: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """Preprocessed training images of a config, two at a time."""
    from mmdet.registry import DATASETS
    from mmengine.dataset import pseudo_collate

    with _said_nothing():
        data = DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset))
    for start in range(0, min(images, len(data)), 2):
        items = [data[i] for i in range(start, min(start + 2, len(data)))]
        yield _split(model.data_preprocessor(pseudo_collate(items), True))


def random_teacher(config: Any, folder: Path) -> str:
    """A teacher without its weights, for what depends on shapes alone."""
    from mmdet.registry import MODELS

    path = folder / "teacher.pth"
    torch.save({"state_dict": MODELS.build(copy.deepcopy(resolve_config(config).model)).state_dict()}, path)
    return str(path)


def strip_pretrained(model: Any) -> None:
    """Leave out downloads of pretrained backbones, where only shapes, costs and gradients are looked at."""
    for module in model.student.modules():
        init = getattr(module, "init_cfg", None)
        if isinstance(init, dict) and init.get("type") == "Pretrained":
            module.init_cfg = None
