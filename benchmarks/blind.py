"""How many pictures of each folder look wrong to people who cannot know which folder a picture is from.

    python3 benchmarks/blind.py runs/blind --pictures output/face hw2_data/face/photos --count 10   # makes the sheets
    python3 benchmarks/blind.py runs/blind --answers ann.txt ben.txt eve.txt                         # counts

The first leaves runs/blind/sheet_1.png, ...: --count pictures of each folder, drawn by --seed, shuffled, enlarged and
numbered, with --names under the names of their files, as captions; and key.json, which no rater may see. An answer
names, between spaces or lines, the numbers of the pictures that its rater calls wrong. The second prints how many those
are of each folder: by each rater, and by more than half.
"""

from __future__ import annotations

import pathlib
import random
import sys
import textwrap

import numpy as np
from PIL import Image, ImageDraw
from table import add_out_option, save_table

from p2_train import face_paths, read_pictures
from utils import SEED, Parser, UserError, cli, output_folder, read_json, save_json, save_png, whole

SIDE, EDGE, COLUMNS, ROWS = 256, 28, 4, 4  # of a picture on a sheet, and of the strip for its number


def make_sheets(args):
    """Sheets of args.count pictures of each folder, and their key: [{"folder", "picture"}], in the sheets' order."""
    chosen, rng = [], random.Random(args.seed)
    for folder in args.pictures:
        paths = face_paths(folder)
        if len(paths) < args.count:
            raise UserError(f"{folder}: {len(paths)} pictures in it; take --count {len(paths)} or another folder")
        chosen += [(folder, path) for path in rng.sample(paths, args.count)]
    rng.shuffle(chosen)
    images = read_pictures([path for _, path in chosen], args.size).permute(0, 2, 3, 1).numpy()
    out, each = output_folder(args.folder), COLUMNS * ROWS
    for old in [*out.glob("sheet_*.png"), *out.glob("key.json")]:  # no old key beside new sheets
        old.unlink()
    told = [f"{i}  {path.stem * args.names}" for i, (_, path) in enumerate(chosen, 1)]
    for first in range(0, len(images), each):
        part = slice(first, first + each)
        save_png(sheet(images[part], told[part]), out / f"sheet_{first // each + 1}.png")
    save_json([{"folder": folder, "picture": path.name} for folder, path in chosen], out / "key.json")
    print(f"wrote {out}/{{sheet_1.png, ..., key.json}}; show the raters the sheets alone")


def sheet(images, told):
    """Pictures uint8 [N, S, S, 3] enlarged on one image, each under what is `told` of it."""
    page = Image.new("RGB", (COLUMNS * SIDE, -(-len(images) // COLUMNS) * (SIDE + EDGE)), "white")
    for i, (image, text) in enumerate(zip(images, told)):
        x, y = i % COLUMNS * SIDE, i // COLUMNS * (SIDE + EDGE)
        page.paste(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y + EDGE))
        ImageDraw.Draw(page).text((x + 4, y), textwrap.fill(text, 50), fill="black")
    return np.asarray(page)


def count_answers(args):
    """The table of what each rater calls wrong in each folder."""
    path = pathlib.Path(args.folder) / "key.json"
    key = read_json(path)
    folders = [entry.get("folder") for entry in key if isinstance(entry, dict)] if isinstance(key, list) else []
    if not folders or len(folders) < len(key) or not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"{path}: no key of --pictures; make the sheets anew")
    wrong = np.array([read_answer(path, len(key)) for path in args.answers])  # [raters, pictures]
    lines = [
        f"{args.folder}: of {len(key)} pictures, called wrong",
        "",
        "| pictures | of | " + " | ".join(args.answers) + " | by more than half |",
        "|---|---|" + "---|" * (len(wrong) + 1),
    ]
    for folder in dict.fromkeys(folders):
        its = wrong[:, [f == folder for f in folders]]
        counts = [*its.sum(1), (2 * its.sum(0) > len(wrong)).sum()]
        lines.append(f"| {folder} | {its.shape[1]} | {' | '.join(map(str, counts))} |")
    print("\n".join(lines))
    save_table(lines, args.out)


def read_answer(path, pictures):
    """bool [pictures]: the numbers in the file, from 1 on."""
    words = pathlib.Path(path).read_text(errors="replace").replace(",", " ").split()
    numbers = {int(word) for word in words if word.isascii() and word.isdigit()}
    if len(numbers) < len(set(words)) or not numbers <= set(range(1, pictures + 1)):
        raise UserError(f"{path}: give the numbers of pictures, 1 to {pictures}, and nothing else")
    return [n in numbers for n in range(1, pictures + 1)]


@cli
def main(argv=None):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("folder", help="of the sheets and their key")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pictures", nargs="+", metavar="FOLDER", help="make sheets of the pictures in these")
    what.add_argument("--answers", nargs="+", metavar="FILE", help="count these answers")
    option("--count", type=whole(), default=16, help="pictures of each folder (default: 16)")
    option("--size", type=whole(16, 256), default=64, help="to which all are scaled before they are enlarged to 256")
    option("--names", action="store_true", help="show the files' names, where they say what is to be seen")
    option("--seed", type=SEED, default=0)
    add_out_option(parser)
    args = parser.parse_args(argv)
    make_sheets(args) if args.pictures else count_answers(args)


if __name__ == "__main__":
    main(sys.argv[1:])
