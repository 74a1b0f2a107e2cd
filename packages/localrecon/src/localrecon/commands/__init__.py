"""One file per verb: ``run(settings, invocation)``; imported when the verb runs."""
