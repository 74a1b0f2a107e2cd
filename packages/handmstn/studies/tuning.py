"""The trials behind the settings of the demonstration, on a tuning seed (100 unless ``--seed`` says otherwise).

    python tuning.py aligner --out DIR --align 700 --turns quarter --head places --distance plain
    python tuning.py arms    --out DIR --arms palm,all --steps 300 --places 6 --jitter 0.06
    python tuning.py noise   --out DIR --arm oracle --steps 200

``aligner`` trains stage A and prints the median error of the points, in halves of the palm's width, after 1 or 4 turns of
level 0 and 0 to 3 looks of level 1. ``arms`` trains stage B of each arm with the points of the aligner that DIR holds, which it
trains first where there is none, and prints rank 1 of the test people, whole, covered and clear. ``noise`` trains with true
points and searches with points that are off by known amounts: of each point alone, of each part, or of the whole hand.

Rendered people and aligners stay in DIR. ``--level quick`` is for a look at the mechanics (a minute); the numbers of
docs/handmstn.md are of ``--level full``, 60 people, which takes 2 to 6 minutes of a core per trial.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from handmstn.commands._arms import look, measured, numbers, train_arm
from handmstn.commands._demo_arms import COVERED, half_width, of_network
from handmstn.commands._world import settings_of, world
from handmstn.config import CompareSettings, DemoSettings
from handmstn.models import build_aligner
from handmstn.training import train_aligner

NETWORK = "hand:cnn4"


def changed(settings: CompareSettings, words: argparse.Namespace) -> CompareSettings:
    """The demonstration's settings with those of the trial."""
    steps = {} if words.align is None else {"steps": words.align}
    batch = {} if words.align_batch is None else {"batch_size": words.align_batch}
    aligner = dataclasses.replace(
        settings.aligner, backbone=words.backbone, turns=words.turns, head=words.head, distance=words.distance,
        scrambled=words.scrambled, lr=words.align_lr, **steps, **batch,
    )  # fmt: skip
    recognizer = dataclasses.replace(settings.recognizer, places=words.places, jitter=words.jitter)
    optimizer = dataclasses.replace(settings.optimizer, lr=words.lr)
    length = {} if words.steps is None else {"steps": words.steps}
    return dataclasses.replace(settings, aligner=aligner, recognizer=recognizer, optimizer=optimizer, **length)


def trained(words: argparse.Namespace, people: Any, settings: CompareSettings) -> Any:
    """The aligner of these settings, trained once and kept."""
    a = settings.aligner
    name = "-".join(
        str(v) for v in (a.backbone.replace(":", ""), a.steps, a.batch_size, a.lr, a.turns, a.head, a.distance)
    )
    path = words.out / f"aligner-{words.level}-{words.seed}-{name}-{a.scrambled}.pt"
    if not path.exists():
        start = time.process_time()
        made = train_aligner(people.train, settings, words.seed, quiet=True)
        assert made is not None
        sys.stdout.write(f"stage A: {time.process_time() - start:.0f} s of a core\n")
        torch.save(made.state_dict(), path)
    fresh = build_aligner(settings, words.seed)
    assert fresh is not None
    fresh.load_state_dict(torch.load(path, weights_only=True))
    return fresh.eval()


def aligner(words: argparse.Namespace, people: Any, demo: DemoSettings) -> None:
    """Errors of the points by turns of level 0 and looks of level 1, on training and test people."""
    found = trained(words, people, changed(settings_of(demo), words))
    for name in ("train", "test"):
        whole = getattr(people, name)
        hands = whole.part(np.arange(min(240, len(whole))))
        unit = half_width(hands.points)
        mean = np.linalg.norm(people.train.points.mean(0)[None] - hands.points, axis=-1).mean(1) / unit
        told = [f"mean pose {np.median(mean):.3f}"]
        for votes, passes in ((1, 0), (1, 1), (4, 0), (4, 1), (4, 2), (4, 3)):
            found.votes, found.passes = votes, max(1, passes)
            spots = []
            with torch.no_grad():
                for rows in torch.split(hands.images, 60):
                    out = found(rows.float() / 255)
                    spots.append(out.points if passes else found.placed(out.transform))
            error = np.linalg.norm(torch.cat(spots).numpy() - hands.points, axis=-1) / unit[:, None]
            told.append(f"{votes} turns, {passes} looks {np.median(error.mean(1)):.3f}")
        sys.stdout.write(f"{name}: {'; '.join(told)}\n")


