"""The starting points that the configs of the papers share.

Every config has the same sections in the same order: seed, algorithm, network, data, optimizer,
sharding, train, eval, checkpoint; those of language models have `export` too. A config of games
has `environment` in place of `data`. A paper's config fills `algorithm` and overrides what differs.
"""

from typing import Any, NamedTuple

import ml_collections

# Low-rank adapters of a language model; a learning rate ten times that of full training is usual.
LORA = {
  "lora_rank": 0,  # 0: train all parameters
  "lora_alpha": 32.0,  # the change is B A alpha / rank
  "lora_targets": "all",  # matrices of the layers, or names such as query,value
  "lora_base": "full",  # or int8: the frozen matrices take a quarter of the memory
}


class Preset(NamedTuple):
  """One line of `--list`: what runs, how long it takes, and the result that we measured."""

  description: str
  time: str
  expected: str


def check_preset(preset: str, presets: dict[str, Preset]) -> None:
  """Raises a ValueError that lists the choices if `preset` is not one of `presets`."""
  if preset not in presets:
    raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(presets)}")


def _config(paper: str, preset: str, **sections: Any) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict({"paper": paper, "preset": preset, "seed": 0})
  for name, section in sections.items():
    config[name] = section
  return config


def bandit(paper: str, preset: str, *, algorithm: dict[str, Any]) -> ml_collections.ConfigDict:
  """A tabular run: `data.name` picks the problem; all seeds and settings are one program.

  One step of the training loop is a compiled scan of `train.inner_steps` optimisation steps.
  """
  return _config(
    paper,
    preset,
    algorithm=algorithm,
    network={},  # a table of logits
    data={"name": paper + "_bandit", "num_seeds": 10, "batch_size": 9},
    optimizer={"learning_rate": 1e-2},
    sharding={"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
    train={"num_steps": 180, "inner_steps": 100, "log_every": 1},
    eval={"every": 0},
    checkpoint={"every": 60, "keep": 2},
  )


def game(
  paper: str, preset: str, name: str, *, algorithm: dict[str, Any], bar: float = 0.0
) -> ml_collections.ConfigDict:
  """Solves a game of OpenSpiel: all seeds are one program; NashConv is exact.

  If `bar` is above 0, the run passes if the NashConv of every seed ends below it.
  """
  return _config(
    paper,
    preset,
    algorithm=algorithm,
    network={},
    environment={"game": name, "num_seeds": 3, "max_nodes": 1_000_000, "bar": bar},
    optimizer={},
    sharding={"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
    train={"num_steps": 100, "log_every": 1},
    eval={"every": 0},
    checkpoint={"every": 50, "keep": 1},
  )


def graph(paper: str, preset: str, *, algorithm: dict[str, Any]) -> ml_collections.ConfigDict:
  """Learns embeddings of the nodes of one graph; each step reads the whole graph."""
  return _config(
    paper,
    preset,
    algorithm=algorithm,
    network={
      "encoder": "gcn",  # or "mean_pooling", "gat"
      "widths": (256, 128),
      "norm": "batch",  # of gcn; or "graph"
      "batch_norm_decay": 0.01,
      "standardise_weights": False,
      "predictor_width": 512,
    },
    data={
      "name": "csbm",
      "directory": "",
      "edges": "symmetrise",  # what to do with one-way edges; or "keep", "error"
      "binarise": False,
      "features": "file",  # or, for a graph without any: "identity", "degree"
    },
    # As the authors of BGRL: the warm-up starts at 0, and all parameters decay.
    optimizer={"learning_rate": 5e-4, "warmup_steps": 1000, "weight_decay": 1e-5},
    sharding={"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
    train={"num_steps": 10_000, "log_every": 10},
    eval={"every": 0, "num_splits": 20, "split_seed": 0},
    checkpoint={"every": 500, "keep": 1},
  )


def images(paper: str, preset: str, *, algorithm: dict[str, Any]) -> ml_collections.ConfigDict:
  """Learns features of images without labels; probes evaluate them. The defaults fit CIFAR-10."""
  return _config(
    paper,
    preset,
    algorithm=algorithm,
    network={
      "encoder": "resnet18",  # or another name of image_runs.ENCODERS
      "width_multiplier": 1.0,
      "stem": "cifar",  # or "imagenet"
      "zero_scale": False,  # whether residual blocks start as their shortcuts
      "dtype": "float32",  # of the computation; or "bfloat16"
    },
    data={
      "source": "tfds:cifar10",  # or digits, a .npz file, a folder of images
      "directory": "",  # of TFDS; empty: its default
      "size": 0,  # side of the images in memory; 0: as they are
      "num_images": 0,  # of a subset of the training images, the same for all seeds; 0: all
      # Decode and crop on the host (antialiased) in each step: for sets that do not fit into memory
      "from_files": False,
    },
    views={
      "size": 32,
      "antialias": False,
      "first": _view(blur_prob=1.0, solarise_prob=0.0),
      "second": _view(),
    },
    optimizer={
      "name": "lars",  # or "sgd", "adamw"
      "learning_rate": 0.2,  # for 256 images a step; the peak grows with the batch
      "warmup_steps": 1000,
      "weight_decay": 1.5e-6,
    },
    sharding={"mesh": {"data": -1, "fsdp": 1, "tensor": 1}},
    train={"num_steps": 20_000, "batch_size": 512, "log_every": 10},
    eval={
      "every": 0,
      "batch_size": 500,
      "size": 0,  # side of the images that are evaluated; 0: views.size
      "crop_share": 1.0,  # side of the central square that is seen, as a share of the image
      "probes": ("knn", "linear", "logistic"),
      "baselines": True,  # whether pixels and an untrained encoder are evaluated too
      "num_neighbours": 200,
      "num_epochs": 80,  # of the linear probe
    },
    checkpoint={"every": 500, "keep": 1},
  )


def _view(**changed: float) -> dict[str, float]:
  """The augmentation of one view, by default BYOL's second; fields of `Augmentation`."""
  return {
    "min_area": 0.08, "max_aspect": 4 / 3, "flip_prob": 0.5, "jitter_prob": 0.8, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grey_prob": 0.2, "blur_prob": 0.1,
    "solarise_prob": 0.2,
  } | changed  # fmt: skip


def random_bandits(paper: str, *, algorithm: dict[str, Any]) -> ml_collections.ConfigDict:
  """The tabular runs of the baselines: 4,000 steps on 8 random bandits."""
  config = bandit(paper, "bandit", algorithm=algorithm)
  config.data = ml_collections.ConfigDict(
    {"name": paper + "_bandit", "num_bandits": 8, "num_arms": 5, "batch_size": 256}
  )
  config.optimizer.learning_rate = 3e-2
  config.train.update({"num_steps": 20, "inner_steps": 200})
  config.checkpoint.every = 10
  return config


def language_model(
  paper: str, preset: str, *, algorithm: dict[str, Any]
) -> ml_collections.ConfigDict:
  """Aligns a pretrained model on its own samples, scored by a reward function.

  The defaults are those of the `sentiment` presets: 40 steps of 8 prompts on two CPU cores, little
  more than one pass over the data. (A second pass memorises the completions: their margins jump by
  20 nats, and the held-out reward does not follow.)
  """
  return _config(
    paper,
    preset,
    algorithm=algorithm,
    network={
      # A built-in name, a Hugging Face folder, a .gguf file, or (online) a hub id.
      "model": "smollm2-135m-instruct",
      "dtype": "float32",
      "remat": False,
      "scan_layers": True,  # False: layers in a row, faster on GPUs, longer to compile
      "logps_chunk": 0,  # vocabulary entries whose logits are held at once; 0: as the device suits
      **LORA,
    },
    reward="vader",  # or module:function(prompts, completions) -> array of floats
    data={
      "name": "sentiment",
      # Your data: prompts, scored completions or preference pairs. A file, tfds:NAME, hf:NAME or
      # another source of experiments/data/rows.py.
      "prompts": "",
      "scored": "",
      "preferences": "",
      "demonstrations": "",  # for SFT: {prompt, completion} from any such source
      "preference_fields": "prompt,chosen,rejected",  # their names in your data set
      "cache": "",  # folder of samples and reference log-probabilities; empty: user cache
      "num_prompts": 272,
      "num_samples": 4,
      "prompt_template": "{prompt}",  # the model reads this; rewards see the prompt alone
      "prompt_length": 64,  # tokens of the longest prompt that is accepted
      "completion_length": 20,
      "length_buckets": 1,  # above 1: batches of similar length, cut to so many sets of widths
      "truncate": False,  # cut the start of long prompts and the end of your completions
      "temperature": 1.0,
      "top_k": 0,
      "top_p": 1.0,
      "sample_batch_size": 64,
    },
    optimizer={
      "learning_rate": 8e-5,
      "warmup_steps": 5,
      "warmup_from": 1,  # 0: the first update has a learning rate of 0
      "final_scale": 0.0,  # the cosine decays to learning_rate * final_scale
      "clip_norm": 1.0,
      "b1": 0.9,
      "b2": 0.999,
      "weight_decay": 0.0,
      "decay_all": False,  # True: also scales of norms and biases
    },
    sharding={"mesh": {"data": -1, "fsdp": 1, "tensor": 1}},
    train={"num_steps": 40, "batch_size": 8, "log_every": 1},
    eval={
      "every": 20,
      "num_prompts": 256,
      "num_table_rows": 16,
      # Other rewards, parted by commas: they score the same completions, and nothing learns from
      # them. Where they fall while the reward rises, the reward is being gamed.
      "judges": "",
      # Tasks of the lm-evaluation-harness, or YAML files of tasks, parted by commas. They run in
      # every evaluation, so they are best given with --mode=eval.
      "tasks": "",
      "task_limit": 0,  # examples of each task; 0: all
      "num_fewshot": 0,  # worked examples in a prompt; 0: as the task says
    },
    checkpoint={"every": 20, "keep": 1},
    export={"hub": ""},  # organisation/model on the Hugging Face hub, to upload the model to
  )


def online_language_model(
  paper: str, preset: str, *, algorithm: dict[str, Any], num_samples: int, pairwise: bool = False
) -> ml_collections.ConfigDict:
  """The same for methods that draw completions: `num_samples` for each prompt, in each step.

  With `pairwise`, a judge compares two of them: your own function, or the rewards.
  """
  make = tiny_language_model if preset == "tiny" else language_model
  config = make(paper, preset, algorithm=algorithm)
  config.data.num_samples = num_samples
  if pairwise:
    # The judge: module:function(prompts, firsts, seconds) -> P(first beats second). If it is empty,
    # the rewards judge: P = sigmoid(difference / preference_scale).
    config.preference = ""
    config.data.preference_scale = 0.25
    config.data.mixture_beta = 0.0  # weight of the reference in the sampled mixture
  return config


def tiny_language_model(
  paper: str, preset: str = "tiny", *, algorithm: dict[str, Any], learning_rate: float = 3e-3
) -> ml_collections.ConfigDict:
  """The same on a random two-layer character model: takes seconds, needs no weights."""
  config = language_model(paper, preset, algorithm=algorithm)
  config.network.model = "tiny-random"
  config.reward = "vowels"
  config.data.update({"num_prompts": 64, "completion_length": 8})
  config.optimizer.learning_rate = learning_rate
  config.eval.num_prompts = 64
  return config
