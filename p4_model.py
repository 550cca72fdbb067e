"""The networks of domain-adversarial training (DANN, Ganin et al. 2016): one for both scenarios.

from p4_model import load_digit_net, predict
net, config = load_digit_net("checkpoints/p4_svhn_dann.pt")
digits = predict(net, images, config["domain"])             # uint8 [N, 3, 28, 28] -> int64 [N]
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils import UserError, load_checkpoint, load_weights, to_float

SOURCE, TARGET = 0, 1  # index of a domain, and the domain classifier's label
FEATURES = 128
SCENARIOS = "svhn", "usps"  # MNIST-M to each of these
HELD_BACK = {"mnistm": 0.1, "svhn": 0.2, "usps": 0.2}  # for validation, where a domain has no val.csv


class GradientReversal(torch.autograd.Function):
    """R(x) = x, dR/dx = -lambda I (Ganin et al. 2016, section 4.2)."""

    @staticmethod
    def forward(ctx, x, lambd):
        ctx.lambd = lambd
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.lambd * gradient, None


def reverse_gradient(x, lambd):
    """x itself; on the way back its gradient is multiplied by -lambd."""
    return GradientReversal.apply(x, lambd)


class DomainNorm(nn.Module):
    """Batch normalisation of [B, C, H, W], a batch being of one domain: statistics of each domain's own, common scale
    and shift (AdaBN, Li et al. 2016; DSBN, Chang et al. 2019)."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(2, channels))
        self.register_buffer("var", torch.ones(2, channels))
        self.momentum = 0.1

    def forward(self, x, domain):
        statistics = self.mean[domain], self.var[domain]
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum)


class Conv(nn.Module):
    """relu(norm(convolution 3x3)); `stride` 2 halves the size."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm = DomainNorm(c_out)

    def forward(self, x, domain):
        return F.relu(self.norm(self.conv(x), domain))


class FeatureExtractor(nn.Module):
    """[B, 3, 28, 28], uint8 or in [-1, 1], of one domain -> features [B, 128]. The mean and deviation of each
    channel of each picture are taken out first, as in VADA (Shu et al. 2018)."""

    def __init__(self):
        super().__init__()
        # fmt: off
        self.layers = nn.ModuleList([
            Conv(3, 32),                    # 28x28
            Conv(32, 64, stride=2),         # 14x14
            Conv(64, 64),
            Conv(64, 128, stride=2),        # 7x7
            Conv(128, 128),
            Conv(128, FEATURES),
        ])
        # fmt: on

    def forward(self, x, domain=SOURCE):
        x = (to_float(x) if x.dtype == torch.uint8 else x).contiguous(memory_format=torch.channels_last)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.02)
        for layer in self.layers:
            x = layer(x, domain)
        return x.mean((2, 3))


class LabelPredictor(nn.Sequential):
    """Features [B, 128] -> logits of the digits [B, 10]."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


class DomainClassifier(nn.Sequential):
    """Features [B, 128] -> logits of SOURCE and TARGET [B, 2]; only training needs it."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))


class DigitNet(nn.Module):
    """What remains after training, extractor and label predictor: [B, 3, 28, 28] of one domain -> logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.features, self.labels = FeatureExtractor(), LabelPredictor()
        self.to(memory_format=torch.channels_last)

    def forward(self, x, domain=SOURCE):
        return self.labels(self.features(x, domain)).float()

    @contextlib.contextmanager
    def unremembered(self):
        """What passes through the network meanwhile leaves no trace in the domains' running statistics."""
        norms = [m for m in self.modules() if isinstance(m, DomainNorm)]
        for norm in norms:
            norm.momentum = 0.0
        yield
        for norm in norms:
            norm.momentum = 0.1


@torch.no_grad()
def run_batches(function, images, domain, device="cpu", batch_size=500, progress=None):
    """function(images, domain) over uint8 images [N, 3, 28, 28] in batches: float32 [N, ...] on the CPU. `progress`
    names a bar."""
    batches = tqdm(images.split(batch_size), desc=progress, unit="batch", disable=progress is None)
    return torch.cat([function(batch.to(device), domain).float().cpu() for batch in batches])


def predict(net, images, domain, **options):
    """The likeliest digit of uint8 images [N, 3, 28, 28] of one domain, int64 [N]; options: as of run_batches."""
    return run_batches(net.eval(), images, domain, **options).argmax(1)


def load_digit_net(path):
    """(DigitNet in eval mode, float32; config) of a checkpoint of p4_train.py; raises UserError."""
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    domain = config.get("domain") if isinstance(config, dict) and "state_dict" in checkpoint else None
    if type(domain) is not int or domain not in (SOURCE, TARGET):
        raise UserError(f"{path}: it is not a checkpoint of p4_train.py; name one, or train it")
    return load_weights(DigitNet(), checkpoint["state_dict"], path).eval(), config
