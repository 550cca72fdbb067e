"""Puts the repository root on the path, keeps small tensors on one thread, and runs the scripts."""

import contextlib
import importlib
import inspect
import io
import os
import pathlib
import subprocess
import sys
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def script(name, *arguments, code=0, cwd=None, apart=False):
    """Runs a script of the repository: a .sh by bash, a .py by its main() in this process, which saves importing torch
    anew, or `apart` in its own. Checks the exit code; gives returncode, stdout and stderr."""
    arguments, before = list(map(str, arguments)), os.getcwd()
    if name.endswith(".sh") or apart:
        command = ["bash" if name.endswith(".sh") else sys.executable, ROOT / name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=cwd)
    else:
        out, err, main = io.StringIO(), io.StringIO(), importlib.import_module(name[: -len(".py")]).main
        try:
            os.chdir(cwd or before)
            with mock.patch.object(sys, "argv", [name, *arguments]):
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    ended = main(*[arguments] * len(inspect.signature(main).parameters))
        except SystemExit as e:
            ended = e.code
        finally:
            os.chdir(before)
        done = subprocess.CompletedProcess([name, *arguments], ended or 0, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stderr
    return done
