"""Scores and continuations are those of the model, with and without the lm-evaluation-harness."""

import json

import numpy as np
import pytest

from alignment import sequences
from alignment.models import transformer
from experiments.loop import presets
from experiments.report import results
from experiments.tasks import harness, language_offline


@pytest.fixture(scope="module")
def task():
  config = presets.resolve("copg:tiny")
  config.data.sample_batch_size = 4  # more than one batch, the last one filled up
  return language_offline.make_task(config)


@pytest.mark.slow
def test_scores_are_the_models_log_probabilities(task):
  rng = np.random.default_rng(0)
  vocabulary = task.network.vocab_size
  pairs = [
    (rng.integers(vocabulary, size=n).tolist(), rng.integers(vocabulary, size=k).tolist())
    for n, k in ((1, 1), (5, 3), (2, 7), (9, 1), (3, 2), (40, 3))
  ]
  found = harness.scores(task, task.model.params, pairs)
  for (context, text), (logp, _) in zip(pairs, found, strict=True):
    row = sequences.Sequences(
      np.array([text]),
      np.ones((1, len(text))),
      np.array([context]),
      np.ones((1, len(context))),
    )
    expected = float(task.apply_fn(task.model.params, row).sum())
    np.testing.assert_allclose(logp, expected, rtol=1e-5)


def test_the_most_probable_text_is_greedy_and_another_is_not(task):
  context = task.model.tokenizer.encode_prompt("a cat ")
  params, text = task.model.params, []
  for _ in range(4):
    ids = np.array([context + text])
    logits = transformer.logits(params, ids, np.ones_like(ids), config=task.network)
    text.append(int(np.argmax(logits[0, -1])))
  other = [*text[:-1], (text[-1] + 1) % task.network.vocab_size]
  found = harness.scores(task, params, [(context, text), (context, other)])
  assert [greedy for _, greedy in found] == [True, False]
  (drawn,) = harness.continuations(task, params, ["a cat "], max_new_tokens=4)
  assert drawn == task.model.tokenizer.decode_completion(text, prompt="a cat ")


def test_long_contexts_lose_their_start(task):
  ids = np.random.default_rng(1).integers(task.network.vocab_size, size=600).tolist()
  longest = task.network.max_length
  kept = ids[-longest + 1 :]
  long, short = harness.scores(task, task.model.params, [(ids, [3, 5]), (kept, [3, 5])])
  np.testing.assert_allclose(long[0], short[0], rtol=1e-6)
  with pytest.raises(ValueError, match="longer than the model's context"):
    harness.scores(task, task.model.params, [([1], ids[: longest + 1] * 2)])


def test_without_the_harness_a_note_says_why(task, monkeypatch, capsys):
  monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(task.config.eval, "tasks", "arc_easy")
  found = harness.extend(results.Result(metrics={"kl": 1.0}), task, task.model.params)
  assert "pip install lm_eval" in found.notes[0] and list(found.metrics) == ["kl"]
  assert "arc_easy" in capsys.readouterr().out


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("tasks", "missing.yaml", "no file 'missing.yaml'"),
    ("task_limit", -1, "eval.task_limit"),
    ("num_fewshot", -1, "eval.num_fewshot"),
  ],
)
def test_bad_settings_are_named(task, field, value, message):
  config = presets.resolve("copg:tiny")
  config.eval[field] = value
  with pytest.raises(ValueError, match=message):
    harness.check(config, task.network)


def test_a_task_file_runs_through_the_harness(task, tmp_path, monkeypatch):
  pytest.importorskip("lm_eval")
  rows = [{"question": f"{a} and {a}", "choices": ["aeiou", "xyz"], "answer": 0} for a in "abc"]
  (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  shared = f"dataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/rows.jsonl\n"
  shared += "test_split: train\ndoc_to_text: '{{question}}'\n"
  (tmp_path / "choice.yaml").write_text(
    f"task: choice\n{shared}output_type: multiple_choice\n"
    "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
  )
  (tmp_path / "rolling.yaml").write_text(
    f"task: rolling\n{shared}output_type: loglikelihood_rolling\n"
    "doc_to_target: '{{question}}'\nmetric_list:\n  - metric: byte_perplexity\n"
  )
  (tmp_path / "writing.yaml").write_text(
    f"task: writing\n{shared}output_type: generate_until\ndoc_to_target: '{{{{choices[0]}}}}'\n"
    "generation_kwargs:\n  until: ['z']\n  max_gen_toks: 4\n"
    "metric_list:\n  - metric: exact_match\n"
  )
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  files = [tmp_path / f"{name}.yaml" for name in ("choice", "rolling", "writing")]
  monkeypatch.setattr(task.config.eval, "tasks", ",".join(map(str, files)))
  found = harness.extend(results.Result(), task, task.model.params)
  tokenizer, params = task.model.tokenizer, task.model.params
  right = 0
  for row in rows:
    context = tokenizer.encode_prompt(row["question"])
    pairs = [(context, tokenizer.encode(f" {choice}")) for choice in row["choices"]]
    scores = [logp for logp, _ in harness.scores(task, params, pairs)]
    right += scores[0] > scores[1]
  assert found.metrics["choice/acc"].value == pytest.approx(right / len(rows))
  assert found.metrics["choice/acc"].n == len(rows)
  assert found.metrics["rolling/byte_perplexity"].value > 1
  assert "writing/exact_match" in found.metrics
