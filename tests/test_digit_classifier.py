"""digit_classifier.py and classifiers.py: the course's command line, its judges, and what --json says."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import script
from PIL import Image
from test_digits import write_domain

import classifiers
import digit_classifier
from classifiers import DigitResNet, LeNet, load_classifier, predict, resnet34_svhn
from digit_classifier import read_folder, svhn_judge
from utils import UserError, load_checkpoint


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A folder of two domains, 3 pictures a digit, and classifiers: LeNet always says 4, DigitResNet always 7."""
    folder = tmp_path_factory.mktemp("judged")
    for domain in ("mnistm", "svhn"):
        (folder / domain).mkdir()
        for i in range(30):
            name = f"{i % 10}_{i // 10 + 1:03d}.png"
            Image.fromarray(np.full((28, 28, 3), 8 * i, np.uint8)).save(folder / domain / name)
    for net, answer, name in ((LeNet(), 4, "lenet.pth"), (DigitResNet(), 7, "resnet.pth")):
        last = net.fc3 if isinstance(net, LeNet) else net.layers[-1]
        torch.nn.init.zeros_(last.weight)
        last.bias.data = torch.nn.functional.one_hot(torch.tensor(answer), 10).float()
        torch.save({"state_dict": net.state_dict()}, folder / name)
    return folder


def test_the_course_s_command_line_and_output_lines(judged):
    judges = ["--checkpoint", judged / "lenet.pth", "--svhn-checkpoint", judged / "resnet.pth"]
    done = script("digit_classifier.py", "--folder", judged, *judges)
    lines = done.stdout.splitlines()
    assert "MNIST-M acc = 0.1000 (correct/total = 3/30)" in lines
    assert "SVHN acc = 0.1000 (correct/total = 3/30)" in lines
    assert lines[-1] == "acc = 0.1000"
    assert sum("judged by" in line for line in lines) == 2


def test_labels_are_the_first_character_of_the_name(judged, tmp_path):
    for domain in ("mnistm", "svhn"):
        (tmp_path / domain).mkdir()
        Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / domain / "4_001.png")
        (tmp_path / domain / "._4_001.png").write_bytes(b"what macOS leaves beside a picture")
    judges = ["--checkpoint", judged / "lenet.pth", "--svhn-checkpoint", judged / "lenet.pth"]
    done = script("digit_classifier.py", "--folder", tmp_path, *judges)
    assert done.stdout.splitlines()[-1] == "acc = 1.0000"


def test_grading_errors_name_the_file(judged, tmp_path):
    with pytest.raises(UserError, match="no pictures in it"):
        read_folder(tmp_path)
    (tmp_path / "4_001.png").write_bytes(b"")
    with pytest.raises(UserError, match="4_001.png: not a readable picture"):
        read_folder(tmp_path)
    (tmp_path / "4_001.png").rename(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png: the name must begin with its digit"):
        read_folder(tmp_path)
    options = ["--checkpoint", judged / "lenet.pth", "--svhn-checkpoint", judged / "resnet.pth"]
    assert "mnistm: no pictures in it" in script("digit_classifier.py", "--folder", tmp_path, *options, code=2).stderr


def test_a_classifier_is_told_apart_by_its_keys(judged):
    assert isinstance(load_classifier(judged / "lenet.pth"), LeNet)
    assert isinstance(load_classifier(judged / "resnet.pth"), DigitResNet)
    black = torch.zeros(3, 3, 28, 28, dtype=torch.uint8)
    assert predict(load_classifier(judged / "lenet.pth"), black).tolist() == [4] * 3
    torch.save({"weights": 1}, judged / "bad.pth")
    with pytest.raises(UserError, match="not a checkpoint of a digit classifier"):
        load_classifier(judged / "bad.pth")


def test_a_classifier_learns(tmp_path):
    """Pictures whose grey level is their label: a few epochs are enough to do better than chance."""
    folder = tmp_path / "mnistm"
    write_domain(folder, count=400, flat=True)
    options = ["--out", tmp_path / "c.pth", "--epochs", 30, "--batch-size", 32]
    done = script("digit_classifier.py", "--train", "mnistm", "--data", tmp_path, *options)
    assert "held-back images of mnistm; wrote" in done.stdout.splitlines()[-1]
    assert isinstance(load_classifier(tmp_path / "c.pth"), LeNet)
    assert load_checkpoint(tmp_path / "c.pth")["accuracy"] > 0.3


# ------------------------------------------------------------------------ the course's SVHN classifier


def test_the_course_s_svhn_classifier_is_torchvision_s_resnet34_for_small_pictures():
    """timm's network against torchvision's; the digest is of the keys and shapes that detectors 0.1.8 registers."""
    pytest.importorskip("timm")
    peer = torchvision.models.resnet34(num_classes=10)
    peer.conv1, peer.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    ours = resnet34_svhn().eval()
    layout = "\n".join(f"{key} {tuple(value.shape)}" for key, value in ours.state_dict().items())
    assert layout == "\n".join(f"{key} {tuple(value.shape)}" for key, value in peer.state_dict().items())
    digest = "bd0ad046a8cb88a9bb8347ad86804e08bc9a6cfe4ed8248c3c67fe0c7b5e3c03"
    assert hashlib.sha256(layout.encode()).hexdigest() == digest
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), peer.eval()(x), atol=1e-5)


@pytest.fixture(scope="module")
def course_judge(tmp_path_factory):
    """A file as the hub has it: a state dict alone. This one always says 2."""
    pytest.importorskip("timm")
    net = resnet34_svhn()
    torch.nn.init.zeros_(net.fc.weight)
    net.fc.bias.data = torch.nn.functional.one_hot(torch.tensor(2), 10).float()
    path = tmp_path_factory.mktemp("hub") / "pytorch_model.bin"
    torch.save(net.state_dict(), path)
    return path


def test_a_file_of_the_course_s_svhn_classifier_judges(judged, course_judge, tmp_path):
    options = ["--checkpoint", judged / "lenet.pth", "--svhn-checkpoint", course_judge, "--json", tmp_path / "d.json"]
    done = script("digit_classifier.py", "--folder", judged, *options)
    assert f"SVHN judged by {course_judge}" in done.stdout
    svhn = json.loads((tmp_path / "d.json").read_text())["domains"][1]
    assert (svhn["pictures"], svhn["correct"], svhn["judge"]) == (30, 3, str(course_judge))
    assert svhn["by_digit"] == {str(d): float(d == 2) for d in range(10)}
    assert [w["file"] for w in svhn["wrong"][:4]] == ["0_001.png", "0_002.png", "0_003.png", "1_001.png"]
    assert all(w["answer"] == 2 and w["digit"] == int(w["file"][0]) and 0.1 < w["sure"] < 1 for w in svhn["wrong"])


def test_svhn_is_judged_by_the_course_s_network_where_the_hub_has_it_and_by_ours_where_not(course_judge, monkeypatch):
    monkeypatch.setattr(digit_classifier, "fetch_resnet34_svhn", lambda: course_judge)
    model, name = svhn_judge(None, "cpu")
    assert type(model).__name__ == "ResNet" and "the course's judge" in name

    def closed(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(digit_classifier, "fetch_resnet34_svhn", classifiers.fetch_resnet34_svhn)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", closed)
    monkeypatch.setattr("urllib.request.urlopen", closed)
    model, name = svhn_judge(None, "cpu")
    assert isinstance(model, DigitResNet) and "(the course's resnet34_svhn cannot be fetched: OSError)" in name
