"""UNet.py: its keys and its numbers are the course's; its fast paths and its narrow versions are the same network."""

import hashlib
import pathlib
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import UNet as room
from diffusion import ddim, run, schedule, timesteps
from p2_ddim import make_eps_model
from UNet import Attention, ResBlock, UNet, load_unet, widened
from utils import UserError, attention, plain_attention, torch_version

REFERENCE = pathlib.Path(__file__).parent / "data" / "unet_face.npz"  # the course's UNet.py with these weights
CPU = torch.device("cpu")


def reproducible_weights(shapes):
    """{key: tensor}, from a generator that its key seeds: variance 1 / fan in, norms near 1, a small last layer."""
    weights = {}
    for key, shape in shapes.items():
        seed = zlib.crc32(key.encode()) & 0x7FFFFFFF
        w = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            w *= 1.0 / np.sqrt(np.prod(shape[1:]))
        elif re.search(r"norm\d?\.weight$", key) or key == "out.0.weight":
            w = 1.0 + 0.1 * w
        else:
            w *= 0.02
        weights[key] = torch.from_numpy(w * 0.02 if key.startswith("out.2.") else w)
    return weights


def fill(model):
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k != "time.0.inv_freq"}
    model.load_state_dict({**reproducible_weights(shapes), "time.0.inv_freq": model.time[0].inv_freq})
    return model.eval()


@pytest.fixture(scope="module")
def course():
    return fill(UNet())


@pytest.fixture(scope="module")
def narrow():
    return fill(UNet(channel=8))


@pytest.fixture(scope="module")
def reference():
    return {k: torch.from_numpy(v) for k, v in np.load(REFERENCE).items()}


def test_the_state_dict_has_the_courses_427_keys_and_shapes(course):
    lines = sorted(f"{k} {'x'.join(map(str, v.shape))}" for k, v in course.state_dict().items())
    assert len(lines) == 427
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "5705410a4355783a7fe62b96d6e82bd20b733b233e329087a0507fbcc196e4ba"
    assert sum(p.numel() for p in course.parameters()) == 113_673_219


def test_eps_is_the_courses(course, reference):
    with torch.no_grad():
        eps = course(reference["x"], reference["t"])
    assert (eps - reference["eps"]).abs().max() < 1e-5


def test_fifty_ddim_steps_are_the_courses(course, reference):
    eps_model = make_eps_model(course, CPU, torch.float32)
    x = run(ddim(eps_model, reference["x"][:1], schedule(), timesteps(1000, 50, "course")))
    assert (x - reference["ddim50"]).abs().max() < 2e-3
    image = ((x - x.min()) / (x.max() - x.min()) * 255 + 0.5).to(torch.uint8)
    assert (image.int() - reference["image_uint8"].int()).abs().max() <= 1


def test_a_narrow_network_has_the_same_keys(course, narrow):
    assert list(narrow.state_dict()) == list(course.state_dict())
    for (key, wide), thin in zip(course.state_dict().items(), narrow.state_dict().values()):
        assert all(n in (16 * m, m) for n, m in zip(wide.shape, thin.shape)), key


@pytest.mark.parametrize("channel", [8, 32, 64])
def test_no_group_norm_of_a_narrow_network_erases_the_time(channel):
    torch.manual_seed(0)
    block = ResBlock(channel, channel, 4 * channel, groups=room.norm_groups(channel))
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(1, channel, 16, 16), torch.randn(2, 4 * channel)
    early, late = block(x, emb[:1]), block(x, emb[1:])
    assert (early - late).std() > 0.1 * early.std()


def test_fused_attention_equals_plain_softmax():
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, 64, 96) for _ in range(3))
    expected = plain_attention(q, k, v)
    by_hand = torch.stack([torch.softmax(a @ b.T / 96**0.5, dim=1) @ c for a, b, c in zip(q, k, v)])
    assert torch.allclose(expected, by_hand, atol=1e-5)
    assert torch.allclose(attention(q, k, v), expected, atol=1e-5)


