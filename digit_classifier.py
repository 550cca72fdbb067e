"""Grades Problem 1 as the course does: the accuracy of digit classifiers on generated digits.

    python3 digit_classifier.py --folder output --json output/digits.json                    # our classifier of MNIST-M
    python3 digit_classifier.py --folder output --checkpoint Classifier.pth                  # the course's
    python3 digit_classifier.py --train svhn --data hw2_data/digits --out checkpoints/svhn_classifier.pth

--folder holds mnistm/{digit}_{001..050}.png and svhn/...; the first character of a file's name is its label. SVHN is
judged by the course's resnet34_svhn where its weights are cached or can be fetched from the hub, else by our own
classifier; the output says by which. Judges compute in float32: --precision is of --train.
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import utils
from classifiers import DigitResNet, LeNet, fetch_resnet34_svhn, load_classifier, predict, probabilities
from digits import SIZE, load_digits
from utils import CHECKPOINTS, Parser, UserError, cli, whole

# ------------------------------------------------------------------------ grading


def read_folder(folder):
    """(names, uint8 [N, 3, 28, 28], labels int64 [N]) of the pictures in a folder, labelled by the first character of
    their names."""
    paths = sorted(p for p in pathlib.Path(folder).glob("[!.]*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"{folder}: no pictures in it; run hw2_1.sh into its parent folder first")
    images = []
    for path in paths:
        if path.name[0] not in "0123456789":
            raise UserError(f"{path}: the name must begin with its digit, as in 3_001.png")
        images.append(np.asarray(utils.open_image(path, "generate it again").resize((SIZE, SIZE), Image.BILINEAR)))
    labels = torch.tensor([int(p.name[0]) for p in paths])
    return [p.name for p in paths], torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


def svhn_judge(checkpoint, device):
    """(classifier, its description): of `checkpoint` where one is named, else resnet34_svhn, else ours."""
    if checkpoint:
        return load_classifier(checkpoint, device), checkpoint
    try:
        path, name = fetch_resnet34_svhn(), "edadaltocg/resnet34_svhn, the course's judge"
    except Exception as e:  # the hub's client has a dozen kinds of network errors
        path = CHECKPOINTS / "svhn_classifier.pth"
        name = f"{path} (the course's resnet34_svhn cannot be fetched: {type(e).__name__})"
    return load_classifier(path, device), name


def judged(model, folder):
    """What a classifier says of the pictures of a folder, as --json writes it."""
    names, images, labels = read_folder(folder)
    sure, answers = probabilities(model, images).max(1)
    right = answers == labels
    return {
        "pictures": len(names),
        "correct": int(right.sum()),
        "by_digit": {str(d): right[labels == d].float().mean().item() for d in labels.unique().tolist()},
        "wrong": [
            {"file": names[i], "digit": int(labels[i]), "answer": int(answers[i]), "sure": sure[i].item()}
            for i in (~right).nonzero().flatten().tolist()
        ],
    }


def grade(args, device):
    of_mnistm = load_classifier(args.checkpoint, device), args.checkpoint
    judges = ("mnistm", "MNIST-M", *of_mnistm), ("svhn", "SVHN", *svhn_judge(args.svhn_checkpoint, device))
    result = {"accuracy": 0.0, "domains": []}
    for domain, title, model, name in judges:
        found = judged(model, pathlib.Path(args.folder) / domain)
        accuracy = found["correct"] / found["pictures"]
        result["accuracy"] += accuracy / 2
        result["domains"].append({"folder": domain, "title": title, "judge": str(name), "accuracy": accuracy, **found})
        print(f"{title} judged by {name}")
        print(f"{title} acc = {accuracy:.4f} (correct/total = {found['correct']}/{found['pictures']})")
    print(f"acc = {result['accuracy']:.4f}")
    if args.json:
        utils.save_json(result, args.json)


# ------------------------------------------------------------------------ training


def augment(x, strong):
    """Small random turns, sizes and shifts of [B, 3, 28, 28] in [-1, 1]; `strong` adds colour changes, inversion,
    noise and a hole."""
    b, device = len(x), x.device

    def u(low, high, *shape):
        return torch.rand(b, *shape, device=device) * (high - low) + low

    grid = utils.affine_grid(x, u(-0.2, 0.2), u(0.85, 1.15, 1) * u(0.95, 1.05, 2), u(-0.12, 0.12, 2))
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if strong:
        x = x * u(0.5, 1.3, 3, 1, 1) + u(-0.3, 0.3, 1, 1, 1) + u(-0.1, 0.1, 3, 1, 1)
        x = torch.where(u(0, 1, 1, 1, 1) < 0.3, -x, x)
        x = x + u(0, 0.1, 1, 1, 1) * torch.randn_like(x)
        rows, columns = torch.arange(SIZE, device=device)[None, :, None], torch.arange(SIZE, device=device)[None, None]
        top, left = u(-16, SIZE, 1, 1), u(-16, SIZE, 1, 1)
        hole = (rows >= top) & (rows < top + 8) & (columns >= left) & (columns < left + 8)
        x = x.masked_fill(hole[:, None], 0.0)
    return x


def train(args, device, dtype):
    """Trains a LeNet on MNIST-M, or a DigitResNet on any other domain, and writes {"state_dict", "accuracy",
    "epochs"}."""
    utils.reuse_freed_memory()
    torch.manual_seed(args.seed)
    utils.output_file(args.out)
    images, labels = load_digits(args.data, args.train, "train")
    val_images, val_labels = load_digits(args.data, args.train, "val")
    if args.batch_size > len(labels):
        raise UserError(f"--batch-size {args.batch_size}: {args.data} has {len(labels)} pictures; take fewer")
    net = LeNet if args.train == "mnistm" else DigitResNet
    model = net().to(device, memory_format=torch.channels_last)
    steps = args.epochs * (len(labels) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    scaler = utils.grad_scaler(device, dtype)
    bar = tqdm(range(args.epochs), desc=f"training {net.__name__} on {args.train}")
    for _ in bar:
        model.train()
        for rows in torch.randperm(len(labels)).split(args.batch_size)[: len(labels) // args.batch_size]:
            x = augment(utils.to_float(images[rows].to(device)), strong=net is DigitResNet)
            with utils.autocast(device, dtype):
                logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        accuracy = (predict(model.eval(), val_images) == val_labels).float().mean().item()
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.4f}")
    checkpoint = {"state_dict": utils.half(model.state_dict()), "accuracy": accuracy, "epochs": args.epochs}
    utils.save_checkpoint(checkpoint, args.out)
    print(f"accuracy {accuracy:.4f} on {len(val_labels)} held-back images of {args.train}; wrote {args.out}")


@cli
def main(argv=None):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--folder", help="output folder of hw2_1.sh")
    option("--checkpoint", default=str(CHECKPOINTS / "mnistm_classifier.pth"), help="of the MNIST-M classifier")
    judge = "of an SVHN classifier (default: resnet34_svhn, else the one in checkpoints/)"
    option("--svhn-checkpoint", help=judge)
    option("--json", type=utils.output_file, metavar="FILE", help="also accuracy by digit, and what was misread")
    option("--train", choices=["mnistm", "svhn", "usps"], help="train a classifier on this domain instead")
    option("--data", default="hw2_data/digits")
    option("--out", help="where --train writes (default: checkpoints/{domain}_classifier.pth)")
    option("--epochs", type=whole(), default=30)
    option("--batch-size", type=whole(), default=128)
    utils.add_device_options(parser)
    args = parser.parse_args(argv)
    if args.train:
        args.out = args.out or str(CHECKPOINTS / f"{args.train}_classifier.pth")
        train(args, args.device, utils.training_precision(args.precision, args.device))
    elif args.folder:
        grade(args, args.device)
    else:
        parser.error("give --folder to grade, or --train to train")


if __name__ == "__main__":
    main(sys.argv[1:])
