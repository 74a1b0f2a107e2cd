"""What the miniImageNet preset costs on a CPU: one base epoch on 600 random images and some steps of one session.

``python preset.py``: ResNet-12 of 12.4 million parameters, 84 x 84 pixels, 60 base classes, width 512, 256 states, rank 256;
64 images per step of the base session, not 512, so that it fits small machines. Prints seconds and the largest resident memory.
"""

import argparse
import resource
import sys
import time

import torch
from mamba_fscil.config import BaseConfig, ProjectorConfig, SessionConfig
from mamba_fscil.training.learner import IncrementalLearner


def peak() -> float:
    """Largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--steps", type=int, default=5)
    chosen = parser.parse_args()
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (chosen.images + 25, 3, 84, 84), dtype=torch.uint8, generator=draws)
    print(f"{torch.get_num_threads()} threads; after the imports {peak():.2f} GB")
    learner = IncrementalLearner(session=SessionConfig(steps=chosen.steps, lr=0.01, copies=10, mix=0.3, separation=0.5))
    names = [f"base-{k}" for k in range(60)]
    start = time.perf_counter(), time.process_time()
    learner.fit_base(
        images[:-25], torch.arange(chosen.images) % 60, names,
        backbone="fscil:resnet12", epochs=1, batch_size=64, capacity=100, device="cpu",
        projector=ProjectorConfig(width=512, states=256, rank=256),
        base=BaseConfig(lr=0.25, schedule="step", padding=8, balanced=True),
    )  # fmt: skip
    middle = time.perf_counter(), time.process_time()
    spent = middle[0] - start[0], middle[1] - start[1]
    print(f"base epoch with class means: {spent[0]:.0f} s, {spent[1]:.0f} s of processors; {peak():.2f} GB")
    learner.learn_session(images[-25:], [f"new-{k % 5}" for k in range(25)])
    end = time.perf_counter(), time.process_time()
    each = (end[0] - middle[0]) / chosen.steps, (end[1] - middle[1]) / chosen.steps
    print(f"session: {each[0]:.1f} s per step, {each[1]:.1f} s of processors; {peak():.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
