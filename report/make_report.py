"""Makes hw2_report.pdf from report/report.typ, report/figures and report/numbers.

    python3 report/make_report.py                           # what is missing is made first, by the project's scripts
    python3 report/make_report.py --remake p2 p3 --data hw2_data --ckpt sd-v1-4.ckpt

Every figure and every number comes out of a command of the table below; the text only names them. Where --data has the
course's face/UNet.pt, or --ckpt is there, the figures of Problems 2 and 3 come from those, else from the small models
that ship. Numbers that need trainings of hours (p4) resume what is in runs/.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import Parser, UserError, atomic, cli, output_folder, save_json  # noqa: E402

HERE = ROOT / "report"
FIGURES, NUMBERS, WORK = HERE / "figures", HERE / "numbers", ROOT / "runs/report"
TINY = ROOT / "tiny/textual_inversion/input.json"
TINY_CKPT, TINY_CLIP = ROOT / "checkpoints/tiny.ckpt", ROOT / "checkpoints/tiny_clip.pt"
MULTI = "a <new1>, in the style of <new2>", "A <new1> next to a <new2>."


def digits(args):
    """Problem 1: grids and reverse processes; the table of samplers, steps and guidance scales."""
    yield "p1_infer.py", "--grid", FIGURES / "p1_grid.png", "--trajectory", FIGURES / "p1_reverse.png"
    judge = ["--classifier", args.classifier] if args.classifier else []
    student = "--students", ROOT / "checkpoints/p1_student.pt"
    fid = "--fid-images", 500, "--out", NUMBERS / "p1.json"
    yield "benchmarks/p1.py", "--data", args.data / "digits", *judge, *student, *fid


def faces(args):
    """Problem 2: by eta, and between two noises."""
    noise, unet = args.data / "face/noise", args.data / "face/UNet.pt"
    course = unet.is_file()
    if not course:
        noise, unet = WORK / "noise", ROOT / "checkpoints/p2_faces.pt"
        yield "p2_ddim.py", "--make-noise", noise, "--count", 4, "--size", 64
    eta = ["--eta-grid", FIGURES / "p2_eta.png"]
    for kind in ("slerp", "linear"):
        sheet = ["--interpolate", kind, "--grid", FIGURES / f"p2_{kind}.png"]
        yield "p2_ddim.py", noise, WORK / "faces", unet, *sheet, *eta
        eta = []
    save_json({"course": course}, NUMBERS / "p2_network.json")


def text_to_image(args):
    """Problem 3: zero-shot classification, Textual Inversion, two concepts in one prompt."""
    data, model = (args.data, args.clip) if args.clip else (ROOT / "tiny", TINY_CLIP)
    prompt = [] if args.clip else ["--prompt", "a photo of {object}"]  # the small CLIP knows no full stop
    out = WORK / "answers"
    yield "p3_clip_zeroshot.py", "--data", data / "clip_zeroshot", "--model", model, *prompt, "--out", out
    shutil.copy(out / "examples.png", FIGURES / "p3_zeroshot.png")
    result = json.loads((out / "zeroshot.json").read_text())
    result["answers"] = [a for a in result["answers"] if not a["right"]][:5]
    result["model"] = pathlib.Path(result["model"]).name  # not where it lies on this machine
    save_json({**result, "course": bool(args.clip)}, NUMBERS / "p3_zeroshot.json")
    small = "benchmarks/tiny.py", "--data", args.emoji
    yield (*small, "--picture", FIGURES / "tiny.png", "--out", NUMBERS / "tiny.json")
    inversion = FIGURES / "tiny_inversion.png", "--out", NUMBERS / "tiny_inversion.json"
    yield (*small, "--inversion", TINY, "--picture", *inversion)
    source = (args.data / "textual_inversion/input.json", args.ckpt) if args.ckpt else (TINY, TINY_CKPT)
    yield ("p3_infer.py", source[0], WORK / "multi", source[1], "--prompt", MULTI[bool(args.ckpt)])
    shutil.copy(WORK / "multi/prompt.png", FIGURES / "p3_multi.png")
    save_json({"course": bool(args.ckpt), "prompt": MULTI[bool(args.ckpt)]}, NUMBERS / "p3_multi.json")
    yield "benchmarks/several.py", "--picture", FIGURES / "several.png", "--out", NUMBERS / "several.json"


def adaptation(args):
    """The 2023 edition: DANN's table and t-SNE."""
    modes = ["--mode", "source", "dann", "target"]
    yield "benchmarks/p4.py", "--data", args.data / "digits", *modes, "--out", NUMBERS / "p4.json"
    yield "p4_tsne.py", "--data", args.data / "digits", FIGURES / "p4_tsne.png"


PARTS = {  # what makes a part of the report, and the figures and the numbers that it leaves
    "p1": (digits, "p1_grid_mnistm.png p1_grid_svhn.png p1_reverse.png", "p1.json"),
    "p2": (faces, "p2_eta.png p2_slerp.png p2_slerp.json p2_linear.png p2_linear.json", "p2_network.json"),
    "p3": (
        text_to_image,
        "p3_zeroshot.png tiny.png tiny_inversion.png p3_multi.png several.png",
        "p3_zeroshot.json tiny.json tiny_inversion.json p3_multi.json several.json",
    ),
    "p4": (adaptation, "p4_tsne.png", "p4.json"),
}


def run(command):
    command = [sys.executable, *map(str, command)]
    print("$", " ".join(command[1:]), file=sys.stderr)
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        raise UserError(f"{command[1]}: failed, as said above; without it the report lacks a figure")


@cli
def main(argv=None):
    def path(text):
        return pathlib.Path(text).resolve()  # the commands run in the repository

    parser = Parser(__doc__)
    parser.add_argument("--out", default=str(ROOT / "hw2_report.pdf"))
    parser.add_argument("--remake", nargs="+", choices=list(PARTS), default=[], help="make these anew")
    parser.add_argument("--data", type=path, default=ROOT / "hw2_data", help="the course's data")
    parser.add_argument("--classifier", type=path, help="the course's Classifier.pth (default: ours)")
    parser.add_argument("--emoji", type=path, default=ROOT / "runs/emoji", help="of tools/make_emoji_dataset.py")
    parser.add_argument("--ckpt", type=path, help="sd-v1-4.ckpt, its tokens in embeddings/ (default: ours)")
    clip = {"type": lambda text: path(text) if pathlib.Path(text).is_file() else text}
    parser.add_argument("--clip", **clip, help="ViT-B/32 or its file, for zero-shot (default: the small CLIP)")
    args = parser.parse_args(argv)
    try:
        import typst
    except ModuleNotFoundError:
        raise UserError("the report is typeset by typst; `pip install typst`") from None
    for folder in (pathlib.Path(args.out).absolute().parent, FIGURES, NUMBERS, WORK):
        output_folder(folder)
    for part, (make, figures, numbers) in PARTS.items():
        files = [FIGURES / f for f in figures.split()] + [NUMBERS / f for f in numbers.split()]
        if part in args.remake or not all(f.is_file() for f in files):
            for command in make(args):
                run(command)
    try:
        pdf = typst.compile(str(HERE / "report.typ"), root=str(ROOT))
    except typst.TypstError as e:
        raise UserError(f"report/report.typ: {e}") from None
    with atomic(pathlib.Path(args.out)) as temporary:
        temporary.write_bytes(pdf)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
