"""The autoencoder's posterior."""

import math

import torch


class DiagonalGaussianDistribution:
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

    def kl(self, other=None):
        """KL(self || other), of N(0, I) by default, in nats: [B]."""
        mean, logvar = (0.0, 0.0 * self.logvar) if other is None else (other.mean, other.logvar)
        terms = ((self.mean - mean) ** 2 + self.var) / logvar.exp() - 1.0 + logvar - self.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample, dims=(1, 2, 3)):
        """-log p(sample), summed over `dims`."""
        return 0.5 * (math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var).sum(tuple(dims))
