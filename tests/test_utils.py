"""Checkpoints are read safely, files appear whole or not at all, noise belongs to its picture."""

import os

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image

import utils
from utils import (
    UserError,
    atomic,
    beta_scheduler,
    cli,
    half,
    image_grid,
    load_checkpoint,
    load_weights,
    noise_stream,
    output_folder,
    pick_device,
    pick_precision,
    save_checkpoint,
    save_png,
    to_uint8,
)


def test_beta_scheduler_is_the_course_s():
    beta = beta_scheduler()
    assert beta.dtype == torch.float64 and len(beta) == 1000
    assert beta[0] == 1e-4 and beta[-1] == 2e-2
    assert torch.allclose(beta.diff(), beta.diff().mean())
    assert torch.equal(beta_scheduler(10, 0.1, 0.2), torch.linspace(0.1, 0.2, 10, dtype=torch.float64))


# ------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    state_dict = {"w": torch.randn(3, 2), "n": torch.tensor(7)}
    saved = {"state_dict": state_dict, "config": {"channels": 8, "x": None}, "step": 5}
    save_checkpoint(saved, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["state_dict"]["w"], saved["state_dict"]["w"])
    assert loaded["config"] == saved["config"] and loaded["step"] == 5
    assert os.listdir(tmp_path) == ["a.pt"]


def test_parameters_are_read_as_tensors(tmp_path):
    net = torch.nn.Linear(2, 2)
    torch.save({"state_dict": net.state_dict(), "p": net.weight}, tmp_path / "a.pt")
    assert torch.equal(load_checkpoint(tmp_path / "a.pt")["p"], net.weight)


def test_a_bare_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match="evil.pkl: "):
        load_checkpoint("evil.pkl")
    assert os.listdir(tmp_path) == ["evil.pkl"]


def test_missing_truncated_empty_and_foreign_files_are_one_clear_line(tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    contents = {"cut.pt": whole[: len(whole) // 2], "empty.pt": b"", "text.pt": b"hello, world\n" * 9}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a checkpoint, or a damaged one") as e:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="gone.pt: no such checkpoint; .*hw2_download_ckpt.sh"):
        load_checkpoint(tmp_path / "gone.pt")


def test_loading_weights_names_the_first_wrong_key():
    net = torch.nn.Linear(2, 3)
    good = net.state_dict()
    load_weights(torch.nn.Linear(2, 3), half(good), "x.pt")
    with pytest.raises(UserError, match="x.pt: lacks the key bias"):
        load_weights(net, {"weight": good["weight"]}, "x.pt")
    with pytest.raises(UserError, match=r"weight has shape \(3, 5\) where Linear has \(3, 2\)"):
        load_weights(net, {"weight": torch.zeros(3, 5), "bias": good["bias"]}, "x.pt")
    with pytest.raises(UserError, match="the key extra is unknown"):
        load_weights(net, {**good, "extra": torch.zeros(1)}, "x.pt")
    with pytest.raises(UserError, match="x.pt: bias has NaN or infinity"):
        load_weights(net, {**good, "bias": torch.tensor([1, 2, float("nan")])}, "x.pt")


# ------------------------------------------------------------------------ files


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(UserError, match="f: cannot be written .No space left"), atomic(tmp_path / "f") as temporary:
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device", str(tmp_path / "f"))
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_pictures_are_written_exactly(tmp_path):
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    save_png(image, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image.permute(1, 2, 0).numpy())
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def test_an_image_grid_puts_pictures_row_by_row():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    sheet = image_grid(images, 3, pad=1)
    assert sheet.shape == (3, 7, 10)
    assert sheet[0, 1::3, 1::3].tolist() == [[0, 1, 2], [3, 4, 5]] and (sheet[:, 0] == 255).all()


def test_an_output_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there .*; choose another output folder"):
        output_folder(tmp_path / "file" / "out")


# ------------------------------------------------------------------------ noise, device, precision


def test_noise_belongs_to_the_picture_not_to_the_batch():
    whole = noise_stream(7, range(6), (3, 4, 4))
    first, second = whole(), whole()
    part = noise_stream(7, [4, 2], (3, 4, 4))
    assert torch.equal(part(), first[[4, 2]]) and torch.equal(part(), second[[4, 2]])
    assert not torch.equal(first, second)


def test_devices_and_precisions_that_are_not_there_are_refused():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="no such device"):
        pick_device("quantum")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        pick_precision("fp16", torch.device("cpu"))
    with pytest.raises(UserError, match="no such device"):
        pick_device(f"cuda:{torch.cuda.device_count()}")


def test_auto_precision_is_fp32_where_the_cpu_has_no_bf16_units(monkeypatch):
    monkeypatch.setattr(utils, "cpu_has_fast_bf16", lambda: False)
    assert pick_precision("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    "error, line",
    [(UserError("a: b;\n c"), "error: a: b; c"), (OSError(28, "No space left", "f"), "error: f: No space left")],
)
def test_scripts_end_with_one_line_and_exit_code_2(capsys, error, line):
    @cli
    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2 and capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("name", sorted(p.name for p in ROOT.glob("*.py") if "__main__" in p.read_text()))
def test_every_script_shows_its_help(name):
    if name.endswith(("_train.py", "_distill.py")):
        pytest.importorskip("pytorch_lightning")
    shown = script(name, "--help").stdout
    assert "--seed" in shown and "--precision" in shown
