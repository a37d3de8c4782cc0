"""The one binary: trains, evaluates and samples every paper.

  python -m experiments.main --config=<paper>:<preset> --workdir=DIR [--config.x.y=VALUE ...]

Also installed as `bootstrax`. Start with `--list` and `--help`. Only the standard library and
ml_collections are imported before the arguments have been understood.
"""

import argparse
import logging
import os
import pathlib
import signal
import sys
from typing import Any

from experiments.loop import memory

_EPILOG = """\
examples:
  bootstrax --list
  bootstrax --config=ipo:bandit --workdir=runs/bandit
  bootstrax --config=copg:sentiment --config.optimizer.learning_rate=1e-5 --config.seed=1
  bootstrax --config=copg:sentiment --show          print the config, run nothing
  bootstrax --mode=eval --workdir=runs/bandit       the config is read from the workdir

The same command continues an interrupted run, exactly. SIGTERM and Ctrl-C save and stop between two
steps (elsewhere they stop at once, and the last checkpoint counts); a second one kills at once.

exit code: 0 done; 1 the run had to stop (a loss is not finite, the data ended); 2 bad input, or a
file that cannot be read or written; 130 or 143 stopped by Ctrl-C or SIGTERM, state saved.
"""


def main() -> int:
  """The console script: `run`, in a process that is its own."""
  if not _debug(sys.argv):
    _quiet_orbax()
    # JAX logs the traceback of host code that fails inside a step, and raises it as well.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
  memory.keep_freed()
  # Between two steps the loop listens itself; anywhere else a signal unwinds, so that files close.
  signal.signal(signal.SIGTERM, _terminate)
  return run()


