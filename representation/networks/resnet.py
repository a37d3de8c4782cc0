"""ResNets of version 1 (normalisation and ReLU after each convolution), without the classifier.

`ResNet18` and the others make a module from images `[B, H, W, 3]` to features `[B, F]`.
`adapters.Encoder` turns it into the pure function that `byol` takes. A bottleneck block has its
stride in the 3x3 convolution, as in torchvision. Convolutions and pooling pad as TensorFlow's SAME
does, which differs from torchvision by one pixel where the stride is 2.

References: He et al. 2016 (arXiv:1512.03385). Initialisation and normalisation are those of BYOL
(arXiv:2006.07733): scales start at 1, statistics keep 0.9 of their old value.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from representation.networks import mlp
from sharding import checks


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 ones in a bottleneck.

  The shortcut has a 1x1 convolution where the shape changes.

  Attributes:
    channels: of the 3x3 convolutions; a bottleneck has four times as many outputs.
    stride: of the block.
    bottleneck: whether it is one.
    conv: makes a convolution.
    norm: makes a normalisation layer.
    last_scale: initialiser of the scale of the last normalisation.
  """

  channels: int
  stride: int
  bottleneck: bool
  conv: Any
  norm: Any
  last_scale: Any

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns `[B, H / stride, W / stride, outputs]`."""
    stride = (self.stride, self.stride)
    if self.bottleneck:
      width = 4 * self.channels
      hidden = nn.relu(self.norm()(self.conv(self.channels, (1, 1))(inputs)))
      hidden = nn.relu(self.norm()(self.conv(self.channels, (3, 3), stride)(hidden)))
      hidden = self.conv(width, (1, 1))(hidden)
    else:
      width = self.channels
      hidden = nn.relu(self.norm()(self.conv(width, (3, 3), stride)(inputs)))
      hidden = self.conv(width, (3, 3))(hidden)
    hidden = self.norm(scale_init=self.last_scale)(hidden)
    if self.stride > 1 or inputs.shape[-1] != width:
      inputs = self.norm()(self.conv(width, (1, 1), stride)(inputs))
    return nn.relu(hidden + inputs)


class ResNet(nn.Module):
  """A stem, groups of residual blocks, and the mean over all places.

  Attributes:
    block_sizes: number of blocks in each group. Every group but the first halves the resolution.
    bottleneck: whether blocks are bottlenecks.
    width_multiplier: of the numbers of channels, which are 64, 128, ... in the groups. It may be a
      fraction, if 64 times it is whole.
    stem: "imagenet" (7x7 convolution of stride 2, 3x3 pooling of stride 2) or "cifar" (3x3
      convolution of stride 1), for images of about 32 pixels.
    zero_scale: whether the last scale of each block starts at 0, so that blocks start as their
      shortcuts.
    batch_norm_decay: share of the old running statistics that is kept in a training pass.
    batch_norm_epsilon: added to variances.
    dtype: of the computation, such as `jnp.bfloat16`. Parameters, statistics and features stay
      float32. The default is the dtype of the images.
  """

  block_sizes: Sequence[int]
  bottleneck: bool
  width_multiplier: float = 1
  stem: str = "imagenet"
  zero_scale: bool = False
  batch_norm_decay: float = 0.9
  batch_norm_epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns features `[B, F]` of images `[B, H, W, C]`."""
    checks.choice("stem", self.stem, ("imagenet", "cifar"))
    channels = 64 * self.width_multiplier
    if channels < 1 or channels != int(channels):
      raise ValueError(
        f"width_multiplier must be a positive multiple of 1/64, got {self.width_multiplier}"
      )
    if images.ndim != 4:
      raise ValueError(f"images must have shape [B, H, W, C], got {list(images.shape)}")
    conv = functools.partial(
      nn.Conv, use_bias=False, padding="SAME", kernel_init=mlp.TRUNCATED, dtype=self.dtype
    )
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=self.batch_norm_decay,
      epsilon=self.batch_norm_epsilon,
      dtype=self.dtype,
    )
    last_scale = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
    channels = int(channels)
    if self.stem == "imagenet":
      hidden = nn.relu(norm()(conv(channels, (7, 7), (2, 2))(images)))
      hidden = nn.max_pool(hidden, (3, 3), (2, 2), "SAME")
    else:
      hidden = nn.relu(norm()(conv(channels, (3, 3))(images)))
    for group, num_blocks in enumerate(self.block_sizes):
      for index in range(num_blocks):
        stride = 2 if group and not index else 1
        hidden = Block(
          channels << group, stride, self.bottleneck, conv, norm, last_scale
        )(hidden)  # fmt: skip
    # At least float32: a mean over many places in bfloat16 would lose digits.
    return jnp.mean(hidden, axis=(1, 2), dtype=jnp.promote_types(hidden.dtype, jnp.float32))


ResNet18 = functools.partial(ResNet, (2, 2, 2, 2), False)
ResNet34 = functools.partial(ResNet, (3, 4, 6, 3), False)
ResNet50 = functools.partial(ResNet, (3, 4, 6, 3), True)
ResNet101 = functools.partial(ResNet, (3, 4, 23, 3), True)
ResNet152 = functools.partial(ResNet, (3, 8, 36, 3), True)
ResNet200 = functools.partial(ResNet, (3, 24, 36, 3), True)
