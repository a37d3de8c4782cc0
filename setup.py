"""The distribution `bootstrax`: which packages it holds and what each use of it needs."""

import pathlib

import setuptools

_HERE = pathlib.Path(__file__).resolve().parent

# Lower bounds are versions that the test suite has run with; upper bounds stop at the next release
# line that may change an interface used here.
_BASE = [
  "jax>=0.10.2,<0.13",
  "flax>=0.12.8,<0.13",
  "optax>=0.2.8,<0.3",
  "numpy>=2.1",
  "scipy>=1.14",
]

_EXPERIMENTS = [
  "orbax-checkpoint>=0.12,<0.13",
  "ml-collections>=1.1,<2",
  "absl-py>=2.3",
  "grain>=0.2.14,<0.3",
  "tensorflow-datasets>=4.9.10,<5",
  "importlib-resources>=6",  # needed by tensorflow-datasets when it writes, not declared by it
  "tensorboardX>=2.6.2",
  "tqdm>=4.66",
  "matplotlib>=3.9",
  "pillow>=11",  # decodes and resizes images
  "scikit-learn>=1.9.1",  # its digits are the images that need no files
]

_LM = [
  "transformers>=5.12,<6",
  "tokenizers>=0.22",
  "safetensors>=0.7",
  "gguf>=0.17",
  "jinja2>=3.1",
  "vaderSentiment>=3.3.2",
]

_GAMES = ["open-spiel>=2.0.2"]

_TEST = [
  *_GAMES,  # the reference of every test of games; no part of the library's own needs
  "chex>=0.1.91,<0.2",  # compares trees
  "pytest>=8",
  "pytest-xdist>=3.6",
  "hypothesis>=6.100",
  "ruff==0.17.6",
  "mypy==2.4.1",
  "import-linter>=2.1",
  "nbclient>=0.10",
  "nbformat>=5.10",
  "ipykernel>=6",
  "build>=1.2",
]

_EXTRAS = {
  "experiments": _EXPERIMENTS,
  "lm": _LM,
  "huggingface": ["datasets>=4"],  # for data called hf:NAME
  "games": _GAMES,
  "test": _TEST,
  "benchmarks": [
    "torch>=2.13",
    "torch-geometric>=2.8",
    "transformers>=5.12,<6",
    "trl>=1.16",
    "torchvision>=0.28",
    "kornia>=0.9",
  ],
  "colab": [*_EXPERIMENTS, *_LM, "ipykernel>=6"],
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
  "wandb": ["wandb>=0.19"],
}
_EXTRAS["all"] = sorted({*_EXPERIMENTS, *_LM, *_GAMES, *_TEST})

setuptools.setup(
  name="bootstrax",
  version="0.1.0",
  description=(
    "Papers on preference optimisation, games, returns and representations as pure JAX updates, "
    "checked against their own theorems"
  ),
  long_description=(_HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  author="The bootstrax authors",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_packages(
    include=[
      f"{name}{suffix}"
      for name in ("alignment", "rl_theory", "representation", "sharding", "experiments")
      for suffix in ("", ".*")
    ]
  ),
  package_data={"": ["py.typed"], "experiments.data": ["*.txt"]},
  install_requires=_BASE,
  extras_require=_EXTRAS,
  entry_points={"console_scripts": ["bootstrax = experiments.main:main"]},
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
