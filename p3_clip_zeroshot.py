"""CLIP zero-shot classification of hw2_data/clip_zeroshot: accuracy (also by class), five right and five wrong answers.

    python3 p3_clip_zeroshot.py --data hw2_data/clip_zeroshot --model ViT-B/32 --prompt "A photo of {object}."

Writes zeroshot.json (all answers), examples.txt and examples.png (top row right, bottom row wrong) to --out.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import re
import textwrap

import matplotlib
import torch
from tqdm import tqdm

import utils
from p3_clip import load_clip
from utils import Parser, UserError, cli, whole

CLASS_ID = re.compile("[0-9]{1,9}")

# The 18 templates of the CLIP paper for CIFAR-10 and CIFAR-100, 32x32 pictures as here (openai/CLIP, data/prompts.md).
LOOKS = ["", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good "]
ENSEMBLE = [f"a {look}photo of {article} {{object}}." for look in LOOKS for article in ("a", "the")]
ENSEMBLE += [f"a photo of {article} {size} {{object}}." for size in ("small", "big") for article in ("a", "the")]


def read_data(folder):
    """(image files, their class ids, class names) of val/{class_id}_{image_id}.png and id2label.json."""
    labels = folder / "id2label.json"
    names = utils.read_json(labels, "`bash get_dataset.sh` fetches hw2_data")
    entries = names.items() if isinstance(names, dict) else [("", "")]
    if not all(CLASS_ID.fullmatch(k) and isinstance(v, str) for k, v in entries):
        raise UserError(f'{labels}: expected {{"0": "bicycle", ...}}; fetch it again')
    names = {int(k): v.replace("_", " ") for k, v in entries}
    files = sorted((folder / "val").glob("[!.]*.png"))
    if not files:
        raise UserError(f"{folder / 'val'}: no PNG pictures there; `bash get_dataset.sh` fetches hw2_data")
    ids = [f.name.split("_")[0] for f in files]
    for file, i in zip(files, ids):
        if not CLASS_ID.fullmatch(i) or int(i) not in names or not file.name.isprintable():
            raise UserError(f"{file}: its name must begin with a class id of {labels}, and be printable")
    return files, [int(i) for i in ids], names


def class_vectors(clip, names, templates):
    """One unit vector a class, [C, D]: the mean of its templates' unit vectors (Radford et al. 2021, section 3.1.4)."""
    vectors = torch.stack([clip.texts([t.replace("{object}", name) for t in templates]).mean(0) for name in names])
    return vectors / vectors.norm(dim=1, keepdim=True)


def classify(clip, files, vectors, batch_size):
    """(index of the class with the largest cosine, its softmax probability) of each picture."""
    logits = []
    for start in tqdm(range(0, len(files), batch_size), unit="batch", desc="classify"):
        logits.append(clip.logit_scale * clip.images(files[start : start + batch_size], batch_size) @ vectors.T)
    probability, answer = torch.cat(logits).softmax(1).max(1)
    return answer.tolist(), probability.tolist()


def save_examples(rows, out):
    """Five right and five wrong answers, drawn by the seed, as text and as a picture."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text, (figure, axes) = [], plt.subplots(2, 5, figsize=(12, 6.5), squeeze=False)
    for title, line, examples in zip(("right", "wrong"), axes, rows):
        text.append(f"{title}:")
        for axis, row in itertools.zip_longest(line, examples):
            axis.axis("off")
            if row is not None:
                text.append(f"  {row['file']}: truth {row['truth']}, answer {row['answer']} ({row['probability']:.1%})")
                axis.imshow(utils.open_image(row["path"]), interpolation="nearest")
                told = row["file"], f"truth: {row['truth']}", f"answer: {row['answer']} ({row['probability']:.0%})"
                axis.set_title("\n".join(textwrap.fill(t, 36) for t in told), fontsize=9)
    figure.tight_layout()
    with utils.atomic(out / "examples.png") as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)
    with utils.atomic(out / "examples.txt") as temporary:
        temporary.write_text("\n".join(text) + "\n")
    print("\n".join(text))


def summary(rows, args, templates):
    """What zeroshot.json holds."""
    per_class = {}
    for row in rows:
        per_class.setdefault(row["truth"], []).append(row["right"])
    return {
        "model": args.model,
        "templates": templates,
        "pictures": os.path.relpath(pathlib.Path(args.data, "val"), args.out),
        "images": len(rows),
        "accuracy": sum(r["right"] for r in rows) / len(rows),
        "per_class": {name: sum(hits) / len(hits) for name, hits in per_class.items()},
        "answers": [{k: v for k, v in row.items() if k != "path"} for row in rows],
    }


@cli
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data", default="hw2_data/clip_zeroshot")
    parser.add_argument("--model", default="ViT-B/32", help="OpenAI or hub name, folder, or file in OpenAI's format")
    parser.add_argument("--prompt", default="A photo of {object}.", help="must hold {object}")
    parser.add_argument("--ensemble", action="store_true", help="the CLIP paper's 18 CIFAR templates, averaged")
    parser.add_argument("--out", default="output/clip_zeroshot")
    parser.add_argument("--batch-size", type=whole(), default=100)
    utils.add_device_options(parser)
    parser.set_defaults(precision="fp32")
    args = parser.parse_args(argv)
    if "{object}" not in args.prompt:
        raise UserError('--prompt: needs {object} where the class name goes, as in "A photo of {object}."')
    files, truth, names = read_data(pathlib.Path(args.data))
    device, dtype = args.device, utils.pick_precision(args.precision, args.device)
    clip = load_clip(args.model, device)
    out = utils.output_folder(args.out)

    templates = ENSEMBLE if args.ensemble else [args.prompt]
    ids = sorted(names)
    with utils.autocast(device, dtype):
        vectors = class_vectors(clip, [names[i] for i in ids], templates)
        answers, probabilities = classify(clip, files, vectors, args.batch_size)
    rows = [
        {"file": f.name, "path": f, "truth": names[t], "answer": names[ids[a]], "probability": p, "right": ids[a] == t}
        for f, t, a, p in zip(files, truth, answers, probabilities)
    ]
    draw = random.Random(args.seed)
    sides = [[r for r in rows if r["right"] == side] for side in (True, False)]
    examples = [draw.sample(side, min(5, len(side))) for side in sides]
    save_examples(examples, out)
    result = summary(rows, args, templates)
    result["examples"] = [row["file"] for row in examples[0] + examples[1]]
    utils.save_json(result, out / "zeroshot.json")
    for name, accuracy in sorted(result["per_class"].items(), key=lambda item: -item[1]):
        print(f"{name:16s} {accuracy:.1%}")
    print(f"accuracy {result['accuracy']:.2%} ({len(sides[0])} of {len(rows)})")
    print(f"wrote zeroshot.json, examples.txt and examples.png to {out}")


if __name__ == "__main__":
    main()
