"""Training: the base session with Lightning, and the learner that goes on from it."""
