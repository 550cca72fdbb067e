"""The most typical of a folder's face photographs, for a small network (instance selection, DeVries et al. 2020).

    python3 tools/typical_faces.py hw2_data/face/photos hw2_data/face/typical --share 0.5
    python3 p2_train.py --data hw2_data/face/typical ...

Copies the pictures that are most likely by their Inception features, under one Gaussian of all of them. Hats, hands,
microphones, sunglasses and profiles are the first to go: a small network draws what is left with fewer mistakes, and
nothing of what went.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from classifiers import Inception
from p2_train import face_paths, read_pictures
from utils import Parser, UserError, cli, output_folder, pick_device, real, whole


def distances(features):
    """Squared Mahalanobis distances to the mean, [N, D] -> [N]: -2 times the log of the Gaussian's density, by
    which DeVries et al. 2020 select, but for a constant. A hundredth of the mean variance is added to the
    covariance's diagonal, so that few pictures do too."""
    x = features.astype(np.float64)
    x -= x.mean(0)
    covariance = x.T @ x / (len(x) - 1)
    covariance += 0.01 * covariance.diagonal().mean() * np.eye(len(covariance))
    return (x * np.linalg.solve(covariance, x.T).T).sum(1)


@cli
def main(argv=None):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("source", metavar="PHOTOS", help="folder of pictures")
    option("dest", metavar="DEST", help="folder that gets the typical ones; must not be there yet")
    option("--share", type=real(0.01, 1), default=0.5, help="of the pictures that is copied (default: 0.5)")
    option("--size", type=whole(32, 2048, 32), default=64, help="they are looked at in this size (default: 64)")
    option("--device", type=pick_device, default="auto")
    args = parser.parse_args(argv)
    dest = pathlib.Path(args.dest)
    if dest.exists():
        raise UserError(f"{dest}: is there already; remove it, or give another folder")
    paths = face_paths(args.source)
    pictures = read_pictures(paths, args.size)
    nearest = distances(Inception(args.device)(pictures)).argsort()[: math.ceil(args.share * len(paths))]
    temporary = dest.with_name(f".{dest.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    output_folder(temporary)
    try:
        for i in nearest:
            shutil.copyfile(paths[i], temporary / paths[i].name)
        os.replace(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {len(nearest)} of {len(paths)} pictures to {dest}")


if __name__ == "__main__":
    main(sys.argv[1:])
