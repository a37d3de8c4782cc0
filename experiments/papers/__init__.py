"""Each file wires one method: it turns a config into an `Experiment`. It is meant to be copied."""