def arms(words: argparse.Namespace, people: Any, demo: DemoSettings) -> None:
    """Rank 1 of each arm after stage B with found points."""
    for arm in words.arms.split(","):
        settings = changed(of_network(demo, NETWORK, arm), words)
        shared = None
        if arm in {"palm", "fingers-ce", "all"}:
            shared = trained(words, people, changed(settings_of(demo), words))
            shared.votes, shared.passes = words.votes, words.passes
        start = time.process_time()
        model = train_arm(people.train, settings, arm, words.seed, shared)
        seconds = time.process_time() - start
        found, rows = measured(model, look(model, people.test, settings, arm), people.test.splits, _all(people.test))
        hit = found.identification.per_probe()[0] <= 1
        covered = people.test.visibility[rows, 0] < COVERED
        parts = {"covered": hit[covered], "clear": hit[~covered]}
        told = "; ".join(f"{name} {100 * one.mean():.1f}" for name, one in parts.items() if len(one))
        shown = {name: round(value, 1) for name, value in numbers(found).items()}
        weight = float(model.weights[0].detach())
        sys.stdout.write(f"{arm}: {seconds:.0f} s of a core; {shown}; {told}; palm's weight {weight:.2f}\n")


def noise(words: argparse.Namespace, people: Any, demo: DemoSettings) -> None:
    """Rank 1 of an arm with true points when they are off by a mean distance in halves of the palm's width."""
    settings = changed(of_network(demo, NETWORK, words.arm), words)
    model = train_arm(people.train, settings, words.arm, words.seed, None)
    unit, rng = half_width(people.test.points), np.random.default_rng(0)
    truth = people.test.points
    for kind, groups in (("point", [1] * truth.shape[1]), ("part", [9, *[6] * 5]), ("hand", [truth.shape[1]])):
        for off in (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3):
            drawn = [np.repeat(rng.standard_normal((len(truth), 1, 2)), count, 1) for count in groups]
            moved = truth + off / np.sqrt(np.pi / 2) * np.concatenate(drawn, 1) * unit[:, None, None]
            hands = dataclasses.replace(people.test, points=moved.astype(np.float32))
            found, _ = measured(model, look(model, hands, settings, words.arm), hands.splits, _all(hands))
            sys.stdout.write(f"error of each {kind} {off}: rank 1 {numbers(found)['rank-1']:.1f} %\n")


def _all(hands: Any) -> np.ndarray:
    return np.ones(len(hands), np.bool_)


def main() -> int:
    """Run one trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["aligner", "arms", "noise"])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--level", default="full", choices=["quick", "default", "full"])
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--align", type=int)
    parser.add_argument("--align_batch", type=int)
    parser.add_argument("--align_lr", type=float, default=2e-3)
    parser.add_argument("--backbone", default="hand:loc6")
    parser.add_argument("--turns", default="quarter", choices=["any", "quarter", "none"])
    parser.add_argument("--head", default="places", choices=["dense", "places"])
    parser.add_argument("--distance", default="plain", choices=["squared", "plain"])
    parser.add_argument("--scrambled", type=float, default=0.125)
    parser.add_argument("--votes", type=int, default=4, choices=[1, 4])
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--arms", default="palm,all")
    parser.add_argument("--arm", default="oracle", choices=["oracle"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--places", type=int, default=6)
    parser.add_argument("--jitter", type=float, default=0.06)
    words = parser.parse_args()
    torch.set_num_threads(1)
    (words.out / "worlds").mkdir(parents=True, exist_ok=True)
    demo = DemoSettings(level=words.level)
    people = world(words.out, demo, words.seed)
    {"aligner": aligner, "arms": arms, "noise": noise}[words.trial](words, people, demo)
    return 0


if __name__ == "__main__":
    sys.exit(main())
