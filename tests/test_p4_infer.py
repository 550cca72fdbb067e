"""p4_infer.py and hw2_4.sh: the csv, the scenario, the accuracy, and what each kind of bad input says."""

import csv
import json
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_digits import write_domain
from test_p4_model import lively

import p4_infer
from digits import is_validation
from p4_infer import scenario_of
from p4_model import SOURCE, TARGET, load_digit_net, predict
from utils import UserError, half, save_checkpoint


def save(path, seed=0, domain=TARGET):
    config = {"domain": domain}
    state_dict = half(lively(seed, domain).state_dict())
    save_checkpoint({"state_dict": state_dict, "config": config, "step": 1, "metrics": {}}, path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """svhn/, RGB, usps/, grey, each with 60 pictures, and untrained networks of both scenarios in checkpoints/."""
    folder = tmp_path_factory.mktemp("p4")
    write_domain(folder / "svhn")
    write_domain(folder / "usps", grey=True, seed=1)
    (folder / "checkpoints").mkdir()
    save(folder / "checkpoints/p4_svhn_refined.pt")
    save(folder / "checkpoints/p4_usps_refined.pt", seed=1)
    save(folder / "checkpoints/p4_svhn_source.pt", domain=SOURCE)
    return folder


@pytest.fixture(autouse=True)
def checkpoints(work, monkeypatch):
    monkeypatch.setattr(p4_infer, "CHECKPOINTS", work / "checkpoints")


def infer(*args):
    p4_infer.main([str(a) for a in (*args, "--device", "cpu")])


def rows(path):
    with open(path, newline="") as f:
        return list(csv.reader(f))


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        infer(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------ the csv


@pytest.mark.parametrize("name", ["svhn", "usps"])
def test_the_csv_has_a_row_for_each_picture_sorted_by_name(work, tmp_path, name, capsys):
    infer(work / name / "data", tmp_path / "new" / "out.csv")
    header, *lines = rows(tmp_path / "new" / "out.csv")
    assert header == ["image_name", "label"]
    assert [n for n, _ in lines] == [f"{i:05d}.png" for i in range(60)]
    assert {label for _, label in lines} <= set("0123456789") and len({label for _, label in lines}) > 2
    assert b"\r" not in (tmp_path / "new" / "out.csv").read_bytes()
    assert f"wrote 60 labels ({name}, refined)" in capsys.readouterr().out.splitlines()[-1]


def test_the_labels_are_the_scenario_s_network_s(work, tmp_path):
    for name in ("svhn", "usps"):
        infer(work / name / "data", tmp_path / "out.csv")
        pixels = [np.asarray(Image.open(work / name / "data" / f"{i:05d}.png").convert("RGB")) for i in range(60)]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        net, config = load_digit_net(work / f"checkpoints/p4_{name}_refined.pt")
        assert [int(label) for _, label in rows(tmp_path / "out.csv")[1:]] == predict(
            net, images, config["domain"]
        ).tolist()


def test_mode_names_the_checkpoint_and_the_checkpoint_its_domain(work, tmp_path):
    infer(work / "svhn/data", tmp_path / "refined.csv")
    infer(work / "svhn/data", tmp_path / "source.csv", "--mode", "source")
    assert rows(tmp_path / "refined.csv") != rows(tmp_path / "source.csv")


def test_a_network_that_was_named_is_told_by_its_file(work, tmp_path, capsys):
    infer(work / "svhn/data", tmp_path / "out.csv", "--checkpoint", work / "checkpoints/p4_usps_refined.pt")
    assert "wrote 60 labels (svhn, p4_usps_refined.pt)" in capsys.readouterr().out


def test_a_csv_that_the_accuracy_would_replace_is_refused(work, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        infer(work / "svhn/data", tmp_path / "out.json", "--gt", work / "svhn/train.csv")
    assert stop.value.code == 2 and "out.json: the accuracy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_batch_size_does_not_change_a_label(work, tmp_path):
    for size in (1, 7, 500):
        infer(work / "svhn/data", tmp_path / f"{size}.csv", "--batch-size", size)
    assert rows(tmp_path / "1.csv") == rows(tmp_path / "7.csv") == rows(tmp_path / "500.csv")


def test_gt_prints_the_accuracy_on_the_pictures_it_names(work, tmp_path, capsys):
    infer(work / "svhn/data", tmp_path / "out.csv")
    lines = rows(tmp_path / "out.csv")[:41]
    for line in lines[1:5]:
        line[1] = str((int(line[1]) + 1) % 10)
    with open(tmp_path / "gt.csv", "w", newline="") as f:
        csv.writer(f).writerows([*lines, ["elsewhere.png", "3"]])
    infer(work / "svhn/data", tmp_path / "again.csv", "--gt", tmp_path / "gt.csv")
    assert "accuracy 0.9000 (36/40)" in capsys.readouterr().out
    told = json.loads((tmp_path / "again.json").read_text())
    assert (told["right"], told["known"], told["folder"]) == (36, 40, str(work / "svhn/data"))


def test_held_back_counts_only_what_training_never_sees(work, tmp_path, capsys):
    infer(work / "svhn/data", tmp_path / "out.csv")
    lines = rows(tmp_path / "out.csv")
    kept = [line for line in lines[1:] if is_validation(line[0], 0.2)]
    kept[0][1] = str((int(kept[0][1]) + 1) % 10)
    with open(tmp_path / "gt.csv", "w", newline="") as f:
        csv.writer(f).writerows(lines)
    infer(work / "svhn/data", tmp_path / "again.csv", "--gt", tmp_path / "gt.csv", "--held-back")
    assert 1 < len(kept) < len(lines) - 1
    assert f"({len(kept) - 1}/{len(kept)})" in capsys.readouterr().out
    (tmp_path / "val.csv").touch()  # then p4_train.py learns from all of the csv beside it
    with pytest.raises(SystemExit):
        infer(work / "svhn/data", tmp_path / "again.csv", "--gt", tmp_path / "gt.csv", "--held-back")
    assert "give val.csv beside it" in capsys.readouterr().err


def test_hw2_4_sh_takes_a_folder_and_a_csv(work, tmp_path):
    command = ["bash", str(ROOT / "hw2_4.sh")]
    assert subprocess.run([*command, "only-one"], capture_output=True).returncode == 2
    done = subprocess.run(
        [*command, work / "svhn/data", "out.csv", "--checkpoint", work / "checkpoints/p4_svhn_refined.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    infer(work / "svhn/data", tmp_path / "here.csv")
    assert rows(tmp_path / "out.csv") == rows(tmp_path / "here.csv")


# ------------------------------------------------------------------------ the scenario


@pytest.mark.parametrize(
    "path, scenario",
    [
        ("/data/digits/svhn/data", "svhn"),
        ("/data/digits/usps/data", "usps"),
        ("/svhn/hw2/usps_test", "usps"),
        ("/usps/hw2/SVHN-private/data", "svhn"),
        ("/usps/svhn_and_usps/data", "usps"),
    ],
)
def test_the_last_telling_component_of_the_path_is_the_scenario(path, scenario):
    assert scenario_of(path) == scenario


def test_a_relative_path_is_told_by_where_it_is(work, monkeypatch):
    monkeypatch.chdir(work / "usps")
    assert scenario_of("data") == "usps"


def test_an_unknown_scenario_asks_for_target(tmp_path):
    with pytest.raises(UserError, match="neither svhn nor usps in it; say --target"):
        scenario_of("/data/mnist")


def test_target_overrides_the_path(work, tmp_path, capsys):
    infer(work / "svhn/data", tmp_path / "out.csv", "--target", "usps")
    assert "(usps, refined)" in capsys.readouterr().out


# ------------------------------------------------------------------------ bad input


def copy_of(folder, to):
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_an_empty_or_missing_folder_is_refused(tmp_path, capsys):
    (tmp_path / "svhn").mkdir()
    assert "svhn: no *.png in it" in refused(capsys, tmp_path / "svhn", tmp_path / "out.csv")
    assert "svhn/gone: no such folder" in refused(capsys, tmp_path / "svhn/gone", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_an_unreadable_picture_is_named_and_no_csv_is_left(work, tmp_path, content, capsys):
    folder = copy_of(work / "svhn/data", tmp_path / "svhn")
    path = folder / "00007.png"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    assert "00007.png: not a readable picture" in refused(capsys, folder, tmp_path / "out.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["svhn"]


def test_a_picture_of_another_size_is_named(work, tmp_path, capsys):
    folder = copy_of(work / "svhn/data", tmp_path / "svhn")
    Image.new("RGB", (32, 32)).save(folder / "00007.png")
    assert "00007.png: 32x32 pixels where digits have 28x28" in refused(capsys, folder, tmp_path / "out.csv")


def test_a_missing_checkpoint_and_one_of_another_network_are_named(work, tmp_path, capsys):
    folder = work / "usps/data"
    assert "p4_usps_target.pt" in refused(capsys, folder, tmp_path / "out.csv", "--mode", "target")
    other = ROOT / "checkpoints/p1_unet.pt"
    says = refused(capsys, folder, tmp_path / "out.csv", "--checkpoint", other)
    assert "p1_unet.pt: it is not a checkpoint of p4_train.py" in says
    assert not (tmp_path / "out.csv").exists()


def test_a_gt_of_other_pictures_is_refused(work, tmp_path, capsys):
    (tmp_path / "gt.csv").write_text("image_name,label\nelsewhere.png,3\n")
    says = refused(capsys, work / "svhn/data", tmp_path / "out.csv", "--gt", tmp_path / "gt.csv")
    assert "gt.csv: names none of the pictures" in says


# ------------------------------------------------------------------------ t-SNE


def test_the_t_sne_picture_has_a_row_of_four_panels_for_each_scenario(work, tmp_path):
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn")
    import p4_tsne

    write_domain(tmp_path / "digits/mnistm", seed=2, count=200)
    for name in ("svhn", "usps"):
        write_domain(tmp_path / "digits" / name, count=200)
        for mode in p4_tsne.TRAININGS:
            save(tmp_path / f"p4_{name}_{mode}.pt", domain=SOURCE if mode == "source" else TARGET)
    options = ["--data", tmp_path / "digits", "--device", "cpu", "--checkpoints", tmp_path, "--count", 20]
    p4_tsne.main([str(a) for a in (tmp_path / "out" / "tsne.png", *options)])
    picture = np.asarray(Image.open(tmp_path / "out" / "tsne.png").convert("RGB")).astype(int)
    assert picture.shape[1] == 2 * picture.shape[0] == 1280
    panels = [half_.reshape(-1, 3) for row in np.split(picture, 2) for half_ in np.array_split(row, 4, axis=1)]
    assert all((panel.std(1) > 20).sum() > 20 for panel in panels), "coloured dots in each panel"


def test_t_sne_without_scikit_learn_says_what_to_install(monkeypatch, capsys):
    import sys

    import p4_tsne

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(SystemExit) as stop:
        p4_tsne.main(["tsne.png"])
    assert stop.value.code == 2 and "pip install scikit-learn" in capsys.readouterr().err
