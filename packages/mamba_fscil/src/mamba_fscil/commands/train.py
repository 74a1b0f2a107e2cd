"""`mamba-fscil train`: the base session, and a learner that can be taught further classes."""

import sys
import time
from functools import partial

import torch

from mamba_fscil import metrics
from mamba_fscil.commands import _pictures
from mamba_fscil.config import TrainSettings
from mamba_fscil.data import SessionData, load
from mamba_fscil.training.base import Base, prepare, train_base
from mamba_fscil.training.learner import IncrementalLearner
from mamba_fscil.training.store import append, changes, opened, write_base
from tenfold import UserError, checkpoints
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.report import write_report
from tenfold.terminal import table, track

HEADERS = ["session", "classes", "all (%)", "base (%)", "novel (%)", "harmonic", "calibration error (%)"]


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train, write the learner and the run's record, and go on through the sessions where that is asked for."""
    start = time.perf_counter()
    folder = invocation.folder
    choose_device(settings.device)
    data = load(settings.data, settings.protocol, settings.reading, seed=settings.seed)
    if folder.writes:
        with opened(settings.learner, writing=True, option="--learner") as growing:
            if growing.entries and not folder.resumed:
                raise UserError(f"--learner {settings.learner}: a learner is there already; give another folder")
    base = _base(data, settings, invocation)
    if (
        not folder.writes
    ):  # one of several processes, which train the base session together; the first one goes on alone
        return
    learner = IncrementalLearner(settings.method, settings.session, settings.seed)
    learner.take_base(base, data, settings.backbone)
    _write_base_once(learner, settings)
    scores = [learner.evaluate(data.test_until(0))]
    for number, part in enumerate(data.shots if settings.sessions else (), 1):
        maps = torch.cat([found for found, _ in learner.maps_of(part)])
        names = [data.classes[k] for k in part.labels.tolist()]
        show = partial(track, description=f"session {number}", quiet=invocation.quiet)
        learner.learn_session(maps, names, show=show)
        with opened(settings.learner, writing=True, option="--learner") as growing:
            learner.files = number
            if len(growing.entries) <= number:  # else a killed run has written it
                append(growing, learner, option="--learner")
        scores.append(learner.evaluate(data.test_until(number)))
    study = Study(folder, data=data.source, seeds=[settings.seed])
    found = {key: value for key, value in metrics.summary(scores).items() if value == value}
    study.record(settings.method, found)
    study.note(
        f"{len(learner.classes)} classes of at most {learner.capacity}; confidence is softmax of {learner.scale:g} cos."
    )
    _pictures.draw_sessions(folder, {settings.method: [scores]})
    if data.shots and data.size:
        _pictures.draw_shots(folder, data)
    study.finish(time.perf_counter() - start)
    checkpoints.save(folder.own("learner.safetensors"), changes(learner), method="mamba_fscil.changes", config={})
    folder.write_json(
        "config.json", {"learner": settings.learner, "classes": learner.classes, "method": learner.method}
    )
    captions = {"sessions": "Accuracy on the test pictures of all classes seen, of base classes and of novel ones."}
    captions |= {"shots": "The pictures that each session learns from."} if data.shots and data.size else {}
    write_report(folder, f"mamba-fscil train: {settings.method} on {settings.data}", captions)
    rows = [
        [number, data.seen(number), *(f"{x:.2f}" if x == x else "-" for x in vars(s).values())]
        for number, s in enumerate(scores)
    ]
    sys.stdout.write(table(HEADERS, rows) + f"\n\nlearner in {settings.learner}\n")


def _base(data: SessionData, settings: TrainSettings, invocation: Invocation) -> Base:
    """The base session: trained, or from a converted checkpoint."""
    if settings.base_weights is None:
        return train_base(data, settings, run=invocation.folder, quiet=invocation.quiet, stage="")
    base = prepare(data, settings)
    names = checkpoints.load(settings.base_weights, method="mamba_fscil.converted").tensors
    if any(name.startswith("projector.inc.") for name in names):
        raise UserError(
            f"--base_weights {settings.base_weights}: it holds an incremental branch: convert the checkpoint of"
            " the base session"
        )
    for prefix, module in (("projector.", base.projector), ("head.", base.head), ("backbone.", base.backbone)):
        if module is None:
            continue
        target = getattr(module, "model", module)
        read = checkpoints.load(settings.base_weights, method="mamba_fscil.converted").tensors
        found = {name.removeprefix(prefix): x for name, x in read.items() if name.startswith(prefix)}
        expected = {name: tuple(x.shape) for name, x in target.state_dict().items()}
        checkpoints.check_shapes(f"--base_weights {settings.base_weights} ({prefix}*)", expected, found)
        target.load_state_dict(found)
        module.eval().requires_grad_(False)
    if base.backbone is not None:
        base.backbone.freeze()
    return base


def _write_base_once(learner: IncrementalLearner, settings: TrainSettings) -> None:
    """Write the base session; a killed run that is resumed may have done so, with the same bits."""
    with opened(settings.learner, writing=True, option="--learner") as growing:
        entries = list(growing.entries)
    if not entries:
        write_base(learner, settings.learner, option="--learner")
        return
    there = checkpoints.load(entries[0].path, method="mamba_fscil.base").tensors
    if not torch.equal(there["head.W"], learner.head.W.cpu()):
        raise UserError(f"--learner {settings.learner} was made by another run; give another folder")
