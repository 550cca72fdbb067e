"""Makes one page of what demo.sh and the graders' commands left in a folder: OUT/index.html, which opens from the disk.

    python3 report/page.py output

It shows what it finds and names the command for what it does not:
  mnistm/ svhn/ (hw2_1.sh), digits.json (digit_classifier.py --json), grid_{mnistm,svhn}.png, reverse.png (p1_infer.py);
  face/ (hw2_2.sh) with errors.json (--gt), eta.png (--eta-grid), {slerp,linear}.{png,json} (--interpolate);
  p3/ (hw2_3.sh) with scores.json (grade_hw2_3.py --json), prompt.png (p3_infer.py), zeroshot/ (p3_clip_zeroshot.py);
  dann.json (hw2_4.sh ... OUT/dann.csv --gt), tsne.png (p4_tsne.py), else the figure that ships; runs/: loss curves.
Pictures from elsewhere are copied to OUT/page, so that the folder can be moved. No number is computed here.
"""

from __future__ import annotations

import io
import pathlib
import shutil
import sys
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jinja2  # noqa: E402
import matplotlib  # noqa: E402
import pandas as pd  # noqa: E402
from markupsafe import Markup  # noqa: E402

from p3_concepts import image_files  # noqa: E402
from utils import Parser, UserError, atomic, cli, output_folder, read_json  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = ["#2b83d6", "#e0702f", "#3a9d5d", "#b065c9"]  # readable on white and on black
INK = "#010203"  # stands for the page's own text colour
WRONG_SHOWN = 40


class Folder:
    """The folder whose page is made: its JSON files, and links to pictures from the page."""

    def __init__(self, path):
        self.path, self.read = pathlib.Path(path), []

    def json(self, name):
        """Content of a JSON file, or None where there is none; raises UserError for a damaged one."""
        path = self.path / name
        if not path.is_file():
            return None
        self.read.append(name)
        return read_json(path)

    def link(self, path):
        """URL of a picture, relative to the page; one from elsewhere is copied. None where there is none."""
        path = self.path / path
        if not path.is_file():
            return None
        here, full = self.path.resolve(), path.resolve()
        inside = full.relative_to(here) if here in full.parents else None
        if inside is None:
            inside = pathlib.Path("page", f"{full.parent.name}_{path.name}")
            output_folder(self.path / "page")
            shutil.copyfile(path, self.path / inside)
        return urllib.parse.quote(str(inside))

    def pictures(self, name):
        folder = self.path / name
        return [self.link(file.relative_to(self.path)) for file in image_files(folder)] if folder.is_dir() else []

    def is_older(self, name, pictures):
        """Whether a JSON file was written before one of the folder's pictures was."""
        written = (self.path / name).stat().st_mtime
        return any((self.path / urllib.parse.unquote(p)).stat().st_mtime > written for p in pictures)


# ------------------------------------------------------------------------ charts


def chart(draw, label, width, height):
    """Inline SVG of what draw(figure) draws, in the page's own font and text colour."""
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    style = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 8, "axes.titlesize": 8}
    style.update(dict.fromkeys(ink, INK))
    style.update(dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False))
    with plt.rc_context(style):
        figure = plt.figure(figsize=(width, height), layout="constrained")
        draw(figure)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = svg.getvalue().replace(INK, "currentColor")
    return Markup('<svg role="img" aria-label="{}"').format(label) + Markup(text[text.index("<svg") + 4 :])


def accuracy_bars(domains):
    def draw(figure):
        axis = figure.subplots()
        for i, (domain, colour) in enumerate(zip(domains, COLOURS)):
            places = [int(d) + 0.4 * i - 0.2 for d in domain["by_digit"]]
            bars = axis.bar(places, domain["by_digit"].values(), 0.36, color=colour, label=domain["title"])
            told = [f"{100 * share:.0f}" if share < 0.995 else "" for share in domain["by_digit"].values()]
            axis.bar_label(bars, told, fontsize=7)
        axis.set(ylim=(0, 1.05), xticks=range(10), yticks=[0, 0.5, 1], yticklabels=["0 %", "50 %", "100 %"])
        axis.set_xlabel("digit that was asked for")
        figure.legend(loc="outside upper center", ncols=2)

    return chart(draw, "Share of the digits that the judges read as meant, by digit", 4.6, 2.3)


def interpolation_curves(kinds):
    def draw(figure):
        titles = {"norms": "length of the noise", "contrasts": "contrast of the picture"}
        for axis, (name, title) in zip(figure.subplots(1, 2), titles.items()):
            for (kind, told), colour in zip(kinds.items(), COLOURS):
                axis.plot(told["alphas"], told[name], ".-", color=colour, label=kind)
            axis.set(title=title, xlabel="alpha", ylim=(0, None))
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)

    return chart(draw, "Length of the noise and contrast of the picture over alpha, slerp and linear", 4.6, 2.3)


