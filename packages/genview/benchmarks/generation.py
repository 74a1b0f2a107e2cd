"""Generation in buckets of one level against the official pattern: one picture at a time, with a pipeline call for each."""

import sys

import diffusers
import numpy as np
import torch
from genview import tiny
from genview.generators import UnCLIPGenerator

from tenfold.bench import Comparison, compare, main

NUMBER, STEPS = 32, 10


def measure() -> list[Comparison]:
    """Time of 32 pictures of one level."""
    made = UnCLIPGenerator(tiny.build_tiny_unclip(tiny.TinySize(channels=(24, 48))), steps=STEPS)
    conditions, seeds = torch.randn(NUMBER, 32), list(range(NUMBER))

    def ours():
        return made.generate(conditions, 200, seeds, guidance=2.0)

    def one_by_one():
        return np.concatenate([made.generate(conditions[i : i + 1], 200, [seeds[i]], guidance=2.0) for i in seeds])

    def equal(a, b):
        difference = int(abs(a.astype(int) - b.astype(int)).max())
        assert difference <= 1, difference
        return f"pictures differ by {difference} of 255 at most"

    shape = f"{NUMBER} pictures of 16 x 16, {STEPS} steps with guidance, tiny pipeline of the real class"
    return [compare("generation_in_buckets", ours, one_by_one, equal, shape=shape, required=">= 3", pairs=5)]


if __name__ == "__main__":
    sys.exit(main("genview", {"diffusers": diffusers.__version__}, measure))
