"""p3_train.py: the small model from pictures and captions to a checkpoint that everything else takes."""

import io
import json
import signal
import types

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_lightning")
clip = pytest.importorskip("clip")

import p3_train  # noqa: E402  isort: skip  (it puts ldm on the path)
from ldm.util import CONFIGS, ModelError, load_model, read_config  # noqa: E402

import p3_pictures  # noqa: E402
from p3_clip import openai_names, transformers_names  # noqa: E402
from utils import to_float  # noqa: E402

SUBJECTS = ["a red dot", "a green dot", "a blue dot", "a black box", "a white box", "an orange", "a dog"]
VENDORS = ["Noto", "Twemoji", "OpenMoji", "Glyphs"]
SMALL = [
    "autoencoder.steps=3",
    "autoencoder.batch_size=4",
    *(f"{stage}.{option}" for stage in ("text_encoder", "judge") for option in ("steps=3", "batch_size=8")),
    *(f"{stage}.vision_layers=[1,1,1,1]" for stage in ("text_encoder", "judge")),
    "diffusion.steps=3",
    "diffusion.batch_size=4",
]


def write_emoji(folder):
    """A small data set of random pictures, one subject and one style of it held back; gives its folder."""
    folder.mkdir(exist_ok=True)
    rng = np.random.RandomState(0)
    subject, vendor = (a.ravel() for a in np.meshgrid(range(7), range(4), indexing="ij"))
    split = ((subject + vendor) % 6 == 5).astype(np.uint8)
    split[subject == 6], split[vendor == 3] = 2, 3
    np.savez(
        folder / "emoji.npz",
        images=rng.randint(0, 256, (28, 64, 64, 3), dtype=np.uint8),
        subject=subject,
        vendor=vendor,
        split=split,
    )
    (folder / "emoji.json").write_text(
        json.dumps(
            {
                "subjects": [{"phrase": s} for s in SUBJECTS],
                "vendors": [{"name": v} for v in VENDORS],
                "splits": ["train", "val", "subject", "style"],
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_emoji(tmp_path_factory.mktemp("emoji"))


def run(data, out, *options, training=()):
    options = ["--epoch-steps", "3", "--warmup", "1", *options]
    where = ["--data", str(data), "--out", str(out)]
    p3_train.main([*where, "--device", "cpu", "--precision", "fp32", *options, "--set", *SMALL, *training])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(data, out)
    return out


def test_the_checkpoint_names_its_config_and_loads_as_any_other(trained):
    model = load_model(None, trained / "model.ckpt")
    assert model.image_size == 16 and model.first_stage_model.factor == 4
    cond = model.get_learned_conditioning(["an orange"])
    eps = model.apply_model(torch.zeros(1, 4, 16, 16), torch.tensor([500]), cond)
    assert eps.shape == (1, 4, 16, 16) and torch.isfinite(eps).all()
    assert model.decode_first_stage(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 64, 64)


def test_words_of_no_caption_get_the_mean_embedding_and_the_others_their_own(trained):
    stored = torch.load(trained / "model.ckpt")["state_dict"]
    rows, ids = stored[p3_train.TABLE].float(), stored["known_words"]
    table = load_model(None, trained / "model.ckpt").cond_stage_model.transformer.get_input_embeddings().weight
    assert len(table) == 49408 and len(rows) == len(ids) < 50
    assert torch.equal(table[ids], rows)
    unknown = clip.tokenize("zebra")[0, 1]
    assert unknown not in ids and torch.equal(table[unknown], rows.mean(0))


@pytest.mark.parametrize("ids", [[49408], [0, 1]])
def test_ids_of_words_that_do_not_fit_are_one_line(trained, tmp_path, ids):
    checkpoint = torch.load(trained / "model.ckpt")
    rows = torch.zeros({1: 1, 2: 3}[len(ids)], 128)  # an id too large; more rows than ids
    checkpoint["state_dict"].update({"known_words": torch.tensor(ids), p3_train.TABLE: rows})
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ModelError, match="bad.ckpt: .*known_words do not fit"):
        load_model(None, tmp_path / "bad.ckpt")


def test_the_judge_builds_by_clip_load_and_has_words_for_what_the_model_never_saw(trained):
    network, _ = clip.load(str(trained / "clip.pt"), device="cpu")
    assert network.visual.input_resolution == 96
    assert network.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, 128)
    ids = torch.load(trained / "model.ckpt")["state_dict"]["known_words"]
    dog, dot, zebra = clip.tokenize(["dog", "dot", "zebra"])[:, 1]
    assert dot in ids and dog not in ids and zebra not in ids
    rows = network.token_embedding.weight
    assert not torch.equal(rows[dog], rows[zebra])  # a word that nobody saw has the mean of all


def untrained(trained):
    """The model as the diffusion stage begins with it, and the ids of its words."""
    args = types.SimpleNamespace(start=None, out=trained / "diffusion")
    return p3_train.begun(args, read_config(CONFIGS["tiny"]))[:2]


def test_the_text_encoder_begins_as_the_text_tower_of_the_clip_that_was_trained(trained):
    """The tower's weights in openai-clip's own network, of which only the last projection is taken away."""
    text, network = (
        torch.load(trained / "text.pt")["text"],
        clip.load(str(trained / "clip.pt"), device="cpu")[0].float(),
    )
    tower = openai_names({k.removeprefix("transformer."): v for k, v in text.items()})
    unexpected = network.load_state_dict({**tower, "text_projection": torch.eye(128)}, strict=False).unexpected_keys
    (model, _), prompt = untrained(trained), "a red dot, in the style of Noto"
    tokens = clip.tokenize(prompt)
    hidden = model.get_learned_conditioning([prompt])[0][int(tokens.argmax())]
    assert not unexpected
    with torch.no_grad():
        torch.testing.assert_close(hidden, network.encode_text(tokens)[0], rtol=2e-3, atol=2e-3)


def test_the_text_encoder_of_known_words_alone_says_the_same_and_gives_what_it_learned_back(trained):
    model, ids = untrained(trained)
    encoder, prompt = model.cond_stage_model, ["a red dot, in the style of Noto"]
    text, before = p3_train.of_known_words(encoder, ids), encoder(prompt)
    words = torch.searchsorted(ids, encoder.tokenize(prompt))
    torch.testing.assert_close(text(input_ids=words).last_hidden_state, before)
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    with torch.no_grad():
        for weight in text.parameters():
            weight += 0.1 * torch.randn_like(weight)
    p3_train.take_over(encoder, text, ids)
    torch.testing.assert_close(encoder(prompt), text(input_ids=words).last_hidden_state)
    table = p3_train.TABLE.removeprefix("cond_stage_model.")
    others = torch.ones(49408, dtype=torch.bool).index_fill(0, ids.long(), False)
    assert torch.equal(encoder.state_dict()[table][others], state[table][others])


def test_latents_have_unit_variance(trained, data):
    model, images = load_model(None, trained / "model.ckpt"), p3_pictures.Pictures(data).images
    assert model.encode_first_stage(to_float(images)).sample().std() == pytest.approx(1, abs=0.1)


def test_scaling_the_latents_leaves_the_reconstruction_as_it_was(trained, data):
    autoencoder = load_model(None, trained / "model.ckpt").first_stage_model
    x = to_float(p3_pictures.Pictures(data).images[:2])
    with torch.no_grad():
        before = autoencoder.decode(autoencoder.encode(x).mode())
        autoencoder.quant_conv.weight[:4] *= 3
        autoencoder.quant_conv.bias[:4] *= 3
        autoencoder.post_quant_conv.weight /= 3
        p3_train.normalise_latents(autoencoder, p3_pictures.Pictures(data).images)
        torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x).mode()), before, rtol=1e-3, atol=1e-4)


