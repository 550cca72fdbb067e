"""Trains digits for a domain without labels: source only, domain-adversarial (DANN, Ganin et al. 2016), or target only.

    python3 p4_train.py --target svhn --mode dann                   # to runs/p4_svhn_dann; the same line resumes it
    python3 p4_train.py --target usps --mode dann --refine

Leaves in --out: last.ckpt (resumable), best.pt (EMA weights in half precision; copy it to
checkpoints/p4_{target}_{mode}.pt), last.pt (those of the last epoch), csv/ and tensorboard/.

No label of the target is seen by source and dann, but to report an accuracy that decides nothing. best.pt is the epoch
with the highest score, which is, in
- source: the accuracy on validation images of the source;
- dann: that, plus the mutual information of target images and predictions, H(mean p) - mean H(p), as a part of log 10,
  its largest value (Krause et al. 2010; to select by it: Musgrave et al. 2022), on validation images without labels;
- target: the step, so the last one: the accuracy on the validation images is what gets reported;
- any, with --oracle-selection: the accuracy on validation images of the target; the checkpoint's metrics say so.

--refine adds self-training on the target: where the EMA network is sure of an untouched picture's digit, the network
learns it on an augmented view (FixMatch, Sohn et al. 2020, with the averaged teacher of French et al. 2018), and the
entropy of its mean prediction is kept high, so that no digit is lost; both weighted by the schedule of lambda.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch.utils.data import Dataset

from digits import load_digits
from p4_augment import SOURCE_ZOOM, TARGET_ZOOM, augment
from p4_model import HELD_BACK, NORMS, SOURCE, TARGET, DigitNet, DomainClassifier, reverse_gradient, run_batches
from train_common import add_training_options, fit, lightning_trainer, warmup_cosine
from utils import UserError, cli, half, output_folder, save_checkpoint

SURE = 0.9  # the probability from which --refine believes the teacher


class Adaptation(pl.LightningModule):
    """Batches are uint8 [B, 3, 28, 28] and labels [B] of a domain; in dann also uint8 [B, 3, 28, 28] of the target."""

    def __init__(self, config, args):
        super().__init__()
        self.config, self.args = config, args
        self.net = DigitNet(config["norm"])
        if config["mode"] == "dann":
            self.domains = DomainClassifier()

    def training_step(self, batch, _):
        images, labels, *unlabelled = batch
        view = (TARGET_ZOOM,) if self.config["mode"] == "target" else (SOURCE_ZOOM, 0.5)
        images = self.view_of(to_float(images), *view)
        if unlabelled:
            loss = self.adversarial_loss(images, labels, to_float(unlabelled[0]))
        else:
            loss = F.cross_entropy(self.net(images, self.config["domain"]), labels)
        self.log("train_loss", loss)
        return loss

    def view_of(self, images, *how):
        return images if self.args.plain else augment(images, *how)

    def adversarial_loss(self, source, labels, target):
        """The objective of Ganin et al. 2016 (section 4.2), lambda by their schedule; `target` not yet augmented."""
        ramp = 2 / (1 + math.exp(-10 * self.trainer.global_step / self.args.steps)) - 1
        lambd = self.args.adversary * ramp
        views = source, self.view_of(target, TARGET_ZOOM)
        if self.net.features.domains == 1:
            features = self.net.features(torch.cat(views))
        else:
            features = torch.cat([self.net.features(x, d) for x, d in zip(views, (SOURCE, TARGET))])
        logits, target_logits = self.net.labels(features).float().chunk(2)
        domain = torch.tensor([SOURCE, TARGET], device=self.device).repeat_interleave(len(source))
        label_loss = F.cross_entropy(logits, labels)
        domain_loss = F.cross_entropy(self.domains(reverse_gradient(features, lambd)).float(), domain)
        self.log_dict({"label_loss": label_loss, "domain_loss": domain_loss, "lambda": lambd})
        refinement = ramp * self.refinement(target, target_logits) if self.args.refine else 0
        return label_loss + domain_loss + refinement

    def refinement(self, target, logits):
        """FixMatch (Sohn et al. 2020, eq. 4) by the EMA network's digits, minus the entropy of the mean prediction."""
        teacher = next(c for c in self.trainer.callbacks if isinstance(c, Teacher)).network()
        with torch.no_grad():
            probability, digit = teacher(target, TARGET).softmax(1).max(1)
        sure = (probability >= SURE).float()
        self.log("sure", sure.mean())
        mean = logits.softmax(1).mean(0)
        return (sure * F.cross_entropy(logits, digit, reduction="none")).mean() + 0.1 * torch.xlogy(mean, mean).sum()

    def validation_step(self, batch, _):
        images, labels = batch
        domain = TARGET if self.config["mode"] == "target" else SOURCE
        right = self.net(images, domain).argmax(1) == labels
        self.log("labelled_accuracy", right.float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.args.lr, betas=(0.9, 0.99), weight_decay=0.01)
        return warmup_cosine(optimizer, self.args.steps, self.args.warmup)


def to_float(images):
    return images.float() / 127.5 - 1


