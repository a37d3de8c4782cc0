r"""Supervised networks on images, and the semi-supervised protocol of BYOL (arXiv:2006.07733).

`tiny` and `cifar10_cpu` train the network of the BYOL preset of the same name on the labels of the
same images, from scratch. Two fields make other runs of them. `network.init_from` is the work
directory of a BYOL run, whose encoder is the start (fine-tuning); with `algorithm.frozen` it stays
as it is, and only the linear layer learns.

`semi_supervised` fine-tunes BYOL's encoder on few labels beside the same network from scratch. As
in the paper it is SGD with Nesterov momentum and no weight decay; the learning rate and the number
of epochs are those that are best on validation images. The paper gives no schedule, here it is a
cosine decay, and its batch of 1024 is smaller here.

Command:   python -m experiments.main --config=supervised:cifar10_cpu --workdir=runs/supervised \
             --config.data.source=CIFAR.npz
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base, byol

PRESETS = {
  "tiny": base.Preset("handwritten digits of 8x8 pixels, 60 steps", "30 seconds", "smoke test"),
  "cifar10_cpu": base.Preset(
    "10,000 images of CIFAR-10, the network of byol:cifar10_cpu",
    "9 minutes",
    "test accuracy 0.667, three seeds of 1,500 steps (image_comparison:cifar10_cpu)",
  ),
  "semi_supervised": base.Preset(
    "1 % and 10 % of these labels, from BYOL and from scratch", "hours", "not run to the end"
  ),
  "tiny_semi_supervised": base.Preset("the same protocol on digits", "1 minute", "smoke test"),
}


def get_config(preset: str = "cifar10_cpu") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset.endswith("semi_supervised"):
    return _semi_supervised(preset)
  source = byol.get_config(preset)
  config = base.images("supervised", preset, algorithm={"frozen": False})
  for name in config.network:
    config.network[name] = source.network[name]
  config.network.init_from = ""  # work directory of a BYOL run; empty: random parameters
  config.data.update({name: source.data[name] for name in ("source", "num_images")})
  config.data.label_share = 1.0  # of the images that have a label in training, equal in each class
  config.data.label_seed = 0
  config.data.validate = False  # leave the validation images out, and report their accuracy
  config.views.size = source.views.size
  del config.views.second
  config.views.first.update(
    {name: 0.0 for name in ("jitter_prob", "grey_prob", "blur_prob", "solarise_prob")}
  )
  config.optimizer = ml_collections.ConfigDict(
    {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
  )
  config.train.update({"num_steps": 1500, "batch_size": 128})
  config.eval = ml_collections.ConfigDict(
    {name: source.eval[name] for name in ("every", "batch_size", "size", "crop_share")}
  )
  if preset == "tiny":
    config.views.first.update({"flip_prob": 0.0, "min_area": 0.5})
    config.train.update({"num_steps": 60, "batch_size": 64, "log_every": 1})
    config.checkpoint.every = 20
  return config


def _semi_supervised(preset: str) -> ml_collections.ConfigDict:
  """A run of runs: the sections replace those of the runs."""
  tiny = preset.startswith("tiny")
  method = "tiny" if tiny else "cifar10_cpu"
  sections = get_config(method)
  config = ml_collections.ConfigDict(
    {
      "paper": "supervised",
      "preset": preset,
      "runner": "fine_tuning",
      "seed": 0,
      "method": method,  # preset of `supervised`, and of `byol` where `init_from` is empty
      "init_from": "",  # work directory of a finished BYOL run; empty: train one first
      "label_shares": (0.1,) if tiny else (0.01, 0.1),
      "learning_rates": (0.05, 0.1) if tiny else (0.005, 0.01, 0.02, 0.05, 0.1),
      "epochs": (4,) if tiny else (30, 50),
      "network": {
        name: sections.network[name] for name in ("encoder", "width_multiplier", "stem", "dtype")
      },
      "data": {"source": sections.data.source, "directory": ""},
      "optimizer": {"weight_decay": 0.0},
      # The steps are those of BYOL, where the study trains it; the batch is that of fine-tuning.
      "train": {
        "num_steps": byol.get_config(method).train.num_steps, "batch_size": 32, "log_every": 1,
      },
    }
  )  # fmt: skip
  for section in ("sharding", "eval", "checkpoint"):
    config[section] = sections[section]
  return config
