"""tools/make_emoji_dataset.py, on small packages that are built here: names, splits, pictures, and what it refuses."""

import base64
import hashlib
import io
import json
import pathlib
import re
import sys
import tarfile
import urllib.error

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import make_emoji_dataset as tool  # noqa: E402

from p3_concepts import image_files, read_concepts  # noqa: E402

NAMES = {  # code: (Unicode's name, CLDR's name, category, subcategory)
    "1F436": ("DOG FACE", "dog face", "Animals & Nature", "animal-mammal"),
    "1F98A": ("FOX FACE", "fox", "Animals & Nature", "animal-mammal"),
    "1F40E": ("HORSE", "horse", "Animals & Nature", "animal-mammal"),
    "1F3E0": ("HOUSE BUILDING", "house", "Travel & Places", "place-building"),
    "1F33B": ("SUNFLOWER", "sunflower", "Animals & Nature", "plant-flower"),
    "1F354": ("HAMBURGER", "hamburger", "Food & Drink", "food-prepared"),
    "1F916": ("ROBOT FACE", "robot", "Smileys & Emotion", "face-costume"),
    "1F6B2": ("BICYCLE", "bicycle", "Travel & Places", "transport-ground"),
    "1F347": ("GRAPES", "grapes", "Food & Drink", "food-fruit"),
    "2764-FE0F": ("HEAVY BLACK HEART", "red heart", "Smileys & Emotion", "heart"),
    "1F9D1-200D-1F3EB": ("TEACHER", "teacher", "People & Body", "person-role"),
    "1F468-200D-1F3EB": ("MALE TEACHER", "man teacher", "People & Body", "person-role"),
    "1F1EF-1F1F5": ("JAPAN FLAG", "flag: Japan", "Flags", "country-flag"),
}


def colour(text):
    return tuple(hashlib.sha256(text.encode()).digest()[:3])


