"""Reads hw2_data/digits/{mnistm,svhn,usps}: a folder of PNGs and a csv `image_name,label`, into one uint8 tensor.

from digits import load_digits
images, labels = load_digits("hw2_data/digits", "svhn", "train")        # uint8 [N, 3, 28, 28], int64 [N]
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from utils import UserError, atomic, open_image

DOMAINS = ["mnistm", "svhn"]  # their order is the domain index of Problem 1
SIZE = 28


def load_digits(root, name, split="all", fraction=0.1):
    """(images uint8 [N, 3, 28, 28], labels int64 [N]) of one domain, in the order of the csv.

    split: "train", "val" or "all". Validation is val.csv where it stands beside train.csv (2023 edition), else the
    `fraction` of images whose names hash lowest: the same ones on every machine, and a larger fraction contains a
    smaller one. The decoded images are cached beside the csv. Raises UserError for a missing folder or csv, a csv
    row without its file, a file that is no picture of 28x28, a label that is not 0..9, and an empty split.
    """
    folder = pathlib.Path(root) / name
    if not (folder / "train.csv").is_file():
        raise UserError(f"{folder}/train.csv: not found; `bash get_dataset.sh` fetches it, --data names its place")
    names, labels, given_val = [], [], []
    for file in ("train.csv", "val.csv"):
        if (folder / file).is_file():
            n, y = read_csv(folder / file)
            names, labels, given_val = names + n, labels + y, given_val + [file == "val.csv"] * len(n)
    images = _read_cached(folder, names)
    val = np.array(given_val if any(given_val) else [is_validation(n, fraction) for n in names])
    keep = {"all": np.ones(len(names), bool), "val": val, "train": ~val}[split]
    if not keep.any():
        raise UserError(f"{folder}: none of its {len(names)} pictures is for {split}; it needs more")
    return torch.from_numpy(images[keep]), torch.tensor(labels)[torch.from_numpy(keep)]


def is_validation(image_name, fraction):
    """Whether an image belongs to the held-back `fraction`: a hash of its name, so that it depends on nothing else."""
    return zlib.crc32(image_name.encode()) / 2**32 < fraction


def read_csv(path):
    """(names, labels) of a csv with the header image_name,label; raises UserError for another header or a label not
    0..9."""
    import pandas  # here: it costs half a second, and hw2_1.sh reads no csv

    try:
        table = pandas.read_csv(
            path, dtype=str, index_col=False, na_filter=False, skip_blank_lines=False, compression=None
        )
        table = table[["image_name", "label"]]
    except (ValueError, KeyError) as e:  # no UTF-8, no table, other columns
        reason = "it lacks the column image_name or label" if isinstance(e, KeyError) else str(e)[:120]
        raise UserError(f"{path}: not a csv with the first line image_name,label ({reason}); correct it") from None
    table = table[(table != "").any(axis=1)]  # but for blank lines
    for i, label in table.label[~table.label.isin(list("0123456789"))].items():
        raise UserError(f"{path} line {i + 2}: label {label[:20]!r} is not a digit 0..9; correct it")
    if not len(table):
        raise UserError(f"{path}: no rows; give the csv of the folder's pictures")
    return table.image_name.tolist(), table.label.astype(int).tolist()


def read_image(path):
    """uint8 [3, 28, 28] of one picture, grey ones as three equal channels; raises UserError naming the file."""
    pixels = np.asarray(open_image(path, "unpack hw2_data again"))
    if pixels.shape[:2] != (SIZE, SIZE):
        raise UserError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels where digits have {SIZE}x{SIZE}")
    return pixels.transpose(2, 0, 1)


def _read_cached(folder, names):
    """uint8 [N, 3, 28, 28] of folder/data/{names}, from folder/.cache.npz when it was made of the same names, in the
    folder as it was (pictures overwritten in place are not noticed)."""
    cache = folder / ".cache.npz"
    data = folder / "data"
    key = f"{zlib.crc32(chr(10).join(names).encode())}-{data.stat().st_mtime_ns if data.is_dir() else 'none'}"
    try:
        with np.load(cache) as stored:
            if str(stored["key"]) == key:
                return stored["images"]
    except Exception:  # no cache, an old one or a damaged one: read the pictures
        pass
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; unpack hw2_data again")
    with ThreadPoolExecutor() as pool:
        paths = [data / n for n in names]
        read = tqdm(pool.map(read_image, paths), total=len(paths), desc=f"reading {folder.name}", leave=False)
        images = np.ascontiguousarray(np.stack(list(read)))  # noise like a picture follows its memory layout
    buffer = io.BytesIO()  # numpy's own file, where the disk is full, complains again when it is deleted
    np.savez(buffer, key=np.array(key), images=images)
    with contextlib.suppress(UserError), atomic(cache) as temporary:
        temporary.write_bytes(buffer.getbuffer())  # a read-only data folder only costs the second start
    return images


class BalancedDigits(Dataset):
    """Both domains of Problem 1 as one map-style dataset in which every (domain, digit) pair is equally frequent.

    Item i is an image of pair i % 20, (uint8 [3, 28, 28], digit, domain): of "train" any one, drawn by torch's global
    generator; of "val" the (i // 20)-th, cyclically. A list of indices gives a whole batch at once,
    (uint8 [B, 3, 28, 28], int64 [B], int64 [B]). `length` items make an epoch.
    """

    def __init__(self, root, split, length):
        self.split, self.length = split, length
        loaded = [load_digits(root, name, split) for name in DOMAINS]
        self.images = torch.cat([images for images, _ in loaded])
        self.digits = torch.cat([labels for _, labels in loaded])
        self.domains = torch.cat([torch.full_like(labels, i) for i, (_, labels) in enumerate(loaded)])
        order = torch.randperm(len(self.digits), generator=torch.Generator().manual_seed(0))
        pairs = [order[(self.domains[order] == p // 10) & (self.digits[order] == p % 10)] for p in range(20)]
        for p, members in enumerate(pairs):
            if len(members) == 0:
                raise UserError(f"{root}/{DOMAINS[p // 10]}: no {split} image of digit {p % 10}")
        self.order, self.counts = torch.cat(pairs), torch.tensor([len(members) for members in pairs])
        self.starts = self.counts.cumsum(0) - self.counts

    def __len__(self):
        return self.length

    def __getitems__(self, indices):
        number, pair = torch.tensor([divmod(i, 20) for i in indices]).unbind(1)
        which = torch.randint(2**40, number.shape) if self.split == "train" else number
        rows = self.order[self.starts[pair] + which % self.counts[pair]]
        return self.images[rows], self.digits[rows], self.domains[rows]
