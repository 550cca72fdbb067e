"""train_common.py: what a training leaves on the disk."""

import argparse
import os

import pytest
import torch

pytest.importorskip("pytorch_lightning")

from train_common import MovingAverage, SaveBest, WholeCheckpoints  # noqa: E402
from utils import UserError  # noqa: E402


def test_a_checkpoint_that_does_not_fit_the_disk_leaves_the_one_before_it(tmp_path, monkeypatch):
    last = tmp_path / "run/last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, last)

    def full_disk(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(last), "write_bytes", full_disk)
        with pytest.raises(UserError, match="last.ckpt: cannot be written .No space left on device"):
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


class Rank1:
    """A trainer of the second process, which counts who asks for the metrics of all."""

    is_global_zero, asked = False, 0

    @property
    def callback_metrics(self):
        self.asked += 1
        return {"val_loss_0.9": torch.tensor(1.0), "labelled_accuracy": torch.tensor(1.0)}


def test_every_process_asks_for_metrics_which_all_of_them_have_to_reduce(tmp_path):
    import p4_train

    module = argparse.Namespace(averages=argparse.Namespace(decays=[0.9]))
    for callback in (SaveBest(tmp_path, None), p4_train.Selection(tmp_path, None, None, False)):
        trainer = Rank1()
        callback.on_validation_epoch_end(trainer, module)
        assert trainer.asked and not list(tmp_path.glob("*.pt"))


def test_the_moving_average_is_that_of_torch_after_the_warmup_and_the_weights_before_it():
    torch.manual_seed(0)
    module = torch.nn.BatchNorm1d(4)
    average = MovingAverage(argparse.Namespace(device=torch.device("cpu"), ema=0.9, warmup=2))
    average._average_model = torch.optim.swa_utils.AveragedModel(module)
    expected = None
    for step in range(1, 7):
        for x in (*module.parameters(), module.running_mean):
            x.data += torch.randn(4)
        now = torch.cat([module.weight.detach(), module.running_mean])
        expected = now if step <= 3 else 0.9 * expected + 0.1 * now
        average.on_train_batch_end(argparse.Namespace(global_step=step), module, None, None, 0)
        averaged = average._average_model.module
        assert torch.allclose(torch.cat([averaged.weight, averaged.running_mean]), expected, atol=1e-6)
