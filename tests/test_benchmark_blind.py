"""benchmarks/blind.py: sheets of pictures that tell nothing, and the count of what raters answer."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

pytest.importorskip("pytorch_lightning", reason="p2_train.py needs requirements-dev")
sys.path.insert(0, str(ROOT / "benchmarks"))

from blind import EDGE, main  # noqa: E402

from tiny import write_pairs  # noqa: E402


@pytest.fixture
def sheets(tmp_path, monkeypatch):
    """Sheets of ten black and ten white pictures, and their key."""
    monkeypatch.chdir(tmp_path)
    for folder, grey in (("black", 0), ("white", 250)):
        (tmp_path / folder).mkdir()
        for i in range(12):
            Image.new("RGB", (20, 30), (grey,) * 3).save(tmp_path / folder / f"{i}.png")
    main(["blind", "--pictures", "black", "white", "black", "--count", "12", "--size", "16"])  # three, to be replaced
    main(["blind", "--pictures", "black", "white", "--count", "10", "--size", "16"])
    return json.loads((tmp_path / "blind" / "key.json").read_text())


def test_the_key_says_which_picture_stands_where(sheets, tmp_path):
    pages = [np.asarray(Image.open(tmp_path / "blind" / f"sheet_{n}.png")) for n in (1, 2)]
    assert len(list((tmp_path / "blind").glob("*"))) == 3
    assert pages[0].shape == (4 * (256 + EDGE), 1024, 3) and pages[1].shape == (256 + EDGE, 1024, 3)
    middles = [
        page[EDGE + 128 + (256 + EDGE) * row, 128 + 256 * column, 0]
        for page in pages
        for row in range(len(page) // (256 + EDGE))
        for column in range(4)
    ]
    assert ["black" if grey == 0 else "white" for grey in middles] == [entry["folder"] for entry in sheets]
    assert len({(entry["folder"], entry["picture"]) for entry in sheets}) == 20


def test_pairs_are_shown_under_their_captions(tmp_path):
    captions = ["a fork, in the style of Noto", "a woman in lotus position, in the style of EmojiOne of 2013"]
    real, made = (torch.full((2, 3, 64, 64), grey, dtype=torch.uint8) for grey in (0, 200))
    write_pairs(captions, real, made, tmp_path)
    edges = []
    for names in ([], ["--names"]):
        main([str(tmp_path), "--count", "2", *names, "--pictures", str(tmp_path / "real"), str(tmp_path / "ours")])
        edges.append((np.asarray(Image.open(tmp_path / "sheet_1.png"))[:EDGE] < 128).any((0, 2)).reshape(4, -1))
    widths = [[row.nonzero()[0].max() for row in edge] for edge in edges]
    key = json.loads((tmp_path / "key.json").read_text())
    assert sorted(entry["picture"] for entry in key) == sorted([f"{caption}.png" for caption in captions] * 2)
    assert max(widths[0]) < 20 and all(100 < width < 256 for width in widths[1])


def test_counts_are_of_each_rater_and_of_more_than_half(sheets, tmp_path, capsys):
    black = [i for i, entry in enumerate(sheets, 1) if entry["folder"] == "black"]
    white = [i for i, entry in enumerate(sheets, 1) if entry["folder"] == "white"]
    for name, wrong in {"a": black[:4] + white[:1], "b": black[2:5], "c": []}.items():
        (tmp_path / name).write_text(" ".join(map(str, wrong)).replace(" ", ", ", 1))
    main(["blind", "--answers", "a", "b", "c", "--out", "t.json"])
    rows = {row.pop("pictures"): row for row in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert rows["black"] == {"of": "10", "a": "4", "b": "3", "c": "0", "by more than half": "2"}
    assert rows["white"] == {"of": "10", "a": "1", "b": "0", "c": "0", "by more than half": "0"}
    assert "| black | 10 | 4 | 3 | 0 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["21", "0", "3 x", "²"])
def test_an_answer_that_names_no_picture_is_refused(sheets, tmp_path, capsys, answer):
    (tmp_path / "a").write_text(answer)
    with pytest.raises(SystemExit, match="2"):
        main(["blind", "--answers", "a"])
    assert "a: give the numbers of pictures, 1 to 20" in capsys.readouterr().err


@pytest.mark.parametrize("key", ['{"folder": 3}', '[{"folder": []}]', "[1]", "[]"])
def test_a_key_of_something_else_is_refused(tmp_path, capsys, key):
    (tmp_path / "key.json").write_text(key)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--answers", "a"])
    assert "key.json: no key of --pictures" in capsys.readouterr().err
