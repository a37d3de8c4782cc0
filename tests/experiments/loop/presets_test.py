"""Tests of loop.presets: configs by name, and overrides that keep the types of the fields."""

import pathlib
import sys

import fake_paper
import ml_collections
import pytest

from experiments.loop import presets

_PAPER = pathlib.Path(fake_paper.__file__)


def _config():
  config = fake_paper.get_config()
  config.nothing = None
  config.names = ("a", "b")
  config.empty = ()
  return config


@pytest.mark.parametrize(
  ("argument", "expected"),
  [
    ("train.num_steps=7", 7),
    ("train.num_steps=1e3", 1000),
    ("train.num_steps=1_000", 1000),
    ("optimizer.learning_rate=1", 1.0),
    ("optimizer.learning_rate=3e-4", 3e-4),
    ("data.name=a=b", "a=b"),
    ("data.name=", ""),
    ("algorithm.flag=True", True),
    ("algorithm.flag=no", False),
    ("algorithm.taus=(1, 2)", (1.0, 2.0)),
    ("algorithm.taus=[0.5]", (0.5,)),
    ("algorithm.taus=0.5,2", (0.5, 2.0)),
    ("names='x','y'", ("x", "y")),
    ("empty=(1,'a')", (1, "a")),
    ("nothing=3", 3),
    ("nothing=text", "text"),
    ("seed=-1", -1),
  ],
)
def test_values_take_the_type_of_the_field(argument, expected):
  name, _, value = argument.partition("=")
  config = presets.override(_config(), [(name, value)])
  found = config
  for part in name.split("."):
    found = found[part]
  assert found == expected
  assert type(found) is type(expected)


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("train.num_steps=abc", "expected int"),
    ("train.num_steps=0.5", "expected int"),
    ("train.num_steps=inf", "expected int"),
    ("optimizer.learning_rate=fast", "expected float"),
    ("algorithm.flag=maybe", "expected bool"),
    ("algorithm.taus=x", "expected a tuple like"),
    ("train=5", "is a section: set one of its fields, train."),
    ("optimizer.learning_rat=1", "did you mean --config.optimizer.learning_rate?"),
    ("learning_rate=1", "did you mean --config.optimizer.learning_rate?"),
    ("optim.learning_rate=1", "did you mean --config.optimizer.learning_rate?"),
    ("sed=1", "did you mean --config.seed?"),
    ("xyzzy=1", "its fields are algorithm."),
  ],
)
def test_bad_overrides_name_the_remedy(argument, words):
  name, _, value = argument.partition("=")
  with pytest.raises(ValueError, match=rf"--config\.{name}") as caught:
    presets.override(_config(), [(name, value)])
  assert words in str(caught.value)


def test_overriding_leaves_the_original_alone():
  config = _config()
  presets.override(config, [("seed", "9")])
  assert config.seed == 0


def test_an_override_without_a_value_is_an_error():
  with pytest.raises(ValueError, match=r"--config\.seed needs a value"):
    presets.split_overrides(["--config.seed"])


@pytest.mark.parametrize("value", ["false", 0, 1.0, None])
def test_a_switch_of_a_config_file_is_true_or_false(value):
  config = presets.resolve("copg:tiny").to_dict()
  config["data"]["truncate"] = value
  with pytest.raises(ValueError, match=r"config.data.truncate must be True or False, got"):
    presets.check(ml_collections.ConfigDict(config))


def test_every_listed_preset_exists_and_is_complete():
  listed = presets.listing()
  for paper, module in presets.papers().items():
    for preset in module.PRESETS:
      assert f"{paper}:{preset} " in listed
      config = presets.resolve(f"{paper}:{preset}")
      assert (config.paper, config.preset) == (paper, preset)
      presets.check(config)
      module = presets.module_of(config)
      assert hasattr(module, "run") != hasattr(module, "build"), preset