def test_a_second_run_goes_on_where_the_first_one_stopped(trained, data):
    before = (trained / "model.ckpt").read_bytes()
    stamp = (trained / "autoencoder.pt").stat().st_mtime_ns
    (trained / "model.ckpt").unlink()  # the last stage only: from its last.ckpt, which is finished
    run(data, trained)
    assert (trained / "autoencoder.pt").stat().st_mtime_ns == stamp
    a, b = torch.load(io.BytesIO(before))["state_dict"], torch.load(trained / "model.ckpt")["state_dict"]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_stage_in_two_parts_is_the_one_in_one_go(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(p3_train, "STAGES", {"autoencoder": p3_train.STAGES["autoencoder"]})
    run(data, tmp_path / "whole", "--epoch-steps", "1")
    with pytest.raises(SystemExit) as stopped:
        run(data, tmp_path / "parts", "--epoch-steps", "1", "--max-epochs", "2")
    assert not stopped.value.code and "autoencoder: step 2 of 3; the same line goes on" in capsys.readouterr().out
    assert not (tmp_path / "parts/autoencoder.pt").exists()
    run(data, tmp_path / "parts", "--epoch-steps", "1")
    a, b = (torch.load(tmp_path / part / "autoencoder.pt")["state_dict"] for part in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def changed(before, after):
    """The parts of two checkpoints' model that differ."""
    a, b = before["state_dict"], after["state_dict"]
    assert a.keys() == b.keys()
    return {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}


def test_start_trains_network_and_text_encoder_of_a_model_further_and_nothing_else(trained, data, tmp_path):
    run(data, tmp_path, "--start", str(trained / "model.ckpt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diffusion", "model.ckpt"]
    before, after = torch.load(trained / "model.ckpt"), torch.load(tmp_path / "model.ckpt")
    assert (before["step"], after["step"]) == (3, 6)
    assert changed(before, after) == {"model", "cond_stage_model"}


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"state_dict": torch.zeros(2)}, [torch.zeros(2)]])
def test_start_with_another_checkpoint_is_one_line(data, tmp_path, capsys, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit) as stopped:
        run(data, tmp_path / "run", "--start", str(tmp_path / "other.ckpt"))
    assert stopped.value.code == 2 and "other.ckpt: no model.ckpt of p3_train.py" in capsys.readouterr().err