def test_attention_without_the_fused_kernel_gives_the_same_block(monkeypatch):
    torch.manual_seed(0)
    block = Attention(32, groups=8)
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(2, 32, 8, 8)
    fused = block(x)
    monkeypatch.delattr(F, "scaled_dot_product_attention", raising=False)
    assert torch.allclose(block(x), fused, atol=1e-5)


def test_layout_and_in_place_activations_change_nothing(narrow):
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 64, 32), torch.tensor([0, 999])
    given = x.clone()
    plain = narrow(x, t).detach()  # gradients on: nothing in place, NCHW
    fast = make_eps_model(fill(UNet(channel=8)), CPU, torch.float32)
    with torch.no_grad():
        for x_t, time, eps in zip(x.split(1), t.tolist(), plain.split(1)):
            assert torch.allclose(fast(x_t, time), eps, atol=1e-6)
    assert torch.equal(x, given)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    block = room.Block(8, 16, 32, groups=2, attention=True).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # some begin at zero, and would hide an error
    x, emb = torch.randn(1, 8, 4, 4, dtype=torch.float64), torch.randn(1, 32, dtype=torch.float64)
    assert torch.autograd.gradcheck(block, (x.requires_grad_(), emb.requires_grad_()))


@pytest.mark.skipif(torch_version() < (2, 0), reason="torch before 2.0 has no bf16 on CPUs")
def test_half_precision_keeps_the_time_embedding_exact(narrow):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    unet = fill(UNet(channel=8))
    rounded = make_eps_model(unet, CPU, torch.bfloat16)
    assert unet.out[2].weight.dtype == torch.bfloat16
    assert torch.equal(unet.time[0].inv_freq, narrow.time[0].inv_freq)
    with torch.no_grad():
        for t in (1, 500, 999):
            a, b = narrow(x, torch.tensor([t])), rounded(x, t)
            assert (a - b).square().mean().sqrt() < 0.03 * a.std()


def test_a_new_network_predicts_zero_and_learns_from_there():
    model = UNet(channel=8)
    out = model(torch.randn(1, 3, 32, 32), torch.tensor([5]))
    assert not out.any()
    (out - 1).square().mean().backward()
    assert model.out[2].bias.grad.abs().min() > 0


def test_a_size_that_does_not_halve_five_times_is_refused(narrow):
    with pytest.raises(ValueError, match="multiples of 32"):
        narrow(torch.zeros(1, 3, 48, 64), torch.tensor([0]))
    with pytest.raises(ValueError, match="channel 30: take a multiple"):
        UNet(channel=30)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_width_comes_from_the_checkpoint(narrow, tmp_path, wrapped):
    state_dict = narrow.state_dict()
    torch.save({"state_dict": state_dict, "step": 3} if wrapped else state_dict, tmp_path / "unet.pt")
    loaded = load_unet(tmp_path / "unet.pt")
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), state_dict.values()))


def test_the_objective_comes_from_the_checkpoint_and_is_eps_without_one(narrow, tmp_path):
    for config, objective in (({}, "eps"), ({"objective": "v"}, "v"), ({"objective": "eps", "size": 64}, "eps")):
        torch.save({"state_dict": narrow.state_dict(), "config": config}, tmp_path / "unet.pt")
        assert load_unet(tmp_path / "unet.pt").objective == objective
    torch.save({"state_dict": narrow.state_dict(), "config": {"objective": "x_0"}}, tmp_path / "unet.pt")
    with pytest.raises(UserError, match="unet.pt: its objective is 'x_0', not eps or v"):
        load_unet(tmp_path / "unet.pt")


def test_a_network_that_predicts_v_is_sampled_by_its_eps(narrow, tmp_path):
    """eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t."""
    torch.save({"state_dict": narrow.state_dict(), "config": {"objective": "v"}}, tmp_path / "unet.pt")
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([300, 300])
    with torch.no_grad():
        v, eps = narrow(x, t), make_eps_model(load_unet(tmp_path / "unet.pt"), CPU, torch.float32)(x, 300)
    a = schedule()[300]
    assert torch.allclose(eps, (a.sqrt() * v + (1 - a).sqrt() * x).float(), atol=1e-5)


