"""benchmarks/p2.py and fid.py: what --quality measures, on pictures and features of which it is known."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from fid import frechet_distance, precision_recall  # noqa: E402
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


def features(n, seed, *means):
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(n, 4, generator=draw) + mean for mean in means]).numpy()


def test_what_leaves_out_half_of_the_kinds_loses_recall_and_what_adds_one_precision():
    two_kinds, one, another = features(200, 0, 0, 100), features(400, 1, 0), features(200, 2, 0, -100)
    precision, recall = precision_recall(one, two_kinds)
    assert precision > 0.9 and 0.4 < recall <= 0.5
    precision, recall = precision_recall(another, two_kinds)
    assert 0.4 < precision <= 0.5 and 0.4 < recall <= 0.5
    assert precision_recall(two_kinds, two_kinds) == (1, 1)


def test_the_frechet_distance_of_normal_features_is_that_of_their_moments():
    a, b = features(2000, 0, 0), 2 * features(2000, 1, 0) + 3
    assert frechet_distance(a, b) == pytest.approx(4 * (3**2 + 1), rel=0.05)  # means 3 apart, deviations 1 and 2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
