"""`genview compare`: plain augmentation, generated views, weights, more data; over seeds."""

import sys
from functools import partial

from genview.commands import _files, _measures
from genview.config import Arm, CompareSettings
from genview.data import Pictures, load, read_manifest
from genview.training import prepare, pretrain, semi_supervised, views_of
from tenfold import UserError, executors
from tenfold.claims import Study, arm_rows
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.figures import arm_chart
from tenfold.models import IMAGENET
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims, table, track


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Train every arm on every seed, measure, decide, draw."""
    folder = invocation.folder
    choose_device(settings.device)
    data = load(settings.data)
    for arm in settings.arms:  # what cannot be used is refused before the first of them trains
        views_of(settings.of_arm(arm, settings.seeds[0]))
    study = Study(folder, data=data.source, seeds=settings.seeds)
    with executors.make(settings.executor) as pool:
        here = folder if pool is None else None
        arms = {arm: partial(measure, settings, arm, here, invocation.quiet) for arm in settings.arms}
        show = partial(track, description="arms x seeds", quiet=invocation.quiet or pool is None)
        study.over_arms(arms, pool, show)
    metrics = ["linear top1", "knn top1", *(["semi top1"] if settings.share is not None else [])]
    for metric in metrics:
        for arm in settings.arms[1:]:
            first = settings.arms[0]
            id = f"{metric}_{arm}_over_{first}".replace(" ", "_").replace("-", "_")
            text = f"{metric} of {arm} - of {first} (percentage points)"
            study.difference(id, text, (arm, metric), (first, metric), required=">= 0", main=True)
    values = {arm: study.values((arm, "linear top1")).tolist() for arm in settings.arms}
    arm_chart(folder.figure("arms"), values, xlabel="linear top-1 on test pictures (%)")
    summary = study.finish()
    caption = "Linear probe of each arm: mean over seeds with its 95 % interval, a faint dot for each seed."
    write_report(folder, f"genview compare: {settings.backbone} by {settings.method}", {"arms": caption})
    sys.stdout.write(table(*arm_rows(study, settings.arms, metrics)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def measure(settings: CompareSettings, arm: Arm, run: Run | None, quiet: bool, seed: int) -> dict[str, float]:
    """Train one arm on one seed, and measure it."""
    own = settings.of_arm(arm, seed)
    prepared = prepare(own)
    if arm == "naive":
        assert settings.views is not None
        number = len(read_manifest(settings.views).files)
        prepared = prepare(own, views=None)
        prepared = type(prepared)(
            type(prepared.dataset)(
                first_external(prepared.dataset.pictures, number), None, prepared.dataset.size, resident=True
            ),
            prepared.data,
            None,
            None,
            None,
        )
    stage = f"{arm}-seed-{seed}"
    backbone = pretrain(own, prepared, run=run, stage=stage, quiet=quiet or run is None)
    if run is not None:
        _files.save_backbone(run, backbone, own, prepared.data.classes, f"{stage}/")
    found = _measures.read(prepared.data, settings.size)
    values = _measures.quick(backbone, found, settings.probe, IMAGENET, seed)
    if settings.share is not None:
        semi = semi_supervised(
            backbone,
            found.train,
            found.test,
            found.classes,
            settings.share,
            settings.probe,
            IMAGENET,
            size=settings.size,
            seed=seed,
        )
        values["semi top1"] = semi[0]
    return values


def first_external(pictures: Pictures, number: int) -> Pictures:
    """The data's own pictures, and as many external ones.

    Raises:
        UserError: there are fewer of them.
    """
    own = [i for i, key in enumerate(pictures.keys) if not key.startswith("external/")]
    others = [i for i, key in enumerate(pictures.keys) if key.startswith("external/")]
    if len(others) < number:
        raise UserError(f"--external: {len(others)} pictures, expected {number}, as many as there are views")
    return pictures.part([*own, *others[:number]])
