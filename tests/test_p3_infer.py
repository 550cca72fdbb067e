"""p3_infer.py and hw2_3.sh on a tiny Stable Diffusion: layout, resuming, missing embeddings, the time limit."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import p3_tiny
import pytest
import torch
from PIL import Image

import p3_infer
import p3_model
from p3_invert import initial
from utils import UserError, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return p3_tiny.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def embeddings(files, tmp_path_factory):
    """A folder with new1.safetensors (two vectors) and new2.safetensors."""
    folder = tmp_path_factory.mktemp("embeddings")
    tokens = p3_model.learned_tokens(p3_tiny.load(files))
    for token, words, vectors in (("<new1>", "corgi dog", 2), ("<new2>", "painting", 1)):
        tokens.add(token, initial(tokens, words, vectors), init_word=words)
        tokens.save(p3_model.embedding_path(folder, token), [token], step=1)
    return folder


@pytest.fixture
def task(files, embeddings, tmp_path):
    """The options of a run of 2 x 2 prompts, three pictures each."""
    json_file = p3_tiny.write_concepts(tmp_path / "data")
    small = ["--size", 64, "--steps", 2, "--images", 3, "--batch-size", 2, "--precision", "fp32"]
    return [json_file, tmp_path / "out", files[1], "--config", files[0], "--embeddings", embeddings, *small]


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["p3_infer.py", "--device", "cpu", *map(str, options)])
    monkeypatch.setattr(p3_infer, "START", time.monotonic())
    try:
        p3_infer.main()
    except SystemExit as e:
        return e.code
    return 0


def contents(out):
    """{relative path: bytes} of all pictures."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.png"))}


LAYOUT = [f"{s}/{p}/source{s}_prompt{p}_{i}.png" for s in "01" for p in range(2) for i in range(3)]


# ------------------------------------------------------------------------------------------------ the contract


def test_hw2_3_writes_2x2x25_pictures_and_the_grader_accepts_them(files, tmp_path, monkeypatch, capsys):
    """From nothing but the JSON, its source pictures and the checkpoint: both tokens are trained on the way."""
    json_file, out = p3_tiny.write_concepts(tmp_path / "data"), tmp_path / "out"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    small = ["--size", 64, "--steps", 1, "--batch-size", 5, "--train-steps", 1, "--device", "cpu"]
    small += ["--precision", "fp32", "--config", files[0], "--embeddings", tmp_path]
    command = map(str, ["bash", ROOT / "hw2_3.sh", json_file, out, files[1], *small])
    done = subprocess.run(list(command), capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1].startswith(f"wrote 100 pictures to {out}")
    for source in "01":
        for prompt in range(2):
            names = sorted(os.listdir(out / source / str(prompt)))
            assert names == sorted(f"source{source}_prompt{prompt}_{i}.png" for i in range(25))
    assert Image.open(out / "1/1/source1_prompt1_24.png").size == (64, 64)

    clip_model = pytest.importorskip("clip.model")
    torch.manual_seed(0)
    torch.save(clip_model.CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1).state_dict(), tmp_path / "clip.pt")
    options = {"json_path": json_file, "input_dir": json_file.parent, "output_dir": out, "clip": tmp_path / "clip.pt"}
    monkeypatch.setattr(sys, "argv", ["grade_hw2_3.py", *(f"--{k}={v}" for k, v in options.items())])
    spec = importlib.util.spec_from_file_location("grade_hw2_3", ROOT / "evaluation/grade_hw2_3.py")
    grader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grader)
    grader.main()
    assert capsys.readouterr().out.strip().splitlines()[-1] == "4 of 4 prompts reach both baselines"


def test_the_layout_is_the_contracts_and_pictures_differ(task, monkeypatch, capsys):
    assert run(monkeypatch, *task) == 0
    made = contents(task[1])
    assert sorted(made) == sorted(LAYOUT) and len(set(made.values())) == len(LAYOUT)
    assert "wrote 12 pictures" in capsys.readouterr().out


