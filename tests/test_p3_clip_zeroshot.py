"""p3_clip_zeroshot.py with a tiny random CLIP: the pictures are named so that the accuracy is known beforehand."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import p3_clip
import p3_clip_zeroshot as zeroshot
from utils import UserError

clip_model = pytest.importorskip("clip.model")
NAMES = {"0": "willow_tree", "1": "clock", "2": "fox"}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    torch.manual_seed(0)
    network = clip_model.CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    for p in (network.visual.proj, network.text_projection, network.visual.class_embedding):
        torch.nn.init.normal_(p)
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data(clip_file, tmp_path_factory):
    """Twelve pictures, nine named by the class that this CLIP answers and three by the next class."""
    folder = tmp_path_factory.mktemp("clip_zeroshot")
    (folder / "id2label.json").write_text(json.dumps(NAMES))
    (folder / "val").mkdir()
    rng = np.random.RandomState(0)
    images = [Image.fromarray(rng.randint(0, 256, (2, 2, 3), dtype=np.uint8)).resize((32, 32)) for _ in range(12)]
    clip = p3_clip.load_clip(str(clip_file))
    texts = clip.texts(["A photo of willow tree.", "A photo of clock.", "A photo of fox."])
    answers = (clip.images(images) @ texts.T).argmax(1).tolist()
    for i, (image, answer) in enumerate(zip(images, answers)):
        image.save(folder / "val" / f"{answer if i < 9 else (answer + 1) % 3}_{i}.png")
    return folder


def run(monkeypatch, *options):
    """Runs the script; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["p3_clip_zeroshot.py", "--device", "cpu", *map(str, options)])
    try:
        zeroshot.main()
    except SystemExit as e:
        return e.code
    return 0


def test_accuracy_is_counted_and_examples_are_shown(data, clip_file, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--data", data, "--model", clip_file, "--out", tmp_path, "--batch-size", 5) == 0
    result = json.loads((tmp_path / "zeroshot.json").read_text())
    assert result["accuracy"] == 0.75 and result["images"] == 12
    assert "accuracy 75.00% (9 of 12)" in capsys.readouterr().out
    hits = {}
    for answer in result["answers"]:
        assert answer["right"] == (answer["truth"] == answer["answer"])
        hits.setdefault(answer["truth"], []).append(answer["right"])
    assert result["per_class"] == {name: sum(h) / len(h) for name, h in hits.items()}
    lines = (tmp_path / "examples.txt").read_text().splitlines()
    assert lines[0] == "right:" and lines[6] == "wrong:" and len(lines) == 2 + 5 + 3
    assert Image.open(tmp_path / "examples.png").size[0] > 600


def test_batch_size_does_not_change_an_answer(data, clip_file):
    clip = p3_clip.load_clip(str(clip_file))
    files, _, names = zeroshot.read_data(data)
    vectors = zeroshot.class_vectors(clip, list(names.values()), ["A photo of {object}."])
    one, all_at_once = zeroshot.classify(clip, files, vectors, 1), zeroshot.classify(clip, files, vectors, 12)
    assert one[0] == all_at_once[0] and one[1] == pytest.approx(all_at_once[1], abs=1e-5)


def test_the_ensemble_is_the_mean_of_the_templates_unit_vectors(clip_file):
    clip = p3_clip.load_clip(str(clip_file))
    assert len(set(zeroshot.ENSEMBLE)) == 18 and all("{object}" in t for t in zeroshot.ENSEMBLE)
    mean = sum(clip.texts([t.replace("{object}", "fox")])[0] for t in zeroshot.ENSEMBLE)
    vector = zeroshot.class_vectors(clip, ["fox"], zeroshot.ENSEMBLE)[0]
    assert torch.allclose(vector, mean / mean.norm(), atol=1e-6)


def test_underscores_of_class_names_are_spaces(data):
    assert zeroshot.read_data(data)[2][0] == "willow tree"


@pytest.mark.parametrize(
    "option, value, complaint",
    [("--prompt", "A photo.", "{object}"), ("--data", "none", "id2label.json"), ("--model", "none.pt", "none.pt")],
)
def test_bad_input_is_one_line_and_code_2(data, clip_file, tmp_path, monkeypatch, capsys, option, value, complaint):
    good = ["--data", data, "--model", clip_file, "--out", tmp_path / "out"]
    assert run(monkeypatch, *good, option, value) == 2
    error = capsys.readouterr().err
    assert complaint in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "zeroshot.json").exists()


def test_a_picture_without_a_known_class_is_named(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "id2label.json").write_text(json.dumps(NAMES))
    (tmp_path / "val/._0_0.png").write_bytes(b"what macOS leaves beside a picture")
    Image.new("RGB", (32, 32)).save(tmp_path / "val" / "0_0.png")
    assert len(zeroshot.read_data(tmp_path)[0]) == 1
    Image.new("RGB", (32, 32)).save(tmp_path / "val" / "7_0.png")
    with pytest.raises(UserError, match="7_0.png"):
        zeroshot.read_data(tmp_path)


def test_the_courses_folder_is_read_whole():
    if not os.environ.get("HW2_DATA"):
        pytest.skip("HW2_DATA is not set: the course's data is not here")
    files, ids, names = zeroshot.read_data(Path(os.environ["HW2_DATA"]) / "clip_zeroshot")
    assert len(files) == 2500 and len(names) == 50 and sorted(set(ids)) == list(range(50))
