"""Digit classifiers: they judge generated digits, in training and in grading.

from classifiers import load_classifier, predict
digits = predict(load_classifier("checkpoints/svhn_classifier.pth"), images)     # uint8 [N, 3, 28, 28] -> int64 [N]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

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


def load_classifier(path, device="cpu"):
    """The LeNet or DigitResNet of a checkpoint {"state_dict": ...}, told apart by its keys; raises UserError."""
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: no state_dict in it; it is not a checkpoint of a digit classifier")
    state_dict = checkpoint["state_dict"]
    model = LeNet() if "fc1.weight" in state_dict else DigitResNet()
    return load_weights(model, state_dict, path).eval().to(device)


@torch.no_grad()
def predict(model, images, batch_size=250):
    """The likeliest digit of uint8 images [N, 3, 28, 28], normalised to mean 0.5 and deviation 0.5 as the course
    does: int64 [N]."""
    device = next(model.parameters()).device
    batches = [to_float(batch.to(device)) for batch in images.split(batch_size)]
    return torch.cat([model(batch).argmax(1).cpu() for batch in batches])