def test_batch_size_does_not_change_a_picture(files):
    model = p3_tiny.load(files)
    one = torch.cat([p3_model.generate(model, "a dog", [i], 4, size=64) for i in range(5)])
    batch = p3_model.generate(model, "a dog", range(5), 4, size=64)
    assert (one.int() - batch.int()).abs().max() <= 1
    assert (batch[0].int() - batch[1].int()).abs().max() > 30


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(monkeypatch):
    made = []

    def generate(model, prompt, indices, *settings):
        if len(indices) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate ...")
        made.append(list(indices))
        return torch.tensor(indices)

    monkeypatch.setattr(p3_model, "generate", generate)
    settings = p3_infer.Settings(5, 2, 7.5, 64, 0, "fp32", "", False)
    assert p3_infer.generate(None, "a dog", range(5), settings).tolist() == [0, 1, 2, 3, 4]
    assert made == [[0, 1], [2], [3, 4]]

    def none(*unused):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(p3_model, "generate", none)
    with pytest.raises(UserError, match="too little memory"):
        p3_infer.generate(None, "a dog", range(5), settings)


def test_two_embedding_files_equal_one_file_with_both(files, embeddings, tmp_path):
    prompt = "a <new1> next to a <new2>"
    apart, together = p3_tiny.load(files), p3_tiny.load(files)
    tokens = p3_model.learned_tokens(apart)
    assert p3_model.load_embeddings(tokens, embeddings, ["<new2>", "<new1>"]) == []
    tokens.save(tmp_path / "both.pt")
    both = p3_model.learned_tokens(together)
    assert p3_model.load_embeddings(both, tmp_path, ["<new1>", "<new2>"]) == []
    assert all(both.metadata[t]["init_word"] == tokens.metadata[t]["init_word"] for t in ("<new1>", "<new2>"))
    a, b = (m.get_learned_conditioning([prompt]) for m in (apart, together))
    assert torch.equal(a, b)
    assert not torch.allclose(a, apart.get_learned_conditioning(["a <new2> next to a <new1>"]), atol=1e-3)


def test_a_sheet_of_one_prompt_is_drawn(task, tmp_path, monkeypatch):
    assert run(monkeypatch, *task, "--prompt", "A <new1> next to a <new2>.", "--images", 7) == 0
    assert Image.open(task[1] / "prompt.png").size == (5 * 66 + 2, 2 * 66 + 2)
    assert list(contents(task[1])) == ["prompt.png"]


# ------------------------------------------------------------------------------------------------ resuming


def test_an_interrupted_run_goes_on_where_it_stopped(task, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *task) == 0
    whole = contents(task[1])
    task[1] = tmp_path / "again"
    generate, calls = p3_model.generate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(p3_model, "generate", interrupted)
    assert run(monkeypatch, *task) == 130
    assert f"the same line goes on with the pictures that {task[1]} lacks" in capsys.readouterr().err
    assert len(contents(task[1])) == 5  # batches of 2, 1, 2
    monkeypatch.setattr(p3_model, "generate", generate)
    assert run(monkeypatch, *task) == 0
    assert "wrote 7 pictures" in capsys.readouterr().out
    assert contents(task[1]) == whole
    assert run(monkeypatch, *task) == 0
    assert "wrote 0 pictures" in capsys.readouterr().out


def test_pictures_of_other_prompts_settings_or_embeddings_are_made_anew(task, files, tmp_path, monkeypatch, capsys):
    def made():
        capsys.readouterr()
        assert run(monkeypatch, *task) == 0
        return int(capsys.readouterr().out.split("wrote ")[-1].split()[0])

    assert made() == 12
    (task[1] / LAYOUT[0]).unlink()
    assert made() == 1
    entries = json.loads(task[0].read_text())
    entries["0"]["prompt"][1] = "A <new1> on the moon."
    task[0].write_text(json.dumps(entries))
    assert made() == 3
    task += ["--scale", "5"]
    assert made() == 12
    tokens = p3_model.learned_tokens(p3_tiny.load(files))
    tokens.add("<new2>", initial(tokens, "cartoon"))
    tokens.save(tmp_path / "new2.safetensors")
    source = Path(task[task.index("--embeddings") + 1])
    (tmp_path / "new1.safetensors").write_bytes((source / "new1.safetensors").read_bytes())
    task += ["--embeddings", tmp_path]
    assert made() == 6  # the prompts that say <new2>
    task += ["--images", 2]
    assert made() == 0
    assert sorted(contents(task[1])) == [p for p in sorted(LAYOUT) if not p.endswith("_2.png")]


