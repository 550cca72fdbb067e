"""A small set of pictures with captions: emoji of four vendors in six styles, 64x64 on white.

    python3 tools/make_emoji_dataset.py runs/emoji
    python3 tools/make_emoji_dataset.py runs/emoji --textual-inversion tiny/textual_inversion

Fetches five npm packages of pinned versions and hashes (164 MB, kept in DEST/tarballs; --source names a folder of
tarballs already at hand, called as `npm pack` calls them) and writes

    DEST/emoji.npz      images uint8 [N, 64, 64, 3]; subject int16 [N], vendor and split uint8 [N], which index
    DEST/emoji.json     subjects (code, name, phrase, group), vendors (name, licence, credit, package ...) and splits;
                        a picture's caption is info["caption"].format(subject=its phrase, vendor=its vendor's name)
    DEST/licences/      what the pictures stand under

A subject is an emoji's code points, with one name for all vendors' pictures: CLDR's, as OpenMoji's table has it. Left
out, because a small model would learn them badly, or little else: skin tones; women and men where there is a neutral
form; families by their members; people facing right instead of left; flags of countries; keycaps, letters, arrows,
buttons and the other symbols, most of them a white glyph on the same square; the 24 clock faces; all but three phases
of the moon; small and medium shapes. The hot dog is left out, too: it would be all that a model without dogs knows by
that word. Instead, the poodle is called a poodle dog.

The splits depend on hashes of code points and vendors, never on an order:

    subject     HELD_BACK, by all vendors: all dogs but the poodle (guide dogs and service dogs are almost the dog
                itself) and four subjects whose relatives stay: a penguin, an octopus, a strawberry, a guitar
    style       STYLE, all other subjects: OpenMoji's second drawing of everything, black lines without colour. Seen
                side by side, it is the most distinct of the six; a model should be able to express it, for it knows
                the lines from coloured OpenMoji, white inside them from its ghosts and teacups; and it costs no
                training pictures of another kind. Coloured OpenMoji would be as distinct, but nothing else has any
                outline to learn it from; each Fluent is too much like the other
    val         one coloured picture of every fourth subject, 5 % of the pairs: each subject is seen in other styles
    train       the rest

A drawing that another emoji has already (Fluent's cat face is its grinning cat, OpenMoji's snowflake has no colour to
leave out) is taken once. OpenMoji and Fluent flat are SVG, drawn by resvg-py (`pip install resvg-py`: 1.4 MB, Python
3.10 or newer).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import io
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, atomic, cli, output_folder, save_png  # noqa: E402

SIZE = 64
CAPTION = "{subject}, in the style of {vendor}"
SPLITS = ["train", "val", "subject", "style"]
STYLE = "OpenMoji line"
HELD_BACK = {
    "1F436": "dog face",
    "1F415": "dog",
    "1F9AE": "guide dog",
    "1F415-200D-1F9BA": "service dog",
    "1F427": "penguin",
    "1F419": "octopus",
    "1F353": "strawberry",
    "1F3B8": "guitar",
}
VAL_SUBJECTS = 0.25  # of these, one of the five coloured pictures

NEW1 = "1F436"  # pictures for Textual Inversion: this subject ...
NEW2 = ["1F40E", "1F3E0", "1F33B", "1F354", "1F916", "1F6B2"]  # ... and STYLE's horse, house, sunflower, hamburger, ...

REGISTRY = "https://registry.npmjs.org"
PACKAGES = {  # version and the registry's dist.integrity
    "emoji-datasource-google": (
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "emoji-datasource-twitter": (
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
    "openmoji": (
        "17.0.0",
        "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
    ),
    "@lobehub/fluent-emoji-3d": (
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "@lobehub/fluent-emoji-flat": (
        "1.1.0",
        "sha512-lPYCg8+N56MIj+iOgeBeH6AF0tneXxJCvgi41rOTjAWpA5rU2WUcmU1fiIXouEe8GrSTarWCYLY2ML+rdLRHsg==",
    ),
}


class Vendor(NamedTuple):
    name: str
    package: str
    folder: str  # in the package; its files are named by code points
    licence: str
    credit: str


APACHE = "Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0"
CC_BY = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
CC_BY_SA = "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"
MIT = "MIT, https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE"
NOTO = "Noto Emoji, copyright Google LLC, https://github.com/googlefonts/noto-emoji"
TWEMOJI = "Twemoji, copyright Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji"
OPENMOJI = "OpenMoji, the open-source emoji and icon project, https://openmoji.org"
FLUENT = "Fluent Emoji, copyright Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"
VENDORS = [
    Vendor("Noto", "emoji-datasource-google", "package/img/google/64/", APACHE, NOTO),
    Vendor("Twemoji", "emoji-datasource-twitter", "package/img/twitter/64/", CC_BY, TWEMOJI),
    Vendor("OpenMoji", "openmoji", "package/color/svg/", CC_BY_SA, OPENMOJI),
    Vendor("Fluent 3D", "@lobehub/fluent-emoji-3d", "package/assets/", MIT, FLUENT),
    Vendor("Fluent flat", "@lobehub/fluent-emoji-flat", "package/assets/", MIT, FLUENT),
    Vendor(STYLE, "openmoji", "package/black/svg/", CC_BY_SA, OPENMOJI),
]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("dest", help="folder that gets emoji.npz, emoji.json and licences/")
    option("--source", metavar="DIR", help="folder of tarballs; those missing are fetched (default: DEST/tarballs)")
    option("--textual-inversion", metavar="DIR", help="also the pictures of <new1> and <new2>: DIR/0, DIR/1")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------ packages


def tarball_name(package):
    """The file name that `npm pack` gives: @lobehub/fluent-emoji-3d in lobehub-fluent-emoji-3d-1.1.0.tgz."""
    return f"{package.lstrip('@').replace('/', '-')}-{PACKAGES[package][0]}.tgz"


def have_tarball(package, folder):
    """Path of the verified tarball in `folder`, fetched first where it is missing; UserError where that fails or its
    hash is not the pinned one."""
    path = folder / tarball_name(package)
    if path.is_file():
        verify(path, package, f"{path}: remove it and run again")
    else:
        with atomic(path) as temporary:
            download(package, temporary)
            verify(temporary, package, f"{path}: damaged on the way, so not kept; run again")
    return path


def verify(path, package, remedy):
    """Raises UserError with the remedy where a file's SHA-512 is not the pinned one."""
    digest = hashlib.sha512()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(2**20), b""):
            digest.update(block)
    version, integrity = PACKAGES[package]
    if "sha512-" + base64.b64encode(digest.digest()).decode() != integrity:
        raise UserError(f"{remedy} (its sha512 is not that of {package} {version})")


