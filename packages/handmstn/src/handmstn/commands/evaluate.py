"""`handmstn evaluate`: closed set, open set, verification, another data set; with CMC and DET plots."""

import dataclasses
import sys
from typing import Any

import numpy as np

from handmstn.calibration import cllr, min_cllr
from handmstn.commands import _pictures
from handmstn.commands._files import embedded, first_of, left_out, nothing_left, read, trained
from handmstn.commands._ratios import calibration_of
from handmstn.config import EvaluateSettings, HandReading
from handmstn.data import listed, with_ids
from handmstn.evaluation import Found, Scorer, all_pairs, count, rank_table
from handmstn.metrics import OpenSet, bootstrap
from handmstn.models import Embedded, head_of
from handmstn.naming import numbered
from handmstn.protocols import Rows, check_disjoint, drawn_galleries, first_each, strangers
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.report import write_report
from tenfold.terminal import table

DRAWN = {"hands11k": 10, "hd": 10}
"""Random galleries of the sets whose protocol they are."""


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Measure, write ``evaluation.json``, plots and ``report.html``."""
    model, card, finished = trained(settings.run)
    hands = with_ids(read(settings, card, model, seed=settings.seed), settings.data)
    if settings.protocol == "cross":
        source = settings.train_data or finished.settings.data
        if source == "hands" and settings.data == "hands":
            own = np.asarray([f"{i:04d}" for i in range(finished.settings.reading.people)])
        else:
            own = listed(source, finished.settings.reading if settings.train_data is None else HandReading()).persons
        check_disjoint(own, hands.persons)
    if (hands.splits == "train").any() and (hands.splits != "train").any():
        hands = hands.part(hands.splits != "train")
    found = embedded(settings, model, hands)
    hidden, share = left_out(found), float(found.shown.mean())
    if not found.shown.any():
        raise nothing_left(settings.data, found)
    found = found.part(found.shown)
    weights = model.weights.detach().cpu().numpy()
    folder = invocation.folder
    result: dict[str, Any] = {"protocol": settings.protocol, "assessable": share, "not assessable": hidden}
    rows: list[list[str]] = []
    captions: dict[str, str] = {}
    if settings.protocol != "verify":
        counted = _identify(settings, found, weights, folder if settings.distances else None)
        ranks = rank_table(counted.identification)
        result["closed"] = ranks
        rows += [
            [name, f"{100 * v['value']:.2f} %", _ci(v["ci95"])] for name, v in ranks.items() if isinstance(v, dict)
        ]
        rows += [[name, str(ranks[name]), ""] for name in ("ranked among", "probes", "probes without a mate")]
        if hidden:
            ranks["rank-1 x share assessable"] = ranks["rank-1"]["value"] * share
            rows += [["rank-1 x share assessable", f"{100 * ranks['rank-1 x share assessable']:.2f} %", ""]]
        _pictures.draw_cmc(folder, {"this model": counted.identification})
        captions["cmc"] = "Share of the probes found within a rank, with the 95 % band of a bootstrap over persons."
        if settings.protocol in {"open", "cross"}:
            result["open"] = _open_result(counted.open_set, settings.fpir)
            rows += [
                [k, f"{v:.4g}" if isinstance(v, float) else str(v), ""]
                for k, v in result["open"].items()
                if k != "ci95"
            ]
    if settings.protocol in {"verify", "cross", "open"}:
        classes = found.hands.classes
        pairs = all_pairs(found.enrolled, classes, weights)
        v = pairs.compute()
        result["verification"] = {
            **dataclasses.asdict(v),
            "tar": {f"{f:g}": t for f, t in v.tar.items()},
            "thresholds": {f"{f:g}": t for f, t in v.thresholds.items()},
            "d_prime": None if np.isnan(v.d_prime) else v.d_prime,
            "smallest FAR that can be told": 1 / v.impostor,
        }
        rows += [["EER (threshold)", f"{100 * v.eer:.2f} % ({v.eer_threshold:.3f})", ""]]
        rows += [
            [f"TAR at FAR {f:g} (threshold)", f"{100 * t:.2f} % ({v.thresholds[f]:.3f})", ""] for f, t in v.tar.items()
        ]
        rows += [["smallest FAR that can be told", f"{100 / v.impostor:.2g} %", ""]]
        rows += [
            ["d'", "-" if np.isnan(v.d_prime) else f"{v.d_prime:.2f}", ""],
            ["genuine, impostor pairs", f"{v.genuine}, {v.impostor}", ""],
        ]
        _pictures.draw_det(folder, {"this model": pairs})
        captions["det"] = (
            "False rejects against false accepts over all pairs of pictures; nearer to the lower left is better. No pair at all"
            " is drawn as half a pair, the least that so many pairs can tell."
        )
    if settings.calibration is not None:
        rows += _calibrated(settings, found, weights, str(head_of(model, card)["model"]), result)
    folder.write_json("evaluation.json", result)
    write_report(folder, f"handmstn evaluate: {settings.protocol}, {found.hands.source}", captions)
    sys.stdout.write(table([f"{settings.protocol}: {found.hands.source}", "value", "95 % (persons)"], rows) + "\n")
    if hidden:
        product = "" if settings.protocol == "verify" else ", and counted by the product above alone"
        sys.stdout.write(f"not assessable, left out of {numbered(len(hands))}{product}: {first_of(hidden)}\n")
    if (found.hands.guessed != "").any():
        number = int((found.hands.guessed != "").sum())
        sys.stdout.write(f"guessed of {numbered(number)}: {found.hands.guessed[found.hands.guessed != ''][0]}\n")


def _ci(ci95: tuple[float, float] | None) -> str:
    return "" if ci95 is None else f"{100 * ci95[0]:.1f} to {100 * ci95[1]:.1f}"


def _galleries(settings: EvaluateSettings, found: Embedded) -> list[tuple[Rows, Rows]]:
    """Rows of gallery and probes, one pair or several drawn ones."""
    hands = found.hands
    kind = settings.data.partition(":")[0]
    draws = DRAWN.get(kind, 0) if settings.draws is None else settings.draws
    splits, classes = hands.splits, hands.classes
    extra = np.flatnonzero(splits == "distractor")
    own = np.flatnonzero(splits != "distractor")
    if draws:
        return [
            (np.concatenate([own[g], extra]), own[p]) for g, p in drawn_galleries(classes[own], draws, settings.seed)
        ]
    if (splits == "gallery").any() and (splits == "probe").any():
        return [(np.flatnonzero(splits == "gallery"), np.flatnonzero(splits == "probe"))]
    g, p = first_each(classes[own], settings.gallery_each)
    return [(np.concatenate([own[g], extra]), own[p])]


def _identify(settings: EvaluateSettings, found: Embedded, weights: Any, folder: Any) -> Found:
    """Counts over all galleries; in an open set some people are kept out of them."""
    persons, classes = found.hands.persons, found.hands.classes
    counted: Found | None = None
    for number, (gallery, probes) in enumerate(_galleries(settings, found)):
        if settings.protocol in {"open", "cross"}:
            kept_out = strangers(persons, settings.open_share, settings.seed)
            gallery = gallery[~kept_out[gallery]]
        if not len(gallery) or not len(probes):
            raise UserError(
                f"--data {settings.data}: {numbered(len(gallery))} in the gallery and {numbered(len(probes), 'probe')}"
            )
        scorer = Scorer(found.enrolled.part(gallery), classes[gallery], weights, settings.matcher, settings.components)
        counted = count(
            scorer, found.enrolled.part(probes), classes[probes], unit=settings.unit, ties=settings.ties, into=counted
        )
        if folder is not None and number == 0:
            scores = scorer.scores(found.enrolled.part(probes))
            _, columns = np.unique(np.concatenate([scorer.columns, classes[probes]]), return_inverse=True)
            cameras = np.arange(len(gallery) + len(probes))  # no two pictures share a camera, so that none is left out
            with folder.replacing("distances.npz") as path, path.open("wb") as file:
                np.savez_compressed(
                    file, distmat=1 - scores, g_pids=columns[: scores.shape[1]], q_pids=columns[scores.shape[1] :],
                    g_camids=cameras[: scores.shape[1]], q_camids=cameras[len(gallery) : len(gallery) + len(probes)],
                )  # fmt: skip
    assert counted is not None
    return counted


def _open_result(open_set: OpenSet, fpir: float) -> dict[str, Any]:
    result = open_set.compute(fpir)
    found, persons = open_set.per_probe(fpir)
    _, ci95 = bootstrap(found, persons)
    return {
        f"DIR at FPIR {fpir:g}": result.dir,
        "ci95": ci95,
        "FPIR reached": result.fpir,
        "threshold": result.threshold,
        "probes with a mate": result.mated,
        "probes without": result.impostors,
        "smallest FPIR that can be told": 1 / max(1, result.impostors),
    }


def _calibrated(
    settings: EvaluateSettings, found: Embedded, weights: Any, model: str, result: dict[str, Any]
) -> list[list[str]]:
    """Cllr of a calibration on these pairs."""
    assert settings.calibration is not None
    calibration = calibration_of(settings.calibration, model)
    e, classes = found.enrolled, found.hands.classes
    scores = Scorer(e, classes, weights).scores(e)
    common = np.einsum("ap,bp,p->ab", e.visibility, e.visibility, weights)
    pairs = np.triu(np.ones_like(scores, dtype=np.bool_), 1)
    same = classes[:, None] == classes[None]
    llr = calibration.llr(scores, common)
    genuine, impostor = llr[pairs & same], llr[pairs & ~same]
    if not len(genuine) or not len(impostor):
        raise UserError("--calibration: there are no pairs of one hand, or none of two")
    result["calibration"] = {"cllr": cllr(genuine, impostor), "min cllr": min_cllr(genuine, impostor)}
    return [[name, f"{value:.3f}", ""] for name, value in result["calibration"].items()]
