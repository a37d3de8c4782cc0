"""The wiring of one method per file: from a config to an `Experiment`. Meant to be copied."""
