"""Pictures with captions for the small Stable Diffusion: emoji of twelve free sets, 64x64 on white.

    python3 tools/make_emoji_dataset.py runs/emoji                          # `npm pack` fetches 30 MB
    python3 tools/make_emoji_dataset.py runs/emoji --source packages        # what lies in packages/ is not fetched

Iconify's packages hold each set as one JSON of SVG bodies, drawn here by resvg (`pip install resvg-py`). Leaves

    DEST/emoji.npz      images uint8 [N, 64, 64, 3]; subject, vendor and split, int16 [N], which index
    DEST/emoji.json     subjects (code points and phrase), vendors (name, package, credit, licence) and splits; a
                        picture's caption is info["caption"].format(subject=its phrase, vendor=its vendor's name)
    DEST/ATTRIBUTION.md and licences/

emoji_subjects.json lists the subjects: code points, what captions say, and what the sets call their icons of it. Left
out, because a small model would learn them badly, or little else: skin tones; women and men where there is a neutral
form; families; people facing right; flags of countries; keycaps, letters, arrows, buttons and most other symbols; clock
faces; all but three phases of the moon. A drawing that another emoji has already is taken once. Splits depend on
hashes, never on an order:

    subject     every dog (no hot dog is drawn either, so that no caption says the word), and four subjects whose
                relatives stay: a penguin, an octopus, a strawberry, a guitar
    style       the two sets of black glyphs, all other subjects: no caption of the coloured sets can say that look
    val         5 % of the coloured pairs, at most one a subject, so that each subject is seen in other styles
    train       the rest
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils import Parser, UserError, atomic, cli, output_folder, save_json, save_png  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
SIZE = 64
CAPTION = "{subject}, in the style of {vendor}"
SETS = {  # what captions call a set: its package @iconify-json/...
    "Noto": "noto@1.2.9",
    "Noto blobs": "noto-v1@1.2.5",
    "Twemoji": "twemoji@1.2.5",
    "OpenMoji": "openmoji@1.2.29",
    "EmojiOne": "emojione@1.2.3",
    "old EmojiOne": "emojione-v1@1.2.3",
    "Fluent": "fluent-emoji@1.2.7",
    "Fluent flat": "fluent-emoji-flat@1.2.6",
    "Firefox": "fxemoji@1.2.2",
    "Streamline": "streamline-emojis@1.2.4",
    "EmojiOne glyphs": "emojione-monotone@1.2.1",
    "Fluent glyphs": "fluent-emoji-high-contrast@1.2.6",
}
GLYPHS = ["EmojiOne glyphs", "Fluent glyphs"]
DOGS = ["1f436", "1f415", "1f429", "1f9ae", "1f415-200d-1f9ba"]  # face, whole, poodle, guide dog, service dog
HELD_BACK = [*DOGS, "1f427", "1f419", "1f353", "1f3b8"]  # penguin, octopus, strawberry, guitar
SPLITS = ["train", "val", "subject", "style"]
# pictures of <new1>: the dog's face in six sets, so that prompts can ask for it in the others
NEW1 = [("1f436", v) for v in ("Noto", "Noto blobs", "OpenMoji", "old EmojiOne", "Fluent", "Firefox")]
# of <new2>: horse, house, sunflower, hamburger, robot, bicycle in the set that the judge reads (tiny.py, NEW2)
NEW2 = [(code, "Fluent glyphs") for code in ("1f40e", "1f3e0", "1f33b", "1f354", "1f916", "1f6b2")]
ATTRIBUTION = """# Where these pictures are from

Emoji drawn at 64x64 on white by `tools/make_emoji_dataset.py`, otherwise unchanged. Each stands under the licence of
its set (texts in `licences/`), not under the project's: those of OpenMoji and old EmojiOne may be shared only under
CC BY-SA 4.0 again.

"""


def fetch(folder, spec):
    """The path of a package's archive in `folder`, which npm puts there if it is missing; UserError if it cannot."""
    path = folder / f"iconify-json-{spec.replace('@', '-')}.tgz"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            npm = ["npm", "pack", f"@iconify-json/{spec}", "--loglevel=error", "--fetch-retries=0"]
            try:
                subprocess.run([*npm, "--pack-destination", place], check=True, capture_output=True, text=True)
                (pathlib.Path(place) / path.name).replace(path)
            except (subprocess.CalledProcessError, FileNotFoundError) as e:
                reason = (getattr(e, "stderr", "") or str(e)).splitlines()[0]
                remedy = f"try again with a network, or put {path.name} into a folder and name it with --source"
                raise UserError(f"`{' '.join(npm[:3])}` fails ({reason}); {remedy}") from None
    return path


def read_package(path):
    """(icons.json, info.json) of an archive, which is never unpacked on disk; UserError where it is none."""
    found = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if member.isfile() and member.name in ("package/icons.json", "package/info.json"):
                    found[member.name[8:-5]] = json.load(tar.extractfile(member))
        return found["icons"], found["info"]
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: not a readable package of Iconify ({e!r}); remove it and run this again") from None


def icon_of(content, names):
    """The first of the named icons that a set has, else None; "set:icon" is the only one for its set, "set:-" none."""
    own = [name.split(":")[1] for name in names if name.startswith(content["prefix"] + ":")]
    for name in own or names:
        if name in content["icons"]:
            return {"width": content["width"], "height": content["height"], **content["icons"][name]}


def render(icon):
    """uint8 [64, 64, 3] of an icon on white: drawn twice as large, then averaged."""
    import resvg_py

    box = " ".join(str(icon.get(k, 0)) for k in ("left", "top", "width", "height"))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} width="{2 * SIZE}" height="{2 * SIZE}" viewBox="{box}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB").reduce(2))