def loss_curves(name, table):
    losses = [c for c in table.columns if "loss" in c]

    def draw(figure):
        axis = figure.subplots()
        for column, colour in zip(losses, COLOURS * 3):
            line = table[["step", column]].dropna()
            noisy = column.startswith("train")
            smooth = line[column].rolling(max(1, len(line) // 50), min_periods=1).mean() if noisy else line[column]
            axis.plot(line["step"], smooth, color=colour, label=column.replace("_", " "))
        if (table[losses].min() > 0).all():
            axis.set_yscale("log")
        axis.set_xlabel("step")
        figure.legend(loc="outside upper center", ncols=3)

    return chart(draw, f"Losses of the training {name}", 4.6, 2.3)


# ------------------------------------------------------------------------ what the page says


def digits(folder):
    drawn = {d: folder.pictures(d) for d in ("mnistm", "svhn")}
    graded = folder.json("digits.json")
    if graded:
        for domain in graded["domains"]:
            domain["judge"] = domain["judge"].replace(f"{ROOT}/", "")
            for wrong in domain["wrong"]:
                wrong["url"] = folder.link(pathlib.Path(domain["folder"], wrong["file"]))
        graded["bars"] = accuracy_bars(graded["domains"])
        graded["wrong"] = [{**w, "title": d["title"]} for d in graded["domains"] for w in d["wrong"] if w["url"]]
        graded["older"] = folder.is_older("digits.json", [*drawn["mnistm"], *drawn["svhn"]])
    grids = {title: folder.link(f"grid_{d}.png") for d, title in (("mnistm", "MNIST-M"), ("svhn", "SVHN"))}
    return {"drawn": drawn, "graded": graded, "grids": grids, "reverse": folder.link("reverse.png")}


def faces(folder):
    drawn = folder.pictures("face")
    errors = folder.json("face/errors.json")
    if errors:
        errors["older"] = folder.is_older("face/errors.json", drawn)
    told = {kind: folder.json(f"{kind}.json") for kind in ("slerp", "linear")}
    told = {kind: numbers for kind, numbers in told.items() if numbers}
    return {
        "drawn": {pathlib.Path(urllib.parse.unquote(url)).stem: url for url in drawn},
        "errors": errors,
        "eta": folder.link("eta.png"),
        "strips": {kind: folder.link(f"{kind}.png") for kind in ("slerp", "linear")},
        "curves": interpolation_curves(told) if told else None,
    }


def text_to_image(folder):
    scores = folder.json("p3/scores.json")
    for prompt in scores["prompts"] if scores else []:
        prompt["sources"] = [folder.link(pathlib.Path("p3", file)) for file in prompt["sources"]]
        for picture in prompt["pictures"]:
            picture["url"] = folder.link(pathlib.Path("p3", picture["file"]))
        prompt["older"] = folder.is_older("p3/scores.json", [p["url"] for p in prompt["pictures"] if p["url"]])
    zeroshot = folder.json("zeroshot/zeroshot.json")
    if zeroshot:
        shown = [a for name in zeroshot["examples"] for a in zeroshot["answers"] if a["file"] == name]
        for answer in shown:
            answer["url"] = folder.link(pathlib.Path("zeroshot", zeroshot["pictures"], answer["file"]))
        zeroshot["shown"] = {right: [a for a in shown if a["right"] is right] for right in (True, False)}
        zeroshot["model"] = pathlib.Path(zeroshot["model"]).name
    return {"scores": scores, "zeroshot": zeroshot, "prompt": folder.link("prompt.png")}


def adaptation(folder):
    read = folder.json("dann.json")
    if read:
        read["drawn"] = pathlib.Path(read["folder"]).resolve() == (folder.path / "svhn").resolve()
    shipped = read_json(ROOT / "report/numbers/p4.json")
    own, theirs = folder.link("tsne.png"), ROOT / "report/figures/p4_tsne.png"
    return {"read": read, "shipped": shipped, "own": bool(own), "tsne": own or folder.link(theirs)}


def trainings(runs):
    """{name: SVG} of every run with a csv; a resumed run has one for each start."""
    tables = {}
    for path in sorted(pathlib.Path(runs).glob("**/csv/version_*/metrics.csv")):
        try:
            table = pd.read_csv(path)
            losses = table.filter(like="loss").astype(float)
        except ValueError as e:
            raise UserError(f"{path}: not a csv of numbers ({e}); remove it, or the run's folder") from None
        if "step" in table and len(losses.columns):
            tables.setdefault(str(path.parents[2].relative_to(runs)), []).append(table)
    return {name: loss_curves(name, pd.concat(parts).sort_values("step")) for name, parts in tables.items()}


SECTIONS = {"p1": digits, "p2": faces, "p3": text_to_image, "p4": adaptation}


def render(out, runs):
    """The page's HTML; raises UserError for a JSON file of another shape than the graders write."""
    loader = jinja2.FileSystemLoader(ROOT / "report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page, folder, curves = environment.get_template("page.html.jinja"), Folder(out), trainings(runs)
    try:
        found = {name: section(folder) for name, section in SECTIONS.items()}
        return page.render(**found, runs=curves, made=time.strftime("%Y-%m-%d"), wrong_shown=WRONG_SHOWN)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.UndefinedError) as e:
        wrong = f"one of {', '.join(folder.read)} is not what the graders write ({type(e).__name__}: {str(e)[:120]})"
        raise UserError(f"{out}: {wrong}; run their commands again") from None


@cli
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("out", metavar="OUT", help="the folder that demo.sh filled")
    parser.add_argument("--runs", default=str(ROOT / "runs"), help="folder of trainings (default: runs)")
    args = parser.parse_args(argv)
    if not pathlib.Path(args.out).is_dir():
        raise UserError(f"{args.out}: no such folder; `bash demo.sh` makes output")
    output_folder(args.out)
    html = render(args.out, args.runs)
    path = pathlib.Path(args.out).resolve() / "index.html"
    with atomic(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
