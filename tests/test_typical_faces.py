"""tools/typical_faces.py: which pictures it takes, and what it leaves."""

import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("pytorch_lightning", reason="p2_train.py needs requirements-dev")
sys.path.insert(0, str(ROOT / "tools"))
import typical_faces


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Twenty greys of about one brightness, a white picture and a black one, told by their mean colour alone."""
    monkeypatch.setattr(typical_faces, "Inception", lambda device: lambda images: images.float().mean((2, 3)).numpy())
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, grey in enumerate([*range(120, 140), 255, 0]):
        Image.new("RGB", (40, 48), (grey, grey, grey)).save(folder / f"{i:02d}.png")
    return folder


def test_distances_are_those_of_the_gaussian():
    """A correlated Gaussian: by its own covariance, the distance has a mean of D."""
    x = np.random.default_rng(0).normal(size=(5000, 3)) @ np.array([[1, 0.8, 0], [0, 0.6, 0.3], [0, 0, 2]])
    far = typical_faces.distances(x)
    assert far.mean() == pytest.approx(3, rel=0.05)
    wanted = [(row - x.mean(0)) @ np.linalg.inv(np.cov(x.T)) @ (row - x.mean(0)) for row in x[:20]]
    assert far[:20] == pytest.approx(wanted, rel=0.1)


def test_it_copies_the_share_that_is_nearest(photos, tmp_path, capsys):
    (tmp_path / ".some.tmp").mkdir()
    (tmp_path / ".some.tmp/99.png").write_bytes(b"of a run that was killed")
    typical_faces.main([str(photos), str(tmp_path / "some"), "--share", "0.9", "--device", "cpu"])
    assert sorted(p.name for p in (tmp_path / "some").iterdir()) == [f"{i:02d}.png" for i in range(20)]
    for path in (tmp_path / "some").iterdir():
        assert path.read_bytes() == (photos / path.name).read_bytes()
    assert "wrote 20 of 22 pictures" in capsys.readouterr().out


def test_a_failed_copy_leaves_nothing(photos, tmp_path, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(typical_faces.shutil, "copyfile", full)
    with pytest.raises(SystemExit):
        typical_faces.main([str(photos), str(tmp_path / "some"), "--device", "cpu"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]
