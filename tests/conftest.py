"""Shared set-up of every test: eight simulated CPU devices, no network, one compilation cache."""

import gc
import os
import pathlib

# Before JAX is imported: the device count is read once, at the first use of a backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compilation, and a third of that goes with LLVM's optimiser. To test what
# users run: XLA_FLAGS=--xla_backend_optimization_level=3 make test
for _flag, _value in (
  ("--xla_force_host_platform_device_count", 8),
  ("--xla_backend_optimization_level", 0),
):
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest
from absl import flags

# Grain's and TFDS's libraries read absl flags; outside `app.run` nobody has parsed them.
if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session", autouse=True)
def _no_samples_of_the_user(tmp_path_factory):
  """Samples that module fixtures draw are kept for this session alone."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("BOOTSTRAX_SAMPLE_CACHE", str(tmp_path_factory.mktemp("samples")))
    yield


@pytest.fixture(autouse=True)
def _own_samples(_no_samples_of_the_user, tmp_path, monkeypatch):
  """Every test starts without cached samples; weights and games stay available."""
  monkeypatch.setenv("BOOTSTRAX_SAMPLE_CACHE", str(tmp_path / "samples"))


@pytest.fixture
def x64():
  """Runs one test in float64 and puts the former setting back."""
  before = jax.config.jax_enable_x64
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def smollm2():
  """The real pretrained model; skips where the weights are absent.

  With `BOOTSTRAX_REQUIRE_WEIGHTS=1` (continuous integration) absence is a failure.
  """
  from experiments.data import pretrained

  if not pretrained._is_complete(pretrained._smollm2_path(None)):
    reason = "weights absent: run `python -m experiments.data.pretrained` to fetch them"
    if os.environ.get("BOOTSTRAX_REQUIRE_WEIGHTS") == "1":
      pytest.fail(reason)
    pytest.skip(reason)
  return pretrained.load(pretrained.SMOLLM2)


# Linux gives a process 65,530 mappings, and every compiled program keeps a few: a worker that runs
# out of them crashes inside XLA.
_MAX_MAPPINGS = 30_000
_tests_run = 0


def pytest_runtest_teardown(item, nextitem):
  """Forgets compiled programs when a worker holds too many of them."""
  del item, nextitem
  global _tests_run
  _tests_run += 1
  if _tests_run % 10 == 0 and _num_mappings() > _MAX_MAPPINGS:
    jax.clear_caches()
    gc.collect()


def _num_mappings():
  try:
    return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
  except OSError:  # No such file beyond Linux.
    return 0
