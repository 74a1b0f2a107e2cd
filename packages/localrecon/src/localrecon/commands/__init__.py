"""One file per verb: ``run(settings, invocation)``."""
