"""p3_invert.py and p3_textual_inversion.py: an embedding is learned, and nothing else, on a tiny Stable Diffusion."""

import json
import sys
import time

import numpy as np
import p3_tiny
import pytest
import torch
from PIL import Image

import p3_concepts
import p3_invert
import p3_model
import p3_textual_inversion
from p3_invert import OBJECT_CAPTIONS, Examples, Inversion, Recipe
from p3_model import read_embeddings
from utils import UserError, load_checkpoint

TINY = Recipe(steps=4, batch=2, save_every=2, preview_every=0, size=64, crops=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return p3_tiny.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(files):
    return p3_tiny.load(files)


def random_moments(n=3, std=0.1):
    mean = torch.randn(n, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return torch.cat([mean, torch.full_like(mean, std)], dim=1)


def concept(word="dog", prompts=("a <new1>",)):
    return p3_concepts.Concept("0", word, "<new1>", list(prompts), [], [])


def inversion(model, work, recipe=TINY, word="dog"):
    return Inversion(model, p3_model.learned_tokens(model), concept(word), recipe, work)


def run(model, work, recipe=TINY, deadline=None):
    """Trains <new1> on random latents; returns (steps done, vectors)."""
    moments, training = random_moments(), inversion(model, work, recipe)
    training.learn(Examples(moments, moments[:1], [OBJECT_CAPTIONS]), deadline)
    return len(training.losses), training.vectors.detach().clone()


# ------------------------------------------------------------------------------------------------ learning


class ExactDenoiser(torch.nn.Module):
    """The optimal network where x_0 ~ N(g(c), 0.3^2), g linear: eps = s (x_t - a g) / (s^2 + 0.09 a^2)."""

    def __init__(self, alphas_cumprod):
        super().__init__()
        self.log_abar = alphas_cumprod.log()
        self.g = torch.nn.Linear(32, 4, bias=False).requires_grad_(False)
        self.g.weight.data.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, x, t, context):
        low, share = t.long(), t.float().frac()  # the sampler's times are fractions
        log_abar = torch.lerp(self.log_abar[low], self.log_abar[(low + 1).clamp(max=999)], share)
        abar = log_abar.exp().view(-1, 1, 1, 1)
        g = self.g(context.mean(1))[:, :, None, None]
        return (1 - abar).sqrt() * (x - abar.sqrt() * g) / (1 - abar + 0.09 * abar)


def test_an_embedding_planted_as_the_truth_is_recovered(model, tmp_path):
    """Latents generated with the word "red" are inverted from the word "green"; the loss falls to that of "red"."""
    model.model.diffusion_model = ExactDenoiser(model.alphas_cumprod)
    cond = model.get_learned_conditioning(["a photo of a red"])
    x_T = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latents, _ = p3_model.DPMSolverSampler(model).sample(20, 8, [4, 8, 8], cond, x_T=x_T, verbose=False)
    moments = torch.stack([latents / model.scale_factor, torch.zeros_like(latents)], dim=1)
    captions = OBJECT_CAPTIONS[:1]
    training = inversion(model, tmp_path, TINY._replace(steps=400, batch=4, lr=0.03 / 4, save_every=400), "green")

    def loss(word):
        return p3_invert.held_back_loss(model, moments[:2], [captions[0].format(word)] * 2, 8)

    start, planted = loss("<new1>"), loss("red")
    training.learn(Examples(moments[2:], moments[:2], [captions] * 2))
    assert start > 1.3 * planted  # there was something to learn
    assert loss("<new1>") < 1.05 * planted


def test_the_loss_on_the_concepts_pictures_falls(model, tmp_path):
    """With the real U-Net, its weights random: the vectors find what its prediction gains by."""
    moments = random_moments()
    training = inversion(model, tmp_path, TINY._replace(steps=120, batch=4, lr=0.1 / 4, save_every=120))
    before = p3_invert.held_back_loss(model, moments, ["a photo of a <new1>"] * 3, 8)
    training.learn(Examples(moments, moments, [OBJECT_CAPTIONS[:1]] * 3))
    after = p3_model.read_embeddings(tmp_path / "step_00120.safetensors")[1]["scores"]["held_back_loss"]
    assert after < before - 0.002


def test_only_the_new_rows_change_bit_for_bit(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = p3_invert.initial(p3_model.learned_tokens(model), "dog")
    _, vectors = run(model, tmp_path)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not torch.equal(vectors, start)


def test_every_one_of_several_vectors_moves(model, tmp_path):
    start = p3_invert.initial(p3_model.learned_tokens(model), "dog", 3)
    _, vectors = run(model, tmp_path, TINY._replace(vectors=3))
    assert vectors.shape == (3, 32) and bool(((vectors - start).abs() > 0).all())


def test_the_first_step_moves_by_the_learning_rate_times_pictures_a_step(model, tmp_path):
    start = p3_invert.initial(p3_model.learned_tokens(model), "dog")
    _, vectors = run(model, tmp_path, TINY._replace(steps=1, lr=1e-3, batch=2))
    assert torch.allclose((vectors - start).abs(), torch.tensor(2e-3), rtol=1e-2)


# ------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_training_equals_an_uninterrupted_one(files, tmp_path):
    _, whole = run(p3_tiny.load(files), tmp_path / "whole", TINY._replace(steps=5))
    run(p3_tiny.load(files), tmp_path / "parts", TINY._replace(steps=2))
    steps, resumed = run(p3_tiny.load(files), tmp_path / "parts", TINY._replace(steps=5))
    assert steps == 5 and torch.equal(resumed, whole)
    for name in ("losses.csv", "step_00004.safetensors", "step_00005.safetensors"):
        a, b = tmp_path / "whole" / name, tmp_path / "parts" / name
        if name.endswith(".csv"):
            assert a.read_text() == b.read_text()
        else:
            assert torch.equal(*(p3_model.read_embeddings(path)[0]["<new1>"] for path in (a, b)))


def test_out_of_time_a_training_stops_with_its_state_saved(model, tmp_path):
    steps, vectors = run(model, tmp_path, deadline=time.monotonic() - 1)
    assert steps == 1
    assert torch.equal(load_checkpoint(tmp_path / "state.pt")["vectors"], vectors)
    assert torch.equal(p3_model.read_embeddings(tmp_path / "step_00001.safetensors")[0]["<new1>"], vectors)


def test_a_training_with_other_settings_or_captions_is_not_mixed_in(files, tmp_path, monkeypatch):
    run(p3_tiny.load(files), tmp_path)
    with pytest.raises(UserError, match="other lr;"):
        run(p3_tiny.load(files), tmp_path, TINY._replace(lr=1e-4))
    monkeypatch.setitem(globals(), "OBJECT_CAPTIONS", ["a {}"])
    with pytest.raises(UserError, match="other captions;"):
        run(p3_tiny.load(files), tmp_path)


# ------------------------------------------------------------------------------------------------ data and captions


def test_a_style_is_told_from_an_object_by_the_prompts():
    assert p3_invert.kind_of(concept(prompts=["A city in the style of <new1>."])) == "style"
    assert p3_invert.kind_of(concept(prompts=["A <new1> in the style of Monet."])) == "object"


def test_writing_and_clocks_are_not_mirrored():
    assert p3_invert.may_flip(concept("dog")) and p3_invert.may_flip(concept("David Revoy"))
    assert not p3_invert.may_flip(concept("wall clock")) and not p3_invert.may_flip(concept("Shop Sign"))


def test_crops_are_in_range_upright_and_every_other_one_mirrored(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], (90, 1, 3))  # brighter to the right
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: upright it is brighter to the left
    Image.fromarray(ramp).save(tmp_path / "a.png", exif=exif)
    crops = p3_invert.crops_of(tmp_path / "a.png", 64, 4, True, torch.Generator().manual_seed(0))
    assert crops.shape == (4, 3, 64, 64) and crops.min() >= -1 and crops.max() <= 1
    brighter_left = crops[..., :32].mean(dim=(1, 2, 3)) > crops[..., 32:].mean(dim=(1, 2, 3))
    assert brighter_left.tolist() == [True, False, True, False]


def test_latents_are_sampled_anew_from_moments_encoded_once(model, tmp_path):
    json_file = p3_tiny.write_concepts(tmp_path)
    pictures = p3_concepts.image_files(json_file.parent / "0")
    train, held = p3_invert.encode(model, pictures, TINY, True)
    assert train.shape == (4, 2, 4, 8, 8) and held.shape == (2, 2, 4, 8, 8)
    again, _ = p3_invert.encode(model, pictures, TINY, True)
    assert torch.equal(train, again)
    t, draw = torch.tensor([1]), torch.Generator().manual_seed(0)
    losses = {float(p3_invert.eps_loss(model, train[:1], t, ["a dog"], draw)) for _ in range(2)}
    assert len(losses) == 2


# ------------------------------------------------------------------------------------------------ choice


class FakeClip:
    name, network = "fake", torch.nn.Linear(2, 2)

    def images(self, pictures):
        return torch.zeros(len(pictures), 2)


def test_the_lowest_loss_is_chosen_and_with_a_clip_the_best_score(model, tmp_path, monkeypatch):
    training = inversion(model, tmp_path)
    tokens = training.tokens
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4)):
        tokens["<new1>"].data.fill_(step)
        tokens.save(tmp_path / f"step_{step:05d}.safetensors", step=step, scores={"held_back_loss": loss})
    step, vectors, scores, why = training.choose([])
    assert step == 2 and float(vectors[0, 0]) == 2 and scores == {"held_back_loss": 0.3} and "eps loss" in why

    training.recipe = TINY._replace(average=2)
    step, vectors, *_ = training.choose([])
    assert step == 2 and float(vectors[0, 0]) == 1.5  # of steps 1 and 2
    training.recipe = TINY

    grades = {1: (80, 30), 2: (79, 30), 3: (75, 33)}  # image + 2.5 text: 155, 154, 157.5
    calls = []

    def grade(clip, sources):
        calls.append(int(tokens["<new1>"][0, 0]))
        return grades[calls[-1]]

    monkeypatch.setattr(training, "grade", grade)
    for _ in range(2):  # the second time from scores.json
        step, vectors, scores, why = training.choose([], FakeClip())
        assert step == 3 and float(vectors[0, 0]) == 3 and "grader" in why
        assert (scores["image"], scores["text"]) == (75, 33)
    assert calls == [2, 3, 1]  # the best held-back loss first

    monkeypatch.setattr(FakeClip, "network", torch.nn.Linear(2, 2))  # other weights under the same name
    training.choose([], FakeClip())
    assert calls == [2, 3, 1] * 2
    monkeypatch.setattr(p3_invert, "STYLE_VALIDATION", ["{} at sea"])  # as another JSON may say
    monkeypatch.setattr(p3_invert, "OBJECT_VALIDATION", ["{} at sea"])
    training.choose([], FakeClip())
    assert calls == [2, 3, 1] * 3


