"""What the arms of a comparison are called, and what is claimed of them."""

from head_kd.config import Preset
from tenfold.claims import Study

LABELS: dict[Preset, str] = {
    "plain": "student alone",
    "assist": "assistant on labels",
    "own": "HEAD, normalized",
    "paper": "HEAD, the paper's weights",
    "tf_head": "TF-HEAD (no teacher)",
    "direct": "direct imitation, no assistant",
    "pkd": "PKD on the neck",
    "fitnet": "FitNet on the neck",
}


def claim_all(study: Study, arms: list[Preset]) -> None:
    """One difference to the baseline, the first arm, for each of the others."""
    baseline = arms[0]
    for arm in arms[1:]:
        text = f"{LABELS[arm]} has a higher AP than {LABELS[baseline]}"
        study.difference(f"{arm}_beats_{baseline}", text, (arm, "AP"), (baseline, "AP"), required=">= 0", main=True)