def bitmap(text, kind):
    """A square of one colour on nothing, as a picture file."""
    image = Image.new("RGBA", (64, 64))
    image.paste(colour(text), (16, 16, 48, 48))
    data = io.BytesIO()
    image.save(data, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return data.getvalue()


def vector(text):
    return b'<svg viewBox="0 0 4 4"><rect x="1" y="1" width="2" height="2" fill="#%02x%02x%02x"/></svg>' % colour(text)


def contents(names=NAMES):
    """{package: {member: bytes}}, in the layouts of the real ones."""
    emoji = [{"unified": c, "name": n, "category": g, "subcategory": s} for c, (n, _, g, s) in names.items()]
    cldr = [{"hexcode": tool.code_of(c), "annotation": a} for c, (_, a, _, _) in names.items()]
    files = {package: {} for package in tool.PACKAGES}
    files["emoji-datasource-google"]["package/emoji.json"] = json.dumps(emoji).encode()
    files["openmoji"]["package/data/openmoji.json"] = json.dumps(cldr).encode()
    files["openmoji"]["package/LICENSE.txt"] = b"Attribution-ShareAlike 4.0 International"
    for code in names:
        low, bare = code.lower(), tool.code_of(code)
        files["emoji-datasource-google"][f"package/img/google/64/{low}.png"] = bitmap(f"{code} Noto", "PNG")
        files["emoji-datasource-twitter"][f"package/img/twitter/64/{low}.png"] = bitmap(f"{code} Twemoji", "PNG")
        files["openmoji"][f"package/color/svg/{bare}.svg"] = vector(f"{code} OpenMoji")
        files["openmoji"][f"package/black/svg/{bare}.svg"] = vector(f"{code} line")
        files["@lobehub/fluent-emoji-3d"][f"package/assets/{low}.webp"] = bitmap(f"{code} 3D", "WEBP")
        files["@lobehub/fluent-emoji-flat"][f"package/assets/{low}.svg"] = vector(f"{code} flat")
    return files


def tarball(members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """publish(contents()) writes tarballs to tmp_path/source and makes them the pinned ones."""

    def write(files):
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        pinned = {}
        for package, members in files.items():
            data = tarball(members)
            pinned[package] = ("1.0.0", "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode())
            (folder / f"{package.lstrip('@').replace('/', '-')}-1.0.0.tgz").write_bytes(data)
        monkeypatch.setattr(tool, "PACKAGES", pinned)
        return folder

    def draw(data, side):  # the square of vector(), without resvg-py
        image = Image.new("RGBA", (side, side))
        fill = re.search(rb'fill="#(\w{6})"', data).group(1).decode()
        image.paste(tuple(bytes.fromhex(fill)), (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
        return image

    monkeypatch.setattr(tool, "render_svg", draw)
    return write


def make(dest, *options):
    tool.main([str(dest), *map(str, options)])
    with np.load(dest / "emoji.npz") as arrays:
        return dict(arrays), json.loads((dest / "emoji.json").read_text(encoding="utf-8"))


def error_line(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        tool.main([str(a) for a in args])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# ------------------------------------------------------------------------ names and subjects


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dog face", "a dog face"),
        ("otter", "an otter"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("x-ray", "an x-ray"),
        ("octopus", "an octopus"),
        ("grapes", "grapes"),
        ("thumbs up", "thumbs up"),
        ("people with bunny ears", "people with bunny ears"),
        ("nest with eggs", "a nest with eggs"),
        ("dress", "a dress"),
        ("bread", "bread"),
        ("no bicycles", "no bicycles"),
        ("Statue of Liberty", "the Statue of Liberty"),
        ("Mount Fuji", "Mount Fuji"),
    ],
)
def test_a_subject_has_the_article_that_it_takes(name, expected):
    assert tool.phrase(name) == expected


def chosen(*rows):
    emoji = [{"unified": c, "name": n.upper(), "category": g, "subcategory": s} for c, n, g, s in rows]
    return [s["name"] for s in tool.choose_subjects(emoji, {tool.code_of(c): n for c, n, _, _ in rows})]


def test_gender_variants_go_where_there_is_a_neutral_form_and_stay_where_there_is_none():
    people = "People & Body"
    golfer = [("1F3CC-FE0F", "person golfing"), ("1F3CC-FE0F-200D-2640-FE0F", "woman golfing")]
    role = [("1F9D1-200D-1F3EB", "teacher"), ("1F468-200D-1F3EB", "man teacher")]
    alone = [("1F478", "princess"), ("1F469", "woman"), ("1F469-200D-1F6DF", "woman with no neutral form")]
    names = chosen(*((c, n, people, "person") for c, n in golfer + role + alone))
    assert set(names) == {"person golfing", "teacher", "princess", "woman", "woman with no neutral form"}


def test_what_a_small_model_would_not_learn_is_left_out():
    rows = [
        ("1F1EF-1F1F5", "flag: Japan", "Flags", "country-flag"),
        ("1F3C1", "chequered flag", "Flags", "flag"),
        ("0031-FE0F-20E3", "keycap: 1", "Symbols", "keycap"),
        ("1F170-FE0F", "A button (blood type)", "Symbols", "alphanum"),
        ("1F534", "red circle", "Symbols", "geometric"),
        ("1F538", "small orange diamond", "Symbols", "geometric"),
        ("1F550", "one o\u2019clock", "Travel & Places", "time"),
        ("1F313", "first quarter moon", "Travel & Places", "sky & weather"),
        ("1F6B6-200D-27A1-FE0F", "person walking: facing right", "People & Body", "person-activity"),
        ("1F32D", "hot dog", "Food & Drink", "food-prepared"),
        ("1F3FB", "light skin tone", "Component", "skin-tone"),
        ("1F45E", "man\u2019s shoe", "Objects", "clothing"),
        ("1F9D1-200D-1F9B0", "person: red hair", "People & Body", "person"),
    ]
    kept = {"chequered flag", "red circle", "man's shoe", "person with red hair"}
    assert set(chosen(*rows)) == kept


# ------------------------------------------------------------------------ the data set


def test_captions_name_the_subject_alike_for_all_vendors(publish, tmp_path):
    arrays, info = make(tmp_path / "out", "--source", publish(contents()))
    captions = {
        info["caption"].format(subject=info["subjects"][s]["phrase"], vendor=info["vendors"][v]["name"])
        for s, v in zip(arrays["subject"], arrays["vendor"])
    }
    assert "a dog face, in the style of Noto" in captions and "a dog face, in the style of Fluent 3D" in captions
    assert "grapes, in the style of Twemoji" in captions
    assert len(captions) == len(arrays["images"]) == 11 * 6  # neither the man teacher nor Japan's flag
    names = {s["code"]: s["name"] for s in info["subjects"]}
    assert names["2764"] == "red heart" and "1F468-200D-1F3EB" not in names and "1F1EF-1F1F5" not in names


def test_every_picture_is_on_white_and_belongs_to_its_subject_and_vendor(publish, tmp_path):
    arrays, info = make(tmp_path / "out", "--source", publish(contents()))
    assert arrays["images"].shape[1:] == (64, 64, 3) and arrays["images"].dtype == np.uint8
    assert (arrays["images"][:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    written = {tool.code_of(code): code for code in NAMES}
    suffix = {"Noto": "Noto", "Twemoji": "Twemoji", "OpenMoji": "OpenMoji", "Fluent 3D": "3D", "Fluent flat": "flat"}
    for image, s, v in zip(arrays["images"], arrays["subject"], arrays["vendor"]):
        code, vendor = written[info["subjects"][s]["code"]], info["vendors"][v]["name"]
        assert tuple(image[32, 32]) == colour(f"{code} {suffix.get(vendor, 'line')}")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white_in_proportion(mode):
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 128, 256))
    if mode == "RGBA":
        image.paste((0, 0, 0, 128), (0, 0, 128, 256))
    data = io.BytesIO()
    image.convert("RGBA").quantize(4).save(data, "PNG") if mode == "P" else image.convert(mode).save(data, "PNG")
    pixels = tool.render(data.getvalue(), "a.png")
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:, 40:] == 255).all()
    assert abs(int(pixels[32, 16, 0]) - (127 if mode == "RGBA" else 0)) <= 1


def test_a_picture_that_is_not_square_is_centred():
    data = io.BytesIO()
    Image.new("RGBA", (64, 32), "red").save(data, "PNG")
    pixels = tool.render(data.getvalue(), "a.png")
    assert (pixels[[0, 15, 48, 63]] == 255).all() and (pixels[20:44] == (255, 0, 0)).all()


def test_an_svg_is_drawn_on_white():
    pytest.importorskip("resvg_py", reason="drawing SVG needs resvg-py")
    pixels = tool.render(vector("x"), "x.svg")
    assert tuple(pixels[32, 32]) == colour("x") and (pixels[0] == 255).all()


def test_without_resvg_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(tool.UserError, match="pip install resvg-py"):
        tool.render(vector("x"), "x.svg")


def test_a_drawing_is_taken_once(publish, tmp_path):
    files = contents()
    assets = files["@lobehub/fluent-emoji-3d"]
    assets["package/assets/1f98a.webp"] = assets["package/assets/1f347.webp"]
    svg = files["openmoji"]
    svg["package/black/svg/1F347.svg"] = svg["package/color/svg/1F347.svg"]
    arrays, info = make(tmp_path / "out", "--source", publish(files))
    assert len(arrays["images"]) == 11 * 6 - 2
    pairs = {
        (info["subjects"][s]["name"], info["vendors"][v]["name"]) for s, v in zip(arrays["subject"], arrays["vendor"])
    }
    assert ("fox", "Fluent 3D") not in pairs and ("grapes", "Fluent 3D") in pairs
    assert ("grapes", "OpenMoji line") not in pairs and ("grapes", "OpenMoji") in pairs


# ------------------------------------------------------------------------ splits


def test_the_held_back_subject_and_style_are_never_trained_on(publish, tmp_path):
    arrays, info = make(tmp_path / "out", "--source", publish(contents()))
    codes = np.array([s["code"] for s in info["subjects"]])[arrays["subject"]]
    vendors = np.array([v["name"] for v in info["vendors"]])[arrays["vendor"]]
    splits = np.array(info["splits"])[arrays["split"]]
    assert set(splits[codes == "1F436"]) == {"subject"}
    assert set(splits[(vendors == tool.STYLE) & (codes != "1F436")]) == {"style"}
    assert set(splits[(vendors != tool.STYLE) & (codes != "1F436")]) <= {"train", "val"}
    assert {"train", "val"} <= set(splits)
    assert info["held_back"] == {"subjects": list(tool.HELD_BACK), "style": tool.STYLE}


def test_every_dog_is_held_back():
    assert {"1F436", "1F415", "1F9AE", "1F415-200D-1F9BA"} <= set(tool.HELD_BACK)
    assert tool.NEW1 in tool.HELD_BACK and not set(tool.NEW2) & set(tool.HELD_BACK)


def test_one_in_twenty_pairs_validates_and_its_subject_is_seen_in_other_styles():
    names = [v.name for v in tool.VENDORS]
    rows = [[tool.split_of(f"{0xF0000 + i:X}", v, names) for v in names] for i in range(2000)]  # no held-back code
    assert all(row.count("val") <= 1 and row.count("train") >= 4 and row[-1] == "style" for row in rows)
    held = np.array([[split == "val" for split in row[:-1]] for row in rows])  # [2000, 5 coloured styles]
    assert held.mean() == pytest.approx(0.05, abs=0.006)
    assert held.mean(0) == pytest.approx(np.full(5, 0.05), abs=0.015)


def test_a_subject_of_one_vendor_is_not_validated():
    for number in range(100):
        assert tool.split_of(f"{number:X}", "Noto", ["Noto", tool.STYLE]) == "train"


def test_the_order_of_the_packages_changes_nothing(publish, tmp_path):
    arrays, info = make(tmp_path / "a", "--source", publish(contents()))
    files = contents(dict(reversed(list(NAMES.items()))))
    other, other_info = make(tmp_path / "b", "--source", publish(files))
    assert info["subjects"] == other_info["subjects"]
    assert all(np.array_equal(arrays[key], other[key]) for key in arrays)


def test_a_new_subject_moves_no_other_to_another_split(publish, tmp_path):
    def splits(dest, names):
        arrays, info = make(dest, "--source", publish(contents(names)))
        codes = [info["subjects"][s]["code"] for s in arrays["subject"]]
        return dict(zip(zip(codes, arrays["vendor"]), arrays["split"]))

    fewer = splits(tmp_path / "a", {c: n for c, n in NAMES.items() if c != "1F98A"})
    more = splits(tmp_path / "b", NAMES)
    assert len(more) == len(fewer) + 6
    assert fewer.items() <= more.items()


# ------------------------------------------------------------------------ packages


def test_a_tarball_with_another_hash_is_refused_and_nothing_is_written(publish, tmp_path, capsys):
    folder = publish(contents())
    path = folder / "openmoji-1.0.0.tgz"
    path.write_bytes(path.read_bytes() + b"x")
    assert f"{path}: remove it" in error_line(capsys, tmp_path / "out", "--source", folder)
    assert not (tmp_path / "out" / "emoji.npz").exists()


@pytest.mark.parametrize("name", ["package/../../evil.txt", "/tmp/evil.txt"])
def test_a_tarball_that_leads_out_of_its_folder_is_refused(name, publish, tmp_path, capsys):
    files = contents()
    files["emoji-datasource-twitter"][name] = b"evil"
    line = error_line(capsys, tmp_path / "out" / "in", "--source", publish(files))
    assert "emoji-datasource-twitter-1.0.0.tgz: refused" in line and name in line
    assert not list(tmp_path.rglob("evil.txt"))


def test_members_are_never_unpacked(publish, tmp_path):
    make(tmp_path / "out", "--source", publish(contents()))
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    licences = {f"licences/{n}" for n in ("Apache-2.0.txt", "MIT.txt", "CC-BY-SA-4.0.txt", "SOURCES.md")}
    assert names == {"emoji.npz", "emoji.json"} | licences


def test_a_damaged_picture_is_named(publish, tmp_path, capsys):
    files = contents()
    files["emoji-datasource-google"]["package/img/google/64/1f98a.png"] = b"no picture"
    line = error_line(capsys, tmp_path / "out", "--source", publish(files))
    assert "emoji-datasource-google-1.0.0.tgz: its package/img/google/64/1f98a.png is no readable picture" in line


class Registry:
    """Stands for the registry: the tarballs of a folder, at the addresses that npm has for them."""

    def __init__(self, folder, cut=None):
        self.folder, self.cut, self.asked = folder, cut, []

    def __call__(self, url, timeout):
        self.asked.append(url)
        package = url.split("https://registry.npmjs.org/")[1].split("/-/")[0]
        response = io.BytesIO((self.folder / tool.tarball_name(package)).read_bytes()[: self.cut])
        response.headers = {}
        return response


def test_packages_are_fetched_once_and_kept(publish, tmp_path, monkeypatch):
    registry = Registry(publish(contents()))
    monkeypatch.setattr(tool.urllib.request, "urlopen", registry)
    make(tmp_path / "out")
    url = "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.0.0.tgz"
    assert len(registry.asked) == 5 and url in registry.asked
    (tmp_path / "out" / "tarballs" / "openmoji-1.0.0.tgz").unlink()
    make(tmp_path / "out")
    assert registry.asked[5:] == ["https://registry.npmjs.org/openmoji/-/openmoji-1.0.0.tgz"]


def test_a_download_cut_short_is_not_kept(publish, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.urllib.request, "urlopen", Registry(publish(contents()), cut=100))
    assert "damaged on the way" in error_line(capsys, tmp_path / "out")
    assert list((tmp_path / "out" / "tarballs").iterdir()) == []


def offline(url, timeout):
    raise urllib.error.URLError("Name or service not known")


def test_offline_the_remedy_is_one_line(publish, tmp_path, monkeypatch, capsys):
    publish(contents())
    monkeypatch.setattr(tool.urllib.request, "urlopen", offline)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = error_line(capsys, tmp_path / "out")
    assert "npm pack emoji-datasource-google@1.0.0" in line and "--source" in line and "not reachable" in line


def test_where_only_npm_reaches_a_registry_it_fetches(publish, tmp_path, monkeypatch):
    folder = publish(contents())
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(  # npm pack SPEC --silent --fetch-retries=0 ... DEST
        '#!/bin/sh\nname=$(echo "$2" | sed "s/^@//; s,/,-,; s/@/-/")\ncp "' + str(folder) + '/$name.tgz" "$6"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setattr(tool.urllib.request, "urlopen", offline)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    arrays, _ = make(tmp_path / "out")
    assert len(arrays["images"]) == 11 * 6
    assert len(list((tmp_path / "out" / "tarballs").iterdir())) == 5


def test_a_source_that_is_no_folder_is_named(tmp_path, capsys):
    assert "/nowhere: no such folder" in error_line(capsys, tmp_path / "out", "--source", "/nowhere")


# ------------------------------------------------------------------------ Textual Inversion


def test_the_pictures_of_both_concepts_are_written_and_attributed(publish, tmp_path):
    folder = tmp_path / "ti"
    arrays, info = make(tmp_path / "out", "--source", publish(contents()), "--textual-inversion", folder)
    pictures = [*image_files(folder / "0"), *image_files(folder / "1")]
    assert [f"{p.parent.name}/{p.name}" for p in pictures] == [f"0/{i:02d}.png" for i in range(5)] + [
        f"1/{i:02d}.png" for i in range(6)
    ]
    middle = [np.asarray(Image.open(p))[32, 32] for p in pictures]
    assert tuple(middle[0]) == colour("1F436 Noto") and tuple(middle[5]) == colour("1F40E line")
    text = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(f"| {p.parent.name}/{p.name} | " in text for p in pictures)
    for vendor in info["vendors"]:
        assert vendor["licence"] in text and vendor["credit"] in text


def test_the_shipped_pictures_and_json_fit_together():
    folder = ROOT / "tiny" / "textual_inversion"
    concepts = read_concepts(folder / "input.json")
    text = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for concept in concepts:
        files = image_files(folder / concept.key)
        assert 4 <= len(files) <= 6 and len(concept.prompts) == 2
        assert all(concept.token in p for p in concept.prompts)
        assert not any("<" in p for p in concept.eval_prompts)
        for path in files:
            assert Image.open(path).size == (64, 64)
            assert f"| {concept.key}/{path.name} |" in text
