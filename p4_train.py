"""Trains digits for a domain without labels: source only, domain-adversarial (DANN, Ganin et al. 2016), or target only.

    python3 p4_train.py --target svhn --mode dann                   # to runs/p4_svhn_dann; the same line resumes it
    python3 p4_train.py --target svhn --refine                      # goes on from its best.pt, to runs/p4_svhn_refined

Leaves in --out: last.ckpt (resumable), best.pt (EMA weights in half precision; copy it to
checkpoints/p4_{target}_{mode}.pt), last.pt (those of the last epoch), csv/ and tensorboard/.

No label of the target is seen by source, dann and --refine, but to report an accuracy that decides nothing. best.pt is
the epoch with the highest score, which is, in
- source: the accuracy on validation images of the source;
- dann and --refine: p4_losses.label_free_score, that and the mutual information of target images and predictions;
- target: the step, so the last one: the accuracy on the validation images is what gets reported;
- any, with --oracle-selection: the accuracy on validation images of the target; the checkpoint's metrics say so.

--refine trains the network of --start on, with a small adversarial loss and the parts it names, self-training where it
names none: the EMA network, while it learns, teaches the target's digits that it is sure of (p4_losses.py). Of it the
defaults are batches of 64, lr 5e-4, EMA 0.995, a warm-up of 50 steps, lambda 0.01.
"""

from __future__ import annotations

import math
import os
import pathlib
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

import p4_losses
from digits import load_digits
from p4_augment import SOURCE_ZOOM, TARGET_ZOOM, augment
from p4_model import HELD_BACK, SOURCE, TARGET, DigitNet, DomainClassifier, load_digit_net, run_batches
from train_common import Batches, MovingAverage, Training, add_training_options, fit, lightning_trainer
from utils import Parser, UserError, cli, half, output_folder, real, save_checkpoint, to_float

# --refine: the weights of its parts on the target and on the source (Mao et al. 2019, table 5, for MNIST to SVHN)
PARTS = {"self-training": (1.0, 0.0), "entropy": (0.06, 0.0), "vat": (0.06, 1.0), "mixup": (0.06, 1.0)}
REFINED = {"steps": 2000, "batch_size": 64, "lr": 5e-4, "ema": 0.995, "warmup": 50, "adversary": 0.01}  # its defaults


def started(path, target):
    """The DigitNet that --refine goes on from; UserError unless it is DANN's for that target, which saw no label."""
    net, config = load_digit_net(path)
    if (config.get("mode"), config.get("target")) != ("dann", target):
        of = f"of --mode {config.get('mode')} --target {config.get('target')}"
        raise UserError(f"{path}: {of}; --refine takes one of --mode dann --target {target}")
    return net.train()


