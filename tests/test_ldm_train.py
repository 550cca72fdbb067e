"""stable-diffusion/train.py: the small model from pictures and captions to a checkpoint that everything else takes."""

import contextlib
import io
import json
import pathlib
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_lightning")
clip = pytest.importorskip("clip")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "stable-diffusion"))

import train  # noqa: E402
from ldm.util import ModelError, load_model  # noqa: E402

SUBJECTS = ["a red dot", "a green dot", "a blue dot", "a black box", "a white box", "an orange"]
VENDORS = ["Noto", "Twemoji", "OpenMoji"]
SMALL = [
    "training.autoencoder.steps=3",
    "training.autoencoder.batch_size=4",
    "training.clip.steps=3",
    "training.clip.batch_size=8",
    "training.clip.vision_layers=[1,1,1,1]",
    "training.diffusion.steps=3",
    "training.diffusion.batch_size=4",
    "training.diffusion.variants=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("emoji"), np.random.RandomState(0)
    subject, vendor = (a.ravel() for a in np.meshgrid(range(6), range(3), indexing="ij"))
    split = ((subject + vendor) % 6 == 5).astype(np.uint8)
    np.savez(
        folder / "emoji.npz",
        images=rng.randint(0, 256, (18, 64, 64, 3), dtype=np.uint8),
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


def run(data, out):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = train.main(["--data", str(data), "--out", str(out), "--precision", "32-true", "--set", *SMALL])
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert run(data, out)[0] == 0
    return out


def test_the_checkpoint_names_its_config_and_loads_as_any_other(trained):
    model = load_model(None, trained / "model.ckpt")
    assert model.image_size == 16 and model.first_stage_model.factor == 4
    cond = model.get_learned_conditioning(["an orange"])
    eps = model.apply_model(torch.zeros(1, 4, 16, 16), torch.tensor([500]), cond)
    assert eps.shape == (1, 4, 16, 16) and torch.isfinite(eps).all()
    assert model.decode_first_stage(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 64, 64)


def test_start_begins_with_the_network_of_a_checkpoint(data, trained, tmp_path):
    for name in ("autoencoder.pt", "text.pt", "clip.pt"):
        shutil.copy(trained / name, tmp_path)
    options = ["--data", str(data), "--out", str(tmp_path), "--precision", "32-true"]
    still = [*SMALL, "training.diffusion.lr=0"]
    assert train.main([*options, "--start", str(trained / "model.ckpt"), "--set", *still]) == 0
    before, after = (torch.load(f / "model.ckpt")["state_dict"] for f in (trained, tmp_path))
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("model."))


def test_words_of_no_caption_get_the_mean_embedding_and_the_others_their_own(trained):
    stored = torch.load(trained / "model.ckpt")["state_dict"]
    rows, ids = stored[train.TABLE].float(), stored["known_words"]
    table = load_model(None, trained / "model.ckpt").cond_stage_model.transformer.get_input_embeddings().weight
    assert len(table) == 49408 and len(rows) == len(ids) < 50
    assert torch.equal(table[ids], rows)
    unknown = clip.tokenize("zebra")[0, 1]
    assert unknown not in ids and torch.equal(table[unknown], rows.mean(0))


@pytest.mark.parametrize("ids", [[49408], [0, 1]])
def test_ids_of_words_that_do_not_fit_are_one_line(trained, tmp_path, ids):
    checkpoint = torch.load(trained / "model.ckpt")
    rows = torch.zeros({1: 1, 2: 3}[len(ids)], 128)  # an id too large; more rows than ids
    checkpoint["state_dict"].update({"known_words": torch.tensor(ids), train.TABLE: rows})
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ModelError, match="bad.ckpt: .*known_words do not fit"):
        load_model(None, tmp_path / "bad.ckpt")


def test_the_clip_builds_by_clip_load_and_its_text_tower_is_the_models_text_encoder(trained):
    network, _ = clip.load(str(trained / "clip.pt"), device="cpu")
    model = load_model(None, trained / "model.ckpt")
    prompt = "a red dot, in the style of Noto"
    hidden = model.get_learned_conditioning([prompt])[0]
    tokens = clip.tokenize(prompt)
    end = int(tokens.argmax())
    with torch.no_grad():
        torch.testing.assert_close(
            hidden[end] @ network.float().text_projection, network.encode_text(tokens)[0], rtol=2e-3, atol=2e-3
        )
    assert network.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 128)


def test_latents_have_unit_variance(trained, data):
    model, images = load_model(None, trained / "model.ckpt"), train.Pictures(data).images
    assert model.encode_first_stage(train.to_float(images)).sample().std() == pytest.approx(1, abs=0.1)


def test_scaling_the_latents_leaves_the_reconstruction_as_it_was(trained, data):
    autoencoder = load_model(None, trained / "model.ckpt").first_stage_model
    x = train.to_float(train.Pictures(data).images[:2])
    with torch.no_grad():
        before = autoencoder.decode(autoencoder.encode(x).mode())
        autoencoder.quant_conv.weight[:4] *= 3
        autoencoder.quant_conv.bias[:4] *= 3
        autoencoder.post_quant_conv.weight /= 3
        train.normalise_latents(autoencoder, train.Pictures(data).images)
        torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x).mode()), before, rtol=1e-3, atol=1e-4)


def test_a_second_run_goes_on_where_the_first_one_stopped(trained, data):
    before = (trained / "model.ckpt").read_bytes()
    (trained / "model.ckpt").unlink()  # the last stage only: from its last.ckpt, which is finished
    code, printed = run(data, trained)
    assert code == 0 and "autoencoder.pt, " not in printed
    a, b = torch.load(io.BytesIO(before))["state_dict"], torch.load(trained / "model.ckpt")["state_dict"]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_ctrl_c_says_where_the_same_line_goes_on(data, tmp_path, monkeypatch, capsys):
    def pressed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Autoencoding, "training_step", pressed)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run(data, tmp_path)[0] == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    last = tmp_path / "autoencoder/last.ckpt"
    said = f"interrupted; the same line starts anew: {last} comes after 3 steps"
    assert capsys.readouterr().err.strip().splitlines()[-1] == said


def test_a_caption_that_says_only_the_subject_is_right_for_every_style():
    """Two pictures of one subject, told by subject alone: the loss is the lowest when both are as near."""

    class Fixed(torch.nn.Module):
        logit_scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images, tokens):
            return (self.logits,)

    module = train.Contrastive(Fixed(), {"lr": 1, "steps": 1})
    module.log = lambda *a: None
    form = torch.tensor([train.CAPTIONS.index("{subject}")] * 3)
    batch = torch.zeros(3, 3, 64, 64), None, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), form
    near, losses = torch.tensor([[9.0, 9, 0], [9, 9, 0], [0, 0, 9]]), []
    for logits in (near, 9 * torch.eye(3)):  # the second takes the other picture of the subject for wrong
        module.model.logits = logits
        losses.append(float(module.training_step(batch, 0)))
    assert losses[0] < 0.7 < 3 < losses[1]


def test_a_folder_without_the_data_is_one_line(tmp_path, capsys):
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "make_emoji_dataset" in error and error.count("\n") == 1
