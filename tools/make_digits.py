"""Builds hw2_data/digits from public sources, where the course's archive is not at hand.

    python3 tools/make_digits.py hw2_data/digits
    python3 tools/make_digits.py hw2_data/digits --source raw           # from files in raw/, without the network

DEST gets mnistm/, svhn/ and usps/, each with data/*.png of 28x28 and train.csv; usps, grey, also val.csv:
- mnistm: the 60,000 training images of MNIST, each blended with a random patch of a BSDS500 photograph, |patch - digit|
  in each channel (Ganin et al. 2016, section 5.2.4); one patch an image, drawn from --seed and its number;
- svhn: the 73,257 training images (cropped digits), 32x32 scaled to 28x28 (the course took 79,431 of train and extra);
- usps: the 7,291 training images, and as val.csv the 2,007 test images, 16x16 scaled to 28x28.
A domain that is there already is kept. --source DIR holds what torchvision's datasets leave, MNIST/raw/*-ubyte,
train_32x32.mat, usps.bz2 and usps.t.bz2, and anywhere under it the *.jpg of BSDS500. Needs scipy (for the *.mat).
"""

from __future__ import annotations

import http.client
import os
import pathlib
import shutil
import sys
import urllib.request
import zipfile
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import pandas
from PIL import Image
from torchvision.datasets import MNIST, SVHN, USPS
from tqdm import tqdm

from utils import SEED, Parser, UserError, cli, open_image, output_folder

BSDS500 = "https://codeload.github.com/BIDS/BSDS500/zip/refs/heads/master"  # its authors' files, unchanged
SIZE = 28


# ------------------------------------------------------------------------ sources


def fetch(url, path):
    """Downloads to path.part, going on where an earlier try stopped, then renames it; raises UserError offline."""
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206
            total = int(answer.headers.get("Content-Length") or 0) + (done if resumed else 0)
            with open(part, "ab" if resumed else "wb") as f, tqdm(
                total=total or None, initial=f.tell(), unit="B", unit_scale=True, desc=path.name
            ) as bar:
                for block in iter(lambda: answer.read(1 << 20), b""):
                    f.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "code", 0) == 416:  # no byte beyond what is there: the next try starts anew
            part.unlink()
        raise UserError(f"{url}: cannot be fetched ({e}); try again, or give its files with --source DIR") from None
    if total and part.stat().st_size != total:
        raise UserError(f"{url}: stopped at {part.stat().st_size} of {total} bytes; run this again to go on")
    os.replace(part, path)


def dataset(kind, raw, download, **options):
    """torchvision's dataset of `kind` in the folder raw; raises UserError where its files are missing or damaged."""
    try:
        return kind(raw, download=download, **options)
    except ModuleNotFoundError as e:
        raise UserError(f"{kind.__name__} needs {e.name}; `pip install {e.name}`") from None
    except Exception as e:  # not there, of another checksum, offline, damaged: many kinds
        remedy = "try again with a network, or give the files with --source DIR" if download else "put its files there"
        raise UserError(f"{raw}: {kind.__name__} cannot be read from there ({e}); {remedy}") from None


def photographs(raw, download):
    """The photographs below raw, uint8 [H, W, 3], in the order of their paths; raises UserError if there are none."""
    if download and not (raw / "BSDS500").is_dir():
        archive = raw / "BSDS500.zip"
        if not archive.is_file():
            fetch(BSDS500, archive)
        unpack_photographs(archive, raw / "BSDS500")
    paths = sorted(raw.rglob("[!.]*.jpg"))
    if not paths:
        raise UserError(f"{raw}: no *.jpg below it; put the photographs of BSDS500 there")
    return [read_photograph(p) for p in tqdm(paths, desc="photographs", unit="picture", leave=False)]