class Adaptation(pl.LightningModule):
    """Batches are uint8 [B, 3, 28, 28] and labels [B] of a domain; in dann also uint8 [B, 3, 28, 28] of the target."""

    def __init__(self, config, args):
        super().__init__()
        self.config, self.args = config, args
        self.net = started(args.start, config["target"]) if config["refine"] else DigitNet()
        if config["mode"] == "dann":
            self.domains = DomainClassifier()

    def training_step(self, batch, _):
        images, labels, *unlabelled = batch
        view = (TARGET_ZOOM,) if self.config["mode"] == "target" else (SOURCE_ZOOM, 0.5)
        images = self.view_of(to_float(images), *view)
        if unlabelled:
            loss = self.adapt(images, labels, to_float(unlabelled[0]))
        else:
            loss = F.cross_entropy(self.net(images, self.config["domain"]), labels)
        self.log("train_loss", loss)
        return loss

    def view_of(self, images, *how):
        return images if self.args.plain else augment(images, *how)

    def adapt(self, source, labels, target):
        """Cross-entropy of the source's views, adversarial loss, and the parts of --refine; `target` not yet augmented.
        In DANN lambda rises by the schedule of Ganin et al. 2016, section 5.2.2."""
        views = source, self.view_of(target, TARGET_ZOOM)
        features = [self.net.features(x, domain) for domain, x in enumerate(views)]
        logits = [self.net.labels(f).float() for f in features]
        progress = 1 if self.config["refine"] else self.trainer.global_step / self.args.steps
        lambd = self.args.adversary * (2 / (1 + math.exp(-10 * progress)) - 1)
        losses = {"label_loss": F.cross_entropy(logits[SOURCE], labels)}
        losses["domain_loss"] = p4_losses.adversarial(self.domains, *features, lambd)
        self.log_dict({**losses, "lambda": torch.full((), lambd, device=self.device)})
        return sum(losses.values()) + sum(self.part(p, views, logits, target) for p in self.config["refine"])

    def part(self, name, views, logits, target):
        """One part of --refine, weighted over target and source."""
        if name == "self-training":
            teacher = next(c for c in self.trainer.callbacks if isinstance(c, Teacher)).network()
            with torch.no_grad():
                taught = teacher(target, TARGET)
            loss, share = p4_losses.self_training(logits[TARGET], taught, logits[SOURCE])
            self.log("taught_share", share)
            return PARTS[name][0] * loss
        if name == "entropy":
            return PARTS[name][0] * p4_losses.entropy(logits[TARGET])
        smooth = {"vat": p4_losses.virtual_adversarial, "mixup": p4_losses.virtual_mixup}[name]
        with self.net.unremembered():
            of_source = smooth(lambda x: self.net(x, SOURCE), views[SOURCE], logits[SOURCE])
            of_target = smooth(lambda x: self.net(x, TARGET), views[TARGET], logits[TARGET])
        return PARTS[name][0] * of_target + PARTS[name][1] * of_source

    def validation_step(self, batch, _):
        images, labels = batch
        domain = TARGET if self.config["mode"] == "target" else SOURCE
        right = self.net(images, domain).argmax(1) == labels
        self.log("labelled_accuracy", right.float().mean(), sync_dist=True)

    configure_optimizers = Training.configure_optimizers
    on_save_checkpoint, on_load_checkpoint = Training.on_save_checkpoint, Training.on_load_checkpoint


class Teacher(MovingAverage):
    """The moving average of the weights, which --refine asks for digits during the training."""

    def network(self):
        return self._average_model.module.net.eval()


class Selection(pl.Callback):
    """After every epoch, with the EMA weights as they ship (in half precision): the score; last.pt; best.pt where the
    score is the highest so far. The target's `labels` are for the report alone, but for --oracle-selection.

    It must stand before the EMA callback, which puts the training weights back at the end of the validation.
    """

    def __init__(self, out, images, labels, oracle):
        self.out, self.images, self.labels, self.oracle = out, images, labels, oracle
        self.best, self.seconds, self.since = -math.inf, 0.0, 0.0

    def on_train_start(self, trainer, module):
        self.since = time.time()

    def on_validation_epoch_end(self, trainer, module):
        labelled_accuracy = float(trainer.callback_metrics["labelled_accuracy"])  # of all ranks, so all must ask
        if not trainer.is_global_zero:
            return
        state_dict, net = half(module.net.state_dict()), DigitNet()
        net.load_state_dict(state_dict)
        net.eval().to(module.device)
        logits = run_batches(net, self.images, module.config["domain"], module.device)
        metrics = {
            "target_accuracy": (logits.argmax(1) == self.labels).float().mean().item(),
            "labelled_accuracy": labelled_accuracy,
            "mutual_information": p4_losses.mutual_information(logits),
        }
        scores = {
            "source": labelled_accuracy,
            "dann": p4_losses.label_free_score(labelled_accuracy, metrics["mutual_information"]),
            "target": float(trainer.global_step),
        }
        metrics["score"] = metrics["target_accuracy"] if self.oracle else scores[module.config["mode"]]
        module.log_dict(metrics, rank_zero_only=True)
        self.seconds, self.since = self.seconds + time.time() - self.since, time.time()
        metrics.update(selection="oracle" if self.oracle else "no target labels", seconds=self.seconds)
        checkpoint = {"state_dict": state_dict, "config": module.config}
        checkpoint.update(step=trainer.global_step, metrics=metrics)
        save_checkpoint(checkpoint, self.out / "last.pt")
        if metrics["score"] >= self.best:
            self.best = metrics["score"]
            save_checkpoint(checkpoint, self.out / "best.pt")

    def state_dict(self):
        return {"best": self.best, "seconds": self.seconds}

    def load_state_dict(self, state):
        self.best, self.seconds = state["best"], state["seconds"]