def download(package, path):
    """From the registry's address, else by npm, which knows of mirrors and passwords."""
    version = PACKAGES[package][0]
    url = f"{REGISTRY}/{package}/-/{package.split('/')[-1]}-{version}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as f:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=tarball_name(package), leave=False) as bar:
                for block in iter(lambda: response.read(2**18), b""):
                    f.write(block)
                    bar.update(len(block))
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, socket.timeout) as e:
        if not npm_pack(f"{package}@{version}", path):
            remedy = f"run `npm pack {package}@{version}` where it is, and name the folder with --source"
            raise UserError(f"{url}: not reachable ({e}); {remedy}") from None


def npm_pack(spec, path):
    """Whether npm is here and fetched the package to `path`."""
    if shutil.which("npm") is None:
        return False
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = ["npm", "pack", spec, "--silent", "--fetch-retries=0", "--pack-destination", folder]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        files = list(pathlib.Path(folder).glob("*.tgz"))
        if done.returncode or not files:
            return False
        files[0].replace(path)
    return True


def read_members(tarball, *prefixes):
    """{name: bytes} of the files in a tarball whose names begin so. Nothing is unpacked on disk, and a tarball with a
    name that would lead out of a folder is refused."""
    found = {}
    try:
        with tarfile.open(tarball, "r:gz") as tar:
            for member in tar:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise UserError(f"{tarball}: refused, its {member.name!r} leads out of the folder; remove it")
                if member.isfile() and member.name.startswith(prefixes):
                    found[member.name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as e:
        raise UserError(f"{tarball}: not a readable tarball ({e}); remove it") from None
    return found


def code_of(text):
    """Code points as the key of a subject: upper case, without the variation selector FE0F, which vendors set
    differently."""
    return "-".join(point for point in text.upper().split("-") if point != "FE0F")


# ------------------------------------------------------------------------ subjects and their names

GROUPS_OUT = {"Component", "Flags", "Symbols"}
SUBGROUPS_IN = {"flag", "geometric", "warning"}  # of these groups
NAMES_OUT = re.compile(
    r"facing right|^(family|kiss|couple with heart): |o.clock$|-thirty$|quarter moon|waxing|waning|"
    r"^small |^(white|black) (medium|small)|button|with a dot|^hot dog$"
)
CODES_OUT = {"1F46B", "1F46C", "1F46D", "1F930", "1FAC3"}  # gendered, of one code point: holding hands, pregnant
RENAMED = {  # where CLDR's name is no noun, or (dog) see above
    "poodle": "poodle dog",
    "person: bald": "bald person",
    "breast-feeding": "breast-feeding woman",
    "rolling on the floor laughing": "laughing face rolling on the floor",
    "star-struck": "star-struck face",
    "dizzy": "dizzy star",
    "foggy": "foggy bridge",
    "locked": "closed padlock",
    "unlocked": "open padlock",
    "locked with pen": "padlock with pen",
    "locked with key": "padlock with key",
    "construction": "construction sign",
    "children crossing": "children crossing sign",
    "high voltage": "high voltage sign",
    "prohibited": "prohibition sign",
    "radioactive": "radioactive sign",
    "biohazard": "biohazard sign",
    "warning": "warning sign",
    "mount fuji": "Mount Fuji",
    "Tokyo tower": "Tokyo Tower",
}
THE = {"Statue of Liberty", "milky way", "kaaba"}
UNCOUNTED = set(
    re.split(
        r",\s+",
        """
    Mount Fuji, Tokyo Tower, Santa Claus, Mrs. Claus, Mx Claus, bread, popcorn, bacon, canned food, salt, butter, sake,
    broccoli, garlic, cooked rice, curry rice, spaghetti, sushi, oden, falafel, leafy green, soft ice cream, ice cream,
    shaved ice, custard, mate, ice, bubble tea, pouring liquid, fog, fire, lacrosse, badminton, ping pong, ice hockey,
    field hockey, tennis, bowling, horse racing, cooking, camping, thread, yarn, soap, wood, coral, nail polish, dna,
    luggage, ZZZ, dashing away, light rail, non-potable water, money with wings
""".strip(),
    )
)


def choose_subjects(emoji, annotations):
    """[{code, name, phrase, group}] in the order of code points, from emoji.json and openmoji.json's {code: name}."""
    codes = {code_of(e["unified"]) for e in emoji}
    subjects = []
    for e in emoji:
        code = code_of(e["unified"])
        name = annotations.get(code, e["name"].lower())
        group_out = e["category"] in GROUPS_OUT and e["subcategory"] not in SUBGROUPS_IN
        if group_out or code in CODES_OUT or NAMES_OUT.search(name) or is_gendered(code, codes):
            continue
        name = RENAMED.get(name, name).replace(": ", " with ").replace("\u2019", "'")
        subjects.append({"code": code, "name": name, "phrase": phrase(name), "group": e["subcategory"]})
    return sorted(subjects, key=lambda s: s["code"])


def read_subjects(google, openmoji):
    """(choose_subjects() of what the two tarballs hold, OpenMoji's licence text as bytes)."""
    emoji, names, licence = "package/emoji.json", "package/data/openmoji.json", "package/LICENSE.txt"
    files = {**read_members(google, emoji), **read_members(openmoji, names, licence)}
    missing = [name for name in (emoji, names, licence) if name not in files]
    if missing:
        raise UserError(f"{google if missing[0] == emoji else openmoji}: has no {missing[0]}; it is another package")
    annotations = {code_of(e["hexcode"]): e["annotation"] for e in json.loads(files[names])}
    return choose_subjects(json.loads(files[emoji]), annotations), files[licence]


def is_gendered(code, codes):
    """Whether it is the female or male form of another emoji: with a sign of gender, or a woman or man for a person."""
    if code.endswith(("-200D-2640", "-200D-2642")):
        return True
    return code.startswith(("1F468-", "1F469-")) and "1F9D1" + code[5:] in codes


def phrase(name):
    """The name with its article, if it takes one: a dog face, an otter, the Statue of Liberty, grapes, bread."""
    if name in THE:
        return f"the {name}"
    if name in UNCOUNTED or name.startswith("no ") or is_plural(name):
        return name
    an = name[0].lower() in "aeiou" and not re.match(r"uni|eur|ewe|one-", name) or name.startswith(("hour", "x-ray"))
    return f"an {name}" if an else f"a {name}"


def is_plural(name):
    """By the ending of the word that the name is about: the dolls of Japanese dolls, the nest of nest with eggs."""
    head = re.split(r" (?:with|of|on|in|behind|over|and|up|down|showing|lifting|holding)\b", name)[0].split()[-1]
    if head in {"people", "skis"}:
        return True
    return head.endswith("s") and not head.endswith(("ss", "us", "is", "ros"))


# ------------------------------------------------------------------------ pictures


def render_svg(data, side):
    """RGBA picture of an SVG, its longer side `side` pixels."""
    try:
        import resvg_py
    except ImportError:
        raise UserError("resvg-py, which draws SVG, is missing: pip install resvg-py (Python 3.10 or newer)") from None
    png = resvg_py.svg_to_bytes(svg_string=data.decode(), width=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def render(data, name):
    """uint8 [64, 64, 3] on white of a picture file's bytes, SVG by its name, else whatever Pillow reads. Drawn larger,
    composited, then scaled by Lanczos."""
    image = render_svg(data, 4 * SIZE) if name.endswith(".svg") else Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS))


