"""The small Stable Diffusion in one table: does the picture of a held-back pair show that subject in that style?

    python3 benchmarks/tiny.py --data runs/emoji --ckpt checkpoints/tiny.ckpt --clip checkpoints/tiny_clip.pt

DATA is what tools/make_emoji_dataset.py writes. For 200 held-back pairs (the subject seen in other styles, the style
with other subjects): the share of pictures whose nearest caption of the 200, by the small CLIP, is their own, and the
Frechet inception distance to the real held-back pictures; a row for the real ones and for each guidance scale.
--picture shows two dozen of them under the real ones. --pairs DIR writes DIR/real and DIR/ours, a picture a pair, named
by its caption (benchmarks/blind.py makes sheets of them). --zeroshot DIR writes the held-back pictures of each vendor
as p3_clip_zeroshot.py reads them, DIR/{vendor}/val and id2label.json.

    python3 benchmarks/tiny.py --data runs/emoji --inversion tiny/textual_inversion/input.json --picture inversion.png

scores, for each prompt of the JSON, the best plain words in the token's place (of the seen subjects nearest to the
source pictures, or of the seen styles) as the grader does, in the mean of --draws, which is what the JSON's baselines
are, and beside it the learned token of the JSON's embeddings/. A row of the picture is a prompt: four of the sources,
four pictures by the best words, four by the learned token. With --embeddings DIR it scores the tokens of that folder
alone, plain and with --fast, and needs no --data. --readable DIR lists instead the subjects that prompts of the style
of <new2> can be graded by, DIR being the folder of its source pictures.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import torch
from fid import frechet_distance
from table import ROOT, add_out_option, describe_machine, save_table
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import p3_model
import utils
from classifiers import Inception
from p3_clip import best_fifth, image_scores, load_clip, text_scores
from p3_concepts import image_files, read_concepts
from p3_invert import kind_of
from p3_pictures import Pictures
from utils import Parser, UserError, cli, real, whole

CHECKPOINTS = ROOT / "checkpoints"
NEW2 = "Fluent glyphs"  # the style that <new2> is learned from


def drawn(model, prompts, scale, args, batch=50):
    """A picture of each prompt, uint8 [N, 3, 64, 64]; picture i starts from the seed i."""
    parts = [range(len(prompts))[i : i + batch] for i in range(0, len(prompts), batch)]
    bar = tqdm(parts, f"guidance {scale}", leave=False)
    how = {"steps": args.steps, "scale": scale, "pag": args.pag}
    return torch.cat([p3_model.generate(model, prompts[p.start : p.stop], p, **how) for p in bar])


def nearest_is_right(clip, images, captions):
    """Share of pictures whose nearest caption is the one of the same number."""
    cosines = clip.images(images) @ clip.texts(captions).T
    return (cosines.argmax(1) == torch.arange(len(images))).float().mean().item()


def write_pairs(captions, real, made, folder):
    """folder/real/{caption}.png and folder/ours/{caption}.png."""
    for name, images in {"real": real, "ours": made}.items():
        out = utils.output_folder(pathlib.Path(folder) / name)
        for caption, image in zip(captions, images):
            utils.save_png(image, out / f"{caption}.png")
    print(f"wrote {len(captions)} pictures each to {folder}/{{real,ours}}")


def write_zeroshot(pictures, folder):
    """The held-back pictures of each vendor in the layout of hw2_data/clip_zeroshot."""
    for v, vendor in enumerate(pictures.vendors):
        rows = [r for r in pictures.rows("val").tolist() if pictures.vendor[r] == v]
        if not rows:
            continue
        out = pathlib.Path(folder) / vendor.lower().replace(" ", "_")
        utils.output_folder(out / "val")
        names = {i: pictures.subjects[pictures.subject[r]] for i, r in enumerate(rows)}
        (out / "id2label.json").write_text(json.dumps(names))
        for i, r in enumerate(rows):
            utils.save_png(pictures.images[r], out / "val" / f"{i}_0.png")
        print(f"wrote {len(rows)} pictures of {vendor} to {out}")


# ------------------------------------------------------------------------------------------------ Textual Inversion


def plain_words(pictures, clip, concept, sources, count=8):
    """What a prompt could say for the token: the seen styles, or the seen subjects nearest to the source pictures."""
    train = pictures.rows("train")
    if kind_of(concept) == "style":
        return [pictures.vendors[v] for v in pictures.vendor[train].unique()]
    names = [pictures.subjects[s] for s in pictures.subject[train].unique()]
    cosines = (clip.texts([f"a photo of {n}" for n in names]) @ sources.T).mean(1)
    return [names[i] for i in cosines.topk(count).indices]


def spoken(prompt, token, word):
    """The prompt with the word, which has its own article, for the token."""
    return prompt.replace(f"a {token}", word).replace(token, word)


def graded(clip, seen, told, sources):
    """(image score [N], text score [N]) of the `Clip.images` of pictures."""
    return image_scores(clip, seen, sources), text_scores(clip, seen, told)


def readable(pictures, clip, sources):
    """Lines on the seen subjects whose real picture in the style of <new2> beats, by both scores, the real one of the
    seen style that has the best: only of these can a prompt tell the style from plain words. The text is the picture's
    caption. Sorted by text score."""
    if NEW2 not in pictures.vendors:
        raise UserError(f"--readable: the pictures of --data have no style {NEW2}; make them anew")
    style, seen, found = pictures.vendors.index(NEW2), {}, []
    for r in torch.cat([pictures.rows("train"), pictures.rows("val")]).tolist():
        seen.setdefault(pictures.subject[r].item(), []).append(r)
    held_back = {pictures.subject[r].item(): r for r in pictures.rows("style").tolist() if pictures.vendor[r] == style}
    both = held_back.keys() & seen.keys()
    for s in tqdm(sorted(both), "read", leave=False):
        shown = clip.images(pictures.images[[*seen[s], held_back[s]]])
        image, text = graded(clip, shown, pictures.caption(held_back[s]), sources)
        best = (image + 2.5 * text)[:-1].argmax()
        if image[-1] >= image[best] and text[-1] >= text[best]:
            scores = (round(float(x), 2) for x in (image[best], text[best], image[-1], text[-1]))
            found.append([pictures.subjects[s], *scores])
    found.sort(key=lambda row: -row[-1])
    head = ["| subject | best seen style: image | text | held back: image | text |", "|---|---|---|---|---|"]
    return [f"{len(found)} of {len(both)} subjects", "", *head, *(f"| {' | '.join(map(str, row))} |" for row in found)]


def scored(model, clip, prompt, told, sources, draws, fast=False):
    """(the first 25 pictures of a prompt, uint8; the grader's image and text scores, the mean of `draws` times 25)."""
    pictures, scores = [], []
    for draw in range(draws):
        pictures.append(p3_model.generate(model, prompt, range(25 * draw, 25 * draw + 25), fast=fast))
        scores.append(best_fifth(*graded(clip, clip.images(pictures[-1]), told, sources)))
    return pictures[0], [round(sum(s) / draws, 2) for s in zip(*scores)]


def inversion(model, clip, pictures, args):
    """The table of plain words and learned tokens, as lines; draws --picture."""
    path = pathlib.Path(args.inversion)
    tokens, concepts = p3_model.learned_tokens(model), read_concepts(path)
    missing = p3_model.load_embeddings(tokens, path.parent / "embeddings", [c.token for c in concepts])
    machine, judge, rows = describe_machine(model.device), pathlib.Path(clip.name).name, []
    lines = [f"{machine}; the best 5 of 25 pictures by {judge}, mean of {args.draws} draws", ""]
    lines += ["| prompt | best words | image | text | learned image | learned text |", "|---" * 6 + "|"]
    for concept in concepts:
        files = image_files(path.parent / concept.key)
        sources, shown = clip.images(files), torch.stack([to_tensor(utils.open_image(f)) for f in files])
        words = plain_words(pictures, clip, concept, sources)
        for prompt, told in zip(concept.prompts, concept.eval_prompts):
            tried = []
            for word in tqdm(words, prompt, leave=False):
                said = spoken(prompt, concept.token, word)
                tried.append((*scored(model, clip, said, told, sources, args.draws), word))
            best, (image, text), word = max(tried, key=lambda t: t[1][0] + 2.5 * t[1][1])
            cells, row = [word, image, text, "-", "-"], [(shown * 255).byte()[:4], best[:4]]
            if concept.token not in missing:
                made, cells[3:] = scored(model, clip, prompt, told, sources, args.draws)
                row.append(made[:4])
            rows += [*row, *[torch.full_like(best[:4], 255)] * (3 - len(row))]
            lines.append(f"| `{prompt}` | {' | '.join(map(str, cells))} |")
            print(lines[-1], file=sys.stderr)
    if args.picture:
        utils.save_png(utils.image_grid(torch.cat(rows), 12), args.picture)
    return lines


def learned(model, clip, args):
    """The table of the tokens in the folder --embeddings, plain and with --fast, as lines."""
    path, tokens, table = pathlib.Path(args.inversion), p3_model.learned_tokens(model), {}
    concepts = read_concepts(path)
    p3_model.need_embeddings(tokens, args.embeddings, [c.token for c in concepts])
    for concept in concepts:
        sources = clip.images(image_files(path.parent / concept.key))
        for prompt, told in zip(concept.prompts, concept.eval_prompts):
            given = model, clip, prompt, told, sources, args.draws
            table[f"`{prompt}`"] = [score for fast in (False, True) for score in scored(*given, fast)[1]]
    table["mean"] = [sum(column) / len(table) for column in zip(*table.values())]
    lines = [f"{describe_machine(model.device)}; the best 5 of 25 pictures, mean of {args.draws} draws", ""]
    lines += ["| prompt | image | text | image, `--fast` | text, `--fast` |", "|---" * 5 + "|"]
    return lines + [f"| {name} | {' | '.join(f'{s:.2f}' for s in scores)} |" for name, scores in table.items()]


def add_small_options(parser):
    """What all benchmarks of the small Stable Diffusion ask."""
    parser.add_argument("--ckpt", default=str(CHECKPOINTS / "tiny.ckpt"))
    parser.add_argument("--clip", default=str(CHECKPOINTS / "tiny_clip.pt"))
    add_out_option(parser)
    utils.add_device_options(parser)


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="runs/emoji", help="folder of emoji.npz and emoji.json")
    option("--first", type=whole(0), default=0, help="held-back pairs to pass over (default: 0, the test)")
    option("--count", type=whole(), default=200)
    option("--steps", type=whole(1, 1000), default=25)
    option("--scales", type=real(-100, 100), nargs="+", default=[1.0, 2.0, 5.0, 7.5])
    option("--pag", type=real(0, 100), default=0.0, help="perturbed-attention guidance (default: 0)")
    option("--no-fid", action="store_true")
    option("--picture", metavar="FILE", help="real pictures above generated ones, at the third scale or the last")
    option("--pairs", metavar="DIR", help="only writes the real and the generated pictures, at the same scale")
    option("--zeroshot", metavar="DIR", help="only writes the held-back pictures for p3_clip_zeroshot.py")
    option("--inversion", metavar="JSON", help="the concepts of a JSON: plain words beside learned tokens")
    option(
        "--embeddings", metavar="DIR", help="with --inversion: only the tokens of this folder, plain and with --fast"
    )
    option("--readable", metavar="DIR", help="only lists the subjects that the small CLIP reads in the held-back style")
    option("--draws", type=whole(), default=4, help="of 25 pictures a prompt for --inversion; the grader sees one")
    add_small_options(parser)
    args = parser.parse_args(argv)
    if args.embeddings and not args.inversion:
        raise UserError("--embeddings: give --inversion JSON, which says what they are to be scored by")
    return args


