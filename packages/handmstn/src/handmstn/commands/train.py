"""`handmstn train`: stage A for the aligner, stage B for identities, and the joint stage where it is asked for."""

import sys
import time

from handmstn.commands import _pictures
from handmstn.commands._files import card_of, save, trained
from handmstn.config import TrainSettings
from handmstn.data import boxed, load, wanted_parts, with_ids
from handmstn.familiar import FEWEST
from handmstn.models import build_aligner, build_model, parts_of
from handmstn.naming import numbered
from handmstn.training import check, familiar_of, train_aligner, train_identities
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device, seed_everything
from tenfold.report import write_report


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train, and write the model, its course and overlays of its points."""
    start = time.perf_counter()
    folder = invocation.folder
    device = choose_device(settings.device)
    taken = None if settings.teacher_weights is None else trained(settings.teacher_weights)[0].aligner
    if settings.teacher_weights is not None and taken is None:
        raise UserError(f"--teacher_weights {settings.teacher_weights}: that model has no aligner")
    parts = parts_of(settings)
    hands = load(settings.data, settings.reading, wanted_parts(parts, settings.given_points), seed=settings.seed)
    read = len(hands)
    if (hands.splits == "train").any():
        hands = hands.split("train")
    elif (hands.splits == "gallery").any() and not settings.data.startswith("hands"):
        hands = hands.part(hands.splits != "probe")
    left = read - len(hands)
    hands = boxed(with_ids(hands, settings.data), parts, settings.given_points)
    try:
        check(hands, settings)
    except UserError as error:
        if not left:
            raise
        raise UserError(f"{error}; {left} of {read} pictures are for testing by the data's own parts") from error
    build_model(settings, settings.seed, build_aligner(settings, settings.seed))  # names of networks, before any work
    seed_everything(settings.seed, device)
    if taken is not None and [p.name for p in taken.parts] != [p.name for p in parts]:
        raise UserError(
            f"--teacher_weights {settings.teacher_weights}: its aligner has other parts than {settings.preset}"
        )
    aligner = taken
    if taken is None:
        aligner = train_aligner(hands, settings, settings.seed, folder, quiet=invocation.quiet)
    model = train_identities(hands, settings, settings.seed, aligner, folder, quiet=invocation.quiet)
    model = model.cpu()
    model.familiar = familiar_of(model, hands)
    save(folder, model, card_of(settings, model, hands))
    captions = {}
    if _pictures.draw_course(folder):
        captions["course"] = (
            "The losses by step. Stage A: the points' mean distance"
            + (" squared" if settings.aligner.distance == "squared" else "")
            + ", in half widths of the picture; bending energy; cross-entropy of visibility and side. Stage B: each term before"
            " its weight."
        )
    _pictures.draw_points(folder, model, hands, "points")
    captions["points"] = "Training pictures, the points that were found in them, and the aligned crops."
    write_report(folder, f"handmstn train: {settings.preset}", captions)
    people = len(set(hands.persons.tolist()))
    weights = ", ".join(f"{p.name} {w:.2f}" for p, w in zip(model.parts, model.weights.tolist(), strict=True))
    sys.stdout.write(
        f"trained on {len(hands)} pictures of {people} people in {time.perf_counter() - start:.0f} s; weights of the parts:"
        f" {weights}; model in {folder.path}\n"
    )
    if model.aligner is not None and model.familiar is None:
        sys.stdout.write(
            f"note: {len(hands)} pictures of {people} people are too few ({FEWEST} are not) to know what is no hand: a picture"
            " without one may be taken for one\n"
        )
    if (hands.sides == "unknown").any():
        count = int((hands.sides == "unknown").sum())
        sys.stdout.write(f"note: the side of {numbered(count)} is unknown, taken as right (guessed)\n")
