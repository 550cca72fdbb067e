"""What every training script shares: its options, the learning rate, and a Lightning trainer that stops and resumes."""

from __future__ import annotations

import copy
import datetime
import math
import pathlib
import re
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, Timer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import TorchCheckpointIO
from torch.utils.data import DataLoader, Dataset

import utils
from utils import UserError, load_checkpoint, real, save_checkpoint, whole


def add_run_options(parser, out):
    """The options that every training has."""
    option = parser.add_argument
    option("--out", default=out, help=f"folder of the run, resumed if last.ckpt is in it (default: {out})")
    option("--epoch-steps", type=whole(), default=500, help="steps between validations and checkpoints (default: 500)")
    option("--warmup", type=whole(0), default=200, help="steps of rising learning rate (default: 200)")
    option("--max-epochs", type=whole(), help="stop after this epoch, with a resumable checkpoint")
    option("--max-time", type=duration, metavar="DD:HH:MM:SS", help="stop then, with a resumable checkpoint")
    utils.add_device_options(parser)


def add_training_options(parser, out, steps, batch_size, lr, ema):
    """The options of a training of one network, on any number of devices, with the defaults of the shipped result."""
    option = parser.add_argument
    add_run_options(parser, out)
    option("--steps", type=whole(), default=steps, help=f"optimizer steps of the whole training (default: {steps})")
    option("--batch-size", type=whole(), default=batch_size, help=f"a device (default: {batch_size})")
    option("--lr", type=real(positive=True), default=lr)
    several = {"nargs": "+", "metavar": "DECAY"} if isinstance(ema, list) else {}
    option("--ema", type=real(0, 1), default=ema, help="decay of the weights' moving average, a step", **several)
    option("--devices", type=whole(), default=1, help="GPUs or CPU processes a node; more than one means DDP")
    option("--num_nodes", type=whole(), default=1)


def duration(text):
    """`type` of an option: DD:HH:MM:SS as a timedelta."""
    parts = re.fullmatch(r"(\d{1,4}):(\d{1,2}):(\d{1,2}):(\d{1,2})", text, re.ASCII)
    if not parts:
        raise UserError(f"take DD:HH:MM:SS, as 00:01:30:00 for an hour and a half, not {text[:40]!r}")
    days, hours, minutes, seconds = map(int, parts.groups())
    return datetime.timedelta(days, seconds, hours=hours, minutes=minutes)


class Autoguided:
    """What a network predicts of x_t [B, C, H, W] and t [B], guided by a worse one of the same data: worse + scale
    (good - worse), [B, C, H, W] (Karras et al. 2024, Guiding a Diffusion Model with a Bad Version of Itself, eq. 3).

    Where both err, the worse one errs further. No module, so that it is no part of a training whose teacher it is.
    """

    def __init__(self, good, worse, scale):
        networks = good, worse
        self.networks = [n.eval().requires_grad_(False).to(memory_format=torch.channels_last) for n in networks]
        self.scale = scale
        self.id = " ".join([*map(utils.weights_id, networks), str(scale)])  # a training goes on with the same alone

    @torch.no_grad()
    def __call__(self, x_t, t, **given):
        good, worse = (network.to(x_t.device)(x_t, t, **given) for network in self.networks)
        return torch.lerp(worse, good, self.scale)


class MovingAverages(torch.nn.ModuleList):
    """Copies of a network, each an exponential moving average of its weights with a decay of its own.

    As a part of the module that is trained they go to its device and into its checkpoints; validation tells which of
    them is best. The weights before the first step have no part in them, as in Adam's corrected averages (Kingma & Ba
    2015, section 3); decay 1 is the plain mean.
    """

    def __init__(self, model, decays):
        super().__init__(copy.deepcopy(model).requires_grad_(False) for _ in decays)
        self.decays = decays

    @torch.no_grad()
    def update(self, model, step):
        """Takes in the weights after `step` steps, 1 or more."""
        for decay, average in zip(self.decays, self):
            newest = (1 - decay) / (1 - decay**step) if decay < 1 else 1 / step
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), newest)


