"""The autoencoder's posterior."""

import torch
from torch.distributions import Normal, kl_divergence


class DiagonalGaussianDistribution:
    """A normal distribution with the moments [B, 2C, H, W]: mean, and log of the variance clamped to [-30, 20]."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        self.normal = Normal(self.mean, self.std, validate_args=False)

    def sample(self, noise=None):
        """mean + std * noise; the noise is drawn on the CPU, where it does not depend on the device."""
        noise = torch.randn(self.mean.shape) if noise is None else noise
        return self.mean + self.std * noise.to(self.mean)

    def mode(self):
        return self.mean

    def kl(self, other=None):
        """KL(self || other), of N(0, I) by default, in nats: [B]."""
        return kl_divergence(self.normal, other.normal if other else Normal(0.0, 1.0)).flatten(1).sum(1)

    def nll(self, sample, dims=(1, 2, 3)):
        """-log p(sample), summed over `dims`."""
        return -self.normal.log_prob(sample).sum(tuple(dims))
