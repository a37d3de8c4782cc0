r"""BYOL, Grill et al. 2020, https://arxiv.org/abs/2006.07733.

`tiny` needs no files. The others read images by `data.source`: a `.npz` file, a folder, or a data
set of TensorFlow Datasets (experiments/data/images.py). For CIFAR-10 and ImageNet the first call
prints how to prepare it.

Command:   python -m experiments.main --config=byol:cifar10_cpu --workdir=runs/byol \
             --config.data.source=CIFAR.npz
Hardware:  two CPU cores (tiny, cifar10_cpu), one GPU (cifar10, imagenette), a pod (imagenet_r50)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("handwritten digits of 8x8 pixels, 60 steps", "1 minute", "smoke test"),
  "cifar10_cpu": base.Preset(
    "10,000 images of CIFAR-10, a narrow ResNet",
    "40 minutes",
    "linear accuracy 0.599, 0.570, 0.606, three seeds (untrained 0.309, pixels 0.395)",
  ),
  "ablation": base.Preset("the same, shorter and at 16 pixels", "2 minutes", "not run"),
  "cifar10": base.Preset("CIFAR-10, ResNet-18, 200 epochs, one GPU", "not measured", "not run"),
  "imagenette": base.Preset(
    "ten classes of ImageNet, ResNet-18, 1,000 epochs, one GPU", "not measured", "not run"
  ),
  "imagenet_r50_100": base.Preset("ImageNet, ResNet-50, 100 epochs", "a pod", "not run"),
  "imagenet_r50_300": base.Preset("ImageNet, ResNet-50, 300 epochs", "a pod", "not run"),
  "paper": base.Preset(
    "ImageNet, ResNet-50, 1,000 epochs", "a pod", "not run (paper: top-1 accuracy 0.743)"
  ),
}


_IMAGENET_EPOCHS = {"imagenet_r50_100": 100, "imagenet_r50_300": 300, "paper": 1000}
# Base learning rate, weight decay and target decay of the authors' code, by number of epochs. They
# are in representation.byol_recipes too, which needs JAX; `--list` must not.
_RECIPES = {100: (0.45, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.2, 1.5e-6, 0.996)}
_IMAGENET_SIZE = 1_281_167


def get_config(preset: str = "cifar10_cpu") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {
    "target_decay": 0.99,
    "target": "moving",  # or "stopped", "online"
    "predictor": "network",  # or "none", "least_squares"
    "predictor_rate": 1.0,  # factor on the predictor's learning rate
    "negative_weight": None,  # of negative examples; None: no such term
    "temperature": 0.1,
  }
  config = base.images("byol", preset, algorithm=algorithm)
  config.network.update({"hidden": 4096, "projection": 256})
  if preset == "cifar10_cpu":
    config.data.num_images = 10_000
    config.network.update(
      {"encoder": "resnet10", "width_multiplier": 0.25, "hidden": 512, "projection": 128}
    )
    config.views.size, config.eval.size = 24, 32
    config.algorithm.target_decay = 0.97  # a shorter memory than the paper's, for so few steps
    _small_views(config)
    config.optimizer.update({"learning_rate": 3.0, "warmup_steps": 600, "weight_decay": 1e-6})
    config.train.update({"num_steps": 80 * 10_000 // 128, "batch_size": 128})
    config.eval.every = 1250
    config.checkpoint.every = 250
  if preset == "ablation":
    config.data.num_images = 10_000
    config.network.update(
      {"encoder": "resnet8", "width_multiplier": 0.25, "hidden": 256, "projection": 64}
    )
    config.views.size = 16
    config.algorithm.target_decay = 0.96
    _small_views(config)
    config.optimizer.update({"learning_rate": 3.0, "warmup_steps": 200, "weight_decay": 1e-6})
    config.train.update({"num_steps": 15 * 10_000 // 128, "batch_size": 128})
    config.eval.update({"probes": ("knn", "linear"), "baselines": False})
  if preset == "cifar10":
    # Learning rate and decay of lightly's benchmark, whose loss is a quarter of this one. It has
    # no blur either, which at this size removes the object.
    config.views.first.blur_prob = config.views.second.blur_prob = 0.0
    config.optimizer.update(
      {"name": "sgd", "learning_rate": 0.03, "warmup_steps": 0, "weight_decay": 2e-3}
    )
    config.network.update({"hidden": 1024, "dtype": "bfloat16"})
    config.train.update({"num_steps": 200 * 50_000 // 512, "batch_size": 512})
    config.eval.every = 20 * 50_000 // 512
    config.checkpoint.every = 10 * 50_000 // 512
  if preset == "imagenette":
    config.algorithm.target_decay = 0.996
    config.data.update({"source": "tfds:imagenette/160px-v2", "size": 160})
    config.network.update({"stem": "imagenet", "dtype": "bfloat16"})
    config.views.size, config.eval.crop_share = 128, 0.875
    config.optimizer.update(
      {"learning_rate": 2.0, "warmup_steps": 10 * 9469 // 256, "weight_decay": 1e-6}
    )
    config.train.update({"num_steps": 1000 * 9469 // 256, "batch_size": 256})
  if preset in _IMAGENET_EPOCHS:
    _imagenet(config, _IMAGENET_EPOCHS[preset])
  if preset == "tiny":
    config.data.source = "digits"
    config.network.update(
      {"encoder": "resnet6", "width_multiplier": 0.125, "hidden": 32, "projection": 16}
    )
    config.views.size = 8
    for view in (config.views.first, config.views.second):
      view.update({"flip_prob": 0.0, "min_area": 0.5, "blur_prob": 0.0})
    config.optimizer.update({"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 5})
    config.train.update({"num_steps": 60, "batch_size": 64, "log_every": 1})
    config.eval.update({"probes": ("knn", "linear"), "num_neighbours": 20, "num_epochs": 20})
    config.checkpoint.every = 20
  return config


def _small_views(config: ml_collections.ConfigDict) -> None:
  """Crops of 20 % or more, and no blur: less would be left of so few pixels."""
  for view in (config.views.first, config.views.second):
    view.update({"min_area": 0.2, "blur_prob": 0.0})


def _imagenet(config: ml_collections.ConfigDict, num_epochs: int) -> None:
  """The paper's runs: batch 4096, LARS with ten epochs of warm-up."""
  learning_rate, weight_decay, config.algorithm.target_decay = _RECIPES[num_epochs]
  config.data.update({"source": "tfds:imagenet2012", "from_files": True})
  config.eval.baselines = False  # pixels of all images do not fit into memory
  config.network.update({"encoder": "resnet50", "stem": "imagenet", "dtype": "bfloat16"})
  config.views.size, config.eval.crop_share = 224, 0.875
  config.optimizer.update(
    {
      "learning_rate": learning_rate,
      "warmup_steps": 10 * _IMAGENET_SIZE // 4096,
      "weight_decay": weight_decay,
    }
  )
  config.train.update({"num_steps": num_epochs * _IMAGENET_SIZE // 4096, "batch_size": 4096})
