"""Low-rank adapters of a T5: the base at first, sampled as scored, and through PEFT's files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5

from alignment import sequences
from alignment.models import huggingface, lora, peft, sampling, t5

ADAPTERS = lora.Config(rank=2, targets=("query", "up"))


def _joined(scale):
  config = tiny_t5.make_config()
  base = jax.tree.map(jnp.asarray, tiny_t5.make_params(config))
  adapters = lora.init(base, jax.random.key(0), config=ADAPTERS)
  adapters = jax.tree.map(lambda x: x if x.shape[-1] == 2 else x + scale, adapters)
  return config, base, adapters, lora.join(base, adapters, config=ADAPTERS)


def test_adapters_are_sampled_as_they_are_scored_and_start_as_the_base():
  config, base, _, joined = _joined(0.3)
  prompts = (jnp.array([[5, 6, 1], [0, 7, 1]]), jnp.array([[1, 1, 1], [0, 1, 1]]))
  samples = sampling.generate(
    joined, *prompts, jax.random.key(1), config=config, max_new_tokens=5, eos_id=-1, pad_id=0
  )
  rows = sequences.Sequences(samples.tokens, samples.mask, *prompts)
  apply_fn = jax.jit(t5.make_apply_fn(config))
  np.testing.assert_allclose(samples.logps, apply_fn(joined, rows), atol=5e-5)
  changed = apply_fn(base, rows)
  assert np.abs(samples.logps - changed).max() > 0.01
  np.testing.assert_allclose(apply_fn(_joined(0.0)[3], rows), changed, atol=1e-6)


def test_adapters_pass_through_the_files_of_peft(tmp_path):
  config, _, adapters, _ = _joined(0.3)
  assert set(adapters["decoder"]["layers"]) == {"attention", "cross_attention", "mlp"}
  peft.save(tmp_path, config, adapters, adapter_config=ADAPTERS, base="base")
  found_config, found = peft.load(tmp_path, config)
  assert found_config == ADAPTERS
  jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_peft_adds_what_we_save(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  pretrained_peft = pytest.importorskip("peft")
  config, base, adapters, joined = _joined(0.1)
  huggingface.save(tmp_path / "base", config, base)
  folder = str(tmp_path / "adapter")
  peft.save(folder, config, adapters, adapter_config=ADAPTERS, base=str(tmp_path / "base"))
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
  model = pretrained_peft.PeftModel.from_pretrained(model, folder).eval()
  prompt, tokens = np.array([[5, 6, 1]]), np.array([[0, 7, 9]])
  with torch.no_grad():
    arrays = {"input_ids": torch.tensor(prompt), "decoder_input_ids": torch.tensor(tokens)}
    want = model(**arrays).logits.numpy()
  got = t5.logits(joined, prompt, np.ones_like(prompt), tokens, config=config)
  np.testing.assert_allclose(got, want, atol=1e-4)
