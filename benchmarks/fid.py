"""How far made pictures are from real ones, by the features of classifiers.Inception: the Frechet inception distance
(Heusel et al. 2017), and precision and recall (Kynkaanniemi et al. 2019).

features = Inception(device)
frechet_distance(features(made), features(real))                # both uint8 [N, 3, H, W]
precision_recall(features(made), features(real))
"""

from __future__ import annotations

import numpy as np
import torch


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [N, D], [M, D] (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the singular values of A B^T for the centred features, over sqrt((N-1)(M-1)):
    exact, and much quicker than a matrix root where N and M are smaller than D.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = a - a.mean(0), b - b.mean(0)
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    variances = (x**2).sum() / (len(x) - 1) + (y**2).sum() / (len(y) - 1)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + variances - 2 * root)


def precision_recall(made, real, k=3):
    """(Precision, recall) of features [N, D], [M, D] (Kynkaanniemi et al. 2019, eq. 1 and 2): the share of what was
    made that lies within some real feature's distance to its k-th neighbour, and that of the real ones the other way.
    """
    made, real = torch.as_tensor(made), torch.as_tensor(real)

    def within(points, others):
        radii = torch.cdist(others, others).kthvalue(k + 1).values  # the nearest is the point itself
        return float((torch.cdist(points, others) <= radii).any(1).float().mean())

    return within(made, real), within(real, made)