def test_a_file_is_found_with_and_without_a_preset(tmp_path):
  assert presets.resolve(str(_PAPER)).preset == "tiny"
  assert presets.resolve(f"{_PAPER}:other").preset == "other"
  path = tmp_path / "mine.py"
  path.write_text(
    "import ml_collections\n"
    "def get_config():\n  return ml_collections.ConfigDict({'paper': 'mine', 'seed': 1})\n"
  )
  assert presets.resolve(str(path)).seed == 1
  with pytest.raises(ValueError, match="takes no preset"):
    presets.resolve(f"{path}:big")


@pytest.mark.parametrize(
  ("text", "words"),
  [("x = 1", "defines no get_config"), ("def get_config():\n  return 3", "must return")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, words):
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(ValueError, match=words):
    presets.resolve(str(path))


def test_check_names_field_and_value():
  config = ml_collections.ConfigDict(_config())
  config.train.num_steps = 0
  with pytest.raises(ValueError, match=r"config\.train\.num_steps must be an integer >= 1, got 0"):
    presets.check(config)


@pytest.mark.parametrize(
  ("name", "value", "words"),
  [
    ("seed", 2**32, "integer <= 4294967295"),
    ("seed", -1, "integer >= 0"),
    ("optimizer.learning_rate", -1.0, "be positive"),
    ("optimizer.learning_rate", 0.0, "be positive"),  # also what float("1e-400") is
    ("optimizer.values_learning_rate", float("nan"), "be positive"),
    ("optimizer.b1", 2.0, r"lie in \[0, 1\]"),
    ("optimizer.b2", 1.0, "below 1"),
    ("optimizer.clip_norm", -1.0, "be positive"),
    ("optimizer.weight_decay", -0.1, "not negative"),
    ("optimizer.final_scale", -0.1, r"lie in \[0, 1\]"),
    ("optimizer.warmup_steps", -3, "integer >= 0"),
    ("reward_model.learning_rate", -1.0, "be positive"),
  ],
)
def test_check_looks_at_the_seed_and_at_every_optimiser(name, value, words):
  config = ml_collections.ConfigDict(_config())
  section, _, last = name.rpartition(".")
  if section:
    config[section] = {last: value}
  else:
    config[last] = value
  with pytest.raises(ValueError, match=rf"config\.{name} must .*{words}"):
    presets.check(config)


@pytest.mark.parametrize("name", ["checkpoint", "seed", "sharding"])
def test_check_names_what_is_missing(name):
  config = ml_collections.ConfigDict(_config())
  del config[name]
  with pytest.raises(ValueError, match=rf"the config lacks {name}"):
    presets.check(config)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("", "has no function build"),
    (
      "def build(config, workdir): pass",
      r"has build\(config, workdir\), but build gets",
    ),
  ],
)
def test_a_module_that_cannot_build_is_refused_in_one_line(source, message, tmp_path, monkeypatch):
  (tmp_path / "users_paper.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "users_paper", raising=False)
  config = ml_collections.ConfigDict({"paper": "users_paper"})
  with pytest.raises(ValueError, match=message):
    presets.build(config, tmp_path)
  for name in ("users_paper.missing", "copg.missing", "nowhere.at.all"):
    with pytest.raises(ValueError, match=f"config.paper='{name}' is neither in experiments/papers"):
      presets.module_of(ml_collections.ConfigDict({"paper": name}))


def test_a_module_that_lacks_a_package_says_which(tmp_path, monkeypatch):
  (tmp_path / "needs_more.py").write_text("import no_such_package_at_all")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
    presets.module_of(ml_collections.ConfigDict({"paper": "needs_more"}))


def test_lists_of_words_need_no_quotes():
  config = ml_collections.ConfigDict({"methods": ("a", "b"), "sizes": (1, 2)})
  for text in ("copg,dpo", "('copg', 'dpo')", "'copg','dpo',", "copg, dpo,"):
    assert presets.override(config, [("methods", text)]).methods == ("copg", "dpo")
  assert presets.override(config, [("methods", "my.py:tiny")]).methods == ("my.py:tiny",)
  assert presets.override(config, [("sizes", "3,")]).sizes == (3,)
