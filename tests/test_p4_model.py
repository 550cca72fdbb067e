"""The networks of domain-adversarial training: reversed gradients, the domains' statistics, what a label depends on."""

import pytest
import torch

from p4_model import (
    SOURCE,
    TARGET,
    DigitNet,
    DomainClassifier,
    DomainNorm,
    FeatureExtractor,
    load_digit_net,
    predict,
    reverse_gradient,
)
from utils import UserError, half, save_checkpoint


def pictures(count, seed=0):
    return torch.randint(256, (count, 3, 28, 28), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def lively(seed=0, domain=TARGET):
    """An untrained network whose answers differ between pictures and domains."""
    torch.manual_seed(seed)
    net = DigitNet()
    for module in net.modules():
        if isinstance(module, DomainNorm):
            module.mean.normal_(std=0.1)
            module.var.uniform_(0.2, 0.6)
    last, net = net.labels[-1], net.eval()
    with torch.no_grad():
        logits = net(pictures(60), domain)
        last.weight.div_(logits.std(0).mean())
        last.bias.sub_(logits.mean(0)).div_(logits.std(0).mean())
    return net


# ------------------------------------------------------------------------ gradient reversal


def test_the_reversed_gradient_is_minus_lambda_times_it():
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    out = reverse_gradient(x, 0.25)
    assert torch.equal(out, x)
    out.backward(torch.tensor([4.0, 8.0, -12.0]))
    assert x.grad.tolist() == [-1.0, -2.0, 3.0]


def test_features_climb_the_domain_loss_that_the_classifier_descends():
    """By hand: f = w x, label loss (f - y)^2, domain loss (v R(f) - d)^2 with x = 2, w = 1.5, y = 1, v = 0.5, d = 1:
    f = 3; dw = 2 (f - y) x - lambda 2 (v f - d) v x = 8 - lambda; dv = 2 (v f - d) f = 3."""
    w, v = torch.tensor(1.5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    f = w * 2.0
    ((f - 1.0) ** 2 + (v * reverse_gradient(f, 0.5) - 1.0) ** 2).backward()
    assert w.grad.item() == pytest.approx(7.5) and v.grad.item() == pytest.approx(3.0)


# ------------------------------------------------------------------------ normalisation


def test_a_domain_s_batch_moves_its_own_statistics_only():
    norm = DomainNorm(2)
    x = torch.randn(64, 2, 5, 5) * 3 + 7
    out = norm(x, TARGET)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(norm.mean[TARGET], 0.1 * x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.var[TARGET], 0.9 + 0.1 * x.var((0, 2, 3)), atol=1e-4)
    assert torch.equal(norm.mean[SOURCE], torch.zeros(2)) and torch.equal(norm.var[SOURCE], torch.ones(2))


def test_statistics_are_the_domain_s_own():
    with torch.no_grad():
        net = lively()
        assert not torch.allclose(net(pictures(4), SOURCE), net(pictures(4), TARGET), atol=1e-3)


def test_what_passes_unremembered_leaves_the_statistics_as_they_were():
    net = lively().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with net.unremembered():
        net(pictures(4), TARGET)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net(pictures(4), TARGET)
    assert not torch.equal(net.features.layers[0].norm.mean[TARGET], before["features.layers.0.norm.mean"][TARGET])


def test_instance_normalisation_takes_contrast_and_colour_cast_away():
    x = pictures(4).float() / 255 - 0.5
    changed = x * 0.7 + torch.tensor([0.6, -0.5, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        extractor = lively().features
        moved = (extractor(x) - extractor(changed)).norm() / extractor(x).norm()
    assert moved < 0.03


def test_flat_pictures_give_finite_logits():
    assert lively()(torch.full((2, 3, 28, 28), 255, dtype=torch.uint8)).isfinite().all()


# ------------------------------------------------------------------------ shapes, labels, files


def test_shapes_and_ranges():
    x = pictures(5)
    features = FeatureExtractor().eval()(x)
    assert features.shape == (5, 128) and DomainClassifier()(features).shape == (5, 2)
    net = lively()
    assert net(x).shape == (5, 10) and net(x).dtype == torch.float32
    assert torch.allclose(net(x), net(x.float() / 127.5 - 1), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_batch_size_and_company_do_not_change_a_label(batch_size):
    net, x = lively().train(), pictures(60)
    labels = predict(net, x, TARGET, batch_size=60)
    assert len(labels.unique()) > 2
    assert torch.equal(predict(net, x, TARGET, batch_size=batch_size), labels)
    assert torch.equal(predict(net, x.flip(0), TARGET, batch_size=batch_size).flip(0), labels)


def test_a_checkpoint_is_small_and_comes_back(tmp_path):
    net = lively()
    config = {"domain": TARGET, "mode": "dann"}
    checkpoint = {"state_dict": half(net.state_dict()), "config": config, "step": 1, "metrics": {}}
    save_checkpoint(checkpoint, tmp_path / "net.pt")
    assert (tmp_path / "net.pt").stat().st_size < 5e6
    loaded, given = load_digit_net(tmp_path / "net.pt")
    assert given == config and not loaded.training and next(loaded.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(loaded(pictures(3), TARGET), net(pictures(3), TARGET), atol=0.1)


@pytest.mark.parametrize(
    "checkpoint, says",
    [
        ({"state_dict": {}}, "not a checkpoint of p4_train.py"),
        ({"state_dict": {}, "config": {"channels": 64}}, "not a checkpoint of p4_train.py"),
        ([1, 2], "not a checkpoint of p4_train.py"),
        ({"state_dict": {}, "config": {"domain": True}}, "not a checkpoint of p4_train.py"),
        ({"state_dict": {}, "config": {"domain": torch.tensor([0, 1])}}, "not a checkpoint of p4_train.py"),
        ({"state_dict": {}, "config": {"domain": 1}}, "lacks the key"),
        (
            {"state_dict": {**DigitNet().state_dict(), "labels.3.bias": torch.zeros(3)}, "config": {"domain": 1}},
            "shape",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(checkpoint, says, tmp_path):
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"other.pt: .*{says}"):
        load_digit_net(tmp_path / "other.pt")
