"""Reading hw2_data/digits: what comes out, what is cached, and what each kind of damage says."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import digits
from digits import BalancedDigits, is_validation, load_digits, read_csv
from utils import UserError


def write_domain(folder, count=60, seed=0, grey=False, flat=False):
    """A small domain with labels 0..9 in turn; gives its pictures, uint8 [N, 28, 28(, 3)]: random, or flat, as
    bright as their label is high."""
    (folder / "data").mkdir(parents=True)
    shape = (count, 28, 28) if grey else (count, 28, 28, 3)
    images = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    if flat:
        images[:] = (25 * (np.arange(count) % 10)).reshape(-1, *[1] * (images.ndim - 1))
    with open(folder / "train.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["image_name", "label"])
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / "data" / f"{i:05d}.png")
            rows.writerow([f"{i:05d}.png", i % 10])
    return images


def test_images_and_labels_come_in_the_order_of_the_csv(tmp_path):
    images = write_domain(tmp_path / "svhn")
    loaded, labels = load_digits(tmp_path, "svhn")
    assert loaded.dtype == torch.uint8 and loaded.shape == (60, 3, 28, 28)
    assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), images)
    assert labels.tolist() == [i % 10 for i in range(60)]


def test_grey_pictures_become_three_equal_channels(tmp_path):
    images = write_domain(tmp_path / "usps", grey=True)
    loaded, _ = load_digits(tmp_path, "usps")
    assert np.array_equal(loaded[:, 0].numpy(), images) and torch.equal(loaded[:, 0], loaded[:, 2])


def test_the_second_start_reads_the_cache_and_a_changed_folder_does_not(tmp_path, monkeypatch):
    write_domain(tmp_path / "svhn")
    first, _ = load_digits(tmp_path, "svhn")
    with monkeypatch.context() as m:
        m.setattr(digits, "read_image", lambda path: pytest.fail("read a picture again"))
        assert torch.equal(load_digits(tmp_path, "svhn")[0], first)
    (tmp_path / "svhn/data/00000.png").unlink()
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "svhn/data/00000.png")
    assert load_digits(tmp_path, "svhn")[0][0].max() == 0


def test_a_damaged_cache_is_made_again(tmp_path):
    write_domain(tmp_path / "svhn")
    first, _ = load_digits(tmp_path, "svhn")
    (tmp_path / "svhn/.cache.npz").write_bytes(b"damaged")
    assert torch.equal(load_digits(tmp_path, "svhn")[0], first)


def test_the_split_is_disjoint_complete_and_depends_on_names_alone(tmp_path):
    write_domain(tmp_path / "svhn")
    train, val, whole = (load_digits(tmp_path, "svhn", s)[0] for s in ("train", "val", "all"))
    assert 0 < len(val) < len(train) and len(train) + len(val) == len(whole)
    names = [f"{i:05d}.png" for i in range(20_000)]
    tenth = {n for n in names if is_validation(n, 0.1)}
    fifth = {n for n in names if is_validation(n, 0.2)}
    assert tenth < fifth and len(tenth) == pytest.approx(2000, rel=0.05) and len(fifth) == pytest.approx(4000, rel=0.05)


def test_val_csv_is_the_validation_split_where_it_stands(tmp_path):
    write_domain(tmp_path / "usps")
    lines = (tmp_path / "usps/train.csv").read_text().splitlines()
    (tmp_path / "usps/train.csv").write_text("\n".join(lines[:41]) + "\n")
    (tmp_path / "usps/val.csv").write_text("\n".join([lines[0], *lines[41:]]) + "\n")
    assert len(load_digits(tmp_path, "usps", "train")[0]) == 40
    assert load_digits(tmp_path, "usps", "val")[1].tolist() == [i % 10 for i in range(40, 60)]


def damage_folder(d):
    (d / "train.csv").unlink()


def damage_file(d):
    (d / "data/00007.png").unlink()


def damage_picture(d):
    (d / "data/00007.png").write_bytes(b"no picture")


def damage_size(d):
    Image.fromarray(np.zeros((28, 29, 3), np.uint8)).save(d / "data/00007.png")


def damage_label(d):
    (d / "train.csv").write_text((d / "train.csv").read_text().replace("00007.png,7", "00007.png,11"))


def damage_header(d):
    (d / "train.csv").write_text("name,digit\n00000.png,1\n")


def damage_rows(d):
    (d / "train.csv").write_text("image_name,label\n")


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_folder, "svhn/train.csv: not found; .*get_dataset.sh"),
        (damage_file, "00007.png: no such picture; unpack hw2_data again"),
        (damage_picture, "00007.png: not a readable picture"),
        (damage_size, "00007.png: 29x28 pixels where digits have 28x28"),
        (damage_label, "train.csv line 9: label '11' is not a digit 0..9"),
        (damage_header, "train.csv: not a csv with the first line image_name,label .it lacks the column"),
        (damage_rows, "train.csv: no rows"),
    ],
)
def test_each_kind_of_damage_names_the_file(tmp_path, damage, message):
    write_domain(tmp_path / "svhn")
    damage(tmp_path / "svhn")
    with pytest.raises(UserError, match=message):
        load_digits(tmp_path, "svhn")


def test_a_split_without_a_picture_is_refused(tmp_path):
    write_domain(tmp_path / "svhn", count=1)
    with pytest.raises(UserError, match="svhn: none of its 1 pictures is for (val|train)"):
        [load_digits(tmp_path, "svhn", split) for split in ("train", "val")]


@pytest.mark.parametrize("suffix", ["zip", "xz", "csv.zst"])
def test_a_csv_is_read_as_text_whatever_its_name(tmp_path, suffix):
    (tmp_path / f"gt.{suffix}").write_text("no table")
    with pytest.raises(UserError, match=f"gt.{suffix}: not a csv"):
        read_csv(tmp_path / f"gt.{suffix}")


def test_every_domain_and_digit_is_equally_frequent(tmp_path):
    write_domain(tmp_path / "mnistm", count=200)
    write_domain(tmp_path / "svhn", count=60, seed=1)
    torch.manual_seed(0)
    data = BalancedDigits(tmp_path, "train", length=2000)
    images, digit, domain = data.__getitems__(list(range(len(data))))
    assert images.shape == (2000, 3, 28, 28)
    pairs = torch.bincount(domain * 10 + digit, minlength=20)
    assert pairs.tolist() == [100] * 20
    assert len(images[domain == 1].flatten(1).unique(dim=0)) == len(load_digits(tmp_path, "svhn", "train")[0])


def test_a_domain_without_a_digit_is_refused(tmp_path):
    write_domain(tmp_path / "mnistm", count=60)
    write_domain(tmp_path / "svhn", count=5)
    with pytest.raises(UserError, match="no train image of digit"):
        BalancedDigits(tmp_path, "train", length=20)
