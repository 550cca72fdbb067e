"""What all benchmarks share: the project on the path, the line that says what they ran on, processes of their own for
what is measured, and where their table goes."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "stable-diffusion")]

import torch  # noqa: E402

from utils import UserError, output_file  # noqa: E402


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


def peak_memory(device):
    """Most bytes that this process held so far: on the GPU what torch held there, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage's figure is at least what the parent process held, since that is handed down
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_own_process(script, *arguments):
    """What the script says in its last line, JSON, when it runs with these arguments, so that its peak memory is its
    own."""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, arguments[:4]))}: failed with exit code {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


def add_out_option(parser):
    told = "also write the table there: .md or .json"
    parser.add_argument("--out", nargs="+", type=output_file, default=[], metavar="FILE", help=told)


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
