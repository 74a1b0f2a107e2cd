"""`handmstn calibrate`: scores -> likelihood ratios, per bin of common visibility, checked on other people."""

import itertools
import sys

import numpy as np

from handmstn.calibration import Calibration, cllr, min_cllr
from handmstn.commands._files import DEVELOPMENT, embedded, first_of, left_out, read, trained
from handmstn.commands._ratios import FILE
from handmstn.config import CalibrateSettings
from handmstn.data import with_ids
from handmstn.models import head_of
from handmstn.recognizer import match
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: CalibrateSettings, invocation: Invocation) -> None:
    """Fit on half of the people, check on the other half, then fit on all; write ``calibration.json``."""
    model, card, _ = trained(settings.run)
    found = embedded(settings, model, with_ids(read(settings, card, model, first=DEVELOPMENT), settings.data))
    hidden = left_out(found)
    found = found.part(found.shown)
    e, weights = found.enrolled, model.weights.detach().cpu().numpy()
    persons = np.unique(e.persons)
    if len(persons) < 4:
        raise UserError(f"--data {settings.data}: {len(persons)} people, expected 4 or more to calibrate and to check")
    if settings.edges != sorted(set(settings.edges)):
        raise UserError(f"--edges: expected ascending borders, got {','.join(map(str, settings.edges))}")
    scores = match((e.parts, e.visibility), (e.parts, e.visibility), weights)
    common = np.einsum("ap,bp,p->ab", e.visibility, e.visibility, weights)
    classes = found.hands.classes
    same = classes[:, None] == classes[None]
    pairs = np.triu(np.ones_like(same), 1) & (e.digests[:, None] != e.digests[None])
    half = np.isin(e.persons, np.random.default_rng(settings.seed).permutation(persons)[: len(persons) // 2])
    first, second = pairs & half[:, None] & half[None], pairs & ~half[:, None] & ~half[None]
    for what, chosen in (("first", first), ("second", second)):
        if not (same & chosen).any():
            raise UserError(f"--data {settings.data}: nobody in the {what} half of the people has two pictures")
    trial = Calibration.fit(scores[first], same[first], common[first], settings.edges)
    llr = trial.llr(scores[second], common[second])
    genuine = same[second]
    rows, bins = [], {}
    place = np.digitize(common[second], settings.edges)
    names = _names(settings.edges)
    for number, name in enumerate(["all", *names]):
        here = np.ones_like(genuine) if number == 0 else place == number - 1
        pair = llr[here & genuine], llr[here & ~genuine]
        if not len(pair[0]) or not len(pair[1]):
            continue
        bins[name] = {
            "cllr": cllr(*pair),
            "min cllr": min_cllr(*pair),
            "genuine": len(pair[0]),
            "impostor": len(pair[1]),
        }
        rows.append([name, len(pair[0]), len(pair[1]), f"{bins[name]['cllr']:.3f}", f"{bins[name]['min cllr']:.3f}"])
    final = Calibration.fit(scores[pairs], same[pairs], common[pairs], settings.edges)
    invocation.folder.write_json(
        FILE,
        {
            "model": head_of(model, card)["model"],
            "edges": final.edges,
            "slopes": final.slopes,
            "offsets": final.offsets,
            "checked": bins,
            "people": len(persons),
            "not assessable": hidden,
        },
    )
    sys.stdout.write(table(["common visibility", "genuine", "impostor", "Cllr", "min Cllr"], rows) + "\n")
    sys.stdout.write(
        "Cllr of 1 says nothing, 0 is perfect; checked on people that the map was not fitted on. The likelihood ratios hold for"
        f" pictures like these; {FILE} is fitted on all {len(persons)} people\n"
    )
    if hidden:
        sys.stdout.write(f"not assessable, left out: {first_of(hidden)}\n")


def _names(edges: list[float]) -> list[str]:
    ends = ["0", *(f"{e:g}" for e in edges), "1"]
    return [f"{a} to {b}" for a, b in itertools.pairwise(ends)]
