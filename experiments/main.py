"""The command line: trains, evaluates and samples every paper.

  python -m experiments.main --config=<paper>:<preset> --workdir=DIR [--config.x.y=VALUE ...]

The same program is installed as `bootstrax`. Start with `--list` and `--help`. Both answer at once,
because only the standard library and ml_collections are imported until the arguments are parsed.
"""

import argparse
import contextlib
import importlib.metadata
import logging
import os
import pathlib
import signal
import sys
import sysconfig
import traceback
from typing import Any

from experiments.loop import memory

_EPILOG = """\
examples:
  bootstrax --list
  bootstrax --config=ipo:bandit --workdir=runs/bandit
  bootstrax --config=copg:sentiment --config.optimizer.learning_rate=1e-5 --config.seed=1
  bootstrax --config=copg:sentiment --show          print the config, run nothing
  bootstrax --mode=eval --workdir=runs/bandit       read the config from the workdir

To continue an interrupted run, repeat its command: the numbers are those of a run without a break.
During training, Ctrl-C and SIGTERM finish the step, save the state and stop. At other times they
stop at once, and the run continues from its last checkpoint. A second signal kills at once.

exit codes:
  0         the command succeeded
  1         the run had to stop: a loss is not finite, or the data ended
  2         an argument is wrong, or a file cannot be read or written
  130, 143  Ctrl-C or SIGTERM stopped the run
"""


def main() -> int:
  """Runs the console script: `run`, after setting up logging, memory and signals."""
  if not _debug(sys.argv):
    _quiet_orbax()
    # JAX logs the traceback of host code that fails inside a step, and raises it as well.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
  memory.keep_freed()
  _avoid_wrong_sums()
  # The training loop has a handler of its own. Elsewhere SIGTERM raises, so that files are closed.
  signal.signal(signal.SIGTERM, _terminate)
  return run()


def run(argv: list[str] | None = None) -> int:
  """Runs one command and returns its exit code; `argv` leaves out the program's name."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    return _run(argv)
  except KeyboardInterrupt as error:
    print("\nstopped; repeat the command to continue from the last checkpoint", file=sys.stderr)
    return 143 if isinstance(error, _Terminated) else 130
  except Exception as error:
    place = _users_line(error)
    code = _exit_code(error) or (2 if place else None)
    if code is None or _debug(argv):
      raise
    hint = "" if _is_ours(error) else "\n(--debug shows the traceback)"
    print(f"error: {_message(error)}{place}{hint}", file=sys.stderr)
    return code


class _Terminated(KeyboardInterrupt):
  """SIGTERM, treated like Ctrl-C."""


def _terminate(*unused: Any) -> None:
  raise _Terminated


def _debug(argv: list[str]) -> bool:
  return "--debug" in argv or bool(os.environ.get("BOOTSTRAX_DEBUG"))


def _avoid_wrong_sums() -> None:
  """Turns off a fusion by which JAX 0.10 on a CPU gives wrong sums, before JAX is imported.

  Seen with jaxlib 0.10.2: the sum of a product of two arrays that are broadcast against each other,
  followed by one more operation. jaxlib 0.11 is right. A training step takes 4 % longer without.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if importlib.metadata.version("jaxlib").startswith("0.10.") and "ynn_fusion" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_experimental_ynn_fusion_type=".strip()


def _quiet_orbax() -> None:
  """Silences what Orbax prints when a write fails: it raises the error as well.

  Each of its threads logs the traceback, and each callback complains that its event loop is closed.
  The threads outlive the error, so the silence lasts as long as the process.
  """
  hook = sys.unraisablehook

  def filtered(unraisable):
    if "Event loop is closed" not in str(unraisable.exc_value):
      hook(unraisable)

  logging.getLogger("absl").setLevel(logging.CRITICAL)
  sys.unraisablehook = filtered


def _is_ours(error: Exception) -> bool:
  """Returns whether this library raised the error, so that its message speaks to the user."""
  frame = error.__traceback__
  while frame is not None and frame.tb_next is not None:
    frame = frame.tb_next
  root = pathlib.Path(__file__).resolve().parent.parent
  source = pathlib.Path(frame.tb_frame.f_code.co_filename) if frame is not None else root
  return source.is_relative_to(root) and "site-packages" not in source.relative_to(root).parts


def _users_line(error: Exception) -> str:
  """Returns " (FILE, line N)", the last line of the user's own code that the error went through.

  Returns an empty text if the error comes from this library, or from an installed one, alone.
  """
  lines = [
    (frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)
  ]
  if isinstance(error, SyntaxError) and error.filename:
    lines.append((error.filename, error.lineno or 1))
  here = pathlib.Path(__file__).resolve().parent
  packages = [here.parent / name for name in ("alignment", "rl_theory", "representation")]
  others = [
    *packages,
    here,
    here.parent / "sharding",
    # A virtual environment may stand behind a link.
    *(pathlib.Path(path).resolve() for path in sysconfig.get_paths().values()),
  ]
  for name, number in reversed(lines):
    path = pathlib.Path(name)
    if path.is_file() and not any(path.resolve().is_relative_to(folder) for folder in others):
      return f" ({name}, line {number})"
  return ""


def _exit_code(error: Exception) -> int | None:
  """Returns the exit code of an error that the user can mend; None for a bug."""
  if isinstance(error, (ValueError, OSError, ImportError)):
    return 2
  training = sys.modules.get("experiments.loop.training")
  return 1 if training is not None and isinstance(error, training.RunError) else None


