"""p4_train.py in small: no label of the target is read, it learns, resumes where it stopped, selects as it says."""

import csv
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from test_digits import write_domain

pytest.importorskip("pytorch_lightning", reason="training needs requirements-dev")

import p4_infer
import p4_train
from digits import is_validation
from p4_augment import SOURCE_ZOOM, augment, move

SMALL = ["--steps", 6, "--epoch-steps", 3, "--batch-size", 8, "--warmup", 1, "--ema", 0.5, "--lr", 1e-2]
PARTS = list(p4_train.PARTS)
SMALL += ["--precision", "fp32", "--device", "cpu"]


def draw_digits(folder, seed, light):
    """Replaces a domain's pictures by its labels in figures, on noise."""
    random = np.random.RandomState(seed)
    for i, path in enumerate(sorted((folder / "data").iterdir())):
        figure = Image.new("L", (10, 11))
        ImageDraw.Draw(figure).text((2, 0), str(i % 10), fill=255)
        shape = np.asarray(figure.resize((28, 28)))[..., None] / 255.0
        ground = random.randint(0, 100, (28, 28, 3)) + (0 if light else 120)
        colour = 230 if light else 20
        Image.fromarray((ground * (1 - shape) + colour * shape).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """mnistm/ and svhn/: drawn digits, light ones and dark ones."""
    folder = tmp_path_factory.mktemp("digits")
    for seed, name in enumerate(("mnistm", "svhn")):
        write_domain(folder / name, count=120)
        draw_digits(folder / name, seed, light=name == "mnistm")
    return folder


@pytest.fixture(scope="module")
def started(data, tmp_path_factory):
    """What --refine starts from: a network of DANN."""
    out = tmp_path_factory.mktemp("dann")
    train("--data", data, "--out", out, *SMALL)
    return out / "best.pt"


def train(*args):
    p4_train.main([str(a) for a in ("--target", "svhn", *args)])


def load(out, name="last.pt"):
    return torch.load(out / name, weights_only=False)


def column(out, name):
    (path,) = (out / "csv").rglob("metrics.csv")
    with open(path, newline="") as f:
        return [float(row[name]) for row in csv.DictReader(f) if row.get(name)]


# ------------------------------------------------------------------------ the target's labels


def relabelled(data, folder, labels):
    """The same data with other labels of the target."""
    shutil.copytree(data, folder)
    (folder / "svhn/.cache.npz").unlink(missing_ok=True)
    lines = (folder / "svhn/train.csv").read_text().split()
    with open(folder / "svhn/train.csv", "w") as f:
        f.write("\n".join([lines[0], *(f"{line.split(',')[0]},{y}" for line, y in zip(lines[1:], labels))]) + "\n")
    return folder


@pytest.fixture(scope="module")
def with_other_labels(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    shuffled = np.random.RandomState(0).permutation(np.arange(120) % 10)
    return [relabelled(data, folder / "shuffled", shuffled), relabelled(data, folder / "none", [0] * 120)]


def same_weights(a, b):
    return all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())


@pytest.mark.parametrize(
    "mode", [["source"], ["dann"], ["dann", "--refine"], ["dann", "--refine", *PARTS]], ids=" ".join
)
def test_other_target_labels_give_the_same_weights_bit_for_bit(data, with_other_labels, started, tmp_path, mode):
    runs = []
    for i, folder in enumerate([data, *with_other_labels]):
        start = ["--start", started] if "--refine" in mode else []
        train("--data", folder, "--out", tmp_path / str(i), "--mode", *mode, *start, *SMALL)
        runs.append(tmp_path / str(i))
    for name in ("last.pt", "best.pt"):
        first, *others = [load(out, name) for out in runs]
        assert all(same_weights(first, other) and other["step"] == first["step"] for other in others), name
    accuracies = {load(out)["metrics"]["target_accuracy"] for out in runs}
    assert len(accuracies) > 1, "the labels were others, and only the report saw it"


def test_target_mode_does_learn_from_the_labels(data, with_other_labels, tmp_path):
    for i, folder in enumerate([data, with_other_labels[0]]):
        train("--data", folder, "--out", tmp_path / str(i), "--mode", "target", *SMALL)
    assert not same_weights(load(tmp_path / "0"), load(tmp_path / "1"))


def test_source_mode_asks_for_no_training_image_of_the_target(data, tmp_path, monkeypatch):
    asked, real = [], p4_train.load_digits
    monkeypatch.setattr(p4_train, "load_digits", lambda *a: asked.append(a[1:3]) or real(*a))
    train("--data", data, "--out", tmp_path, "--mode", "source", *SMALL)
    assert sorted(asked) == [("mnistm", "train"), ("mnistm", "val"), ("svhn", "val")]


# ------------------------------------------------------------------------ it learns, stops and resumes


@pytest.fixture(scope="module")
def trained(data, started, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train("--data", data, "--out", out, "--refine", "--start", started, *SMALL)
    return out


def test_a_stopped_training_resumes_to_the_same_weights(data, started, trained, tmp_path):
    options = ["--data", data, "--out", tmp_path, "--refine", "--start", started, *SMALL]
    train(*options, "--max-epochs", 1)
    assert load(tmp_path, "last.ckpt")["global_step"] == 3
    seconds = load(tmp_path)["metrics"]["seconds"]
    train(*options)
    once, twice = load(trained), load(tmp_path)
    assert once["step"] == twice["step"] == 6 and twice["metrics"]["seconds"] > seconds
    for key, value in once["state_dict"].items():
        assert torch.allclose(value.float(), twice["state_dict"][key].float(), atol=2e-3), key
    assert once["metrics"]["score"] == pytest.approx(twice["metrics"]["score"], abs=1e-3)


def test_a_training_does_not_go_on_with_other_options(data, tmp_path, capsys):
    options = ["--data", data, "--out", tmp_path, "--mode", "source", *SMALL]
    train(*options, "--plain", "--max-epochs", 1)
    for other in ([], ["--plain", "--oracle-selection"], ["--plain", "--adversary", 0.1]):
        with pytest.raises(SystemExit) as stop:
            train(*options, *other)
        assert stop.value.code == 2 and "last.ckpt" in capsys.readouterr().err.splitlines()[-1]


def test_it_learns_digits_of_a_domain_without_labels(data, tmp_path):
    steps = ["--steps", 90, "--epoch-steps", 30, "--batch-size", 16, "--lr", 5e-3, "--ema", 0.9]
    train("--data", data, "--out", tmp_path, "--mode", "dann", *SMALL, *steps)
    losses = column(tmp_path, "label_loss")
    assert losses[-1] < 0.9 * losses[0]
    assert load(tmp_path, "best.pt")["metrics"]["target_accuracy"] > 0.3


def test_lambda_rises_as_the_paper_says(data, tmp_path):
    steps = ["--steps", 40, "--epoch-steps", 20, "--adversary", 0.5, "--batch-size", 2]
    train("--data", data, "--out", tmp_path, "--mode", "dann", *SMALL, *steps)
    expected = [0.5 * (2 / (1 + math.exp(-10 * step / 40)) - 1) for step in (19, 39)]
    assert column(tmp_path, "lambda") == pytest.approx(expected, abs=1e-5)


def test_two_processes_train_one_network_that_infers(data, tmp_path):
    command = [sys.executable, ROOT / "p4_train.py", "--target", "svhn", "--data", data, "--out", tmp_path, *SMALL]
    done = subprocess.run([*map(str, command), "--devices", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path)["step"] == 6
    options = ["--checkpoint", tmp_path / "best.pt", "--gt", data / "svhn/train.csv", "--device", "cpu"]
    p4_infer.main([str(a) for a in (data / "svhn/data", tmp_path / "out.csv", *options)])


# ------------------------------------------------------------------------ the choice of the epoch


@pytest.mark.parametrize("mode", ["source", "dann", "target"])
def test_the_score_is_what_the_docstring_says(data, tmp_path, mode):
    train("--data", data, "--out", tmp_path, "--mode", mode, *SMALL)
    metrics = load(tmp_path)["metrics"]
    expected = {
        "source": metrics["labelled_accuracy"],
        "dann": metrics["labelled_accuracy"] + metrics["mutual_information"] / math.log(10),
        "target": 6,
    }
    assert metrics["score"] == pytest.approx(expected[mode]) and metrics["selection"] == "no target labels"
    assert load(tmp_path, "best.pt")["metrics"]["score"] == pytest.approx(max(column(tmp_path, "score")))


def test_oracle_selection_is_named_in_the_checkpoint(data, tmp_path):
    train("--data", data, "--out", tmp_path, "--oracle-selection", *SMALL)
    metrics = load(tmp_path, "best.pt")["metrics"]
    assert metrics["selection"] == "oracle" and metrics["score"] == metrics["target_accuracy"]
    assert metrics["target_accuracy"] == pytest.approx(max(column(tmp_path, "target_accuracy")))


def test_the_reported_accuracy_is_that_of_p4_infer(data, trained, tmp_path, capsys):
    _, labels = p4_train.load_digits(data, "svhn", "val", 0.2)
    names = [f"{i:05d}.png" for i in range(120) if is_validation(f"{i:05d}.png", 0.2)]
    with open(tmp_path / "gt.csv", "w", newline="") as f:
        csv.writer(f).writerows([("image_name", "label"), *zip(names, labels.tolist())])
    options = ["--checkpoint", trained / "last.pt", "--gt", tmp_path / "gt.csv", "--device", "cpu"]
    p4_infer.main([str(a) for a in (data / "svhn/data", tmp_path / "out.csv", *options)])
    assert f"accuracy {load(trained)['metrics']['target_accuracy']:.4f} (" in capsys.readouterr().out


# ------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("mode", ["source", "dann"])
def test_plain_trains_on_the_pictures_as_they_are(data, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(p4_train, "augment", lambda *args: pytest.fail("--plain augments"))
    train("--data", data, "--mode", mode, "--plain", "--out", tmp_path / "plain", *SMALL)
    with pytest.raises(pytest.fail.Exception):
        train("--data", data, "--mode", mode, "--out", tmp_path / "augmented", *SMALL)


def test_views_are_new_in_range_and_follow_the_seed():
    x = torch.rand(64, 3, 28, 28) * 2 - 1
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(augment(x, SOURCE_ZOOM, 0.5))
    a, b, c = views
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == x.shape and a.dtype == torch.float32 and a.abs().max() <= 1
    assert ((a - x).flatten(1).abs().amax(1) > 0.05).all()


def test_a_crowd_shows_the_neighbours_and_else_the_edge_goes_on():
    torch.manual_seed(0)
    x = -torch.ones(8, 3, 28, 28)
    x[0] = 1
    far = ((0.5, 0.5), (1.0, 1.0))
    assert torch.allclose(move(x, far, 0.0)[0], torch.ones(3, 28, 28))
    crowded = move(x, far, 1.0)[0]
    assert crowded[:, 14, 14].min() > 0.99 and crowded[:, :, 0].max() < -0.99 and crowded[:, :, -1].max() < -0.99


def test_views_are_not_mirrored():
    torch.manual_seed(0)
    x = -torch.ones(200, 3, 28, 28)
    x[:, :, 4:10, 4:10] = 1  # a square, upper left
    moved = move(x, SOURCE_ZOOM, 0.0).mean(1)
    for side in (moved, moved.transpose(1, 2)):
        assert (side[:, :14].sum((1, 2)) > side[:, 14:].sum((1, 2))).float().mean() > 0.95


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, says",
    [
        (["--target", "mnistm"], "--target mnistm: it is the source too"),
        (["--mode", "source", "--refine"], "--refine works on top of --mode dann"),
        (["--start", "net.pt"], "--start net.pt: add --refine"),
        (["--refine", "--start", "/nowhere/net.pt"], "/nowhere/net.pt: no such"),
        (["--refine=entropy", "--start", "/nowhere/net.pt"], "/nowhere/net.pt: no such"),
        (["--refine"], "runs/p4_svhn_dann/best.pt: no such checkpoint; train it without --refine"),
        (["--refine", "--start", ROOT / "checkpoints/p4_usps_dann.pt"], "of --mode dann --target usps; --refine takes"),
        (["--refine", "--start", ROOT / "checkpoints/p4_svhn_target.pt"], "of --mode target --target svhn"),
        (["--data", "/nowhere"], "/nowhere/mnistm/train.csv: not found"),
        (["--steps", 7, "--epoch-steps", 3], "--steps 7: take a multiple"),
    ],
)
def test_bad_options_are_one_line(data, options, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train("--data", data, "--out", tmp_path / "run", *SMALL, *options)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
