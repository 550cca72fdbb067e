"""train_common.py: what a training leaves on the disk."""

import pytest
import torch

pytest.importorskip("pytorch_lightning")

from train_common import WholeCheckpoints  # noqa: E402
from utils import UserError  # noqa: E402


def test_a_checkpoint_that_does_not_fit_the_disk_leaves_the_one_before_it(tmp_path, monkeypatch):
    last = tmp_path / "run/last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, last)

    def full_disk(content, path):
        with open(path, "wb") as f:
            f.write(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="last.ckpt: could not be written .*is the disk full"):
        WholeCheckpoints().save_checkpoint({"step": 2}, last)
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(last) == {"step": 1}