def test_ctrl_c_says_where_the_same_line_goes_on(data, tmp_path, monkeypatch, capsys):
    def pressed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(p3_train.Autoencoding, "training_step", pressed)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(data, tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    last = tmp_path / "autoencoder/last.ckpt"
    said = f"interrupted; the same line starts anew: {last} is written every 3 steps, see --epoch-steps"
    assert stopped.value.code == 130 and capsys.readouterr().err.strip().splitlines()[-1] == said


def contrastive_losses(subject, vendor, captions, *several):
    """Those of pictures, each told by a caption of CAPTIONS, for several tables of logits."""

    class Fixed(torch.nn.Module):
        logit_scale = torch.nn.Parameter(torch.zeros(()))
        visual = types.SimpleNamespace(input_resolution=64)

        def forward(self, images, tokens):
            return (self.logits,)

    module = p3_train.Contrastive(Fixed(), None)
    module.log = lambda *a: None
    form = torch.tensor([p3_pictures.CAPTIONS.index(c) for c in captions])
    for logits in several:
        module.model.logits = logits
        batch = torch.zeros(len(form), 3, 64, 64), None, torch.tensor(subject), torch.tensor(vendor), form
        yield float(module.training_step(batch, 0))


def test_a_caption_that_says_only_the_subject_is_right_for_every_style():
    """Two pictures of one subject, told by subject alone: the loss is the lowest when both are as near."""
    near = torch.tensor([[9.0, 9, 0], [9, 9, 0], [0, 0, 9]])
    alone = 9 * torch.eye(3)  # takes the other picture of the subject for wrong
    both, one = contrastive_losses([0, 0, 1], [0, 1, 0], ["{subject}"] * 3, near, alone)
    assert both < 0.7 < 3 < one


def test_of_a_restyled_picture_a_caption_that_names_its_subject_and_a_style_is_neither_right_nor_wrong():
    whole = "{subject}, in the style of {style}"
    tables = [9 * torch.eye(3) for _ in range(3)]
    tables[1][0, 1], tables[2][0, 2] = 20, 20  # the restyled picture is near to its subject, or to another
    same, subject, other = contrastive_losses([0, 0, 1], [-1, 1, 1], ["{subject}", whole, whole], *tables)
    assert same == subject < 3 < other


def test_restyled_pictures_lose_their_colours_and_keep_white():
    torch.manual_seed(0)
    x = torch.ones(64, 3, 16, 16)
    x[:, 1:, 4:12, 4:12] = -1  # a red square
    y = p3_pictures.restyled(x)
    assert y.shape == x.shape and torch.equal(y[:, :, :2], torch.ones(64, 3, 2, 16))
    black, unlike = (y[:, :, 7, 7] == -1).all(1), (y[:, :, 4:12] != x[:, :, 4:12]).flatten(1).any(1)
    assert unlike.all() and 0 < black.sum() < 64 and torch.equal(p3_pictures.restyled(0 * x + 1), 0 * x + 1)


def test_what_inception_sees_is_computed_once(tmp_path, monkeypatch):
    """Unit directions; pictures that look alike see alike."""
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[4] = images[3]
    made = p3_pictures.cache_sight(images, tmp_path / "sight.pt", torch.device("cpu"))
    assert made.shape == (5, 5) and torch.allclose(made.norm(dim=1), torch.ones(5))
    cosines = made @ made.T
    assert cosines[3, 4] > 0.999 and cosines[3, :3].max() < 0.9
    monkeypatch.setattr(p3_pictures, "Inception", None)
    again = p3_pictures.cache_sight(images, tmp_path / "sight.pt", torch.device("cpu"))
    torch.testing.assert_close(again, made, atol=1e-3, rtol=0)


def test_the_judge_trains_heads_that_stay_out_of_its_file(trained):
    lines = next((trained / "judge/csv").rglob("metrics.csv")).read_text().splitlines()
    assert {"train_subjects", "train_styles", "train_sight"} <= set(lines[0].split(","))
    names = [k for k in torch.load(trained / "judge/last.ckpt", weights_only=False)["state_dict"] if "heads" in k]
    assert len(names) == 6
    assert not any("heads" in k for k in torch.jit.load(str(trained / "clip.pt")).state_dict())


def test_transformers_names_is_the_inverse_of_openai_names(trained):
    state = clip.load(str(trained / "clip.pt"), device="cpu")[0].state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("visual.layer") and "attnpool" not in k}
    back = openai_names(transformers_names(state))
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_a_folder_without_the_data_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        p3_train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert str(tmp_path) in error and "make_emoji_dataset" in error and error.count("\n") == 1
