"""t-SNE of the extractor's output on validation images: what adaptation does to the two domains.

    python3 p4_tsne.py --data hw2_data/digits tsne.png

A row a scenario: source only, coloured by digit and by domain, beside the adapted network, likewise. Needs
scikit-learn.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from tqdm import tqdm

import utils
from digits import load_digits
from p4_model import HELD_BACK, SCENARIOS, SOURCE, load_digit_net, run_batches
from utils import CHECKPOINTS, Parser, UserError, add_device_options, atomic, cli, output_file, whole

TRAININGS = {"source": "source only", "refined": "adapted"}


def features_of(path, images, device):
    """Float32 [2 N, 128] of (source images, target images), uint8 [N, 3, 28, 28], each by its domain's statistics."""
    net, config = load_digit_net(path)
    extractor = net.features.to(device)
    both = zip(images, (SOURCE, config["domain"]))
    return torch.cat([run_batches(extractor, x, domain, device) for x, domain in both]).numpy()


def read_domain(data, name, count):
    """The first `count` validation images and labels of a domain."""
    return [x[:count] for x in load_digits(data, name, "val", HELD_BACK[name])]


def draw(panels, digits, domains, path):
    """panels: {scenario: {title: points [N, 2]}}; digits, domains: {scenario: int [N]}; writes one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(panels), 4, figsize=(16, 4 * len(panels)), squeeze=False, layout="constrained")
    for row, (target, modes) in zip(axes, panels.items()):
        for (title, points), by_digit, by_domain in zip(modes.items(), row[::2], row[1::2]):
            dots = by_digit.scatter(*points.T, c=digits[target], s=4, cmap="tab10", vmin=-0.5, vmax=9.5)
            by_digit.set_title(f"MNIST-M to {target.upper()}, {title}: digits")
            for d, name in enumerate(("MNIST-M", target.upper())):
                by_domain.scatter(*points[domains[target] == d].T, s=4, label=name, color=f"C{d}", alpha=0.6)
            by_domain.set_title("domains")
            by_domain.legend(markerscale=4)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.colorbar(dots, ax=axes, ticks=range(10), shrink=0.5)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    plt.close(figure)


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("out", type=output_file, metavar="FILE")
    parser.add_argument("--data", default="hw2_data/digits", help="folder with mnistm/, svhn/, usps/")
    parser.add_argument("--checkpoints", default=str(CHECKPOINTS))
    parser.add_argument("--count", type=whole(10), default=1000, help="images a domain (default: 1000)")
    add_device_options(parser)
    parser.set_defaults(precision="fp32")  # the same maps anywhere
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args = parse(argv)
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError:
        raise UserError("t-SNE needs scikit-learn; `pip install scikit-learn`") from None
    utils.reuse_freed_memory()
    dtype = utils.pick_precision(args.precision, args.device)
    source, source_digits = read_domain(args.data, "mnistm", args.count)
    panels, digits, domains = {}, {}, {}
    with tqdm(total=2 * len(SCENARIOS), desc="t-SNE", unit="map") as bar:
        for target in SCENARIOS:
            images, labels = read_domain(args.data, target, args.count)
            digits[target] = torch.cat([source_digits, labels]).numpy()
            domains[target] = np.repeat([0, 1], [len(source), len(images)])
            panels[target] = {}
            for mode, title in TRAININGS.items():
                with utils.autocast(args.device, dtype):
                    features = features_of(f"{args.checkpoints}/p4_{target}_{mode}.pt", (source, images), args.device)
                perplexity = min(30.0, (len(features) - 1) / 3)
                points = TSNE(perplexity=perplexity, random_state=args.seed).fit_transform(features)
                panels[target][title] = points
                bar.update()
    draw(panels, digits, domains, args.out)
    print(f"wrote {args.out}: {len(source)} images of MNIST-M and up to {args.count} of each target")


if __name__ == "__main__":
    main(sys.argv[1:])
