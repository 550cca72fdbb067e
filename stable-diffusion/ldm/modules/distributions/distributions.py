"""The autoencoder's posterior."""

import torch

from ldm.compat import Divergences


class DiagonalGaussianDistribution(Divergences):
    """A normal distribution with the moments [B, 2C, H, W]: mean, and log of the variance clamped to [-30, 20]."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, noise=None):
        """mean + std * noise; the noise is drawn on the CPU, where it does not depend on the device."""
        noise = torch.randn(self.mean.shape) if noise is None else noise
        return self.mean + self.std * noise.to(self.mean)

    def mode(self):
        return self.mean
