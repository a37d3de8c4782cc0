"""Policies survive JSON and CSV to the last bit, and bad files are named by line or field."""

import json

import compiled_games
import jax.numpy as jnp
import numpy as np
import pytest

from rl_theory import policy_arrays, policy_files

SUFFIXES = [".json", ".csv"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", [compiled_games.KUHN3, compiled_games.TIES3])  # many-line strings
def test_comes_back_to_the_bit(x64, tmp_path, name, suffix):
  game = compiled_games.compile_game(name)
  policy = compiled_games.random_policy(game, 3, holes=True)
  path = tmp_path / f"policy{suffix}"
  policy_files.write_policy(path, game, policy)
  np.testing.assert_array_equal(policy_files.read_policy(path, game), policy)
  assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no scratch left


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_float32_comes_back_to_the_bit(tmp_path, suffix):
  game = compiled_games.compile_game(compiled_games.KUHN)
  policy = jnp.asarray(compiled_games.random_policy(game), jnp.float32)
  policy_files.write_policy(tmp_path / f"p{suffix}", game, policy)
  read = policy_files.read_policy(tmp_path / f"p{suffix}", game)
  assert read.dtype == jnp.float32
  np.testing.assert_array_equal(read, policy)


def test_says_what_people_look_for(x64, tmp_path):
  game = compiled_games.compile_game(compiled_games.KUHN)
  policy_files.write_policy(tmp_path / "p.csv", game, policy_arrays.uniform(game))
  lines = (tmp_path / "p.csv").read_text().splitlines()
  assert lines[0] == "player,information_state,action,action_name,probability"
  assert "0,0pb,1,Bet,0.5" in lines and len(lines) == 1 + 24
  policy_files.write_policy(tmp_path / "p.json", game, policy_arrays.uniform(game))
  content = json.loads((tmp_path / "p.json").read_text())
  assert content["game"] == "kuhn_poker()" and len(content["states"]) == 12
  assert content["states"][0]["actions"][0] == {
    "action": 0,
    "action_name": "Pass",
    "probability": 0.5,
  }


def test_without_openspiel_there_are_no_names(x64, tmp_path, monkeypatch):
  game = compiled_games.compile_game(compiled_games.KUHN)

  def absent():
    raise ImportError("absent")

  monkeypatch.setattr("rl_theory.openspiel._pyspiel", absent)
  policy_files.write_policy(tmp_path / "p.csv", game, policy_arrays.uniform(game))
  assert "0,0pb,1,,0.5" in (tmp_path / "p.csv").read_text()
  policy_files.read_policy(tmp_path / "p.csv", game)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_replaced_only_on_demand(tmp_path, suffix):
  game = compiled_games.compile_game(compiled_games.KUHN)
  path, policy = tmp_path / f"p{suffix}", policy_arrays.uniform(game)
  path.write_text("mine")
  with pytest.raises(ValueError, match="exists already: choose another or set overwrite=True"):
    policy_files.write_policy(path, game, policy)
  assert path.read_text() == "mine"
  policy_files.write_policy(path, game, policy, overwrite=True)
  np.testing.assert_array_equal(policy_files.read_policy(path, game), policy)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  game = compiled_games.compile_game(compiled_games.KUHN)
  path = tmp_path / "p.csv"
  path.write_text("mine")

  def full(*_):
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", full)
  with pytest.raises(OSError, match="disk full"):
    policy_files.write_policy(path, game, policy_arrays.uniform(game), overwrite=True)
  assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_bad_arguments_are_refused(tmp_path):
  game = compiled_games.compile_game(compiled_games.KUHN)
  for call in (
    lambda path: policy_files.read_policy(path, game),
    lambda path: policy_files.write_policy(path, game, policy_arrays.uniform(game)),
  ):
    with pytest.raises(ValueError, match=r"path must end in .json or .csv, got .*p.txt"):
      call(tmp_path / "p.txt")
  with pytest.raises(ValueError, match="policy must sum to 1"):
    policy_files.write_policy(tmp_path / "p.csv", game, np.ones(game.legal.shape))
  with pytest.raises(FileNotFoundError):
    policy_files.read_policy(tmp_path / "absent.csv", game)
  with pytest.raises(FileNotFoundError):
    policy_files.write_policy(tmp_path / "no" / "p.csv", game, policy_arrays.uniform(game))


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("player,", "who,", "line 1: columns must be player,information_state"),
    ("0,0,0,Pass,0.5", "0,0,0,Pass", "line 2: must have 5 fields, got 4"),
    ("0,0,0,Pass,0.5", "0,0,x,Pass,0.5", "line 2: action must be an integer, got 'x'"),
    ("0,0,1,Bet,0.5", "0,0,7,Bet,0.5", r"line 3: action must be one of the legal \[0, 1\], got 7"),
    ("0,0,1,Bet,0.5", "0,0,-1,Bet,0.5", r"line 3: action must be one of the legal .* got -1"),
    ("0,0,1,Bet,0.5", "0,0,0,Pass,0.5", "line 3: action 0 of state '0' appears twice"),
    ("0,0,0,Pass,0.5", "0,0,0,Pass,half", "line 2: probability must be a number, got 'half'"),
    ("0,0,0,Pass,0.5", "0,0,0,Pass,nan", r"line 2: probability must lie in \[0, 1\], got nan"),
    ("0,0,0,Pass,0.5", "0,0,0,Pass,1.5", r"line 2: probability must lie in \[0, 1\], got 1.5"),
    (
      "0,0,0,Pass,0.5",
      "0,0,0,Pass,0.4",
      "must sum to 1 at every information state, got 0.9 at '0'",
    ),
    ("0,0,0,Pass,0.5", "0,0zz,0,Pass,0.5", "line 2: player 0 has no information state '0zz'"),
    ("0,0,0,Pass,0.5", "1,0,0,Pass,0.5", "line 2: player 1 has no information state '0'"),
    ("0,0,0,Pass,0.5\n0,0,1,Bet,0.5\n", "", "1 missing, such as '0'"),
    ("0,0,0,Pass,0.5", '0,"0"x,0,Pass,0.5', "line 2: "),
  ],
)
def test_bad_csv_is_named_by_its_line(tmp_path, old, new, message):
  game = compiled_games.compile_game(compiled_games.KUHN)
  path = tmp_path / "p.csv"
  policy_files.write_policy(path, game, policy_arrays.uniform(game))
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new, 1))
  with pytest.raises(ValueError, match=message):
    policy_files.read_policy(path, game)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.update(game="leduc_poker()"), r"must be for game 'kuhn_poker\(\)', got 'leduc"),
    (lambda c: c.pop("game"), "game must be a string, got None"),
    (lambda c: c.update(states={}), "states must be a list, got {}"),
    (lambda c: c["states"].pop(), "1 missing"),
    (lambda c: c["states"][1].update(player="0"), r"states\[1\]: player must be an integer"),
    (lambda c: c["states"].insert(0, 3), r"states\[0\]: player must be an integer, got None"),
    (
      lambda c: c["states"][2]["actions"][1].update(probability=True),
      r"states\[2\].actions\[1\]: probability must be a number, got True",
    ),
    (
      lambda c: c["states"][2]["actions"][1].update(probability=float("nan")),
      r"states\[2\].actions\[1\]: probability must lie in \[0, 1\], got nan",
    ),
    (
      lambda c: c["states"][2]["actions"][0].update(action=5),
      r"states\[2\].actions\[0\]: action must be one of the legal \[0, 1\], got 5",
    ),
  ],
)
def test_bad_json_is_named_by_its_field(tmp_path, change, message):
  game = compiled_games.compile_game(compiled_games.KUHN)
  path = tmp_path / "p.json"
  policy_files.write_policy(path, game, policy_arrays.uniform(game))
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    policy_files.read_policy(path, game)


def test_broken_files_are_refused(tmp_path):
  game = compiled_games.compile_game(compiled_games.KUHN)
  (tmp_path / "p.json").write_text('{"game": "kuhn_poker()",\n"states": [')
  with pytest.raises(ValueError, match=r"must be JSON: .* line 2"):
    policy_files.read_policy(tmp_path / "p.json", game)
  (tmp_path / "p.csv").write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match="must be UTF-8 text"):
    policy_files.read_policy(tmp_path / "p.csv", game)
