"""train_common.py: what a training leaves on the disk."""

import os

import pytest
import torch

pytest.importorskip("pytorch_lightning")

from train_common import WholeCheckpoints  # noqa: E402
from utils import UserError  # noqa: E402


def test_a_checkpoint_that_does_not_fit_the_disk_leaves_the_one_before_it(tmp_path, monkeypatch):
    last = tmp_path / "run/last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, last)

    def full_disk(content, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="last.ckpt: could not be written .*is the disk full"):
        WholeCheckpoints().save_checkpoint({"step": 2}, last)
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(last) == {"step": 1}


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_hostile_last_checkpoint_runs_nothing_when_a_training_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "callbacks": Hostile()}, "last.ckpt")
    with pytest.raises(UserError, match="last.ckpt: refused"):
        WholeCheckpoints().load_checkpoint("last.ckpt", map_location="cpu", weights_only=False)
    assert os.listdir() == ["last.ckpt"]
