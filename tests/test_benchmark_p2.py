"""benchmarks/p2.py: what --quality measures, on pictures of which it is known."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from p2 import colours, remaining_noise  # noqa: E402


def test_casts_are_deviations_between_pictures_and_means_those_of_the_channels():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1, 0] = 255  # r - g is 0 and 2, g - b is 0 and 0
    assert colours(images) == pytest.approx([2**0.5, 0, 0, -1, -1])


def test_noise_counts_grain_and_neither_flat_areas_nor_slopes():
    slope = torch.arange(0, 128, 2, dtype=torch.uint8).expand(1, 3, 64, 64)
    assert remaining_noise(slope) < 1e-4
    grain = (slope + torch.randn(slope.shape, generator=torch.Generator().manual_seed(0)) * 10 + 60).to(torch.uint8)
    assert remaining_noise(grain) == pytest.approx(10 * (8 / 9) ** 0.5 * (2 / torch.pi) ** 0.5, rel=0.03)
