"""What all benchmarks share: the line that says what they ran on, and where their table goes."""

from __future__ import annotations

import json
import pathlib
import platform
import time

import torch


def describe_machine(device, threads=None):
    """Date, GPU or CPU with its threads, and torch's version; `device` a torch.device, `threads` torch's by default."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    name = f"{cpu}, {threads or torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}"


def add_out_option(parser):
    parser.add_argument("--out", nargs="+", default=[], metavar="FILE", help="also write the table there: .md or .json")


def save_table(lines, paths):
    """Writes a Markdown table, `lines` = [what it was measured on, "", columns, rule, rows ...], to each of `paths`.

    A path that ends in .json gets {"measured": text, "rows": [{column: cell}]}, the cells as they are printed, so no
    two columns may have the same name.
    """
    names = [name.strip() for name in lines[2].strip("|").split("|")]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns of one name: {lines[2]}")
    for path in map(pathlib.Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        columns, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]
        content = {"measured": lines[0], "rows": [dict(zip(columns, row)) for row in rows]}
        text = json.dumps(content, indent=1) if path.suffix == ".json" else "\n".join(lines)
        path.write_text(text + "\n")
        print(f"wrote {path}")