def render_vendor(vendor, tarball, codes):
    """{code: uint8 [64, 64, 3]} of the subjects that a vendor draws."""
    files = {code_of(pathlib.PurePosixPath(n).stem): (n, d) for n, d in read_members(tarball, vendor.folder).items()}
    pictures = {}
    for code in tqdm([c for c in codes if c in files], desc=f"drawing {vendor.name}", leave=False):
        name, data = files[code]
        try:
            pictures[code] = render(data, name)
        except UserError:
            raise
        except Exception as e:  # Pillow and resvg raise many kinds for damaged files
            raise UserError(f"{tarball}: its {name} is no readable picture ({e})") from None
    return pictures


# ------------------------------------------------------------------------ splits


def share(text):
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def split_of(code, vendor, drawn_by):
    """The split of one picture; drawn_by: the names of all vendors that draw this subject."""
    if code in HELD_BACK:
        return "subject"
    if vendor == STYLE:
        return "style"
    seen = [v for v in drawn_by if v != STYLE]
    held = min(seen, key=lambda v: share(f"{code} {v}"))
    return "val" if vendor == held and len(seen) > 1 and share(code) < VAL_SUBJECTS else "train"


def without_copies(pictures):
    """The same {vendor name: {code: image}}, less the images that equal one before, of any subject and vendor."""
    seen, kept = set(), {}
    for vendor in VENDORS:  # STYLE is the last
        kept[vendor.name] = {}
        for code, image in sorted(pictures[vendor.name].items()):
            if image.tobytes() not in seen:
                kept[vendor.name][code] = image
            seen.add(image.tobytes())
    return kept


