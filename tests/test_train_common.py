"""train_common.py: what a training leaves on the disk."""

import argparse
import datetime
import os
import time

import pytest
import torch

pytest.importorskip("pytorch_lightning")

import pytorch_lightning as pl  # noqa: E402

from train_common import (
    Batches,
    MovingAverage,
    MovingAverages,
    SaveBest,
    Training,
    WholeCheckpoints,
    fit,
    lightning_trainer,
)  # noqa: E402
from utils import UserError  # noqa: E402


def test_averages_of_several_decays_differ_and_forget_the_first_weights():
    decays, network = [0.5, 0.999, 1.0], torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1e6)
    averages = MovingAverages(network, decays)
    for step in range(1, 9):
        network.weight.data.fill_(step)
        averages.update(network, step)
    for decay, average in zip(decays, averages):
        shares = [decay ** (8 - step) for step in range(1, 9)]
        expected = sum(share * step for share, step in zip(shares, range(1, 9))) / sum(shares)
        assert average.weight.item() == pytest.approx(expected, rel=1e-4)
    assert averages[0].weight > averages[1].weight > averages[2].weight


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


class Drawing(pl.LightningModule):
    """Keeps what its steps draw; step `fails_at` fails as a GPU without memory does."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.weight, self.drawn, self.fails_at = torch.nn.Parameter(torch.zeros(())), [], fails_at

    def training_step(self, batch, _):
        time.sleep(0.02)
        self.drawn.append(torch.rand(()).item())
        if self.global_step == self.fails_at:
            raise RuntimeError("out of memory")
        return self.weight * 0

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train_for(tmp_path, seconds, fails_at=None):
    """(what was drawn, the last step) of a training of 400 steps within epochs of 200."""
    args = argparse.Namespace(out=tmp_path, steps=400, epoch_steps=200, batch_size=1, devices=1, num_nodes=1, seed=0)
    args.device, args.precision, args.ema, args.warmup, args.max_epochs = torch.device("cpu"), "fp32", 0.9, 0, None
    args.max_time = datetime.timedelta(seconds=seconds)
    module = Drawing(fails_at)
    trainer = lightning_trainer(args, [])
    fit(args, trainer, module, Batches(1, lambda rows: rows), Batches(1, lambda rows: rows))
    return module.drawn, trainer.global_step


def test_every_start_has_the_whole_of_max_time_and_draws_afresh_within_an_epoch(tmp_path):
    first, step = train_for(tmp_path, 0.5)
    second, later = train_for(tmp_path, 0.5)
    assert 2 < step < 100 and later >= step + 2
    assert not set(first) & set(second)


def test_what_goes_wrong_within_a_resumed_epoch_is_not_blamed_on_the_checkpoint(tmp_path):
    _, step = train_for(tmp_path, 0.3)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_for(tmp_path, 60, fails_at=step + 1)


def test_a_training_is_not_resumed_with_another_config(tmp_path):
    args = argparse.Namespace(ema=[0.9], out=tmp_path)
    checkpoint = {}
    Training(torch.nn.Linear(1, 1), {"objective": "v", "log_sigma": [-0.5, 1.3]}, args).on_save_checkpoint(checkpoint)
    Training(torch.nn.Linear(1, 1), {"objective": "v", "log_sigma": [-0.5, 1.3]}, args).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="last.ckpt: of a training with another config"):
        Training(torch.nn.Linear(1, 1), {"objective": "eps"}, args).on_load_checkpoint(checkpoint)