def test_leftovers_of_a_killed_run_are_removed_and_other_files_are_named(task, monkeypatch, capsys):
    folder = task[1] / "0/1"
    folder.mkdir(parents=True)
    (folder / ".source0_prompt1_0.png.123.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    assert run(monkeypatch, *task) == 0
    assert sorted(os.listdir(folder)) == sorted([Path(p).name for p in LAYOUT if p.startswith("0/1/")] + ["notes.txt"])
    assert "notes.txt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ missing embeddings


def test_a_token_without_an_embedding_is_an_error_before_anything_is_generated(task, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *task, "--embeddings", tmp_path / "none") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "<new1> has no embedding" in error and "--train-missing" in error
    assert contents(task[1]) == {}


def test_a_placeholder_that_is_no_token_name_is_an_error(task, monkeypatch, capsys):
    entries = json.loads(task[0].read_text())
    entries["0"]["prompt"][1] = "A <new9> on the moon."
    task[0].write_text(json.dumps(entries))
    assert run(monkeypatch, *task, "--train-missing") == 2
    assert "<new9>" in capsys.readouterr().err and contents(task[1]) == {}


def test_a_missing_embedding_is_trained_once_from_the_pictures_beside_the_json(task, tmp_path, monkeypatch, capsys):
    (tmp_path / "some").mkdir()
    source = Path(task[task.index("--embeddings") + 1])
    (tmp_path / "some/new1.safetensors").write_bytes((source / "new1.safetensors").read_bytes())
    options = ["--embeddings", tmp_path / "some", "--train-missing", "--train-steps", 2]
    assert run(monkeypatch, *task, *options) == 0
    out = capsys.readouterr().out
    assert "<new2> has no embedding for this model: training it on 2 pictures now" in out and "<new1> has no" not in out
    assert "eps loss on held-back crops" in out and sorted(contents(task[1])) == sorted(LAYOUT)
    assert p3_model.read_embeddings(task[1] / ".embeddings/new2.safetensors")[1]["init_word"] == "David Revoy"
    assert run(monkeypatch, *task, *options) == 0
    out = capsys.readouterr().out
    assert "training" not in out and "wrote 0 pictures" in out


def test_a_json_that_comes_alone_is_trained_on_the_pictures_of_the_course(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(p3_model, "ROOT", tmp_path / "root")
    (tmp_path / "root/hw2_data").mkdir(parents=True)
    task[0].parent.rename(tmp_path / "root/hw2_data/textual_inversion")
    task[0] = tmp_path / "alone.json"
    (tmp_path / "root/hw2_data/textual_inversion/input.json").rename(task[0])
    assert run(monkeypatch, *task, "--embeddings", tmp_path / "none", "--train-missing", "--train-steps", 2) == 0
    assert "<new2> has no embedding for this model: training it on 2 pictures now" in capsys.readouterr().out
    assert sorted(contents(task[1])) == sorted(LAYOUT)


def test_without_source_pictures_nothing_is_trained(task, tmp_path, monkeypatch, capsys):
    for picture in (task[0].parent / "1").iterdir():
        picture.unlink()
    assert run(monkeypatch, *task, "--embeddings", tmp_path / "none", "--train-missing") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "<new2> has no embedding" in error and "data/1" in error
    assert not (task[1] / ".embeddings").exists()


def test_an_embedding_of_another_model_is_not_used(task, embeddings, tmp_path, monkeypatch, capsys):
    for path in embeddings.iterdir():
        torch.save({**load_checkpoint(path), "base_model": "0" * 16}, tmp_path / path.name)
    assert run(monkeypatch, *task, "--embeddings", tmp_path) == 2
    error = capsys.readouterr().err
    assert "learned with another text encoder" in error and "has no embedding" in error


def test_an_embedding_of_another_width_is_named(task, tmp_path, monkeypatch, capsys):
    torch.save({"<new1>": torch.zeros(1, 768)}, tmp_path / "wide.pt")
    assert run(monkeypatch, *task, "--embeddings", tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "wide.pt: <new1>" in error and "768" in error


# ------------------------------------------------------------------------------------------------ time


def test_the_clock_takes_the_fast_mode_then_fewer_steps_but_not_below_the_fewest(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(p3_infer, "FAST", 0.5)
    clock, wanted = p3_infer.Clock(deadline=1100.0), p3_infer.Settings(25, 25, 7.5, 64, 0, "fp32", "", False)
    clock.step, clock.rest = 0.1, 0.5  # seconds a picture: each step, and beside the steps
    assert clock.settings(wanted, 20) == wanted  # 20 x 3.0 s fit into 100 s
    assert clock.settings(wanted, 50) == wanted._replace(fast=True)  # 2 s a picture are left: 0.5 + 25 x 0.05 fit
    assert clock.settings(wanted, 80) == wanted._replace(fast=True, steps=15)  # 1.25 s are left: 0.5 + 15 x 0.05
    assert clock.settings(wanted._replace(fast=True), 80).steps == 15
    assert clock.settings(wanted, 1000) == wanted._replace(fast=True, steps=p3_infer.FEWEST_STEPS)
    assert p3_infer.Clock(None).settings(wanted, 1000) == wanted
    clock.learn(2.5, wanted._replace(steps=10))  # a batch was slower: 0.2 s a step
    assert clock.settings(wanted, 50).steps == 15
    clock.learn(2.5, wanted._replace(steps=20, fast=True))
    assert clock.step == pytest.approx(0.2)
    assert clock.needs(10, wanted._replace(steps=5)) == pytest.approx(10 * 1.5)


def test_the_clock_measures_steps_and_the_rest_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = p3_infer.Clock(deadline=100.0)

    def make(steps):
        now[0] += 4 * (0.3 * steps + 1.0)

    clock.start(make, 4)
    assert (clock.step, clock.rest) == pytest.approx((0.3, 1.0))


def test_pictures_of_lowered_steps_are_said_and_made_anew_when_there_is_time(task, monkeypatch, capsys):
    task += ["--steps", 12, "--images", 1]
    assert run(monkeypatch, *task, "--time-limit", 0.001) == 0
    said = capsys.readouterr()
    assert "4 pictures were made faster than asked" in said.out
    assert "time is short: --fast, 8 of 12 steps" in said.err + said.out
    hurried = contents(task[1])
    assert run(monkeypatch, *task) == 0
    assert "wrote 4 pictures" in capsys.readouterr().out
    assert all(hurried[p] != made for p, made in contents(task[1]).items())


@pytest.mark.parametrize("options", [["--fast"], ["--pag", 1]])
def test_pictures_by_other_means_are_others_made_anew_on_a_later_run_without(task, monkeypatch, capsys, options):
    task += ["--steps", 4, "--images", 1]
    assert run(monkeypatch, *task, *options) == 0
    before = contents(task[1])
    assert run(monkeypatch, *task) == 0
    assert capsys.readouterr().out.count("wrote 4 pictures") == 2
    assert all(before[p] != made for p, made in contents(task[1]).items())


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({2: "none.ckpt"}, "none.ckpt"),
        ({0: "none.json"}, "none.json"),
        ({"--size": 100}, "multiple of 64"),
        ({"--steps": 0}, "--steps"),
        ({"--config": "none.yaml"}, "none.yaml"),
        ({"--config": "wide.yaml"}, "where the config says"),  # the config of another size
    ],
)
def test_bad_input_is_one_line_and_code_2(task, tmp_path, monkeypatch, capsys, change, complaint):
    monkeypatch.chdir(tmp_path)
    Path("wide.yaml").write_text(p3_tiny.CONFIG.replace("model_channels: 32", "model_channels: 64"))
    for place, value in change.items():
        task[place if isinstance(place, int) else task.index(place) + 1] = value
    assert run(monkeypatch, *task) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and complaint in error
    assert not task[1].exists() or contents(task[1]) == {}
