"""Runs the papers: the only place with flags, files and loops.

`main` is the one binary, `training` the one loop. A paper adds `papers/<paper>.py` with
`build(config, workdir) -> training.Experiment` and `configs/<paper>.py` with its presets.
"""