@pytest.mark.parametrize(
    "given, asked",
    [
        ({}, ["A lighthouse on a cliff in the style of dog."]),
        ({"validation_prompts": ["a {} on ice"]}, ["a dog on ice"]),
        ({"validation_prompts": {"a {} on ice": "ice", "{} at sea": "the sea"}}, ["ice", "the sea"]),
    ],
)
def test_the_clip_is_asked_for_the_texts_of_the_validation_prompts(model, tmp_path, monkeypatch, given, asked):
    entry = {"src_image": "dog", "token_name": "<new1>", "prompt": ["a city in the style of <new1>"], **given}
    (tmp_path / "input.json").write_text(json.dumps({"0": entry}))
    told, drawn = [], []

    def generate(model, prompt, indices, **settings):
        drawn.append((prompt, len(indices)))
        return torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(p3_invert, "generate", generate)
    monkeypatch.setattr(p3_invert, "text_scores", lambda clip, seen, text: told.append(text) or torch.ones(len(seen)))
    monkeypatch.setattr(p3_invert, "image_scores", lambda clip, seen, sources: torch.ones(len(seen)))
    monkeypatch.setattr(p3_invert, "STYLE_VALIDATION", p3_invert.STYLE_VALIDATION[:1])
    (concept,) = p3_concepts.read_concepts(tmp_path / "input.json")
    monkeypatch.setattr(p3_invert, "fitting_batch", lambda model, size: 5)
    training = Inversion(
        model, p3_model.learned_tokens(model), concept, TINY._replace(validation_pictures=7), tmp_path / "work"
    )
    training.grade(FakeClip(), None)
    assert told == asked and [n for _, n in drawn] == [5, 2] * len(asked) and all("<new1>" in p for p, _ in drawn)