def test_a_wider_copy_predicts_the_same(narrow):
    """Exactly where all widths double; nearly where only some grow, since groups of channels then change."""
    x, t = torch.randn(4, 3, 32, 32), torch.tensor([1, 200, 600, 990])
    with torch.no_grad():
        expected = narrow(x, t)
        for multiplier, noise, error in (((2, 2, 4, 4, 8, 8), 0, 1e-4), ((1, 1, 4, 3, 4, 4), 0.01, 0.2)):
            wide = widened(narrow, multiplier, noise)
            assert wide.channel_multiplier == multiplier
            assert (wide(x, t) - expected).norm() < error * expected.norm()
    assert widened(narrow, (1, 1, 4, 3, 4, 4)).mid2.resblocks.conv1.weight.equal(narrow.mid2.resblocks.conv1.weight)


def test_a_wider_copy_parts_with_noise(narrow):
    conv = widened(narrow, (1, 1, 2, 2, 8, 8), 0.1).mid2.resblocks.conv1.weight
    assert not any(torch.equal(conv[i], conv[i + 1]) for i in range(0, len(conv), 2))


def test_a_copy_that_has_no_room_for_a_layer_is_refused(narrow):
    with pytest.raises(UserError, match="multiplier .1, 1, 4, 4, 4, 4.: down14 must go on changing the width"):
        widened(narrow, (1, 1, 4, 4, 4, 4))
    with pytest.raises(UserError, match="multiplier .1, 1, 2, 2, 4, 3.: narrower"):
        widened(narrow, (1, 1, 2, 2, 4, 3))


def test_the_widths_come_from_the_checkpoint(tmp_path):
    state_dict = UNet(channel=4, channel_multiplier=[1, 2, 3, 1, 2, 3]).state_dict()
    torch.save(state_dict, tmp_path / "unet.pt")
    loaded = load_unet(tmp_path / "unet.pt")
    assert loaded.channel_multiplier == (1, 2, 3, 1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), state_dict.values()))
    for bad in (torch.zeros(()), torch.zeros(7), torch.zeros(10**6)):  # the last is no width to make
        torch.save({**state_dict, "down18.resblocks.conv2.bias": bad}, tmp_path / "unet.pt")
        with pytest.raises(UserError, match="unet.pt: .*shape") as error:
            load_unet(tmp_path / "unet.pt")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [[1, 2], "112244", [1, 1, 2, 2, 4, 17], [1, 1, 2, 2, 4, 0.5]])
def test_widths_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="take six whole numbers from 1 to 16"):
        UNet(channel=4, channel_multiplier=bad)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("mid1.attention.qkv.bias"), "mid1.attention.qkv.bias"),
        (lambda s: s.pop("down1.weight"), "down1.weight"),
        (lambda s: s.update({"up7.resblocks.skip.bias": torch.zeros(3)}), r"up7.resblocks.skip.bias has shape \(3,\)"),
        (lambda s: s.update({"down1.weight": torch.zeros(30, 3, 3, 3)}), "down1.weight"),
        (lambda s: s.update({"down1.weight": torch.tensor(1.0)}), "down1.weight"),
        (lambda s: s.update({"down1.weight": torch.zeros(100_000, 3, 3, 3)}), "down1.weight"),
        (lambda s: s.update({"foreign.weight": torch.zeros(1)}), "foreign.weight"),
        (lambda s: s.update({"step": 3}), "no state dict"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_the_first_wrong_key(change, named, tmp_path):
    state_dict = dict(UNet(channel=4).state_dict())
    change(state_dict)
    torch.save(state_dict, tmp_path / "unet.pt")
    with pytest.raises(UserError, match=named) as error:
        load_unet(tmp_path / "unet.pt")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "unet.pt") in str(error.value)