class Teacher(EMAWeightAveraging):
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
        if not trainer.is_global_zero:
            return
        state_dict, net = half(module.net.state_dict()), DigitNet(module.config["norm"])
        net.load_state_dict(state_dict)
        net.eval().to(module.device)
        logits = run_batches(net, self.images, module.config["domain"], module.device)
        metrics = {
            "target_accuracy": (logits.argmax(1) == self.labels).float().mean().item(),
            "labelled_accuracy": float(trainer.callback_metrics["labelled_accuracy"]),
            "mutual_information": mutual_information(logits),
        }
        metrics["score"] = metrics["target_accuracy"] if self.oracle else self.score(trainer, module, metrics)
        module.log_dict(metrics, rank_zero_only=True)
        self.seconds, self.since = self.seconds + time.time() - self.since, time.time()
        metrics.update(selection="oracle" if self.oracle else "no target labels", seconds=self.seconds)
        checkpoint = {"state_dict": state_dict, "config": module.config}
        checkpoint.update(step=trainer.global_step, metrics=metrics)
        save_checkpoint(checkpoint, self.out / "last.pt")
        if metrics["score"] >= self.best:
            self.best = metrics["score"]
            save_checkpoint(checkpoint, self.out / "best.pt")

    def score(self, trainer, module, metrics):
        return {
            "source": metrics["labelled_accuracy"],
            "dann": metrics["labelled_accuracy"] + metrics["mutual_information"] / math.log(10),
            "target": float(trainer.global_step),
        }[module.config["mode"]]

    def state_dict(self):
        return {"best": self.best, "seconds": self.seconds}

    def load_state_dict(self, state):
        self.best, self.seconds = state["best"], state["seconds"]


def mutual_information(logits):
    """H(mean p) - mean H(p) of p = softmax(logits [N, 10]), 0 to log 10: high where predictions are sure and differ."""
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    mean = p.mean(0)
    return float((p * log_p).sum(1).mean() - torch.xlogy(mean, mean).sum())


class Digits(Dataset):
    """A list of items gives these rows, (images, labels); in training any rows, and as many of `unlabelled`."""

    def __init__(self, images, labels, unlabelled=(), training=False):
        self.images, self.labels, self.unlabelled, self.training = images, labels, unlabelled, training
        self.length = len(images)

    def __len__(self):
        return self.length

    def __getitems__(self, indices):
        rows = torch.randint(len(self.images), (len(indices),)) if self.training else torch.tensor(indices)
        batch = self.images[rows], self.labels[rows]
        if len(self.unlabelled):
            batch += (self.unlabelled[torch.randint(len(self.unlabelled), (len(indices),))],)
        return batch


def read_data(args):
    """(training set, validation set, target's validation images, their labels). The training set has no target labels
    but in the mode target, and no target images in the mode source."""

    def load(name, split):
        return load_digits(args.data, name, split, HELD_BACK[name])

    labelled = args.target if args.mode == "target" else args.source
    unlabelled = load(args.target, "train")[0] if args.mode == "dann" else ()
    train = Digits(*load(labelled, "train"), unlabelled, training=True)
    return train, Digits(*(x[:2000] for x in load(labelled, "val"))), *load(args.target, "val")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", default="hw2_data/digits", help="folder with mnistm/, svhn/, usps/")
    option("--source", choices=list(HELD_BACK), default="mnistm")
    option("--target", choices=list(HELD_BACK), required=True)
    option("--mode", choices=["source", "dann", "target"], default="dann")
    option("--norm", choices=NORMS, default="instance-domain", help="of features and pictures: see p4_model.py")
    option("--adversary", type=float, default=1.0, help="the largest lambda (default: 1)")
    option("--plain", action="store_true", help="no augmentation, to see what adaptation does alone")
    option("--refine", action="store_true", help="self-training on top of dann")
    option("--oracle-selection", action="store_true", help="choose the epoch by target labels; for comparison only")
    add_training_options(parser, out="runs/p4_{target}_{mode}", steps=2000, batch_size=128, lr=1e-3, ema=0.999)
    args = parser.parse_args(argv)
    if args.source == args.target:
        raise UserError(f"--target {args.target}: it is the source too; take another one")
    if args.refine and args.mode != "dann":
        raise UserError(f"--refine works on top of --mode dann, not {args.mode}")
    args.out = args.out.replace("{target}", args.target).replace("{mode}", args.mode)
    return args


@cli
def main(argv=None):
    args = parse(argv)
    train, val, images, labels = read_data(args)
    out = output_folder(args.out)
    config = {"norm": args.norm, "domain": SOURCE if args.mode == "source" else TARGET, "mode": args.mode}
    config.update(source=args.source, target=args.target, refine=args.refine, steps=args.steps)
    pl.seed_everything(args.seed, verbose=False)
    module = Adaptation(config, args)
    selection = Selection(out, images, labels, args.oracle_selection)
    ema = Teacher(decay=args.ema, update_starting_at_step=args.warmup)
    trainer = lightning_trainer(args, [selection, ema])
    fit(args, trainer, module, train, val)
    if trainer.is_global_zero:
        print(f"step {trainer.global_step} of {args.steps}; wrote {out}/{{last.ckpt,best.pt,last.pt}}")


if __name__ == "__main__":
    main(sys.argv[1:])