# ------------------------------------------------------------------------------------------------ the script


def script(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["p3_textual_inversion.py", "--device", "cpu", *map(str, options)])
    try:
        p3_textual_inversion.main()
    except SystemExit as e:
        return e.code
    return 0


@pytest.fixture
def task(files, tmp_path):
    """The options of a run on two concepts."""
    json_file = p3_tiny.write_concepts(tmp_path / "data")
    folders = ["--data", json_file.parent, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    small = [
        "--size",
        64,
        "--steps",
        2,
        "--save-every",
        1,
        "--batch-size",
        2,
        "--crops",
        2,
        "--precision",
        "fp32",
        "--validation-pictures",
        2,
    ]
    return ["--json", json_file, "--config", files[0], "--ckpt", files[1], *folders, *small]


def test_the_script_learns_all_concepts_and_chooses_by_a_clip(task, tmp_path, monkeypatch, capsys):
    clip_model = pytest.importorskip("clip.model")
    torch.manual_seed(0)
    torch.save(clip_model.CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1).state_dict(), tmp_path / "clip.pt")
    for kind in ("OBJECT", "STYLE"):
        monkeypatch.setattr(p3_invert, f"{kind}_VALIDATION", getattr(p3_invert, f"{kind}_VALIDATION")[:1])
    assert script(monkeypatch, *task, "--clip", tmp_path / "clip.pt", "--preview-every", 2) == 0
    said = capsys.readouterr().out.strip().splitlines()[-2:]
    for line, token, kind in zip(said, ("new1", "new2"), ("object", "style")):
        assert (
            line.startswith(f"<{token}> ({kind}): step")
            and "the grader's score" in line
            and f"{token}.safetensors" in line
        )
        vectors, told = p3_model.read_embeddings(tmp_path / "out" / f"{token}.safetensors")
        assert vectors[f"<{token}>"].shape == (1, 32) and set(told["scores"]) == {"held_back_loss", "image", "text"}
        assert told["step"] in (1, 2) and told["base_model"]
        assert Image.open(tmp_path / "work" / token / "preview_00002.png").size == (2 * 64 + 6, 2 * 64 + 6)
    assert p3_model.read_embeddings(tmp_path / "out/new2.safetensors")[1]["init_word"] == "David Revoy"


