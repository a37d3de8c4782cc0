"""Uploading an exported model: what is sent, and what is refused before any work."""

import ml_collections
import pytest

from experiments.loop import hub

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


def _config(name):
  return ml_collections.ConfigDict({"export": {"hub": name}})


@pytest.fixture
def api(monkeypatch):
  """A hub that writes down what it is asked; offline, since the tests have no network."""
  calls = []

  class Api:
    def create_repo(self, name, **settings):
      calls.append((name, settings))
      return f"https://hub/{name}"

    def create_commit(self, name, operations, *, commit_message):
      del commit_message
      calls.append((name, {one.path_in_repo: one.path_or_fileobj for one in operations}))

  monkeypatch.setattr(huggingface_hub, "HfApi", Api)
  return calls


def _run(folder, *, adapter):
  for path in ("model/config.json", "model/model.safetensors", "model_card.md", "report.html"):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(path)
  if adapter:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
  return folder


@pytest.mark.parametrize("adapter", [False, True])
def test_the_model_its_card_and_its_adapters_are_one_commit(tmp_path, api, adapter):
  folder = _run(tmp_path, adapter=adapter)
  assert hub.upload(_config("me/model"), folder) == "https://hub/me/model"
  sent = {
    "config.json": folder / "model" / "config.json",
    "model.safetensors": folder / "model" / "model.safetensors",
    "README.md": folder / "model_card.md",
  }
  if adapter:
    sent["adapter/adapter_config.json"] = folder / "adapter" / "adapter_config.json"
  found = {name: str(path) for name, path in api[1][1].items()}
  assert found == {name: str(path) for name, path in sent.items()}
  assert api[0] == ("me/model", {"private": True, "exist_ok": True})


def test_without_a_name_nothing_is_uploaded(tmp_path, api):
  for config in (_config(""), ml_collections.ConfigDict({})):
    hub.check(config)
    assert hub.upload(config, _run(tmp_path, adapter=False)) == ""
  assert not api


def test_a_hub_that_refuses_leaves_the_run_and_says_how_to_go_on(tmp_path, monkeypatch):
  class Api:
    def create_repo(self, name, **settings):
      raise RuntimeError("403 Forbidden\nmore")

  monkeypatch.setattr(huggingface_hub, "HfApi", Api)
  with pytest.raises(OSError, match=r"is finished in .*'me/model': 403 Forbidden more; repeat"):
    hub.upload(_config("me/model"), _run(tmp_path, adapter=False))


def test_links_are_followed_and_one_that_leads_nowhere_is_told_of(tmp_path, api):
  folder = _run(tmp_path / "run", adapter=False)
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "notes.txt").write_text("")
  (folder / "model" / "more").symlink_to(tmp_path / "elsewhere")
  hub.upload(_config("me/model"), folder)
  assert "more/notes.txt" in api[1][1]
  (folder / "model" / "broken").symlink_to(tmp_path / "absent")
  with pytest.raises(OSError, match=r"is finished in .* repeat the command"):
    hub.upload(_config("me/model"), folder)


def test_nothing_is_made_where_there_is_no_model(tmp_path, api):
  with pytest.raises(OSError, match=r"has no config\.json, so nothing was uploaded"):
    hub.upload(_config("me/model"), tmp_path)
  assert not api


def test_a_field_of_that_name_in_a_users_config_is_no_upload():
  for value in (True, None, "x", {"hub": None}):
    hub.check(ml_collections.ConfigDict({"export": value}))


def test_a_run_over_several_hosts_is_refused():
  with pytest.raises(ValueError, match="uploads from one host, and this run has 2"):
    hub.check(_config("me/model"), 2)


@pytest.mark.parametrize(
  "name", ["model", "a/b/c", "/model", "me/", "../model", "me/mo del", "me/a--b", "me/model."]
)
def test_a_name_that_is_none_is_refused(name):
  with pytest.raises(ValueError, match="must be organisation/model"):
    hub.check(_config(name))


def test_what_an_upload_needs_is_checked_before_the_run(monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(ValueError, match="needs the network, and HF_HUB_OFFLINE is set"):
    hub.check(_config("me/model"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  with pytest.raises(ValueError, match="hf auth login"):
    hub.check(_config("me/model"))
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
  hub.check(_config("me/model"))
