"""tools/make_digits.py on small stand-ins of the public files: what it builds, and what each kind of damage says."""

import bz2
import csv
import hashlib
import http.server
import io
import struct
import sys
import threading
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("scipy", reason="torchvision reads SVHN with scipy")
import scipy.io

sys.path.insert(0, str(ROOT / "tools"))
import make_digits

from digits import load_digits
from utils import UserError

COUNT = 12


def jpeg(size=(40, 50), seed=0):
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Files as torchvision leaves them, with a dozen pictures each, and three photographs."""
    folder, random = tmp_path / "source", np.random.RandomState(0)
    (folder / "MNIST/raw").mkdir(parents=True)
    images = random.randint(0, 256, (COUNT, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        idx3 = struct.pack(">4i", 2051, COUNT, 28, 28) + images.tobytes()
        (folder / f"MNIST/raw/{split}-images-idx3-ubyte").write_bytes(idx3)
        labels = struct.pack(">2i", 2049, COUNT) + bytes(i % 10 for i in range(COUNT))
        (folder / f"MNIST/raw/{split}-labels-idx1-ubyte").write_bytes(labels)
    svhn = {"X": random.randint(0, 256, (32, 32, 3, COUNT), dtype=np.uint8), "y": np.arange(1, COUNT + 1)[:, None] % 10}
    svhn["y"][svhn["y"] == 0] = 10
    scipy.io.savemat(str(folder / "train_32x32.mat"), svhn)
    md5 = hashlib.md5((folder / "train_32x32.mat").read_bytes()).hexdigest()
    monkeypatch.setitem(make_digits.SVHN.split_list, "train", ["", "train_32x32.mat", md5])
    for name, count in (("usps.bz2", COUNT), ("usps.t.bz2", 5)):
        values = random.uniform(-1, 1, (count, 256))
        pixels = [" ".join(f"{k + 1}:{v:.4f}" for k, v in enumerate(row)) for row in values]
        lines = [f"{i % 10 + 1} {row}" for i, row in enumerate(pixels)]
        (folder / name).write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
    (folder / "BSDS500/images/train").mkdir(parents=True)
    for i in range(3):
        (folder / f"BSDS500/images/train/{i}.jpg").write_bytes(jpeg(seed=i))
    return folder


def make(*args):
    make_digits.main([str(a) for a in args])


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted((folder / "data").iterdir())}


# ------------------------------------------------------------------------ what it builds


def test_the_three_domains_are_in_the_course_s_layout(raw, tmp_path):
    make(tmp_path / "digits", "--source", raw)
    for name, shape in (("mnistm", (28, 28, 3)), ("svhn", (28, 28, 3)), ("usps", (28, 28))):
        assert {p.shape for p in pictures(tmp_path / "digits" / name).values()} == {shape}
        files = {p.name for p in (tmp_path / "digits" / name).iterdir()}
        assert files == {"data", "train.csv"} | ({"val.csv"} if name == "usps" else set())
        images, labels = load_digits(tmp_path / "digits", name)
        assert len(images) == COUNT + (5 if name == "usps" else 0)
        if name == "svhn":
            assert labels.tolist() == [(i + 1) % 10 for i in range(COUNT)], "SVHN's 10 is the digit 0"
        else:
            assert labels[:COUNT].tolist() == [i % 10 for i in range(COUNT)]
    with open(tmp_path / "digits/usps/val.csv", newline="") as f:
        assert list(csv.reader(f)) == [["image_name", "label"], *([f"{COUNT + i:05d}.png", str(i)] for i in range(5))]


def test_mnist_m_is_the_difference_of_a_patch_and_the_digit():
    digit = np.random.RandomState(0).randint(0, 256, (28, 28), dtype=np.uint8)
    photo = np.random.RandomState(1).randint(0, 256, (33, 41, 3), dtype=np.uint8)
    blended = make_digits.blend(digit, photo, np.random.default_rng(3)).astype(int)
    found = [
        (y, x)
        for y in range(6)
        for x in range(14)
        if np.array_equal(blended, np.abs(photo[y : y + 28, x : x + 28].astype(int) - digit[..., None]))
    ]
    assert len(found) == 1
    whole = photo[:28, :28]
    assert np.array_equal(make_digits.blend(np.zeros((28, 28), np.uint8), whole, np.random.default_rng(0)), whole)


def test_the_seed_decides_the_patches(raw, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / out, "--source", raw, "--only", "mnistm", "--seed", seed)
    a, b, c = (pictures(tmp_path / out / "mnistm") for out in "abc")
    assert all(np.array_equal(a[n], b[n]) for n in a) and not any(np.array_equal(a[n], c[n]) for n in a)


def test_a_domain_that_is_there_stays_and_an_interrupted_one_is_made_again(raw, tmp_path, monkeypatch, capsys):
    def interrupted(pixels):
        raise UserError("no space")

    with monkeypatch.context() as m:
        m.setattr(make_digits, "scaled", interrupted)
        with pytest.raises(SystemExit):
            make(tmp_path, "--source", raw, "--only", "svhn")
    assert not (tmp_path / "svhn").exists()
    make(tmp_path, "--source", raw, "--only", "svhn")
    before = (tmp_path / "svhn/train.csv").stat().st_mtime_ns
    make(tmp_path, "--source", raw, "--only", "svhn")
    assert "svhn is there already" in capsys.readouterr().out
    assert (tmp_path / "svhn/train.csv").stat().st_mtime_ns == before and len(pictures(tmp_path / "svhn")) == COUNT


# ------------------------------------------------------------------------ fetching


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives `content`, from the asked byte on; the first answer breaks off half-way."""

    content, asked = b"", []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append(start)
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : None if len(self.asked) > 1 else len(self.content) // 2])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Handler.asked = []
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def test_photographs_are_fetched_and_a_broken_download_goes_on(server, tmp_path, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("BSDS500-master/BSDS500/data/images/train/2.jpg", jpeg(seed=2))
        z.writestr("BSDS500-master/BSDS500/data/images/val/1.jpg", jpeg(seed=1))
        z.writestr("BSDS500-master/documentation/figure.jpg", jpeg(seed=3))
    Handler.content = archive.getvalue()
    monkeypatch.setattr(make_digits, "BSDS500", server)
    with pytest.raises(UserError, match="run this again to go on|cannot be fetched"):
        make_digits.photographs(tmp_path, download=True)
    assert not (tmp_path / "BSDS500.zip").exists()
    photos = make_digits.photographs(tmp_path, download=True)
    assert Handler.asked == [0, len(Handler.content) // 2]
    assert (tmp_path / "BSDS500.zip").read_bytes() == Handler.content
    assert [p.shape for p in photos] == [(40, 50, 3)] * 2
    assert len(make_digits.photographs(tmp_path, download=True)) == 2 and len(Handler.asked) == 2, "kept"


def test_a_download_that_was_killed_at_its_last_byte_is_made_anew(server, tmp_path):
    Handler.content = b"all of it"
    (tmp_path / "file.part").write_bytes(Handler.content)
    with pytest.raises(UserError, match="416"):
        make_digits.fetch(server, tmp_path / "file")
    make_digits.fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == Handler.content and Handler.asked == [len(Handler.content), 0]


def test_offline_is_one_line_that_names_source(tmp_path, monkeypatch, capsys):
    offline = "http://127.0.0.1:9/"
    monkeypatch.setitem(make_digits.SVHN.split_list, "train", [offline, "train_32x32.mat", "0"])
    monkeypatch.setattr(make_digits, "BSDS500", offline)
    with pytest.raises(SystemExit) as stop:
        make(tmp_path / "digits", "--only", "svhn")
    assert stop.value.code == 2 and "--source DIR" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "digits/svhn").exists()
    with pytest.raises(UserError, match="127.0.0.1:9/: cannot be fetched .* --source DIR"):
        make_digits.photographs(tmp_path, download=True)


# ------------------------------------------------------------------------ bad input


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    "damage, file, says",
    [
        (remove, "MNIST/raw/train-images-idx3-ubyte", "MNIST cannot be read from there"),
        (truncate, "MNIST/raw/train-images-idx3-ubyte", "MNIST cannot be read from there"),
        (truncate, "train_32x32.mat", "SVHN cannot be read from there"),
        (remove, "usps.t.bz2", "USPS cannot be read from there"),
        (truncate, "BSDS500/images/train/1.jpg", "1.jpg: not a readable picture"),
    ],
)
def test_each_missing_or_damaged_file_is_one_line(raw, tmp_path, damage, file, says, capsys):
    damage(raw / file)
    with pytest.raises(SystemExit) as stop:
        make(tmp_path / "digits", "--source", raw)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_without_photographs_or_with_a_small_one_it_says_so(raw, tmp_path):
    for path in (raw / "BSDS500").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"no \*.jpg below it"):
        make_digits.photographs(raw, download=False)
    (raw / "small.jpg").write_bytes(jpeg((27, 50)))
    with pytest.raises(UserError, match="small.jpg: smaller than 28x28"):
        make_digits.photographs(raw, download=False)


def test_a_source_that_is_no_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make(tmp_path / "digits", "--source", tmp_path / "gone")
    assert "gone: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()
