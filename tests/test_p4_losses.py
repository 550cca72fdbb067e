"""The losses of adaptation, each against its equation by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from p4_losses import (
    BELIEF,
    RADIUS,
    adversarial,
    divergence,
    entropy,
    label_free_score,
    mutual_information,
    self_training,
    virtual_adversarial,
    virtual_mixup,
)

SURE = torch.eye(10) * 100


def logits_of(p):
    """Logits of the digit 0 with probability p, the rest shared by the others."""
    return torch.tensor([p, *[(1 - p) / 9] * 9]).log()


def test_the_adversary_s_loss_is_cross_entropy_and_features_climb_it():
    source, target = torch.full((2, 1), 1.0, requires_grad=True), torch.full((2, 1), 2.0, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = adversarial(lambda f: f @ weight, source, target, lambd=0.5)
    by_hand = (2 * math.log(1 + math.exp(1)) + 2 * math.log(1 + math.exp(-2))) / 4
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    loss.backward()
    descent = torch.sigmoid(torch.tensor(1.0)) / 4  # of the loss by a source feature, weight 1
    assert torch.allclose(source.grad, -0.5 * descent.expand(2, 1), atol=1e-6)
    by_hand = 2 * descent + 2 * 2 * (torch.sigmoid(torch.tensor(2.0)) - 1) / 4
    assert torch.allclose(weight.grad[0, 1], by_hand, atol=1e-6)


def test_self_training_learns_what_the_teacher_is_sure_of_by_the_source_s_measure():
    source = torch.stack([logits_of(0.8)] * 4)
    teacher = torch.stack([logits_of(BELIEF * 0.8 + 0.01), logits_of(BELIEF * 0.8 - 0.01)])
    student = torch.stack([logits_of(0.5), logits_of(0.1)])
    loss, share = self_training(student, teacher, source)
    assert share == 0.5 and loss.item() == pytest.approx(-math.log(0.5) / 2, abs=1e-5)
    assert self_training(student, teacher, torch.stack([logits_of(0.6)] * 4))[1] == 1


def test_entropy_by_hand():
    assert entropy(torch.zeros(3, 10)).item() == pytest.approx(math.log(10), abs=1e-5)
    assert entropy(SURE).item() == pytest.approx(0, abs=1e-5)


def test_adversarial_noise_has_its_radius_and_does_more_than_random_noise():
    torch.manual_seed(0)
    weight, seen = torch.randn(12, 10) / 4, []

    def classify(x):
        seen.append(x.detach())
        return x.flatten(1) @ weight

    x = torch.randn(6, 3, 2, 2)
    logits = classify(x)
    loss = virtual_adversarial(classify, x, logits)
    assert torch.allclose((seen[-1] - x).flatten(1).norm(dim=1), torch.full((6,), RADIUS), atol=1e-4)
    noise = [RADIUS * F.normalize(torch.randn(6, 12)).view_as(x) for _ in range(20)]
    assert all(loss > divergence(logits.softmax(1), classify(x + r)) for r in noise)


def test_mixup_is_nothing_for_what_is_linear_and_something_else_where_not():
    torch.manual_seed(0)
    x = torch.rand(8, 10, 1, 1)
    x = x / x.sum(1, keepdim=True)

    def linear(x):  # p(x) = x
        return x.flatten(1).log()

    assert virtual_mixup(linear, x, linear(x)).item() == pytest.approx(0, abs=1e-5)
    assert virtual_mixup(lambda x: 3 * linear(x), x, 3 * linear(x)).item() > 1e-3


def test_mutual_information_by_hand():
    assert mutual_information(SURE) == pytest.approx(math.log(10), abs=1e-5)
    assert mutual_information(SURE[:1].repeat(10, 1)) == pytest.approx(0, abs=1e-5), "always the same digit"
    assert mutual_information(torch.zeros(10, 10)) == pytest.approx(0, abs=1e-5), "never sure"
    assert mutual_information(SURE[:2]) == pytest.approx(math.log(2), abs=1e-5)
    assert label_free_score(0.9, math.log(10)) == pytest.approx(1.9)
