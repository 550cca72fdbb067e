"""hw2_download_ckpt.sh, with the tools of Linux and with those of macOS."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import zipfile

import pytest
from conftest import ROOT

LINUX, MACOS = ["sha256sum", "wget"], ["shasum", "curl"]
EVERYWHERE = "bash cat cut dirname basename mkdir mv rm git perl sed".split()


@pytest.fixture(params=[LINUX, MACOS], ids=["linux", "macos"])
def script(request, tmp_path):
    """Runs a copy of the script whose one checkpoint is missing, but to be had from a folder of another place."""
    missing = [tool for tool in request.param if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"this machine has no {missing[0]}")
    here, there, tools = (tmp_path / name for name in ("here", "there", "tools"))
    (here / "checkpoints").mkdir(parents=True)
    there.mkdir()
    tools.mkdir()
    for tool in [*EVERYWHERE, *request.param]:
        (tools / tool).symlink_to(shutil.which(tool))
    shutil.copy(ROOT / "hw2_download_ckpt.sh", here)
    (there / "net.pt").write_bytes(b"weights")
    (here / "checkpoints/SHA256SUMS").write_text(f"{hashlib.sha256(b'weights').hexdigest()}  net.pt\n")

    def run(server):
        env = {**os.environ, "PATH": str(tools), "HW2_CKPT_URL": server, "no_proxy": "127.0.0.1"}
        command = [shutil.which("bash"), here / "hw2_download_ckpt.sh"]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    run.here, run.there = here, there
    return run


@pytest.fixture
def server(tmp_path):
    """Address of a server of tmp_path/there."""
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "there"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def files(folder):
    return sorted(p.name for p in pathlib.Path(folder).iterdir())


def test_what_is_missing_is_fetched_and_checked(script, server):
    done = script(server)
    assert done.returncode == 0, done.stderr
    assert (script.here / "checkpoints/net.pt").read_bytes() == b"weights"
    again = script("http://127.0.0.1:9")
    assert again.returncode == 0 and "checkpoints/net.pt: ok" in again.stdout


def test_what_has_another_sum_is_not_kept(script, server):
    (script.there / "net.pt").write_bytes(b"other")
    done = script(server)
    assert done.returncode == 2 and "its sha256 differs" in done.stderr
    assert files(script.here / "checkpoints") == ["SHA256SUMS"]


GDOWN = """#!/bin/sh
cp "$HW2_ZIP" "$3"
"""


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_the_course_s_data_is_there_whole_or_asked_for_again(tmp_path, damaged):
    """get_dataset.sh, with the course's drive in a file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gdown").write_text(GDOWN)
    (tools / "gdown").chmod(0o755)
    with zipfile.ZipFile(tmp_path / "course.zip", "w") as z:
        for name in ("digits/svhn/train.csv", "face/noise/00.pt"):
            z.writestr(f"hw2_data/{name}", name)
    if damaged:
        (tmp_path / "course.zip").write_bytes((tmp_path / "course.zip").read_bytes()[:-30])
    shutil.copy(ROOT / "get_dataset.sh", tmp_path)
    (tmp_path / "hw2_data/face").mkdir(parents=True)
    (tmp_path / "hw2_data/face/mine.png").touch()
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "HW2_ZIP": str(tmp_path / "course.zip")}
    for _ in range(2):  # the second time it has nothing to do, or as much to do
        done = subprocess.run(["bash", tmp_path / "get_dataset.sh"], capture_output=True, text=True, env=env)
        assert done.returncode == 2 * damaged
        assert ("cannot be unpacked" in done.stderr) == damaged == (not (tmp_path / "hw2_data/digits").is_dir())
    assert files(tmp_path / "hw2_data/face") == ["mine.png"] + ["noise"] * (not damaged)
    assert damaged or (tmp_path / "hw2_data/digits/svhn/train.csv").read_text() == "digits/svhn/train.csv"
    assert files(tmp_path) == ["course.zip", "get_dataset.sh", "hw2_data", "tools"]
