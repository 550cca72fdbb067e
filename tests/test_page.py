"""report/page.py: the graders' numbers are on the page; a real browser shows it, wide and narrow, light and dark."""

import argparse
import importlib.util
import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import digit_classifier
import p3_clip_zeroshot
from classifiers import LeNet
from p3_concepts import read_concepts
from utils import UserError, save_json

pytest.importorskip("jinja2")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "a <new1> & friends"


def load(path):
    """A script outside the path, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page, grader = load(ROOT / "report/page.py"), load(ROOT / "evaluation/grade_hw2_3.py")


def picture(path, width=32, height=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(sum(map(ord, str(path.name))))
    Image.fromarray(rng.randint(0, 256, (height or width, width, 3), dtype=np.uint8)).save(path)


class FakeClip:
    """A clip whose vectors depend on the number of pictures and texts alone."""

    logit_scale = 100

    def vectors(self, n):
        x = torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
        return x / x.norm(dim=1, keepdim=True)

    def images(self, files):
        return self.vectors(len(files))

    def texts(self, texts):
        return self.vectors(len(texts))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A folder as demo.sh leaves it, every JSON written by the code of the graders; moved after the page was made."""
    root = tmp_path_factory.mktemp("page")
    out = root / "output"
    problem_1(out, root)
    problem_2(out)
    problem_3(out, root)
    save_json({"folder": "svhn", "target": "svhn", "mode": "dann", "right": 9, "known": 20}, out / "dann.json")
    for version in range(2):
        csv = root / f"runs/faces/csv/version_{version}/metrics.csv"
        csv.parent.mkdir(parents=True)
        csv.write_text("step,train_loss,val_loss\n19,2.0,\n39,1.0,\n39,,1.5\n")
    page.main([str(out), "--runs", str(root / "runs")])
    return Path(shutil.move(out, root / "moved"))


def problem_1(out, root):
    for domain in ("mnistm", "svhn"):
        for digit in range(10):
            picture(out / domain / f"{digit}_001.png", 28)
        picture(out / f"grid_{domain}.png", 302)
    picture(out / "reverse.png", 350, 118)
    judge = LeNet()
    torch.nn.init.zeros_(judge.fc3.weight)
    judge.fc3.bias.data = torch.eye(10)[4]  # always says 4
    torch.save(judge.state_dict(), root / "judge.pth")
    judges = [f"--checkpoint={root / 'judge.pth'}", f"--svhn-checkpoint={root / 'judge.pth'}"]
    digit_classifier.main([f"--folder={out}", *judges, f"--json={out / 'digits.json'}", "--device=cpu"])


def problem_2(out):
    for i in range(3):
        picture(out / f"face/{i:02d}.png", 64)
    save_json({"errors": {"00": 0.0625, "01": 2, "02": 3}, "mean": 1.6875, "bound": 20.0}, out / "face/errors.json")
    picture(out / "eta.png", 266, 332)
    for kind in ("slerp", "linear"):
        picture(out / f"{kind}.png", 728, 68)
        save_json({"alphas": [0, 0.5, 1], "norms": [1, 0.7, 1], "contrasts": [57, 49, 58]}, out / f"{kind}.json")


def problem_3(out, root):
    task = {"src_image": "dog", "token_name": "<new1>", "prompt": [PROMPT], "prompt_4_clip_eval": ["a dog"]}
    (root / "input.json").write_text(json.dumps({"0": {**task, "baseline": [[-100, 101]]}}))
    for i in range(25):
        picture(out / f"p3/0/0/{i}.png")
    picture(root / "sources/0/dog's first #1.png")
    results = list(grader.grade(read_concepts(root / "input.json"), root / "sources", out / "p3", FakeClip()))
    save_json({"clip": "ViT-B/32", "prompts": results}, out / "p3/scores.json")
    picture(out / "prompt.png", 172)
    names = ["fox", "clock"]
    rows = [{"file": f"{i % 2}_{i}.png", "truth": names[i % 2], "answer": "fox", "probability": 0.5} for i in range(6)]
    rows = [{**row, "right": row["truth"] == row["answer"]} for row in rows]
    for row in rows:
        picture(root / "zero/val" / row["file"])
    asked = argparse.Namespace(data=root / "zero", out=out / "zeroshot", model="ViT-B/32")
    result = p3_clip_zeroshot.summary(rows, asked, ["A photo of {object}."])
    (out / "zeroshot").mkdir()
    save_json({**result, "examples": [row["file"] for row in rows]}, out / "zeroshot/zeroshot.json")


# ------------------------------------------------------------------------ what it says