def run(argv: list[str] | None = None) -> int:
  """Runs one command and returns its exit code; `argv` is without the program's name."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    return _run(argv)
  except KeyboardInterrupt as error:
    print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
    return 143 if isinstance(error, _Terminated) else 130
  except Exception as error:
    code = _exit_code(error)
    if code is None or _debug(argv):
      raise
    hint = "" if _is_ours(error) else "\n(--debug shows where this came from)"
    print(f"error: {_message(error)}{hint}", file=sys.stderr)
    return code


class _Terminated(KeyboardInterrupt):
  """SIGTERM, treated like Ctrl-C."""


def _terminate(*unused: Any) -> None:
  raise _Terminated


def _debug(argv: list[str]) -> bool:
  return "--debug" in argv or bool(os.environ.get("BOOTSTRAX_DEBUG"))


def _quiet_orbax() -> None:
  """Drops what Orbax prints when a write fails, for it raises the error as well.

  It logs the traceback once in each of its threads, and its callbacks find their loop closed. Those
  threads outlive the error, so this lasts as long as the process.
  """
  hook = sys.unraisablehook

  def filtered(unraisable):
    if "Event loop is closed" not in str(unraisable.exc_value):
      hook(unraisable)

  logging.getLogger("absl").setLevel(logging.CRITICAL)
  sys.unraisablehook = filtered


def _is_ours(error: Exception) -> bool:
  """Whether the message was written here, for the user, rather than in some library."""
  frame = error.__traceback__
  while frame is not None and frame.tb_next is not None:
    frame = frame.tb_next
  root = pathlib.Path(__file__).resolve().parent.parent
  source = pathlib.Path(frame.tb_frame.f_code.co_filename) if frame is not None else root
  return source.is_relative_to(root) and "site-packages" not in source.relative_to(root).parts


def _exit_code(error: Exception) -> int | None:
  """Returns the exit code of an error that the user can act on; None for a bug."""
  if isinstance(error, (ValueError, OSError, ImportError)):
    return 2
  training = sys.modules.get("experiments.loop.training")
  return 1 if training is not None and isinstance(error, training.RunError) else None


def _message(error: Exception) -> str:
  if isinstance(error, ModuleNotFoundError) and error.name:
    return (
      f"the package {error.name!r} is not installed: "
      'pip install "bootstrax[experiments,lm]" brings everything'
    )
  return str(error) or type(error).__name__


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of everything but `--config.x.y=VALUE`."""
  parser = argparse.ArgumentParser(
    prog="bootstrax",
    description="Trains, evaluates and samples the papers of bootstrax.",
    usage="bootstrax --config=<paper>:<preset> --workdir=DIR [--config.x.y=VALUE ...] [options]",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--config", metavar="P:Q", help="<paper>:<preset>, or a config file: path.py, path.py:preset")
  add("--config.x.y", metavar="VALUE", dest="_", help="overrides any field of the config")
  add("--workdir", metavar="DIR", help="folder of the run (default: runs/<paper>-<preset>)")
  add("--mode", choices=("train", "eval", "sample"), default="train", help="default: train")
  add(
    "--checkpoint",
    metavar="WHICH",
    default="last",
    help="for eval and sample: last (default), best, or a step",
  )
  add("--list", action="store_true", help="list papers and presets with expected time and result")
  add("--show", action="store_true", help="print the config with its overrides and stop")
  add("--wandb", metavar="PROJECT", default="", help="write to Weights & Biases too")
  add("--multihost", action="store_true", help="one process of a run over several hosts")
  add("--debug", action="store_true", help="show the traceback of an error")
  return parser


def _run(argv: list[str]) -> int:
  from experiments.loop import presets

  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # a reward or paper module beside the user; `python -m` has it
  overrides, rest = presets.split_overrides(argv)
  args = make_parser().parse_args(rest)
  if args.list:
    print(presets.listing())
    return 0
  if args.config is None and args.mode == "train":
    raise ValueError("--config=<paper>:<preset> is missing; --list shows what there is")
  if args.config is None and args.workdir is None:
    raise ValueError(f"--mode={args.mode} needs --workdir=DIR, the folder of a run")
  config: Any = None
  if args.config is not None:
    config = presets.override(presets.resolve(args.config), overrides)
  if args.show:
    if config is None:
      config = presets.override(presets.from_workdir(args.workdir), overrides)
    print(presets.as_arguments(config))
    return 0
  workdir = pathlib.Path(args.workdir or f"runs/{config.paper}-{config.get('preset') or 'custom'}")
  return _start(args, config, workdir, overrides)


def _start(args: argparse.Namespace, config: Any, workdir: pathlib.Path, overrides: Any) -> int:
  """Brings JAX up and runs the mode."""
  import jax
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own
  if args.multihost or os.environ.get("BOOTSTRAX_MULTIHOST") == "1":
    import sharding

    sharding.initialize_multihost()
  from experiments.loop import presets, run_folder, training

  if args.mode == "train":
    presets.check(config)
    training.make_mesh(config.sharding.mesh)  # fails before any work does
    # Ours before the paper loads weights or writes data; hosts share the folder.
    if jax.process_index() == 0:
      run_folder.claim(config, workdir)
    paper = presets.module_of(config)
    if hasattr(paper, "run"):  # a run of runs, such as a comparison
      outcome = paper.run(config, workdir)
    else:
      outcome = training.train(paper.build(config, workdir), config, workdir, wandb=args.wandb)
    if outcome.status == "interrupted":
      return 128 + outcome.signal
    if outcome.result is not None:
      print(_as_text(outcome.result))
    print(f"report: {workdir / 'report.html'}")
    return 0
  # Overrides of a run's own config: another mesh, or fewer prompts. Nothing is trained with them.
  saved = presets.override(run_folder.read_config(workdir), overrides)
  if config is not None:
    run_folder.claim(config, workdir)  # refuses another run's folder
    saved = config
  paper = presets.module_of(saved)
  if hasattr(paper, "run"):
    raise ValueError(f"{workdir} holds runs: give the folder of one of them to --workdir")
  experiment = paper.build(saved, workdir)
  return _evaluate(args, experiment, saved, workdir)


def _evaluate(args: argparse.Namespace, experiment: Any, config: Any, workdir: pathlib.Path) -> int:
  from experiments import files
  from experiments.loop import training
  from experiments.report import results

  function = experiment.evaluate if args.mode == "eval" else experiment.sample
  if function is None:
    raise ValueError(f"--mode={args.mode}: the paper {config.paper!r} defines no such thing")
  restored = training.restore(experiment, config, workdir, args.checkpoint)
  found = function(restored.state)
  path = workdir / f"{args.mode}-step{restored.step}.json"
  if args.mode == "sample":
    print(results.as_text(found))
    files.write_json(path, {"step": restored.step, **vars(found)})
  else:
    print(_as_text(found))
    files.write_json(path, {"step": restored.step, "result": found.to_json()})
  print(f"step {restored.step}, written to {path}")
  return 0


def _as_text(result: Any) -> str:
  """The headline numbers, and the pass criteria where the paper has some."""
  from experiments.report import results

  checks = [row for table in result.tables if table.columns == results.CHECKS for row in table.rows]
  return "\n".join([str(result), *(f"{passed}  {criterion}" for criterion, passed in checks)])


if __name__ == "__main__":
  sys.exit(main())
