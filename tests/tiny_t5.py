"""A tiny random T5 with a tokenizer of the kind that T5 has: Unigram pieces, no start token."""

import string

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from alignment.models import huggingface, t5
from alignment.models import tokenizer as tokenizer_lib

PIECES = ["<pad>", "</s>", "<unk>", "▁the", "▁soup", "▁cold", "▁", *string.printable[:95].strip()]


def make_tokenizer():
  """Pads with 0, ends with 1; unknown characters become 2."""
  # Scores are log-probabilities: the longest piece that fits is the most probable.
  scores = [(piece, -1.0 if len(piece) > 1 else -10.0) for piece in PIECES]
  backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=2))
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
  )
  backend.post_processor = processors.TemplateProcessing(
    single=["$A", "</s>"], special_tokens=[("</s>", 1)]
  )
  backend.decoder = decoders.Metaspace(prepend_scheme="always")
  backend.add_special_tokens(PIECES[:3])
  return tokenizer_lib.Tokenizer(backend, eos_id=1, pad_id=0, ends_prompts=True)


def make_config(**changes):
  """More embeddings than tokens, as all published T5 have; widths that split over a mesh."""
  sizes = dict(num_layers=2, num_decoder_layers=2, width=16, num_heads=2, head_dim=8, mlp_width=24)
  return t5.T5Config(**{"vocab_size": 112, **sizes, **changes})


def make_params(config, seed=0):
  """Random NumPy parameters, large enough that attention, positions and norms matter."""
  shapes = jax.eval_shape(lambda key: t5.init_params(config, key), jax.random.key(0))
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = 0.25 * generator.standard_normal(leaf.shape)
    return np.asarray(noise + (path[-1].key == "scale")).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def write_folder(folder):
  """Writes a Hugging Face folder of the model with its tokenizer, and returns its path."""
  config = make_config()
  huggingface.save(folder, config, make_params(config), tokenizer=make_tokenizer())
  return folder
