"""The training loop, with the config, folder, checkpoints and signals of a run."""
