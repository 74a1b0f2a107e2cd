"""The commands: one file per verb, `run(settings, invocation)`."""
