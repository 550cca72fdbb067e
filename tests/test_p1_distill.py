"""p1_distill.py: a student of few steps follows its teacher, from trajectories that are sampled once."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from test_digits import write_domain
from test_p1 import CONFIG

pytest.importorskip("pytorch_lightning", reason="training needs requirements-dev")

import p1_distill
import p1_infer
from classifiers import DigitResNet, feature_distance
from diffusion import alpha_sigma, schedule
from p1_model import GUIDANCE, Critic, DigitUNet, eps_model_for, load_digit_unet, reverse_process
from utils import UserError, half, load_checkpoint, save_checkpoint

SMALL = "--count 500 --steps 16 --epoch-steps 8 --batch-size 8 --lr 3e-3 --warmup 2 --ema 0.5 0.8 --features 0".split()
SMALL += "--precision fp32 --device cpu".split()


def noisy(model):
    """The model with random weights where it begins with zeros, so that everything matters to its output."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05) if p.abs().sum() == 0 else None
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small untrained teacher whose output is not zero."""
    torch.manual_seed(0)
    model = noisy(DigitUNet(CONFIG["channels"], CONFIG["deep"]))
    path = tmp_path_factory.mktemp("teacher") / "unet.pt"
    save_checkpoint({"state_dict": half(model.state_dict()), "config": CONFIG}, path)
    return path


@pytest.fixture(scope="module")
def distilled(checkpoint, tmp_path_factory):
    """(folder of a run with two steps, its options)."""
    out = tmp_path_factory.mktemp("student")
    options = ["--teacher", str(checkpoint), "--times", "999", "499", *SMALL]
    p1_distill.main([*options, "--out", str(out)])
    return out, options


def losses(out, name):
    (path,) = (out / "csv").rglob("metrics.csv")
    with open(path, newline="") as f:
        return [float(row[name]) for row in csv.DictReader(f) if row.get(name)]


def test_the_student_comes_closer_to_its_teacher(distilled):
    for decay in (0.5, 0.8):
        first, last = losses(distilled[0], f"val_loss_{decay}")
        assert last < 0.98 * first


def test_a_run_from_stored_trajectories_and_resumed_ends_with_the_same_weights(distilled, tmp_path, monkeypatch):
    out, options = distilled
    monkeypatch.setattr(p1_distill, "stages", lambda *_: pytest.fail("sampled again"))
    again = [*options, "--out", str(tmp_path), "--trajectories", str(out)]
    p1_distill.main([*again, "--max-epochs", "1"])
    p1_distill.main(again)
    a, b = (load_checkpoint(folder / "last.ckpt") for folder in (out, tmp_path))
    assert a["global_step"] == b["global_step"] == 16
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])


def test_beside_a_critic_the_last_weights_are_kept(distilled, tmp_path, monkeypatch):
    def worse_and_worse(self, batch, _):
        for decay in self.averages.decays:
            self.log(f"val_loss_{decay}", float(self.global_step))

    out, options = distilled
    for seed, name in enumerate(("mnistm", "svhn")):
        write_domain(tmp_path / name, count=200, seed=seed, flat=True)
    monkeypatch.setattr(p1_distill.Distillation, "validation_step", worse_and_worse)
    steps = []
    for run, contest in {"with": ["--adversarial", "1", "--data", str(tmp_path)], "without": []}.items():
        p1_distill.main([*options, *contest, "--trajectories", str(out), "--out", str(tmp_path / run)])
        steps.append(load_checkpoint(tmp_path / run / "best.pt")["step"])
    assert steps == [16, 8]


def test_trajectories_are_what_the_teacher_draws(checkpoint, distilled):
    (path,) = distilled[0].glob("trajectories_*.pt")
    states = load_checkpoint(path).float()
    assert states.shape == (500, 9, 3, 28, 28) and abs(states[:, 0].std() - 1) < 0.01
    teacher, config = load_digit_unet(checkpoint)
    i = 37  # of digit 7 and the second domain
    with torch.no_grad():
        eps_model = eps_model_for(teacher, config, torch.tensor([7]), torch.tensor([1]), GUIDANCE[1], (200, 750))
        noise = torch.Generator().manual_seed(10**6 + i)
        x_T = torch.randn(1, 3, 28, 28, generator=noise)
        path = [x_t for _, x_t, _ in reverse_process(eps_model, config, x_T, None, "dpm++", 16)]
    assert torch.allclose(states[i, 0], x_T[0], atol=2e-3)
    assert torch.allclose(states[i, 1:], torch.cat(path[1::2]), atol=1e-2)


def test_p1_infer_takes_the_few_steps_from_the_checkpoint_without_guidance(distilled, tmp_path):
    student = distilled[0] / "best.pt"
    model, config = load_digit_unet(student)
    assert config["steps"] == [999, 499]
    options = ["--checkpoint", str(student), "--precision", "fp32", "--device", "cpu"]
    sheets = ["--grid", str(tmp_path / "g.png"), "--trajectory", str(tmp_path / "t.png")]
    p1_infer.main([str(tmp_path / "out"), *options, *sheets, "--num-per-digit", "1"])
    written = np.asarray(Image.open(tmp_path / "out/svhn/3_001.png")).transpose(2, 0, 1)
    x = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(13 * p1_infer.PER_PAIR))
    for t, s in ((999, 499), (499, -1)):
        (a_t, s_t), (a_s, s_s) = (alpha_sigma(schedule("cosine"), when) for when in (t, s))
        with torch.no_grad():
            v = model(x, torch.tensor([t]), torch.tensor([3]), torch.tensor([1]))
        x = a_s * (a_t * x - s_t * v) + s_s * (s_t * x + a_t * v)
    assert np.abs(written - ((x[0].clamp(-1, 1) + 1) * 127.5).numpy()).max() < 1.5
    assert (tmp_path / "t.png").is_file() and (tmp_path / "g_mnistm.png").is_file()


def test_a_perfect_student_has_no_loss():
    """A constant network leads through known states: with those as the teacher's, nothing is left to learn."""
    torch.manual_seed(0)
    x, v, alpha_bar, states = torch.randn(2, 3, 28, 28), torch.randn(2, 3, 28, 28), schedule("cosine"), []
    for t, s in ((999, 499), (499, -1)):
        (a_t, s_t), (a_s, s_s) = alpha_sigma(alpha_bar, t), alpha_sigma(alpha_bar, s)
        states.append(x)
        x = a_s * (a_t * x - s_t * v) + s_s * (s_t * x + a_t * v)
    states, digit = torch.stack([*states, x], 1), torch.tensor([1, 2])
    module = distillation(["--times", "999", "499"])
    loss, x_0 = module.loss(lambda *_: v, states, digit, digit * 0)
    assert loss < 1e-4 and torch.allclose(x_0, x, atol=1e-4)
    worse, _ = module.loss(lambda *_: v + 0.1, states, digit, digit * 0)
    assert worse > 0.05