@cli
def main(argv=None):
    args = parse(argv)
    device, precision = args.device, utils.pick_precision(args.precision, args.device)
    if args.embeddings:
        model = p3_model.load_stable_diffusion(args.ckpt, device, precision)
        lines = learned(model, load_clip(args.clip, device), args)
        print("\n".join(lines))
        return save_table(lines, args.out)
    pictures = Pictures(args.data)
    if args.zeroshot:
        return write_zeroshot(pictures, args.zeroshot)
    rows = pictures.rows("val")[args.first : args.first + args.count]
    if not len(rows):
        raise UserError(f"--first {args.first}: {args.data} has {len(pictures.rows('val'))} held-back pairs")
    real, captions = pictures.images[rows], [pictures.caption(r) for r in rows]
    clip = load_clip(args.clip, device)
    if args.readable:
        return print("\n".join(readable(pictures, clip, clip.images(image_files(pathlib.Path(args.readable))))))
    model = p3_model.load_stable_diffusion(args.ckpt, device, precision)
    if args.inversion:
        lines = inversion(model, clip, pictures, args)
        print("\n".join(lines))
        return save_table(lines, args.out)
    third = args.scales[:3][-1]
    if args.pairs:
        return write_pairs(captions, real, drawn(model, captions, third, args), args.pairs)
    features = None if args.no_fid else Inception(device)
    told = None if args.no_fid else features(real)
    lines = [
        f"{describe_machine(device)}; {len(rows)} held-back pairs, {args.steps} steps, pag {args.pag:g}",
        "",
        "| | guidance | nearest caption is right | FID | s a picture |",
        "|---|---|---|---|---|",
        f"| real | | {nearest_is_right(clip, real, captions):.3f} | | |",
    ]
    for scale in args.scales:
        begin = time.time()
        made = drawn(model, captions, scale, args)
        seconds = (time.time() - begin) / len(made)
        fid = "-" if args.no_fid else f"{frechet_distance(features(made), told):.1f}"
        lines.append(f"| ours | {scale:g} | {nearest_is_right(clip, made, captions):.3f} | {fid} | {seconds:.2f} |")
        if args.picture and scale == third:
            pairs = [x[i : i + 12] for i in (0, 12) for x in (real, made)]
            utils.save_png(utils.image_grid(torch.cat(pairs), 12), args.picture)
    print("\n".join(lines))
    save_table(lines, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