def test_the_numbers_are_those_of_the_graders(output):
    html = (output / "index.html").read_text()
    scores = json.loads((output / "p3/scores.json").read_text())["prompts"][0]
    assert "<b>10.0&nbsp;%</b> (1 of 10)" in html and html.count("saw <b>4</b>") == 18
    assert "00: 0.0625" in html and "<b>1.6875</b>" in html
    assert f"image <b>{scores['image']:.2f}</b> of -100.00 asked for" in html and "not passed" in html
    assert html.count('<li class="counts">') == 5 == sum(shown["counts"] for shown in scores["pictures"])
    assert "answers <b>50.0&nbsp;%</b> of 6 given pictures rightly, where chance has 50.0&nbsp;%" in html
    assert "read <b>9</b> rightly, 45.0&nbsp;%" in html
    assert "shipped with the project" in html and "<b>faces</b>" in html
    assert "a &lt;new1&gt; &amp; friends" in html and "Run the command again" not in html


def test_the_page_needs_no_script_no_network_and_nothing_outside_its_folder(output):
    html = (output / "index.html").read_text()
    assert "<script" not in html and not re.search(r"""(src|href)=["'](https?:|//|/|\.\.)""", html)
    assert all(alt for alt in re.findall(r'<button[^>]*><img src="[^"]*" alt="([^"]*)"', html))


def test_an_empty_folder_gives_a_page_that_names_the_commands(tmp_path, capsys):
    page.main([str(tmp_path), "--runs", str(tmp_path / "none")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'index.html'}\n"
    html = (tmp_path / "index.html").read_text()
    for command in (
        "p1_infer.py",
        "digit_classifier.py",
        "hw2_2.sh",
        "grade_hw2_3.py",
        "p3_clip_zeroshot.py",
        "hw2_4.sh",
    ):
        assert command in html


def test_pictures_that_were_drawn_after_the_grading_are_told(tmp_path):
    problem_2(tmp_path)
    for path, time in ((tmp_path / "face/errors.json", 1000), *((p, 2000) for p in tmp_path.glob("face/*.png"))):
        os.utime(path, (time, time))
    assert "Run the command again" in page.render(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "file, text, complaint",
    [
        ("face/errors.json", "{", "errors.json: not JSON"),
        ("face/errors.json", "[1]", "face/errors.json is not what the graders write"),
        ("slerp.json", '{"alphas": [0, 1], "norms": [1], "contrasts": [1, 2]}', "linear.json is not what the graders"),
        ("dann.json", '{"folder": "svhn"}', "dann.json is not what the graders write"),
        (
            "dann.json",
            '{"folder": "svhn", "target": "svhn", "mode": "dann", "right": [], "known": 1}',
            "dann.json is not",
        ),
        (
            "dann.json",
            '{"folder": "svhn", "target": "svhn", "mode": "dann", "right": 1, "known": 0}',
            "dann.json is not",
        ),
    ],
)
def test_a_damaged_json_is_one_line(tmp_path, capsys, file, text, complaint):
    problem_2(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(SystemExit) as end:
        page.main([str(tmp_path)])
    told = capsys.readouterr().err
    assert end.value.code == 2 and complaint in told and len(told.splitlines()) == 1
    assert not (tmp_path / "index.html").exists()


def test_a_training_s_csv_with_words_in_it_is_one_line(tmp_path):
    folder = tmp_path / "runs/p1/csv/version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,train_loss\n1,much\n")
    with pytest.raises(UserError, match="metrics.csv: not a csv of numbers"):
        page.trainings(tmp_path / "runs")


# ------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("##### no Chromium here: the page was NOT opened in a browser; apt-get install chromium #####")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, output):
    """open(width, scheme) -> the page, and what its console and network complained of."""
    contexts = []

    def open_page(width, scheme):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        tab, complaints = contexts[-1].new_page(), []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("requestfailed", lambda request: complaints.append(request.url))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
        tab.goto((output / "index.html").as_uri())
        tab.evaluate("for (const image of document.images) image.loading = 'eager'")
        tab.evaluate("Promise.allSettled([...document.images].map(image => image.decode()))")  # a broken one rejects
        return SimpleNamespace(tab=tab, complaints=complaints)

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_every_picture_without_an_error_or_sideways_scrolling(opened, width, scheme):
    shown = opened(width, scheme)
    widths = shown.tab.evaluate("[...document.images].map(image => [image.src, image.naturalWidth])")
    assert len(widths) > 100 and [src for src, natural in widths if not natural] == []
    assert shown.complaints == []
    assert shown.tab.evaluate("document.documentElement.scrollWidth") <= width
    pixels = np.asarray(Image.open(io.BytesIO(shown.tab.screenshot(full_page=True))).convert("L")).astype(float)
    assert pixels.shape[1] == width and pixels.std() > 20
    assert np.median(pixels) < 60 if scheme == "dark" else np.median(pixels) > 200


def test_a_picture_enlarges_pixelated_and_closes_again(opened):
    tab = opened(400, "light").tab
    first = tab.locator("#p1 button.picture").first
    small = first.locator("img").bounding_box()["width"]
    first.click()
    large = tab.locator(":popover-open img")
    assert large.is_visible() and large.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    digit = tab.locator("#p1 .many button.picture").first
    large.click()
    assert tab.locator(":popover-open").count() == 0 and small > 100
    digit.click()
    assert tab.locator(":popover-open img").bounding_box()["width"] > 4 * digit.bounding_box()["width"]
