"""tools/make_emoji_dataset.py, on tiny packages that are made here: names, pictures, splits, and what it refuses."""

import hashlib
import io
import json
import pathlib
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
pytest.importorskip("resvg_py", reason="drawing SVG needs resvg-py")

import make_emoji_dataset as tool  # noqa: E402

from p3_concepts import image_files, read_concepts  # noqa: E402

NAMES = ["dog-face", "dog", "cat-face", "cat", "house", "grapes", "red-heart", "man-teacher"]
FIREFOX = ["dog", "dogside", "cat", "catside", "housebuilding", "grapes", "hearts"]


def colour(text):
    return tuple(hashlib.sha256(text.encode()).digest()[:3])


def icon(text):
    """A block on nothing; those of glyph sets have the colour that nobody named, and differ in size alone."""
    glyph = text.startswith(("emojione-monotone", "fluent-emoji-high"))
    fill = "currentColor" if glyph else "rgb({},{},{})".format(*colour(text))
    width, height, _ = (12 + c / 64 for c in colour(text))
    return {"body": f'<rect x="8" y="8" width="{width}" height="{height}" fill="{fill}"/>'}


def contents():
    """{package name: icons.json}, in the layout of the real ones."""
    prefixes = [spec.split("@")[0] for spec in tool.SETS.values()]
    return {
        prefix: {
            "prefix": prefix,
            "icons": {n: icon(f"{prefix} {n}") for n in (FIREFOX if prefix == "fxemoji" else NAMES)},
            "width": 32,
            "height": 32,
        }
        for prefix in prefixes
    }


def publish(folder, packages):
    """A folder with the packages' archives, called as `npm pack` calls them."""
    folder.mkdir(exist_ok=True)
    for spec in tool.SETS.values():
        prefix = spec.split("@")[0]
        info = {
            "name": prefix.title(),
            "author": {"name": f"Maker of {prefix}", "url": "https://example.org"},
            "license": {"title": "CC BY 4.0", "url": "https://example.org/by"},
        }
        with tarfile.open(folder / f"iconify-json-{spec.replace('@', '-')}.tgz", "w:gz") as tar:
            for name, content in (("icons", packages[prefix]), ("info", info)):
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"package/{name}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def make(dest, source, *more):
    tool.main([str(dest), "--source", str(source), *map(str, more)])
    with np.load(dest / "emoji.npz") as arrays:
        return dict(arrays), json.loads((dest / "emoji.json").read_text(encoding="utf-8"))


def pictures_of(arrays, info):
    """{(phrase, set): (image, split)}."""
    return {
        (info["subjects"][s]["phrase"], info["vendors"][v]["name"]): (image, info["splits"][split])
        for image, s, v, split in zip(*(arrays[k] for k in ("images", "subject", "vendor", "split")))
    }