def gather(subjects, pictures):
    """Arrays of emoji.npz from pictures {vendor name: {code: image}}: by subject, then by vendor."""
    rows = []
    for i, subject in enumerate(subjects):
        code = subject["code"]
        drawn_by = [v.name for v in VENDORS if code in pictures[v.name]]
        for j, vendor in enumerate(VENDORS):
            if vendor.name in drawn_by:
                split = SPLITS.index(split_of(code, vendor.name, drawn_by))
                rows.append((pictures[vendor.name][code], i, j, split))
    images, subject, vendor, split = zip(*rows)
    return {
        "images": np.stack(images),
        "subject": np.array(subject, np.int16),
        "vendor": np.array(vendor, np.uint8),
        "split": np.array(split, np.uint8),
    }


# ------------------------------------------------------------------------ writing


def write_dataset(dest, subjects, arrays):
    with atomic(dest / "emoji.npz") as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **arrays)
    vendors = [{**v._asdict(), "version": PACKAGES[v.package][0]} for v in VENDORS]
    held_back = {"subjects": list(HELD_BACK), "style": STYLE}
    info = {"caption": CAPTION, "splits": SPLITS, "held_back": held_back, "vendors": vendors, "subjects": subjects}
    with atomic(dest / "emoji.json") as temporary:
        temporary.write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_licences(folder, openmoji_licence):
    """SOURCES.md, and the texts of the licences that ask to travel with the pictures."""
    folder = output_folder(folder)
    for path in (ROOT / "tools" / "licences").glob("*.txt"):
        with atomic(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
    with atomic(folder / "CC-BY-SA-4.0.txt") as temporary:
        temporary.write_bytes(openmoji_licence)
    with atomic(folder / "SOURCES.md") as temporary:
        temporary.write_text(sources(VENDORS), encoding="utf-8")


def sources(vendors):
    """A Markdown table of styles, their authors, licences and packages."""
    lines = ["| style | by | licence | taken from |", "|---|---|---|---|"]
    lines += [f"| {v.name} | {v.credit} | {v.licence} | npm {v.package} {PACKAGES[v.package][0]} |" for v in vendors]
    return "\n".join(lines) + "\n"


def write_textual_inversion(folder, subjects, pictures, openmoji_licence):
    """folder/0: NEW1 by every vendor of training; folder/1: NEW2 in STYLE; ATTRIBUTION.md and licences/."""
    names = {s["code"]: s["name"] for s in subjects}
    coloured = [v for v in VENDORS if v.name != STYLE]
    style = [v for v in VENDORS if v.name == STYLE]
    rows = []
    for key, codes, vendors in (("0", [NEW1], coloured), ("1", NEW2, style)):
        output_folder(folder / key)
        pairs = [(c, v) for c in codes for v in vendors if c in pictures[v.name]]
        for i, (code, vendor) in enumerate(pairs):
            save_png(pictures[vendor.name][code], folder / key / f"{i:02d}.png")
            rows.append(f"| {key}/{i:02d}.png | {names[code]} | {vendor.name} |")
    write_licences(folder / "licences", openmoji_licence)
    text = ATTRIBUTION + "\n".join(["| picture | of | style |", "|---|---|---|", *rows]) + "\n\n" + sources(VENDORS)
    with atomic(folder / "ATTRIBUTION.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


ATTRIBUTION = """# Where these pictures are from

Emoji of four vendors, drawn at 64x64 on white by `tools/make_emoji_dataset.py` and otherwise unchanged. Each stands
under its vendor's licence (texts in `licences/`), not under the project's: those by OpenMoji may be shared only under
CC BY-SA 4.0 again.

"""


@cli
def main(argv=None):
    args = parse(argv)
    dest = output_folder(args.dest)
    folder = pathlib.Path(args.source) if args.source else output_folder(dest / "tarballs")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --source names one with the tarballs")
    tarballs = {package: have_tarball(package, folder) for package in PACKAGES}

    subjects, openmoji_licence = read_subjects(tarballs["emoji-datasource-google"], tarballs["openmoji"])
    codes = [s["code"] for s in subjects]
    pictures = without_copies({v.name: render_vendor(v, tarballs[v.package], codes) for v in VENDORS})
    arrays = gather(subjects, pictures)
    write_licences(dest / "licences", openmoji_licence)
    write_dataset(dest, subjects, arrays)
    if args.textual_inversion:
        write_textual_inversion(pathlib.Path(args.textual_inversion), subjects, pictures, openmoji_licence)
    for j, vendor in enumerate(VENDORS):
        counts = np.bincount(arrays["split"][arrays["vendor"] == j], minlength=len(SPLITS))
        print(f"{vendor.name:14}" + "  ".join(f"{n} {c:4d}" for n, c in zip(SPLITS, counts)))
    print(f"{len(arrays['images'])} pictures of {len(subjects)} subjects: {dest / 'emoji.npz'}, {dest / 'emoji.json'}")


if __name__ == "__main__":
    main()
