"""Runs the papers: the command line, the training loop and the reports.

`main` is the one binary. A paper adds `configs/<paper>.py` with its presets and
`papers/<paper>.py` with `build(config) -> training.Experiment`. From there a run goes down
the folders: `papers` (one method) over `tasks` (what methods on one kind of problem share) and
`data`, over `loop` (the training loop and the run's folder), over `report` (what a reader gets).
`studies` are runs of several methods. Nothing imports upwards.
"""