def error_line(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(a) for a in args])
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and not any("Trace" in bar for bar in bars)
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(dest, concepts, arrays, info) of one run on the packages of contents()."""
    folder = tmp_path_factory.mktemp("emoji")
    source = publish(folder / "packages", contents())
    return (folder, folder / "concepts", *make(folder / "out", source, "--concepts", folder / "concepts"))


def test_each_picture_is_its_subject_in_its_set(made):
    pictures = pictures_of(*made[2:])
    assert len(pictures) == len(made[2]["images"])
    assert tuple(pictures["a cat face", "Noto"][0][32, 32]) == colour("noto cat-face")
    assert tuple(pictures["a cat face", "Firefox"][0][32, 32]) == colour("fxemoji cat")  # there a cat is its face,
    assert tuple(pictures["a cat", "Firefox"][0][32, 32]) == colour("fxemoji catside")
    assert tuple(pictures["a cat", "Twemoji"][0][32, 32]) == colour("twemoji cat")  # elsewhere the whole
    assert tuple(pictures["a house", "Firefox"][0][32, 32]) == colour("fxemoji housebuilding")
    assert not any("teacher" in phrase for phrase, _ in pictures)


def test_pictures_are_on_white_and_glyphs_black(made):
    images = made[2]["images"]
    assert images.shape[1:] == (64, 64, 3) and images.dtype == np.uint8
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    glyph = pictures_of(*made[2:])["a dog face", "EmojiOne glyphs"][0]
    assert (glyph[32, 32] == 0).all() and (glyph[12, 32] == 255).all()


def test_captions_have_articles(made):
    info = made[3]
    said = {info["caption"].format(subject=phrase, vendor=v) for phrase, v in pictures_of(*made[2:])}
    assert {"a dog face, in the style of Noto blobs", "grapes, in the style of old EmojiOne"} <= said


def test_transparency_becomes_white_in_proportion():
    half = {"width": 4, "height": 4, "body": '<path d="M0 0h4v4h-4z" fill="#000" fill-opacity="0.5"/>'}
    assert abs(int(tool.render(half)[32, 32, 0]) - 127) <= 1


def test_an_icon_that_is_not_square_is_centred():
    pixels = tool.render({"width": 8, "height": 4, "left": 2, "body": '<path d="M2 0h8v4h-8z" fill="red"/>'})
    assert (pixels[[0, 15, 48, 63]] == 255).all() and (pixels[20:44] == (255, 0, 0)).all()


def test_an_icon_may_have_a_size_of_its_own(tmp_path):
    packages = contents()
    packages["twemoji"]["icons"]["cat"] = {"body": '<path d="M0 0h64v64h-64z" fill="red"/>', "width": 64, "height": 64}
    pictures = pictures_of(*make(tmp_path / "out", publish(tmp_path / "packages", packages)))
    assert (pictures["a cat", "Twemoji"][0] == (255, 0, 0)).all()


def test_a_drawing_is_taken_once(tmp_path):
    packages = contents()
    packages["twemoji"]["icons"]["cat"] = packages["noto"]["icons"]["grapes"]
    pictures = pictures_of(*make(tmp_path / "out", publish(tmp_path / "packages", packages)))
    assert ("a cat", "Twemoji") not in pictures and ("grapes", "Noto") in pictures


def test_dogs_and_glyphs_are_never_trained_on(made):
    for (phrase, vendor), (_, split) in pictures_of(*made[2:]).items():
        if "dog" in phrase:
            assert split == "subject"
        else:
            assert (split == "style") == (vendor in tool.GLYPHS) and split != "subject"


def test_new2_has_the_style_that_the_benchmark_reads(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tiny = pytest.importorskip("tiny", reason="benchmarks/tiny.py needs requirements-dev.txt")
    assert {style for _, style in tool.NEW2} == {tiny.NEW2} and tiny.NEW2 in tool.GLYPHS


def test_every_dog_of_the_table_is_held_back_and_no_other_caption_says_the_word():
    table = json.loads((ROOT / "tools" / "emoji_subjects.json").read_text(encoding="utf-8"))
    dogs = {code for code, words in table.items() if "dog" in words[0] or "poodle" in words[0]}
    assert dogs == set(tool.DOGS) <= set(tool.HELD_BACK) <= set(table)


def test_no_phrase_and_no_name_of_the_table_stands_for_two_subjects():
    table = json.loads((ROOT / "tools" / "emoji_subjects.json").read_text(encoding="utf-8"))
    names = [n for words in table.values() for n in words[1:] if not n.endswith(":-")]
    assert len({words[0] for words in table.values()}) == len(table) and len(set(names)) == len(names)


@pytest.mark.parametrize("names, found", [(["a", "b"], "a"), (["a", "x:b"], "b"), (["a", "x:-"], None), (["c"], None)])
def test_a_set_may_have_a_name_of_its_own_for_a_subject_or_none(names, found):
    icon = tool.icon_of(
        {"prefix": "x", "icons": {"a": {"body": "a"}, "b": {"body": "b"}}, "width": 1, "height": 1}, names
    )
    assert found == (icon and icon["body"])


def test_one_in_twenty_coloured_pairs_validates_and_its_subject_is_seen_in_other_sets():
    sets = list(tool.SETS)
    rows = [[tool.split_of(f"{0xF0000 + i:x}", v, sets) for v in sets] for i in range(2000)]  # no held-back code
    assert all(row.count("val") <= 1 and row[-2:] == ["style", "style"] for row in rows)
    held = np.array([[split == "val" for split in row[:-2]] for row in rows])  # [2000, 10 coloured sets]
    assert held.mean() == pytest.approx(0.05, abs=0.006)
    assert held.mean(0) == pytest.approx(np.full(10, 0.05), abs=0.015)


def test_a_subject_of_one_set_is_not_validated():
    assert {tool.split_of(f"{i:x}", "Noto", ["Noto", *tool.GLYPHS]) for i in range(100)} == {"train"}


def test_another_set_of_subjects_moves_no_picture_to_another_split(tmp_path, made):
    packages = contents()
    for content in packages.values():
        content["icons"].pop("grapes")
        content["icons"] = dict(reversed(list(content["icons"].items())))
    fewer = pictures_of(*make(tmp_path / "out", publish(tmp_path / "packages", packages)))
    more = pictures_of(*made[2:])
    assert len(more) == len(fewer) + 12
    assert all(more[key][1] == split for key, (_, split) in fewer.items())


def test_the_pictures_of_both_concepts_are_written_captioned_and_attributed(made):
    _, folder, arrays, info = made
    text, pictures = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8"), pictures_of(arrays, info)
    captions = json.loads((folder / "captions.json").read_text())
    assert {k: list(c) for k, c in captions.items()} == {k: [p.name for p in image_files(folder / k)] for k in "01"}
    assert captions["0"]["01.png"] == "a {}, in the style of Noto blobs"
    assert captions["1"] == {"00.png": "a house, in the style of {}"}
    assert (np.asarray(Image.open(folder / "0" / "01.png")) == pictures["a dog face", "Noto blobs"][0]).all()
    assert all(f"| {k}/{name} | " in text for k, names in captions.items() for name in names)
    assert all(v["credit"] in text and v["licence"] in text and v["package"] in text for v in info["vendors"])
    assert {p.name for p in (folder / "licences").iterdir()} >= {"Apache-2.0.txt", "MIT.txt", "CC-BY-SA-4.0.txt"}


def test_the_shipped_pictures_and_json_fit_together():
    folder = ROOT / "tiny" / "textual_inversion"
    text = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for concept in read_concepts(folder / "input.json"):
        files = image_files(folder / concept.key)
        assert len(files) >= 4 and len(concept.prompts) >= 2
        assert all(concept.token in p for p in concept.prompts)
        assert not any("<" in p for p in concept.eval_prompts)
        for path in files:
            assert Image.open(path).size == (64, 64)
            assert f"| {concept.key}/{path.name} |" in text


def test_a_damaged_package_is_named_and_nothing_is_written(tmp_path, capsys):
    folder = publish(tmp_path / "packages", contents())
    path = folder / "iconify-json-twemoji-1.2.5.tgz"
    path.write_bytes(path.read_bytes()[:200])
    assert f"{path}: not a readable package" in error_line(capsys, tmp_path / "out", "--source", folder)
    assert not (tmp_path / "out" / "emoji.npz").exists()


def test_an_icon_that_is_no_svg_is_named(tmp_path, capsys):
    packages = contents()
    packages["noto"]["icons"]["cat"] = {"body": "<path"}
    line = error_line(capsys, tmp_path / "out", "--source", publish(tmp_path / "packages", packages))
    assert "@iconify-json/noto@1.2.9: a cat cannot be drawn" in line


def test_without_resvg_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    line = error_line(capsys, tmp_path / "out", "--source", publish(tmp_path / "packages", contents()))
    assert "pip install resvg-py" in line


def npm(folder, script):
    """A program `npm` in a folder for PATH."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_what_is_missing_comes_by_npm_and_is_kept(tmp_path, monkeypatch):
    there = publish(tmp_path / "packages", contents())
    name = '$(echo "$2" | sed "s/^@//; s,/,-,; s/@/-/").tgz'  # npm pack SPEC ... --pack-destination DIR
    script = f'echo "$2" >> {tmp_path}/asked\nfor place; do :; done\ncp {there}/{name} "$place"'
    monkeypatch.setenv("PATH", npm(tmp_path / "bin", script))
    tool.main([str(tmp_path / "out")])
    (tmp_path / "out" / "packages" / "iconify-json-noto-1.2.9.tgz").unlink()
    tool.main([str(tmp_path / "out")])
    specs = [f"@iconify-json/{spec}" for spec in tool.SETS.values()]
    assert (tmp_path / "asked").read_text().split() == [*specs, "@iconify-json/noto@1.2.9"]


@pytest.mark.parametrize("script, reason", [("echo npm error code ENOTFOUND >&2; exit 1", "ENOTFOUND"), (None, "npm")])
def test_offline_the_remedy_is_one_line(script, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", npm(tmp_path / "bin", script) if script else str(tmp_path))
    line = error_line(capsys, tmp_path / "out")
    assert "npm pack @iconify-json/noto@1.2.9" in line and reason in line and "--source" in line
    assert list((tmp_path / "out" / "packages").iterdir()) == []


def test_a_source_that_is_no_folder_is_named(tmp_path, capsys):
    assert "/nowhere: no such folder" in error_line(capsys, tmp_path / "out", "--source", "/nowhere")
