"""How a learner that grows is measured: base and novel classes apart, over sessions, and whether its confidence is true."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SessionScores:
    """Accuracy after one session, in percent; NaN where a part has no test picture.

    Attributes:
        all: over the pictures of all classes seen.
        base: over those of base classes.
        novel: over those of classes of all sessions.
        harmonic: harmonic mean of base and novel.
        calibration: expected calibration error.
    """

    all: float
    base: float
    novel: float
    harmonic: float
    calibration: float


def accuracy(guess: Tensor, labels: Tensor) -> float:
    """Share of right answers in percent; NaN of none."""
    return 100 * float((guess == labels).double().mean()) if len(labels) else float("nan")


def harmonic_mean(a: float, b: float) -> float:
    """2 a b / (a + b); 0 where both are."""
    return 2 * a * b / (a + b) if a + b else 0.0


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over equally wide bins of confidence, weighted by their rows, in percent.

    Shapes: ``probabilities`` (B, K), ``labels`` (B,).

    Source: Guo et al., On calibration of modern neural networks, ICML 2017, Eq. 3.
    """
    confidence, guess = probabilities.max(dim=1)
    right = (guess == labels).double()
    number = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    total = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, confidence.double() - right)
    return 100 * float(total.abs().sum() / len(labels)) if len(labels) else float("nan")


def score(probabilities: Tensor, labels: Tensor, base_classes: int) -> SessionScores:
    """Scores of one session.

    Shapes: ``probabilities`` (B, K) over the classes seen, ``labels`` (B,) in [0, K).
    """
    guess, base = probabilities.argmax(dim=1), labels < base_classes
    kept, learned = accuracy(guess[base], labels[base]), accuracy(guess[~base], labels[~base])
    return SessionScores(
        accuracy(guess, labels), kept, learned, harmonic_mean(kept, learned), calibration_error(probabilities, labels)
    )


def average(accuracies: Sequence[float]) -> float:
    """AVG of the literature: the mean accuracy over all sessions, the base session among them."""
    return sum(accuracies) / len(accuracies)


def performance_drop(accuracies: Sequence[float]) -> float:
    """PD of the literature: accuracy of the base session less that of the last one."""
    return accuracies[0] - accuracies[-1]


def summary(scores: Sequence[SessionScores]) -> dict[str, float]:
    """What tables print of a whole protocol."""
    last = scores[-1]
    over = [s.all for s in scores]
    return {
        "base": last.base,
        "novel": last.novel,
        "harmonic": last.harmonic,
        "average": average(over),
        "drop": performance_drop(over),
        "base drop": scores[0].base - last.base,
        "calibration error": last.calibration,
    }