class Training(pl.LightningModule):
    """A network, its config, and its moving averages, trained by AdamW as the options say. Subclasses have the steps;
    their validation logs a val_loss_{decay} for every average."""

    def __init__(self, model, config, args):
        super().__init__()
        self.model = model.train().to(memory_format=torch.channels_last)
        self.averages = MovingAverages(self.model, args.ema)
        self.config, self.args = config, args

    def on_save_checkpoint(self, checkpoint):
        checkpoint["config"] = self.config

    def on_load_checkpoint(self, checkpoint):
        theirs = checkpoint.get("config", self.config)
        if theirs != self.config:
            told = f"{self.args.out}/last.ckpt: of a training with another config ({theirs})"
            raise UserError(f"{told[:200]}; give the same, or another --out")

    def on_train_batch_end(self, *_):
        self.averages.update(self.model, self.trainer.global_step)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.args.lr, betas=(0.9, 0.99), weight_decay=0.01)
        return warmup_cosine(optimizer, self.args.steps, self.args.warmup)


class SaveBest(pl.Callback):
    """After every validation, of the moving average with the lowest loss: samples go to samples/, and its weights, in
    half precision, to best.pt unless an earlier epoch had a lower one.

    draw(model, config, *given) gives the picture of samples, and a dictionary of what they are worth.
    """

    def __init__(self, out, draw, *given):
        self.out, self.draw, self.given, self.best = out, draw, given, math.inf
        utils.output_folder(out / "samples")

    def on_validation_epoch_end(self, trainer, module):
        decays = module.averages.decays
        losses = [float(trainer.callback_metrics[f"val_loss_{decay}"]) for decay in decays]
        if not trainer.is_global_zero:
            return
        i = losses.index(min(losses))
        model = module.averages[i]
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            picture, metrics = self.draw(model, module.config, *self.given)
        utils.save_png(picture, self.out / "samples" / f"{trainer.global_step:07d}.png")
        metrics = {**metrics, "val_loss": losses[i], "ema": decays[i]}
        for name, value in metrics.items():
            module.log(name, value, rank_zero_only=True)
        if losses[i] < self.best:
            self.best = losses[i]
            weights = {k: v.cpu() for k, v in model.state_dict().items()}  # buffers, as times, are not to be rounded
            checkpoint = {
                "state_dict": {**weights, **utils.half(dict(model.named_parameters()))},
                "config": module.config,
                "step": trainer.global_step,
                "metrics": metrics,
            }
            save_checkpoint(checkpoint, self.out / "best.pt")

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.best = state["best"]


class SaveLast(SaveBest):
    """The same of the last epoch, whatever its loss."""

    def on_validation_epoch_end(self, trainer, module):
        self.best = math.inf
        super().on_validation_epoch_end(trainer, module)


def warmup_cosine(optimizer, total_steps, warmup):
    """Lightning's dictionary of an optimizer whose learning rate rises linearly for `warmup` steps, then falls to 0
    on a cosine."""

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SeedEpochs(pl.Callback):
    """Seeds every epoch and process from (seed, epoch, rank), so that a training resumed at the end of an epoch draws
    what an uninterrupted one draws; one that --max-time ended within an epoch draws afresh from there."""

    def __init__(self, seed):
        self.seed, self.began = seed, False

    def on_train_start(self, trainer, module):
        self.began = True
        self.on_train_epoch_start(trainer, module, 10**6 * trainer.global_step)  # Lightning calls it for whole epochs

    def on_train_epoch_start(self, trainer, module, more=0):
        torch.manual_seed(self.seed + 1000 * trainer.current_epoch + trainer.global_rank + more)


class Slot(Timer):
    """Ends a training after --max-time, counted anew at every start: Lightning's own counts all starts together."""

    def load_state_dict(self, state):
        pass


class MovingAverage(EMAWeightAveraging):
    """The exponential moving average of the weights, by args.ema a step, on the training's device; before args.warmup
    steps it is the weights themselves.

    Lightning alone makes it before the module goes to its device, so that it would stay on the CPU, and copy every
    weight there at every step; and it reads a count back from the device for every one.
    """

    def __init__(self, args):
        super().__init__(device=args.device, decay=args.ema)
        self.decay, self.warmup = args.ema, args.warmup

    def on_train_batch_end(self, trainer, module, *_):
        step = trainer.global_step
        if step <= self._latest_update_step:  # gradients are being accumulated
            return
        self._latest_update_step = step
        average = self._average_model.module
        with torch.no_grad():
            for old, new in ((average.parameters(), module.parameters()), (average.buffers(), module.buffers())):
                pairs = [(a, b) for a, b in zip(old, new) if a.is_floating_point()]
                if pairs:
                    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - self.decay if step > self.warmup + 1 else 1.0)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the final name and renames: a full disk or a kill leaves the last.ckpt before it as it was. Reads
    without running code that a last.ckpt may carry."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path, *args, **kwargs):
        checkpoint = load_checkpoint(path)
        if not isinstance(checkpoint, dict) or not {"state_dict", "optimizer_states", "loops"} <= set(checkpoint):
            raise UserError(f"{path}: no state of a training; remove it, or give another --out")
        return checkpoint