def unpack_photographs(archive, folder):
    """Leaves in `folder` the archive's .../images/{train,val,test}/*.jpg; raises UserError for a damaged archive."""
    temporary = folder.with_name(".BSDS500.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with zipfile.ZipFile(archive) as z:
            for name in z.namelist():
                if "/images/" in name and name.endswith(".jpg"):
                    (temporary / pathlib.PurePosixPath(name).name).write_bytes(z.read(name))
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise UserError(f"{archive}: a damaged archive ({e}); remove it and run this again") from None
    os.replace(temporary, folder)


def read_photograph(path):
    pixels = np.asarray(open_image(path, "fetch it again", upright=False))
    if min(pixels.shape[:2]) < SIZE:
        raise UserError(f"{path}: smaller than {SIZE}x{SIZE} pixels; it is no photograph of BSDS500")
    return pixels


# ------------------------------------------------------------------------ domains


def blend(digit, photo, random):
    """|patch - digit| for a digit uint8 [28, 28] and a random patch of the photo uint8 [H, W, 3]: uint8 [28, 28, 3]."""
    y, x = (random.integers(0, n - SIZE + 1) for n in photo.shape[:2])
    patch = photo[y : y + SIZE, x : x + SIZE].astype(np.int16)
    return np.abs(patch - digit[..., None]).astype(np.uint8)


def scaled(pixels):
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.BILINEAR))


def mnistm(raw, download, seed):
    digits, photos = dataset(MNIST, raw, download, train=True), photographs(raw, download)

    def pictures():
        for i, digit in enumerate(digits.data.numpy()):
            random = np.random.default_rng([seed, i])
            yield blend(digit, photos[random.integers(len(photos))], random)

    return pictures(), digits.targets.tolist(), len(digits)


def svhn(raw, download, seed):
    digits = dataset(SVHN, raw, download, split="train")
    return (scaled(p.transpose(1, 2, 0)) for p in digits.data), digits.labels.tolist(), len(digits)


def usps(raw, download, seed):
    train, test = (dataset(USPS, raw, download, train=t) for t in (True, False))
    both = [*train.data, *test.data]
    return (scaled(p) for p in both), [*train.targets, *test.targets], len(train)


DOMAINS = {"mnistm": mnistm, "svhn": svhn, "usps": usps}


def write_domain(folder, pictures, labels, trained):
    """folder/data/*.png, train.csv with the first `trained` of them, val.csv with the rest; under a temporary name
    until all is written."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "data").mkdir(parents=True)
    names = [f"{i:05d}.png" for i in range(len(labels))]
    for name, picture in tqdm(zip(names, pictures), total=len(names), desc=folder.name, unit="picture"):
        Image.fromarray(picture).save(temporary / "data" / name)
    table = pandas.DataFrame({"image_name": names, "label": labels})
    for file, part in (("train.csv", table[:trained]), ("val.csv", table[trained:])):
        if len(part):
            part.to_csv(temporary / file, index=False)
    os.replace(temporary, folder)


@cli
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("dest", metavar="DEST", help="folder that gets mnistm/, svhn/ and usps/")
    parser.add_argument("--source", metavar="DIR", help="take the files from there (default: fetch them to DEST/raw)")
    parser.add_argument("--only", nargs="+", choices=list(DOMAINS), default=list(DOMAINS), help="these domains")
    parser.add_argument("--seed", type=SEED, default=0, help="of the patches behind MNIST-M (default: 0)")
    args = parser.parse_args(argv)
    if args.source and not pathlib.Path(args.source).is_dir():
        raise UserError(f"{args.source}: no such folder; --source names the folder of the files at hand")
    dest = output_folder(args.dest)
    raw = pathlib.Path(args.source) if args.source else output_folder(dest / "raw")
    for name in args.only:
        if (dest / name).exists():
            print(f"{dest / name} is there already, and stays")
        else:
            write_domain(dest / name, *DOMAINS[name](raw, not args.source, args.seed))
            print(f"wrote {dest / name}")


if __name__ == "__main__":
    main(sys.argv[1:])
