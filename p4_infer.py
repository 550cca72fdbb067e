"""Reads the digits of a folder of pictures of SVHN or USPS, by a network trained without its labels (DANN).

    python3 p4_infer.py hw2_data/digits/svhn/data output.csv
    python3 p4_infer.py TARGET_IMAGE_DIR output.csv --target usps --mode source --gt hw2_data/digits/usps/val.csv

output.csv has the header image_name,label and a row for each *.png, sorted by name. The scenario is told from the
folder's path: the last component with svhn or usps in it. --gt prints the accuracy on the pictures that its csv names;
where that is the train.csv of p4_train.py, --held-back takes those of them that it did not train on.
"""

from __future__ import annotations

import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import utils
from digits import is_validation, read_csv, read_image
from p4_model import HELD_BACK, SCENARIOS, load_digit_net, predict
from utils import CHECKPOINTS, Parser, UserError, cli, whole


def scenario_of(folder):
    """ "svhn" or "usps": what the last telling component of the folder's path names; raises UserError."""
    for part in reversed(pathlib.Path(folder).absolute().parts):
        named = [s for s in SCENARIOS if s in part.lower()]
        if len(named) == 1:
            return named[0]
    raise UserError(f"{folder}: its path has neither svhn nor usps in it; say --target svhn or --target usps")


def read_folder(folder):
    """(names, uint8 [N, 3, 28, 28]) of the folder's *.png, sorted by name; grey ones get three equal channels. Raises
    UserError where there are none, or one cannot be read."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of the target's pictures")
    paths = sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() == ".png")
    if not paths:
        raise UserError(f"{folder}: no *.png in it; name the folder of the target's pictures")
    with ThreadPoolExecutor() as pool:
        images = list(tqdm(pool.map(read_image, paths), total=len(paths), desc="reading", unit="picture"))
    return [p.name for p in paths], torch.from_numpy(np.stack(images))


def write_labels(path, names, labels):
    import pandas

    table = pandas.DataFrame({"image_name": names, "label": labels})
    with utils.atomic(path) as temporary:
        table.to_csv(temporary, index=False, errors="surrogateescape")  # a file's name may be no UTF-8


def read_truth(gt, names, fraction):
    """{name: label} of those of the pictures that the csv names and that belong to the held-back `fraction`; raises
    UserError where there are none."""
    truth = {name: label for name, label in zip(*read_csv(gt)) if is_validation(name, fraction)}
    truth = {name: truth[name] for name in names if name in truth}
    if not truth:
        raise UserError(f"{gt}: names none of the pictures; give the csv that belongs to the folder")
    return truth


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("folder", metavar="TARGET_IMAGE_DIR", help="folder of 28x28 *.png, RGB or grey")
    option("csv", metavar="OUTPUT_CSV")
    option("--target", choices=SCENARIOS, help="the scenario (default: what the folder's path says)")
    modes = ["source", "dann", "refined", "target"]
    option("--mode", choices=modes, default="refined", help="the training (default: refined)")
    option("--checkpoint", help="default: checkpoints/p4_{target}_{mode}.pt")
    option("--gt", metavar="CSV", help="the accuracy on the pictures that it names, also in OUTPUT_CSV's .json")
    option("--held-back", action="store_true", help="only on those that p4_train.py holds back of a train.csv")
    option("--batch-size", type=whole(), default=500, help="changes the speed, not the labels (default: 500)")
    utils.add_device_options(parser)
    parser.set_defaults(precision="fp32")  # the same labels anywhere
    args = parser.parse_args(argv)
    if args.gt and pathlib.Path(args.csv).suffix == ".json":
        raise UserError(f"{args.csv}: the accuracy of --gt goes there; name a .csv")
    if args.held_back and not args.gt:
        raise UserError("--held-back: of what? add --gt with a train.csv")
    if args.held_back and pathlib.Path(args.gt).with_name("val.csv").is_file():
        raise UserError(f"{args.gt}: p4_train.py learns from all of it; give val.csv beside it, without --held-back")
    return args


@cli
def main(argv=None):
    args = parse(argv)
    utils.reuse_freed_memory()
    device = args.device
    dtype = utils.pick_precision(args.precision, device)
    target = args.target or scenario_of(args.folder)
    path = pathlib.Path(args.checkpoint or CHECKPOINTS / f"p4_{target}_{args.mode}.pt")
    mode = path.name if args.checkpoint else args.mode
    net, config = load_digit_net(path)
    names, images = read_folder(args.folder)
    truth = read_truth(args.gt, names, HELD_BACK[target] if args.held_back else 1.0) if args.gt else {}
    utils.output_file(args.csv)
    with utils.autocast(device, dtype):
        options = {"device": device, "batch_size": args.batch_size, "progress": "digits"}
        labels = predict(net.to(device), images, config["domain"], **options).tolist()
    write_labels(args.csv, names, labels)
    if truth:
        right = sum(truth.get(name) == label for name, label in zip(names, labels))
        told = {"folder": args.folder, "target": target, "mode": mode, "right": right, "known": len(truth)}
        utils.save_json(told, pathlib.Path(args.csv).with_suffix(".json"))
        print(f"accuracy {right / len(truth):.4f} ({right}/{len(truth)})")
    print(f"wrote {len(names)} labels ({target}, {mode}) to {args.csv}")


if __name__ == "__main__":
    main(sys.argv[1:])