def _message(error: Exception) -> str:
  if isinstance(error, ModuleNotFoundError) and error.name:
    return (
      f"the package {error.name!r} is not installed: run pip install '.[experiments,lm]' in the "
      "source folder of bootstrax"
    )
  if isinstance(error, SyntaxError):
    return f"{type(error).__name__}: {error.msg}"
  if _exit_code(error) is None:
    return f"{type(error).__name__}: {error}"
  return str(error) or type(error).__name__


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of all arguments except `--config.x.y=VALUE`."""
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
  add("--config.x.y", metavar="VALUE", dest="_", help="override a field of the config")
  add("--workdir", metavar="DIR", help="folder of the run (default: runs/<paper>-<preset>)")
  add(
    "--mode",
    choices=("train", "eval", "sample"),
    default="train",
    help="what to do (default: train)",
  )
  add(
    "--checkpoint",
    metavar="WHICH",
    default="last",
    help="which checkpoint --mode=eval and --mode=sample read: last (default), best, or a step",
  )
  add("--list", action="store_true", help="list all presets with their time and expected result")
  add("--show", action="store_true", help="print the config with its overrides, and stop")
  add("--wandb", metavar="PROJECT", default="", help="also log to Weights & Biases")
  add("--multihost", action="store_true", help="join a run over several hosts")
  add("--debug", action="store_true", help="show the traceback of errors")
  return parser


def _run(argv: list[str]) -> int:
  from experiments import files
  from experiments.loop import presets

  if os.getcwd() not in sys.path:
    # The user's own papers and rewards are found in the current folder, as with `python -m`.
    sys.path.append(os.getcwd())
  overrides, rest = presets.split_overrides(argv)
  args = make_parser().parse_args(rest)
  if args.list:
    print(presets.listing())
    return 0
  if args.config is None and args.mode == "train":
    raise ValueError("--config=<paper>:<preset> is missing; --list shows all presets")
  if args.config is None and args.workdir is None:
    raise ValueError(f"--mode={args.mode} needs --workdir=DIR, the folder of an earlier run")
  config: Any = None
  if args.config is not None:
    config = presets.override(presets.resolve(args.config), overrides)
  if args.show:
    if config is None:
      config = presets.override(presets.from_workdir(args.workdir), overrides)
    print(presets.as_arguments(config))
    return 0
  default = f"runs/{config.paper}-{config.get('preset') or 'custom'}" if config else ""
  workdir = files.local_path("--workdir", args.workdir or default)
  return _start(args, config, workdir, overrides)


def _start(args: argparse.Namespace, config: Any, workdir: pathlib.Path, overrides: Any) -> int:
  """Starts JAX, then trains, evaluates or samples; returns the exit code."""
  import jax
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
  if args.multihost or os.environ.get("BOOTSTRAX_MULTIHOST") == "1":
    import sharding

    if sharding.initialize_multihost() == 1:
      raise ValueError(
        "--multihost found no cluster, so every host would train alone: start the processes on a "
        "TPU pod or through Slurm, Open MPI or Kubernetes, or leave --multihost out"
      )
  from experiments.loop import hub, presets, run_folder, training

  if args.mode == "train":
    presets.check(config)
    hub.check(config, jax.process_count())
    training.make_mesh(config.sharding.mesh)  # a bad mesh fails here, before any work
    # The paper may load weights or write data, so the folder is claimed first. Hosts share it.
    first = jax.process_index() == 0
    with run_folder.hold(config, workdir) if first else contextlib.nullcontext():
      if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("the folder is claimed")
      study = getattr(presets.module_of(config), "run", None)  # a study of several runs
      if study is not None:
        outcome = study(config, workdir)
      else:
        experiment = presets.build(config, workdir)
        outcome = training.train(experiment, config, workdir, wandb=args.wandb)
    if outcome.status == "interrupted":
      return 128 + outcome.signal
    if outcome.result is not None:
      print(_as_text(outcome.result))
    print(f"report: {workdir / 'report.html'}")
    if address := hub.upload(config, workdir):
      print(f"model: {address}")
    return 0
  # Overrides may change the mesh or take fewer prompts. Nothing is trained with them.
  saved = presets.override(presets.completed(run_folder.read_config(workdir)), overrides)
  if config is not None:
    run_folder.claim(config, workdir)  # raises if the folder belongs to another run
    saved = config
  if hasattr(presets.module_of(saved), "run"):
    raise ValueError(f"--workdir={workdir} holds several runs: name the folder of one of them")
  experiment = presets.build(saved, workdir)
  return _evaluate(args, experiment, saved, workdir)


def _evaluate(args: argparse.Namespace, experiment: Any, config: Any, workdir: pathlib.Path) -> int:
  from experiments import files
  from experiments.loop import training
  from experiments.report import results

  function = experiment.evaluate if args.mode == "eval" else experiment.sample
  if function is None:
    name = "evaluate" if args.mode == "eval" else "sample"
    raise ValueError(
      f"--mode={args.mode}: runs of {config.paper!r} have nothing to {name}; give another --mode, "
      f"or set {name!r} in the Experiment of the paper"
    )
  restored = training.restore(experiment, config, workdir, args.checkpoint)
  found = function(restored.state)
  path = workdir / f"{args.mode}-step{restored.step}.json"
  if args.mode == "sample":
    print(results.as_text(found))
    files.write_json(path, {"step": restored.step, **vars(found)})
  else:
    print(_as_text(found))
    files.write_json(path, {"step": restored.step, "result": found.to_json()})
  print(f"wrote {path} (step {restored.step})")
  return 0


def _as_text(result: Any) -> str:
  """Returns the metrics, and one line for each pass criterion of the paper."""
  from experiments.report import results

  checks = [row for table in result.tables if table.columns == results.CHECKS for row in table.rows]
  return "\n".join([str(result), *(f"{passed}  {criterion}" for criterion, passed in checks)])


if __name__ == "__main__":
  sys.exit(main())
