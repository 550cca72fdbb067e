"""evaluation/ and p3_clip.py on a tiny random CLIP: weights in every layout, the grader's scores and its refusals."""

import importlib.util
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_ldm_checkpoint import Runs

import p3_clip
import p3_concepts
from utils import UserError, open_image

ROOT = Path(__file__).resolve().parent.parent
clip_model = pytest.importorskip("clip.model")


def tiny_network():
    """OpenAI's ViT in small: 32x32 pictures, one layer, 64 channels, 16-dimensional space."""
    torch.manual_seed(0)
    network = clip_model.CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1).eval()
    for p in (network.visual.proj, network.text_projection, network.visual.class_embedding):
        torch.nn.init.normal_(p)
    return network


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.fixture(scope="module")
def clip_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    torch.save(network.state_dict(), path)
    return path


def pictures(n, size=40, seed=0):
    rng = np.random.RandomState(seed)
    return [Image.fromarray(rng.randint(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


TEXTS = ["a dog", "the streets of Paris in the style of David Revoy"]


# ------------------------------------------------------------------------------------------------ weights


def test_a_state_dict_gives_the_vectors_of_the_network(network, clip_file):
    clip = p3_clip.load_clip(str(clip_file))
    batch = torch.stack([clip.preprocess(p) for p in pictures(3)])
    with torch.no_grad():
        want = network.encode_image(batch)
    assert torch.allclose(clip.images(pictures(3)), want / want.norm(dim=1, keepdim=True), atol=1e-6)
    assert clip.logit_scale == pytest.approx(network.logit_scale.exp().item())


def test_a_torchscript_archive_gives_the_vectors_of_its_state_dict(network, clip_file, tmp_path):
    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.int32))
    torch.jit.save(torch.jit.trace(network, example), str(tmp_path / "jit.pt"))
    a, b = p3_clip.load_clip(str(tmp_path / "jit.pt")), p3_clip.load_clip(str(clip_file))
    assert torch.equal(a.images(pictures(2)), b.images(pictures(2)))
    assert torch.equal(a.texts(TEXTS), b.texts(TEXTS))


def test_a_transformers_folder_gives_the_vectors_that_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(1)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = p3_clip.load_clip(str(tmp_path))
    tokens = p3_clip.openai_clip.tokenize(TEXTS).long()
    batch = torch.stack([ours.preprocess(p) for p in pictures(2)])
    with torch.no_grad():
        out = theirs(input_ids=tokens, pixel_values=batch)
    assert torch.allclose(ours.texts(TEXTS), out.text_embeds, atol=1e-5)
    assert torch.allclose(ours.images(pictures(2)), out.image_embeds, atol=1e-5)


def test_a_hostile_torchscript_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/data.pkl", pickle.dumps(Runs(os.system, f"touch {tmp_path}/pwned"), protocol=2))
    with pytest.raises(UserError, match="evil.pt: refused, it would run"):
        p3_clip.load_clip(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "pwned").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the weights of a CLIP model"):
        p3_clip.load_clip(str(tmp_path / "other.pt"))


def test_without_a_network_a_published_name_gives_one_clear_line(monkeypatch, tmp_path):
    def closed(*args):
        raise OSError("network is unreachable")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(p3_clip.openai_clip.clip, "_download", closed)
    with pytest.raises(UserError, match="ViT-B/32 is not in the cache .*--clip"):
        p3_clip.load_clip("ViT-B/32")


# ------------------------------------------------------------------------------------------------ scores


def test_the_best_five_of_25_are_those_with_the_largest_image_plus_two_and_a_half_text():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.rand(25, generator=generator) * 100, torch.rand(25, generator=generator) * 40
    order = sorted(range(25), key=lambda i: -(image[i] + 2.5 * text[i]))[:5]
    want = sum(image[i] for i in order) / 5, sum(text[i] for i in order) / 5
    assert p3_clip.best_fifth(image, text) == pytest.approx([float(w) for w in want])


def test_image_score_is_100_times_the_mean_cosine(clip_file):
    clip = p3_clip.load_clip(str(clip_file))
    source = pictures(1)
    assert float(p3_clip.image_scores(clip, source, source)) == pytest.approx(100, abs=1e-3)
    scores = p3_clip.image_scores(clip, pictures(1), pictures(4, seed=5))
    a, b = clip.images(pictures(1)), clip.images(pictures(4, seed=5))
    assert float(scores) == pytest.approx(25 * float((a * b).sum()), abs=1e-3)


# ------------------------------------------------------------------------------------------------ the grader


@pytest.fixture
def graded(tmp_path):
    """A JSON of one concept with two prompts, its sources, and 25 pictures a prompt."""
    entry = {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["a <new1>", "two <new1>"],
        "prompt_4_clip_eval": ["a dog", "two dogs"],
        "baseline": [[-100, -100], [101, 0]],
    }
    (tmp_path / "input.json").write_text(json.dumps({"0": entry}))
    save_all(tmp_path / "0", pictures(3, seed=9))
    for i in range(2):
        save_all(tmp_path / f"out/0/{i}", pictures(25, seed=i))
    return tmp_path


def save_all(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")


def run_grader(folder, clip_file, monkeypatch):
    options = {"json_path": folder / "input.json", "input_dir": folder, "output_dir": folder / "out"}
    options["json"] = folder / "out/scores.json"
    return run_script("grade_hw2_3", {**options, "clip": clip_file}, monkeypatch)


def run_script(name, options, monkeypatch):
    """Runs a script of evaluation/; returns its exit code."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"evaluation/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [name, "--device=cpu", *(f"--{k}={v}" for k, v in options.items())])
    try:
        script.main()
    except SystemExit as e:
        return e.code
    return 0


def test_the_grader_prints_the_scores_and_holds_them_against_the_baselines(graded, clip_file, monkeypatch, capsys):
    assert run_grader(graded, clip_file, monkeypatch) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    clip = p3_clip.load_clip(str(clip_file))
    files = [graded / f"out/0/1/{i}.png" for i in range(25)]
    want = p3_clip.best_fifth(
        p3_clip.image_scores(clip, files, p3_concepts.image_files(graded / "0")),
        p3_clip.text_scores(clip, files, "two dogs"),
    )
    assert lines[0] == 'source 0 prompt 0 "a <new1>":' and lines[3].startswith("PASS")
    assert lines[5:8] == [f"CLIP Image Score: {want[0]:.2f}", f"CLIP Text Score: {want[1]:.2f}", lines[7]]
    assert lines[7] == "Fail! Baseline is 101.00/0.00"
    assert lines[8:] == ["You have passed 1/2 cases", "1 of 2 prompts reach both baselines"]
    told = json.loads((graded / "out/scores.json").read_text())["prompts"]
    assert [prompt["passed"] for prompt in told] == [True, False]
    assert (told[1]["image"], told[1]["text"]) == pytest.approx(want)
    counted = [(shown["image"], shown["text"]) for shown in told[1]["pictures"] if shown["counts"]]
    assert np.mean(counted, axis=0) == pytest.approx(want) and len(counted) == 5
    assert all((graded / "out" / file).is_file() for file in [*told[1]["sources"], told[1]["pictures"][24]["file"]])


def test_files_that_are_no_pictures_do_not_count(graded, clip_file, monkeypatch):
    for name in (".DS_Store", "notes.txt", "26.webp"):
        (graded / "out/0/0" / name).write_bytes(b"no picture")
    picture = graded / "out/0/1/0.png"
    Image.open(picture).save(picture.with_suffix(".gif"))
    picture.unlink()
    assert run_grader(graded, clip_file, monkeypatch) == 0


def test_the_courses_functions_score_a_folder_as_the_grader_does(graded, clip_file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    from clip_image_score import calculate_clip_image_scores_folder
    from clip_text_score import calculate_clip_text_scores_folder

    clip, out = p3_clip.load_clip(str(clip_file)), graded / "out/0/0"
    files = p3_concepts.image_files(out)
    image = calculate_clip_image_scores_folder(str(out), str(graded / "0"), str(clip_file), "cpu")
    text = calculate_clip_text_scores_folder(str(out), "a dog", str(clip_file), "cpu")
    sources = p3_concepts.image_files(graded / "0")
    assert image == p3_clip.image_scores(clip, files, sources).tolist() and len(image) == 25
    assert text == p3_clip.text_scores(clip, files, "a dog").tolist()


def test_the_scores_of_one_folder_are_printed(graded, clip_file, monkeypatch, capsys):
    clip, out = p3_clip.load_clip(str(clip_file)), graded / "out/0/0"
    files = p3_concepts.image_files(out)
    image = p3_clip.image_scores(clip, files, p3_concepts.image_files(graded / "0")).mean()
    options = {"output_dir": out, "clip": clip_file}
    assert run_script("clip_image_score", {**options, "input_dir": graded / "0"}, monkeypatch) == 0
    assert f"CLIP Image Score: {image:.2f} (mean of 25 images against 3)" in capsys.readouterr().out
    text = p3_clip.text_scores(clip, files, "a dog").mean()
    assert run_script("clip_text_score", {**options, "prompt": "a dog"}, monkeypatch) == 0
    assert f"CLIP Text Score: {text:.2f} (mean of 25 images)" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["one too few", "one too many"])
def test_any_other_number_than_25_pictures_is_refused(graded, clip_file, change, monkeypatch, capsys):
    folder = graded / "out/0/1"
    if change == "one too few":
        (folder / "7.png").unlink()
    else:
        pictures(1)[0].save(folder / "25.png")
    assert run_grader(graded, clip_file, monkeypatch) == 2
    complaint = capsys.readouterr().err
    assert str(folder) in complaint and "exactly 25" in complaint and len(complaint.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------ JSON and pictures


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "not JSON"),
        ("[1]", "expected"),
        ('{"0": {"src_image": "dog", "prompt": ["a"]}}', "token_name"),
        ('{"0": {"src_image": "dog", "token_name": "<a>", "prompt": "a"}}', "prompt"),
        ('{"0": {"src_image": "dog", "token_name": "<a>", "prompt": ["a", 3]}}', "must be a text"),
        (
            '{"0": {"src_image": "dog", "token_name": "<a>", "prompt": ["a", "b"], "baseline": [[1, 2]]}}',
            "2 prompts but 1",
        ),
        (
            '{"0": {"src_image": "dog", "token_name": "<a>", "prompt": ["a"], "train_captions": ["dog"]}}',
            "each with a {}",
        ),
        (
            '{"0": {"src_image": "d", "token_name": "<a>", "prompt": ["a"], "train_captions": {"0.jpg": "a {}"}}}',
            "list",
        ),
        ('{"0": {"src_image": "d", "token_name": "<a>", "prompt": ["a"], "validation_prompts": {"d": "a d"}}}', "a {}"),
        ('{"../x": {"src_image": "dog", "token_name": "<a>", "prompt": ["a"]}}', "cannot name a folder"),
    ],
)
def test_a_bad_json_is_refused_by_name(tmp_path, text, complaint):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        p3_concepts.read_concepts(tmp_path / "bad.json")
    assert "bad.json" in str(error.value)


def test_placeholders_are_found_in_order():
    assert p3_concepts.placeholders("A <new1> next to a <new-2>, x < y > z.") == ["<new1>", "<new-2>"]


def test_pictures_are_turned_upright_by_their_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pictures(1)[0].resize((20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(UserError, match="broken.jpg"):
        open_image(tmp_path / "broken.jpg")
