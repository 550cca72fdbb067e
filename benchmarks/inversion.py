"""Ways to learn a word in one table: the paper's, from another start, and by directions alone, some seeds each.

    python3 benchmarks/inversion.py --seeds 3 --out table.md
    python3 benchmarks/inversion.py --only 0 --vectors 2 --way paper "turns 0.02"

A row is a way and a concept of the JSON: image and text score by the grader's measure (the best 5 of 25 pictures, mean
of the JSON's prompts and of --draws), over seeds the mean, and in brackets the least and the greatest; and the norm of
the vectors at the end. The step is chosen on the JSON's validation prompts, as p3_textual_inversion.py does.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import torch
from table import ROOT, describe_machine, save_table

import p3_model
import utils
from p3_clip import load_clip
from p3_concepts import image_files, only, read_concepts
from p3_invert import Inversion, Recipe
from tiny import add_small_options, scored
from utils import Parser, cli, real, whole

WAYS = {  # the settings of Recipe in which they differ; a vector of an encoder's output is 25 times as long as a word's
    "paper": lambda lr: {"lr": lr},
    "cross-initialised": lambda lr: {"lr": 25 * lr, "cross": True},
    "turns 0.005": lambda lr: {"turn": 0.005},
    "turns 0.02": lambda lr: {"turn": 0.02},
    "turns 0.05": lambda lr: {"turn": 0.05},
}


def learned(args, model, clip, concept, files, recipe):
    """(image score, text score, norm) of a token that is learned from `files`, then forgotten."""
    tokens = p3_model.learned_tokens(model)
    with tempfile.TemporaryDirectory() as work:
        Inversion(model, tokens, concept, recipe, work).run(files, pathlib.Path(work) / "out.safetensors", clip)
        sources = clip.images(files)
        pairs = zip(concept.prompts, concept.eval_prompts)
        scores = [scored(model, clip, prompt, told, sources, args.draws)[1] for prompt, told in pairs]
    return (*torch.tensor(scores).mean(0).tolist(), tokens[concept.token].norm(dim=1).mean().item())


def row(way, token, results):
    """A line of the table of [(image, text, norm)], one for each seed."""
    image, text, norms = zip(*results)
    cells = [f"{sum(x) / len(x):.2f} [{min(x):.2f}, {max(x):.2f}]" for x in (image, text)]
    return f"| {way} | `{token}` | {cells[0]} | {cells[1]} | {sum(norms) / len(norms):.2f} |"


def parse(argv):
    parser, default = Parser(__doc__), ROOT / "tiny/textual_inversion/input.json"
    option = parser.add_argument
    option("--json", default=str(default), help="concepts, their pictures beside it")
    option("--way", nargs="+", choices=WAYS, default=list(WAYS))
    option("--only", nargs="+", metavar="SOURCE", help="only these entries of the JSON")
    option("--seeds", type=whole(), default=3)
    option("--draws", type=whole(), default=2, help="of 25 pictures a prompt")
    option("--steps", type=whole(), default=300)
    option("--save-every", type=whole(), default=50)
    option("--batch-size", type=whole(), default=16, dest="batch")
    option("--vectors", type=whole(), default=6)
    option("--lr", type=real(positive=True), default=1e-3, help="of one picture, for AdamW")
    option("--validation-pictures", type=whole(), default=25)
    add_small_options(parser)
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args = parse(argv)
    dtype, clip = utils.pick_precision(args.precision, args.device), load_clip(args.clip, args.device)
    lines = [
        f"{describe_machine(args.device)}; {args.seeds} seeds, {args.steps} steps of {args.batch}, {args.draws} draws",
        "",
        "| way | token | image score | text score | norm |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for way in args.way:
        for concept in only(read_concepts(args.json), args.only, args.json):
            files, results = image_files(pathlib.Path(args.json).parent / concept.key), []
            for seed in range(args.seeds):
                model = p3_model.load_stable_diffusion(args.ckpt, args.device, dtype)
                given = {k: v for k, v in vars(args).items() if k in Recipe._fields} | WAYS[way](args.lr)
                recipe = Recipe(**{**given, "seed": seed, "preview_every": 0, "size": p3_model.own_size(model)})
                results.append(learned(args, model, clip, concept, files, recipe))
            lines.append(row(way, concept.token, results))
            print(lines[-1], flush=True)
    save_table(lines, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