def test_the_json_may_bring_captions_of_its_own(task, tmp_path, monkeypatch):
    entries = json.loads(task[1].read_text())
    entries["0"].update(train_captions=["an emoji of {}"], init_word="cat")
    task[1].write_text(json.dumps(entries))
    said, learn = {}, Inversion.learn
    monkeypatch.setattr(Inversion, "learn", lambda i, e, end: said.update({i.token: e.captions}) or learn(i, e, end))
    assert script(monkeypatch, *task, "--clip", "none", "--preview-every", 0) == 0
    assert said == {"<new1>": [("an emoji of {}",)] * 2, "<new2>": [p3_invert.STYLE_CAPTIONS] * 2}
    starts = [read_embeddings(tmp_path / f"out/new{n}.safetensors")[1]["init_word"] for n in (1, 2)]
    assert starts == ["cat", "David Revoy"]


def test_captions_of_one_picture_are_said_of_that_picture_alone(model, tmp_path, monkeypatch):
    """Picture 0 is all zeros, picture 1 all ones, two crops each: the prompts of a step follow the latents."""
    moments = torch.zeros(4, 2, 4, 8, 8)
    moments[2:, 0] = 1
    said, loss = [], p3_invert.eps_loss
    monkeypatch.setattr(
        p3_invert,
        "eps_loss",
        lambda m, x, t, prompts, draw: (
            said.extend(zip(x[:, 0].mean((1, 2, 3)).tolist(), prompts)),
            loss(m, x, t, prompts, draw),
        )[1],
    )
    captions = [["a red {}", "one red {}"], ["a green {}"]]
    inversion(model, tmp_path, TINY._replace(steps=10)).learn(Examples(moments, moments[::2], captions))
    assert set(said) == {(0.0, "a red <new1>"), (0.0, "one red <new1>"), (1.0, "a green <new1>")}


def test_a_picture_that_the_captions_leave_out_is_named(task, monkeypatch, capsys):
    entries = json.loads(task[1].read_text())
    entries["0"]["train_captions"] = {"00.jpg": ["a {}, in red"]}
    task[1].write_text(json.dumps(entries))
    assert script(monkeypatch, *task, "--clip", "none") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "train_captions" in error and "01.jpg" in error


def test_only_and_init_word_are_taken(task, tmp_path, monkeypatch, capsys):
    options = ["--clip", "none", "--only", "0", "--init-word", "corgi, dog", "--vectors", 2, "--preview-every", 0]
    assert script(monkeypatch, *task, *options) == 0
    vectors, told = p3_model.read_embeddings(tmp_path / "out/new1.safetensors")
    assert vectors["<new1>"].shape == (2, 32) and told["init_word"] == "corgi, dog"
    assert not (tmp_path / "out/new2.safetensors").exists() and "eps loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--only", "7"], "no such entry"),
        (["--init-word", "corgi"], "--only"),
        (["--size", "100"], "multiple of 64"),
        (["--steps", "0"], "1 or more"),
        (["--ckpt", "none.ckpt"], "none.ckpt"),
        (["--data", "nowhere"], "nowhere"),
        (["--clip", "none.pt"], "none.pt"),
    ],
)
def test_bad_input_is_one_line_and_code_2(task, tmp_path, monkeypatch, capsys, options, complaint):
    assert script(monkeypatch, *task, "--clip", "none", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert complaint in error[-1] and error[-1].startswith("error: ")
    assert not list((tmp_path / "out").glob("*.safetensors"))
