"""Two learned concepts in one prompt, in one table: tokens alone, Custom Diffusion of one, of both jointly, merged.

    python3 benchmarks/several.py --out table.md --picture several.png

Trains the deltas of p3_custom_diffusion.py on the concepts of the JSON, <new1> a thing and <new2> a style, starting
from their embeddings, and draws ten prompts that name both. A row is a way: image score to the sources of each
concept and text score, by the grader's measures but of all --count pictures a prompt. Where a delta lacks a token, the
embedding is its word. The picture has the rows of the table, a column for each prompt, the first picture of each.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import torch
from table import ROOT, describe_machine, save_table
from tqdm import tqdm

import p3_custom_diffusion as custom
import p3_model
import utils
from p3_clip import image_scores, load_clip, text_scores
from p3_concepts import image_files, read_concepts
from p3_invert import Recipe
from tiny import NEW2, add_small_options
from utils import Parser, cli, real, whole

FORMS = ["a {}, in the style of {}", "a {} in the style of {}", "a picture of a {} in the style of {}"]
LOOKS = "grinning {}, crying {}, weary {}, pouting {}, kissing {}, {} with heart eyes, {} with tears of joy".split(", ")
CALLED = "dog face", NEW2  # what the judge calls the two concepts
PRIOR = 30  # pictures of the prior, for each concept
PROMPTS = [*FORMS, *(FORMS[0].replace("{}", look, 1) for look in LOOKS)]


def fresh(args):
    """The small Stable Diffusion, as it ships."""
    return p3_model.load_stable_diffusion(args.ckpt, args.device, utils.pick_precision(args.precision, args.device))


def drawn(args, delta):
    """Pictures uint8 [10, --count, 3, 64, 64] of PROMPTS, with the embeddings of the JSON and a delta (or None)."""
    model, wanted = fresh(args), ["<new1>", "<new2>"]
    tokens = p3_model.learned_tokens(model)
    if delta:
        p3_model.load_delta(model, tokens, delta)
    p3_model.need_embeddings(tokens, args.json.parent / "embeddings", wanted)
    said = [prompt.format(*wanted) for prompt in PROMPTS]
    return torch.stack([p3_model.generate(model, s, range(args.count)) for s in tqdm(said, "draw", leave=False)])


def deltas(args, jobs, folder):
    """{way: delta file, or None}, trained and merged."""
    first, second = args.steps
    trained = {"delta of <new1>": (jobs[:1], first), "delta of <new2>": (jobs[1:], second)}
    trained["trained jointly"] = jobs, (first + second) // 2
    ways = {"tokens alone": None, **{way: folder / f"{way}.safetensors" for way in (*trained, "merged")}}
    start = None if args.words else args.json.parent / "embeddings"
    for way, (some, steps) in trained.items():
        model = fresh(args)
        size = p3_model.own_size(model)
        recipe = Recipe(steps=steps, batch=args.batch, lr=args.lr, seed=args.seed, size=size)
        print(f"{way}: {custom.learn(model, some, recipe, PRIOR, ways[way], start)}", file=sys.stderr)
    custom.merge(fresh(args), [ways[way] for way in list(trained)[:2]], ways["merged"], args.seed)
    return ways


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--json", type=pathlib.Path, default=ROOT / "tiny/textual_inversion/input.json", help="pictures beside it")
    option("--count", type=whole(), default=10, help="pictures a prompt")
    option("--steps", type=whole(), nargs=2, default=[50, 100], help="of each delta; jointly, their mean")
    option("--batch-size", type=whole(), default=4, dest="batch")
    option("--lr", type=real(positive=True), default=1e-4, help="of one picture")
    option("--words", action="store_true", help="deltas start from words, not from the embeddings beside the JSON")
    option("--picture", metavar="FILE")
    add_small_options(parser)
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args = parse(argv)
    clip = load_clip(args.clip, args.device)
    jobs = [(c, image_files(args.json.parent / c.key)) for c in read_concepts(args.json)]
    sources, told = [clip.images(files) for _, files in jobs], [p.format(*CALLED) for p in PROMPTS]
    lines = [
        f"{describe_machine(args.device)}; ten prompts, mean of {args.count} pictures each; "
        "deltas of {} and {} steps".format(*args.steps),
        "",
        "| way | image score, <new1> | image score, <new2> | text score |",
        "|---|---|---|---|",
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way, delta in deltas(args, jobs, pathlib.Path(folder)).items():
            made = drawn(args, delta)
            seen = [clip.images(pictures) for pictures in made]
            cells = [image_scores(clip, torch.cat(seen), each).mean() for each in sources]
            cells.append(torch.cat([text_scores(clip, s, t) for s, t in zip(seen, told)]).mean())
            lines.append(f"| {way} | {' | '.join(f'{c:.2f}' for c in cells)} |")
            rows.append(made[:, 0])
    print("\n".join(lines))
    if args.picture:
        utils.save_png(utils.image_grid(torch.cat(rows), len(PROMPTS)), args.picture)
    save_table(lines, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
