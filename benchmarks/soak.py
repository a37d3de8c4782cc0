"""Kills a tiny run at random moments, resumes it, and compares its end with that of a quiet run.

    python -m benchmarks.soak --config=ipo:bandit --kills=20
    python -m benchmarks.soak --config=copg:tiny --kills=6 --config.train.num_steps=6 \\
      --config.data.num_prompts=16 --config.eval.num_prompts=16 --config.checkpoint.every=2

Other options are those of the run. The second command takes two minutes on two CPU cores.

Each kill is a SIGKILL after a random time between nothing and the length of a whole run: start-up,
checkpoints and the report are hit too. The command is then repeated until it ends by itself. What
a run leaves must be equal to the bit: metrics.jsonl without its times, the numbers of results.json,
and every array of the last checkpoint. The exit status is 1 if anything differs. Folders of cases
that differ are kept and named.
"""

import argparse
import json
import logging
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

# Fields of records that measure the machine.
_TIMES = ("second", "time", "memory", "peak")


def command(config: str, folder: pathlib.Path, options: list[str]) -> list[str]:
  """Returns the command line of a run in `folder`."""
  start = [sys.executable, "-m", "experiments.main", f"--config={config}"]
  return [*start, f"--workdir={folder}", *options]


def quiet_run(arguments: list[str]) -> float:
  """Runs a command to its end and returns how long it took, in seconds."""
  began = time.monotonic()
  done = subprocess.run(arguments, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"the run itself fails:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
  return time.monotonic() - began


def killed_run(arguments: list[str], seconds: float) -> bool:
  """Runs a command, kills it after `seconds`; returns whether it had ended by itself."""
  process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    return process.wait(seconds) == 0
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
    return False


def without_times(value):
  """Returns JSON data without the fields that measure time and memory."""
  if isinstance(value, dict):
    kept = {k: v for k, v in value.items() if not any(word in k for word in _TIMES)}
    return {k: without_times(v) for k, v in kept.items()}
  return [without_times(v) for v in value] if isinstance(value, list) else value


def left_behind(folder: pathlib.Path) -> dict:
  """Returns what a run has left, in a form that can be compared with `==`."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return {
    "metrics.jsonl": [without_times(json.loads(line)) for line in lines],
    "results.json": without_times(json.loads((folder / "results.json").read_text())),
    "checkpoint": checkpoint(folder),
  }


def checkpoint(folder: pathlib.Path) -> dict[str, tuple[str, bytes]]:
  """Returns the arrays of the last checkpoint as bytes, by path."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  steps = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
  last = max(steps, key=lambda path: int(path.name)) / "state"
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax misses a file that nobody needs
  reader = ocp.PyTreeCheckpointer()
  shapes = reader.metadata(last).item_metadata.tree
  # As NumPy arrays, so that the devices of the run need not be here.
  wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
  tree = reader.restore(last, restore_args=wanted)
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  return {name: (f"{x.dtype}{x.shape}", x.tobytes()) for name, x in arrays.items()}


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="ipo:bandit")
  parser.add_argument("--kills", type=int, default=20, help="kills in all")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  settings, options = parser.parse_known_args(arguments)
  rng = random.Random(settings.seed)
  root = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
  seconds = quiet_run(command(settings.config, root / "quiet", options))
  # A second quiet run, now that everything is compiled: that is how long a killed one takes.
  seconds = min(seconds, quiet_run(command(settings.config, root / "again", options)))
  want = left_behind(root / "quiet")
  different = [name for name, value in left_behind(root / "again").items() if value != want[name]]
  if different:
    raise SystemExit(f"two quiet runs differ in {', '.join(different)}: see {root}")
  kills = failures = case = 0
  while kills < settings.kills:
    folder, own = root / f"case-{case}", 0
    repeated = command(settings.config, folder, options)
    while kills < settings.kills and not killed_run(repeated, rng.uniform(0, seconds)):
      kills, own = kills + 1, own + 1
    quiet_run(repeated)
    found = left_behind(folder)
    different = [name for name in want if found[name] != want[name]]
    verdict = f"differs in {', '.join(different)}: {folder}" if different else "equal"
    print(f"case {case}: {own} kills, {verdict}", flush=True)
    failures += bool(different)
    if not different:
      shutil.rmtree(folder)
    case += 1
  print(f"{kills} kills in {case} runs of {seconds:.0f} s, {failures} of them not equal")
  if not failures:
    shutil.rmtree(root)
  return int(failures > 0)


if __name__ == "__main__":
  sys.exit(main())