def draw(subjects, packages):
    """{set: {code: image}}, less images that equal one before, of any subject and set."""
    seen, pictures = set(), {vendor: {} for vendor in SETS}
    for vendor, (content, _) in packages.items():
        icons = {code: icon_of(content, names) for code, (_, *names) in subjects.items()}
        for code in tqdm([code for code in subjects if icons[code]], vendor, leave=False):
            try:
                image = render(icons[code])
            except ImportError:
                raise UserError("resvg-py, which draws SVG, is missing: pip install resvg-py") from None
            except Exception as e:  # resvg raises several kinds
                raise UserError(f"@iconify-json/{SETS[vendor]}: {subjects[code][0]} cannot be drawn ({e})") from None
            if image.tobytes() not in seen:
                pictures[vendor][code] = image
            seen.add(image.tobytes())
    return pictures


def share(text):
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def split_of(code, vendor, drawn_by):
    """The split of one picture; drawn_by: the names of all sets that draw this subject."""
    if code in HELD_BACK:
        return "subject"
    if vendor in GLYPHS:
        return "style"
    seen = [v for v in drawn_by if v not in GLYPHS]
    held = min(seen, key=lambda v: share(f"{code} {v}"))
    return "val" if vendor == held and len(seen) > 1 and share(code) < 0.05 * len(seen) else "train"


def write_dataset(dest, subjects, pictures, vendors):
    """emoji.npz, by subject, then by set, and emoji.json; returns the arrays vendor and split."""
    subjects = {code: words[0] for code, words in subjects.items() if any(code in p for p in pictures.values())}
    images, rows = [], []
    for i, code in enumerate(subjects):
        drawn_by = [v for v in SETS if code in pictures[v]]
        images += [pictures[v][code] for v in drawn_by]
        rows += [(i, list(SETS).index(v), SPLITS.index(split_of(code, v, drawn_by))) for v in drawn_by]
    subject, vendor, split = np.array(rows, np.int16).T
    with atomic(dest / "emoji.npz") as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, images=np.array(images), subject=subject, vendor=vendor, split=split)
    named = [{"code": code, "phrase": phrase} for code, phrase in subjects.items()]
    save_json({"caption": CAPTION, "splits": SPLITS, "vendors": vendors, "subjects": named}, dest / "emoji.json")
    return vendor, split


def write_attribution(folder, vendors, rows=()):
    """folder/ATTRIBUTION.md with the given rows of a table of pictures, and the licences' texts beside it."""
    texts = output_folder(folder / "licences")
    for path in (HERE / "licences").glob("*.txt"):
        with atomic(texts / path.name) as temporary:
            shutil.copyfile(path, temporary)
    lines = [*rows, "| set | package | by | licence |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(v.values())} |" for v in vendors]
    with atomic(folder / "ATTRIBUTION.md") as temporary:
        temporary.write_text(ATTRIBUTION + "\n".join(lines) + "\n", encoding="utf-8")


def vendor_of(name, info):
    """What emoji.json and ATTRIBUTION.md say of a set; `info` is its package's."""
    credit = f"{info['name']} by {info['author']['name']}, {info['author']['url']}"
    licence = f"{info['license']['title']}, {info['license']['url']}"
    return {"name": name, "package": f"@iconify-json/{SETS[name]}", "credit": credit, "licence": licence}


def write_concepts(folder, subjects, pictures, vendors):
    """folder/0 and folder/1 with the pictures of <new1> and <new2>, captions.json and ATTRIBUTION.md."""
    captions, rows = {"0": {}, "1": {}}, ["| picture | of | set |", "|---|---|---|"]
    for key, pairs in (("0", NEW1), ("1", NEW2)):
        output_folder(folder / key)
        for code, vendor in [(code, v) for code, v in pairs if code in pictures[v]]:
            name = f"{len(captions[key]):02d}.png"
            save_png(pictures[vendor][code], folder / key / name)
            said = ("a {}", vendor) if key == "0" else (subjects[code][0], "{}")
            captions[key][name] = CAPTION.format(subject=said[0], vendor=said[1])
            rows.append(f"| {key}/{name} | {subjects[code][0]} | {vendor} |")
    save_json(captions, folder / "captions.json")
    write_attribution(folder, vendors, [*rows, ""])


@cli
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("dest", metavar="DEST")
    parser.add_argument("--source", metavar="DIR", help="folder of the packages' archives (default: DEST/packages)")
    parser.add_argument("--concepts", metavar="DIR", help="also write pictures of <new1> and <new2>: DIR/0, DIR/1")
    args = parser.parse_args(argv)
    dest = output_folder(args.dest)
    source = pathlib.Path(args.source or output_folder(dest / "packages"))
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; --source names the one of the packages")
    subjects = json.loads((HERE / "emoji_subjects.json").read_text(encoding="utf-8"))
    packages = {name: read_package(fetch(source, spec)) for name, spec in tqdm(SETS.items(), "packages", leave=False)}
    pictures = draw(subjects, packages)
    vendors = [vendor_of(name, info) for name, (_, info) in packages.items()]
    write_attribution(dest, vendors)
    vendor, split = write_dataset(dest, subjects, pictures, vendors)
    if args.concepts:
        write_concepts(pathlib.Path(args.concepts), subjects, pictures, vendors)
    for j, name in enumerate(SETS):
        counts = np.bincount(split[vendor == j], minlength=len(SPLITS))
        print(f"{name:16}" + "  ".join(f"{n} {c:4d}" for n, c in zip(SPLITS, counts)))
    print(f"wrote {len(split)} pictures: {dest / 'emoji.npz'}, {dest / 'emoji.json'}")


if __name__ == "__main__":
    main()
