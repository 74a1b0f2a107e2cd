"""`handmstn compare`: what alignment, fingers and losses bring on the user's pictures, on people kept for testing."""

import dataclasses
import functools
import sys
from typing import Any

import numpy as np

from handmstn.commands._arms import look, measured, numbers, train_arm
from handmstn.config import CompareSettings
from handmstn.data import load, with_ids
from handmstn.models import parts_of
from handmstn.protocols import first_each
from handmstn.records import Hands
from handmstn.training import check, train_aligner
from tenfold import UserError, executors
from tenfold.claims import Study, arm_rows
from tenfold.cli import Invocation
from tenfold.figures import arm_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track


def _parted(hands: Hands, seed: int) -> tuple[Hands, Hands]:
    """Half of the people to train on, half to test on."""
    persons = np.unique(hands.persons)
    tested = np.random.default_rng((seed, 5)).permutation(persons)[: len(persons) // 2]
    test = np.isin(hands.persons, tested)
    return hands.part(~test), hands.part(test)


def measure(settings: CompareSettings, seed: int) -> dict[str, dict[str, float]]:
    """Train and test every arm with one seed."""
    parts = parts_of(dataclasses.replace(settings, preset="hand6"))
    hands = load(settings.data, settings.reading, parts)
    train, test = _parted(hands, seed)
    settings = dataclasses.replace(settings, preset="hand6")
    aligner = None
    if {"palm", "fingers-ce", "all"} & set(settings.arms):
        aligner = train_aligner(train, settings, seed, quiet=True)
    gallery, probes = first_each(test.classes, 1)
    splits = np.empty(len(test), dtype="<U8")
    splits[gallery], splits[probes] = "gallery", "probe"
    found: dict[str, dict[str, float]] = {}
    for arm in settings.arms:
        model = train_arm(train, settings, arm, seed, aligner)
        counts, _ = measured(model, look(model, test, settings, arm), splits, np.ones(len(test), np.bool_))
        found[arm] = dict(numbers(counts))
    return found


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Measure, decide, write results, figures and ``report.html``."""
    read = load(settings.data, settings.reading, parts_of(dataclasses.replace(settings, preset="hand6")))
    hands = with_ids(read, settings.data)
    for seed in settings.seeds:
        check(_parted(hands, seed)[0], dataclasses.replace(settings, preset="hand6"))
    wanting = {"box", "oracle"} & set(settings.arms)
    if wanting and (hands.points.shape[1] != 39 or not np.isfinite(hands.points).all()):
        raise UserError(f"--arms {sorted(wanting)[0]}: needs all points of hand6 in every picture")
    folder = invocation.folder
    study = Study(folder, data=hands.source, seeds=settings.seeds)
    with executors.make(settings.executor) as pool:
        show: Any = functools.partial(track, description="seeds", quiet=invocation.quiet)
        study.over_seeds(functools.partial(measure, settings), pool, show)
    study.against(settings.arms[0], settings.arms, "rank-1")
    headers, rows = arm_rows(study, settings.arms, ["rank-1", "rank-5", "mAP", "EER"])
    arm_chart(
        folder.figure("arms"), {a: study.values((a, "rank-1")).tolist() for a in settings.arms}, xlabel="rank-1 (%)"
    )
    summary = study.finish()
    write_report(
        folder, "handmstn compare", {"arms": "Rank-1 on people that were not trained on, one picture each enrolled."}
    )
    sys.stdout.write(table(headers, rows) + "\n\n")
    return show_claims(summary)
