"""benchmarks/p4.py: which trainings a row of its table starts."""

import argparse
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import p4  # noqa: E402

from utils import UserError, save_checkpoint  # noqa: E402


@pytest.fixture
def asked(monkeypatch):
    """The command lines of p4_train.py that were started; each leaves what a training of 6 steps does."""
    lines = []

    def run(command, **_):
        lines.append(command[2:])
        out = pathlib.Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        for name in ("best.pt", "last.pt"):
            save_checkpoint({"step": 6, "config": {"steps": 6}}, out / name)
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return lines


def options(tmp_path):
    return argparse.Namespace(runs=str(tmp_path), data="d", device="cpu", options=["--steps", "6"])


def test_what_refines_is_trained_after_what_it_starts_from_and_neither_twice(asked, tmp_path):
    for mode in ("refined", "entropy"):
        p4.trained(options(tmp_path), "svhn", mode, 1)
    outs = [line[line.index("--out") + 1] for line in asked]
    assert outs == [str(tmp_path / f"svhn_{mode}_1") for mode in ("dann", "refined", "entropy")]
    assert "--refine" not in asked[0]
    for line in asked[1:]:
        assert line[line.index("--start") + 1] == str(tmp_path / "svhn_dann_1/best.pt")
    assert all(line[line.index("--steps") + 1] == "6" and line[line.index("--seed") + 1] == "1" for line in asked)


def test_a_training_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: argparse.Namespace(returncode=1))
    with pytest.raises(UserError, match="usps_source_0: its training stopped"):
        p4.trained(options(tmp_path), "usps", "source", 0)


def test_a_mean_is_told_with_what_it_is_of():
    assert p4.spread([0.5, 0.75]) == "62.5 (50.0, 75.0)" and p4.spread([0.5]) == "50.0"