def distillation(options):
    args = p1_distill.parse(options)
    config = {"schedule": "cosine", "T": 1000, "steps": args.times}
    torch.manual_seed(0)
    return p1_distill.Distillation(DigitUNet(16, 64), config, args, DigitResNet(8).eval())


def test_each_side_of_the_contest_has_gradients_of_its_own():
    module = distillation(["--adversarial", "0.1"])
    made, digit = torch.randn(2, 3, 28, 28, requires_grad=True), torch.tensor([1, 2])
    fool, tell = module.contest(made, torch.randn(2, 3, 28, 28), digit, digit * 0)
    fool.backward()
    assert made.grad.abs().max() > 0 and all(p.grad is None for p in module.critic.parameters())
    made.grad = None
    tell.backward()
    assert made.grad is None and all(p.grad is not None for p in module.critic.parameters())


def test_the_critic_gives_a_map_that_depends_on_picture_and_condition():
    critic, x = Critic(noisy(DigitUNet(16, 64))), torch.randn(1, 3, 28, 28)
    t, digit, domain = torch.tensor([300]), torch.tensor([4]), torch.tensor([0])
    maps = [critic(x, t, digit, domain), critic(x + 1, t, digit, domain), critic(x, t, digit + 1, domain)]
    assert maps[0].shape == (1, 1, 7, 7)
    assert (maps[0] - maps[1]).abs().max() > 1e-4 and (maps[0] - maps[2]).abs().max() > 1e-4


def test_features_see_blur_and_equal_pictures_are_at_distance_zero():
    torch.manual_seed(0)
    judge, x = DigitResNet(8).eval(), torch.rand(2, 3, 28, 28) * 2 - 1
    assert feature_distance(judge, x, x) == 0
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert feature_distance(judge, x, blurred) > feature_distance(judge, x, 0.9 * x + 0.1 * blurred) > 0


@pytest.mark.parametrize("times", ["499", "999 499 749", "999 500"])
def test_times_that_no_teacher_passes_in_this_order_are_refused(times, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        p1_distill.main(["--times", *times.split(), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "--times" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [[], [499, 999], [1000, 3], ["999"], "999", [999, 999], [999, torch.tensor([1, 2])]])
def test_a_checkpoint_with_impossible_steps_is_refused(steps, checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    content["config"]["steps"] = steps
    save_checkpoint(content, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt: its config has steps"):
        load_digit_unet(tmp_path / "bad.pt")


def test_a_student_is_no_teacher(distilled, tmp_path, capsys):
    with pytest.raises(SystemExit):
        p1_distill.main(["--teacher", str(distilled[0] / "best.pt"), "--out", str(tmp_path / "run")])
    assert "take a teacher of p1_train.py" in capsys.readouterr().err.splitlines()[-1]