def read_data(args):
    """(training set, validation set, target's validation images, their labels). The training set has no target labels
    but in the mode target, and no target images in the mode source."""

    def load(name, split):
        return load_digits(args.data, name, split, HELD_BACK[name])

    def drawn(rows):
        """As many rows of the labelled domain as asked for, and of the unlabelled one."""
        i = torch.randint(len(images), (len(rows),))
        j = [torch.randint(len(x), (len(rows),)) for x in unlabelled]
        return (images[i], labels[i], *(x[k] for x, k in zip(unlabelled, j)))

    labelled = args.target if args.mode == "target" else args.source
    images, labels = load(labelled, "train")
    unlabelled = [load(args.target, "train")[0]] if args.mode == "dann" else []
    known = [x[:2000] for x in load(labelled, "val")]
    val = Batches(len(known[0]), lambda rows: [x[rows] for x in known])
    return Batches(len(images), drawn), val, *load(args.target, "val")


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="hw2_data/digits", help="folder with mnistm/, svhn/, usps/")
    option("--source", choices=list(HELD_BACK), default="mnistm")
    option("--target", choices=list(HELD_BACK), required=True)
    option("--mode", choices=["source", "dann", "target"], default="dann")
    option("--adversary", type=real(0), default=1.0, help="the largest lambda (default: 1)")
    option("--plain", action="store_true", help="no augmentation, to see what adaptation does alone")
    option("--refine", nargs="*", choices=list(PARTS), default=None, help="of --start, by these parts: see above")
    option("--start", metavar="CHECKPOINT", help="of --mode dann (default: runs/p4_{target}_dann/best.pt)")
    option("--oracle-selection", action="store_true", help="choose the epoch by target labels; for comparison only")
    add_training_options(parser, out="runs/p4_{target}_{mode}", steps=2000, batch_size=128, lr=1e-3, ema=0.999)
    if parser.parse_known_args(argv)[0].refine is not None:
        parser.set_defaults(**REFINED, out="runs/p4_{target}_refined")
    args = parser.parse_args(argv)
    if args.source == args.target and args.mode != "target":
        raise UserError(f"--target {args.target}: it is the source too; take another one")
    if args.refine is not None and args.mode != "dann":
        raise UserError(f"--refine works on top of --mode dann, not {args.mode}")
    if args.start and args.refine is None:
        raise UserError(f"--start {args.start}: add --refine, or leave it out")
    args.refine = [] if args.refine is None else args.refine or ["self-training"]
    args.start = args.start or f"runs/p4_{args.target}_dann/best.pt"
    if args.refine and not pathlib.Path(args.start).is_file():
        first = f"train it without --refine, or take --start checkpoints/p4_{args.target}_dann.pt"
        raise UserError(f"{args.start}: no such checkpoint; {first}")
    args.out = args.out.replace("{target}", args.target).replace("{mode}", args.mode)
    return args


@cli
def main(argv=None):
    args = parse(argv)
    train, val, images, labels = read_data(args)
    out = output_folder(args.out)
    config = {"domain": SOURCE if args.mode == "source" else TARGET, "mode": args.mode}
    config.update(source=args.source, target=args.target, refine=args.refine, steps=args.steps)
    config.update(plain=args.plain, adversary=args.adversary, oracle=args.oracle_selection)
    pl.seed_everything(args.seed, verbose=False)
    module = Adaptation(config, args)
    selection = Selection(out, images, labels, args.oracle_selection)
    trainer = lightning_trainer(args, [selection, Teacher(args)])
    fit(args, trainer, module, train, val, "last.ckpt,best.pt,last.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
