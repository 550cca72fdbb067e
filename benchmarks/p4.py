"""Adaptation in one table: accuracy on the target's validation images by scenario, training and seed.

    python3 benchmarks/p4.py --data hw2_data/digits --runs runs/p4 --out table.md
    python3 benchmarks/p4.py --target svhn --mode dann --seeds 0 -- --adversary 0.5 --steps 3000

Trains with p4_train.py what is not finished in --runs (an interrupted run goes on where it stopped), then prints the
mean and each of the seeds. What follows "--" goes to every training; take other --runs for it, since a finished
run is not trained again; minutes of a refined network are those after DANN's. "score" is p4_losses.label_free_score, by
which trainings are chosen. Accuracies are those of best.pt, chosen without target labels (p4_train.py says how), and in
brackets the mean of the last epoch's.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys

from table import ROOT, add_out_option, describe_machine, save_table

from p4_losses import label_free_score
from p4_model import SCENARIOS
from utils import SEED, Parser, UserError, cli, load_checkpoint, output_folder, pick_device

TARGETS = {target: f"MNIST-M to {target.upper()}" for target in SCENARIOS}
PLAIN = " without augmentation"
MODES = {  # name: (title, options of p4_train.py); what --refine starts from is "dann", or "dann-plain" if plain
    "source": ("source only", ["--mode", "source"]),
    "dann": ("DANN", ["--mode", "dann"]),
    "refined": ("DANN, then self-training (`--refine`)", ["--refine"]),
    "entropy": ("DANN, then entropy", ["--refine", "entropy"]),
    "mixup": ("DANN, then entropy and virtual mixup", ["--refine", "entropy", "mixup"]),
    "vat": ("DANN, then entropy and virtual adversarial training", ["--refine", "entropy", "vat"]),
    "vada": ("DANN, then all three (VADA + VMT)", ["--refine", "entropy", "vat", "mixup"]),
    "all": ("DANN, then all three and self-training", ["--refine", "self-training", "entropy", "vat", "mixup"]),
    "source-plain": ("source only" + PLAIN, ["--mode", "source", "--plain"]),
    "dann-plain": ("DANN" + PLAIN, ["--mode", "dann", "--plain"]),
    "refined-plain": ("DANN, then self-training," + PLAIN, ["--refine", "--plain"]),
    "target": ("target only", ["--mode", "target"]),
}


def trained(args, target, mode, seed):
    """(best.pt, last.pt) of a run, after training it where it is not finished; raises UserError if that fails."""
    out = pathlib.Path(args.runs) / f"{target}_{mode}_{seed}"
    if not finished(out):
        command = [sys.executable, str(ROOT / "p4_train.py"), "--data", args.data, "--out", str(out)]
        command += ["--target", target, *MODES[mode][1], "--seed", str(seed), "--device", str(args.device)]
        command += args.options
        if "--refine" in command:
            start = "dann-plain" if "--plain" in command else "dann"
            trained(args, target, start, seed)
            command += ["--start", str(pathlib.Path(args.runs) / f"{target}_{start}_{seed}" / "best.pt")]
        print(f"training {out}", file=sys.stderr)
        if subprocess.run(command, stdout=sys.stderr).returncode or not finished(out):
            raise UserError(f"{out}: its training stopped, as said above; the same command goes on from there")
    return load_checkpoint(out / "best.pt"), load_checkpoint(out / "last.pt")


def finished(out):
    """Whether the run's last.pt is of its last step."""
    last = load_checkpoint(out / "last.pt") if (out / "last.pt").is_file() else {"step": None, "config": {"steps": 0}}
    return last["step"] == last["config"]["steps"]


def spread(values):
    """ "mean (each)" of fractions, in percent."""
    percent = [100 * v for v in values]
    mean = f"{statistics.mean(percent):.1f}"
    return mean if len(percent) == 1 else f"{mean} ({', '.join(f'{p:.1f}' for p in percent)})"


def row(args, mode):
    """A line of the table: for each scenario accuracy, that of the last epoch, label-free score, minutes of a run."""
    cells = []
    for target in args.target:
        runs = [trained(args, target, mode, seed) for seed in args.seeds]
        best, last = ([run[i]["metrics"] for run in runs] for i in (0, 1))
        scores = [label_free_score(m["labelled_accuracy"], m["mutual_information"]) for m in best]
        accuracy = spread([m["target_accuracy"] for m in best])
        cells.append(f"{accuracy} [{100 * statistics.mean(m['target_accuracy'] for m in last):.1f}]")
        # of "target" there is no score: its labelled images are the target's
        cells.append("-" if mode == "target" else f"{statistics.mean(scores):.3f}")
        cells.append(f"{statistics.mean(m['seconds'] for m in last) / 60:.1f}")
    return f"| {MODES[mode][0]} | {' | '.join(cells)} |"


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="hw2_data/digits")
    option("--runs", default="runs/p4", help="folder of the runs, {target}_{mode}_{seed} (default: runs/p4)")
    option("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    rows = ["source", "dann", "refined", "target"]
    option("--mode", nargs="+", choices=list(MODES), default=rows, help=f"rows (default: {' '.join(rows)})")
    option("--seeds", nargs="+", type=SEED, default=[0, 1, 2])
    option("--device", type=pick_device, default="auto")
    add_out_option(parser)
    option("options", nargs="*", metavar="-- OPTIONS", help="for p4_train.py")
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args = parse(argv)
    output_folder(args.runs)
    titles = [t for s in args.target for t in (f"{TARGETS[s]}, %", f"score, {s.upper()}", f"minutes, {s.upper()}")]
    options = f", {' '.join(args.options)}" if args.options else ""
    lines = [
        f"{describe_machine(args.device)}; {len(args.seeds)} seeds{options}",
        "",
        f"| training | {' | '.join(titles)} |",
        "|---" * (1 + len(titles)) + "|",
    ]
    print("\n".join(lines))
    for mode in args.mode:
        lines.append(row(args, mode))
        print(lines[-1], flush=True)
    save_table(lines, args.out)


if __name__ == "__main__":
    main()
