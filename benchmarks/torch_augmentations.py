"""The nearest that torchvision and kornia have to BYOL's augmentation, for `byol.py augment`.

torchvision draws once for what it gets. On a batch all images get the same crop and colours, which
is less work than BYOL needs. kornia draws for each image, but one order of the colour changes.
"""

import os

JITTER, MIN_AREA, MAX_ASPECT, SIGMA = (0.4, 0.4, 0.2, 0.1), 0.08, 4 / 3, (0.1, 2.0)


def make_side(args, images):
  """Returns the command that makes both views `[B, 3, size, size]` of `images` `[B, H, W, 3]`.

  `args.worker` is "torchvision" (image by image), "batched" (the same, on the batch) or "kornia".
  """
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  device = "cpu" if args.platform == "cpu" else "cuda"
  images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
  kernel, ratio = 2 * (args.size // 20) + 1, (1 / MAX_ASPECT, MAX_ASPECT)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

  def torchvision_view(blur, solarise):
    from torchvision.transforms import v2

    return v2.Compose([
      v2.ToDtype(torch.float32, scale=True),
      v2.RandomResizedCrop(
        args.size, (MIN_AREA, 1), ratio, v2.InterpolationMode.BICUBIC, antialias=False
      ),
      v2.RandomHorizontalFlip(),
      v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8),
      v2.RandomGrayscale(0.2),
      v2.RandomApply([v2.GaussianBlur(kernel, SIGMA)], blur),
      v2.RandomSolarize(0.5, solarise),
      v2.Normalize(mean, std),
    ])  # fmt: skip

  def kornia_view(blur, solarise):
    import kornia.augmentation as ka

    return torch.nn.Sequential(
      ka.RandomResizedCrop((args.size, args.size), (MIN_AREA, 1), ratio, resample="bicubic"),
      ka.RandomHorizontalFlip(),
      ka.ColorJitter(*JITTER, p=0.8),
      ka.RandomGrayscale(p=0.2),
      ka.RandomGaussianBlur((kernel, kernel), SIGMA, p=blur),
      ka.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=solarise),
      ka.Normalize(torch.tensor(mean), torch.tensor(std)),
    )

  make = kornia_view if args.worker == "kornia" else torchvision_view
  pair = [make(1.0, 0.0), make(0.1, 0.2)]

  def work():
    with torch.no_grad():
      if args.worker == "torchvision":
        made = [torch.stack([view(image) for image in images]) for view in pair]
      else:
        batch = images.float() / 255 if args.worker == "kornia" else images
        made = [view(batch) for view in pair]
    if device == "cuda":
      torch.cuda.synchronize()
    assert made[0].shape == (args.batch, 3, args.size, args.size)

  return {"work": work}