class Batches(Dataset):
    """`length` items that come in batches: batch(rows) makes one of int64 rows [B], or of their number alone."""

    def __init__(self, length, batch):
        self.length, self.batch = length, batch

    def __len__(self):
        return self.length

    def __getitems__(self, rows):
        return self.batch(torch.tensor(rows))


def lightning_trainer(args, callbacks):
    """A Trainer for the options above. The weights are averaged by args.ema, where that is one number and no callback
    does it. Sets args.resume_from to the run's last.ckpt where there is one.

    --steps must be a multiple of --epoch-steps, since checkpoints and samples are made at the end of epochs.
    """
    if args.steps % args.epoch_steps:
        raise UserError(f"--steps {args.steps}: take a multiple of --epoch-steps, {args.epoch_steps}")
    utils.reuse_freed_memory()
    out = pathlib.Path(args.out)
    last = out / "last.ckpt"
    args.resume_from = str(last) if last.is_file() else None
    device = args.device
    if device.type == "cuda" and args.devices > torch.cuda.device_count():
        raise UserError(f"--devices {args.devices}: this machine has {torch.cuda.device_count()} GPUs; take fewer")
    dtype = utils.training_precision(args.precision, device)
    if isinstance(args.ema, float) and not any(isinstance(c, MovingAverage) for c in callbacks):
        callbacks = [*callbacks, MovingAverage(args)]
    if args.max_time:
        callbacks = [*callbacks, Slot(args.max_time)]
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # so a run resumes
    warnings.filterwarnings("ignore", ".*does not have many workers")  # batches come from memory
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")  # they are drawn afresh
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=args.devices if device.index is None else [device.index],
        num_nodes=args.num_nodes,
        precision={torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[dtype],
        max_steps=args.steps,
        max_epochs=args.max_epochs or -1,
        gradient_clip_val=1.0,
        logger=[CSVLogger(out, name="csv"), TensorBoardLogger(out, name="tensorboard")],
        plugins=[WholeCheckpoints()],
        default_root_dir=out,
        callbacks=[
            *callbacks,
            SeedEpochs(args.seed),
            ModelCheckpoint(out, "last", enable_version_counter=False, save_on_train_epoch_end=True),
        ],
        num_sanity_val_steps=0,
        log_every_n_steps=min(20, args.epoch_steps),
        enable_model_summary=False,
    )


def fit(args, trainer, module, train, val, wrote=""):
    """Trains on map-style datasets that give whole batches (`__getitems__`), from the run's last checkpoint on.

    An epoch is args.epoch_steps optimizer steps on any number of devices: `train.length` is set accordingly. Ctrl-C
    ends as KeyboardInterrupt, which says where the same line goes on; else the end tells what was `wrote`.
    """
    train.length = args.epoch_steps * args.batch_size * trainer.world_size
    loaders = [
        DataLoader(train, args.batch_size, shuffle=True, collate_fn=lambda batch: batch),
        DataLoader(val, 250, collate_fn=lambda batch: batch),
    ]
    try:
        trainer.fit(module, *loaders, ckpt_path=args.resume_from)
    except OSError as e:  # of the loggers, which do not always say which file
        raise UserError(f"{e.filename or args.out}: {e.strerror}; the same line goes on when that is mended") from None
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        if args.resume_from is None or any(isinstance(c, SeedEpochs) and c.began for c in trainer.callbacks):
            raise
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
        raise UserError(f"{args.resume_from}: not of this training ({reason}); remove it, or take another --out") from e
    except SystemExit:  # Lightning's own, after Ctrl-C
        last = pathlib.Path(args.out) / "last.ckpt"
        every = f"{last} is written every {args.epoch_steps} steps, see --epoch-steps"
        goes_on = f"goes on from {last}" if last.is_file() else f"starts anew: {every}"
        raise KeyboardInterrupt(f"interrupted; the same line {goes_on}") from None
    if wrote and trainer.is_global_zero:
        print(f"step {trainer.global_step} of {args.steps}; wrote {args.out}/{{{wrote}}}")
