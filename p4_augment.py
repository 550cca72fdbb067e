"""Random views of digits that carry from one domain to another, of whole batches: moved, recoloured, coarser.

from p4_augment import SOURCE_ZOOM, augment
views = augment(images, SOURCE_ZOOM, crowd=0.5)         # [B, 3, 28, 28] in [-1, 1], drawn by torch's generator
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from utils import affine_grid

# Ranges of zoom in x and y: a digit fills 20 of MNIST-M's 28 pixels, and nearly all of the height of the others'.
SOURCE_ZOOM = ((0.7, 1.4), (0.9, 1.5))
TARGET_ZOOM = ((0.85, 1.15), (0.9, 1.15))


def augment(x, zoom, crowd=0.0):
    """A random view of every picture, float32 [B, 3, 28, 28] in [-1, 1]. No flips: they would turn a 2 towards a 5."""
    with torch.autocast(x.device.type, enabled=False):
        return coarsen(recolour(move(x, zoom, crowd)))


def uniform(x, low, high, *shape):
    """Random numbers for each picture of x, [B, *shape]."""
    return torch.empty(len(x), *shape, device=x.device).uniform_(low, high)


def move(x, zoom, crowd):
    """Rotation by 15 degrees, shear 0.2, shift 3 pixels, zoom in each direction. Beyond the edge lies the edge's
    colour, or in a part `crowd` of the pictures another of the batch, as house numbers have neighbours."""
    angle, shear = uniform(x, -0.26, 0.26), uniform(x, -0.2, 0.2)
    dx, zoom_x, dy, zoom_y = (uniform(x, *low_high) for low_high in ((-0.2, 0.2), zoom[0], (-0.2, 0.2), zoom[1]))
    grid = affine_grid(x, angle, torch.stack([zoom_x, zoom_y], 1), torch.stack([dx, dy], 1), shear)
    if crowd:
        wide = torch.cat([x.roll(1, 0)[..., :24], x, x.roll(2, 0)[..., 4:]], 3)  # [B, 3, 28, 24 + 28 + 24]
        alone = uniform(x, 0, 1, 1, 1, 1) > crowd
        grid = torch.where(alone, grid.clamp(-27 / 28, 27 / 28), grid)
        grid, x = torch.stack([grid[..., 0] * (28 / 76), grid[..., 1]], -1), wide
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def recolour(x):
    """Other hues, a quarter of the pictures grey, half inverted, other contrast and brightness: one affine map of each
    picture's colours."""
    mix = torch.eye(3, device=x.device) + 0.2 * torch.randn(len(x), 3, 3, device=x.device)
    mix = torch.where(uniform(x, 0, 1, 1, 1) < 0.25, torch.full_like(mix, 1 / 3), mix)
    gain = uniform(x, 0.4, 1.2, 1, 1) * uniform(x, -1, 1, 1, 1).sign()
    return torch.baddbmm(uniform(x, -0.3, 0.3, 1, 1), gain * mix, x.flatten(2)).view_as(x).clamp(-1, 1)


def coarsen(x):
    """Half of the pictures mixed with themselves at half the resolution, and a fifth of them with 5 to 11 levels a
    channel."""
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    x = torch.lerp(x, soft, uniform(x, -1, 1, 1, 1, 1).clamp(min=0))
    steps = uniform(x, 1.5, 5.5, 1, 1, 1).round()  # [-1, 1] has 2 steps + 1 levels
    return torch.where(uniform(x, 0, 1, 1, 1, 1) < 0.2, (x * steps).round() / steps, x)
