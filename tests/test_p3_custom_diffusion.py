"""p3_custom_diffusion.py: keys, values and tokens are learned, nothing else; trainings merge by a closed form."""

import json

import p3_tiny
import pytest
import torch
from conftest import script
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import p3_model
from p3_concepts import image_files, read_concepts
from p3_custom_diffusion import batch_of, closed_form, learn, prior, words_of
from p3_invert import Recipe, initial
from utils import UserError, torch_version

SMALL = ["--steps", 2, "--batch-size", 2, "--regularisation", 2, "--size", 64, "--device", "cpu", "--precision", "fp32"]
BOTH = "a <new1> next to a <new2>"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return p3_tiny.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(files):
    """For tests that leave it as it is."""
    return p3_tiny.load(files)


@pytest.fixture(scope="module")
def model_options(files):
    return ["--config", files[0], "--ckpt", files[1], *SMALL]


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    path = p3_tiny.write_concepts(tmp_path_factory.mktemp("data"))
    entries = json.loads(path.read_text())
    for entry in entries.values():  # rows of features [32]: fewer than would determine a matrix
        entry["train_captions"] = ["a {}", "the good {}", "one {} here"]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def deltas(model_options, json_file):
    """Of <new1>, of <new2>, and merged; made by the script."""
    paths = [json_file.parent / f"{name}.safetensors" for name in ("one", "two", "both")]
    for key, path in zip("01", paths):
        task = ["--json", json_file, "--data", json_file.parent, "--only", key, "--lr", 0.02]
        said = script("p3_custom_diffusion.py", *task, "--out", path, *model_options).stdout
        assert said.startswith("eps loss on held-back crops: <new") and said.strip().endswith(f"wrote {path}")
    said = script("p3_custom_diffusion.py", "--merge", *paths[:2], "--out", paths[2], *model_options).stdout
    assert said == f"merged <new1>, <new2>; wrote {paths[2]}\n"
    return paths


def with_delta(files, path):
    """(a model with a delta, its tokens)"""
    model = p3_tiny.load(files)
    tokens = p3_model.learned_tokens(model)
    p3_model.load_delta(model, tokens, path)
    return model, tokens


# ------------------------------------------------------------------------------------------------ training


def test_keys_values_and_tokens_move_and_nothing_else_and_the_file_draws_what_the_trained_model_draws(
    files, json_file, tmp_path
):
    """Of two concepts jointly, whose pictures are predicted better then."""
    model, out = p3_tiny.load(files), tmp_path / "joint.safetensors"
    before, start = {k: v.clone() for k, v in model.state_dict().items()}, p3_model.learned_tokens(model)
    jobs = [(c, image_files(json_file.parent / c.key)) for c in read_concepts(json_file)]
    starts = {c.token: initial(start, c.word) for c, _ in jobs}
    said = learn(model, jobs, Recipe(steps=20, batch=2, lr=0.004, crops=2, size=64), 1, out)
    for token in starts:
        first, last = said.split(f"{token} ")[1].split(", ")[0].split(";")[0].split(" -> ")
        assert float(last) < float(first)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(p3_model.keys_and_values(model)) and len(moved) >= 8
    assert not any(p.requires_grad for p in model.parameters())
    fresh, tokens = with_delta(files, out)
    assert all(not torch.equal(tokens[token], vectors) for token, vectors in starts.items())
    drawn = [p3_model.generate(m, BOTH, range(2), 3) for m in (model, fresh)]
    assert torch.equal(*drawn)


def test_vectors_start_from_embeddings_or_the_folder_that_lacks_one_is_named(files, json_file, tmp_path):
    model, learned = p3_tiny.load(files), torch.full((3, 32), 0.25)
    tokens = p3_model.learned_tokens(model)
    tokens.add("<new1>", learned)
    tokens.save(tmp_path / "new1.safetensors", ["<new1>"])
    jobs = [(c, image_files(json_file.parent / c.key)) for c in read_concepts(json_file)]
    recipe, out = Recipe(steps=1, batch=1, lr=1e-6, size=64), tmp_path / "delta.safetensors"
    learn(p3_tiny.load(files), jobs[:1], recipe, 1, out, tmp_path)
    torch.testing.assert_close(load_file(out)["<new1>"], learned, atol=2e-6, rtol=0)
    with pytest.raises(UserError, match=f"{tmp_path}: <new2> has no embedding"):
        learn(p3_tiny.load(files), jobs, recipe, 1, out, tmp_path)


@pytest.mark.skipif(torch_version() < (2, 0), reason="torch before 2.0 has no bf16 on CPUs")
def test_small_steps_are_not_rounded_away_in_half_precision(files, json_file, tmp_path):
    """Differences of 1e-5 beside weights of 0.3, which in bfloat16 are apart by 1e-3."""
    model, (concept, _) = p3_tiny.load(files), read_concepts(json_file)
    model.model.bfloat16()
    job = [(concept, image_files(json_file.parent / "0"))]
    learn(model, job, Recipe(steps=2, batch=1, lr=1e-5, crops=1, size=64), 1, tmp_path / "x.safetensors")
    differences = p3_model.read_delta(tmp_path / "x.safetensors", model)[2]
    assert all(0.5e-5 < float(d.abs().float().mean()) < 2.5e-5 for d in differences.values())


def test_a_batch_has_the_texts_of_its_pictures_from_all_concepts():
    pools = [(torch.full((3, 2, 4, 1, 1), float(n)), [[f"{n}"], [f"{n}"], [f"{n}", f"{n}"]]) for n in range(2)]
    moments, texts = batch_of(pools, 40, torch.Generator().manual_seed(0))
    assert [str(int(m[0, 0])) for m in moments] == texts and set(texts) == {"0", "1"}


def test_the_prior_is_drawn_of_its_texts_in_turns_without_guidance(model):
    (moments, texts), recipe = prior(model, ["a dog", "a cat"], 3, Recipe(size=64)), Recipe(size=64)
    assert texts == [["a dog"], ["a cat"], ["a dog"]] and not moments[:, 1].any()
    alone = p3_model.latents_of(model, "a cat", [1], scale=1.0, size=64, seed=recipe.seed)
    assert torch.allclose(moments[1:2, 0] * model.scale_factor, alone, atol=1e-4)


@pytest.mark.skipif(torch_version() < (2, 0), reason="torch before 2.0 builds no module without memory")
def test_at_full_size_a_delta_has_19_million_differences():
    from ldm.util import CONFIGS, instantiate_from_config, read_config

    with torch.device("meta"):
        unet = instantiate_from_config(read_config(CONFIGS["v1-inference"]).model.params.unet_config)
    matrices = p3_model.keys_and_values(unet)
    assert len(matrices) == 32 and sum(p.numel() for p in matrices.values()) == 19_169_280  # 38 MB in half precision


# ------------------------------------------------------------------------------------------------ merging


def test_the_merged_matrix_meets_the_constraint_and_is_the_nearest_on_other_captions():
    """Against the optimality conditions (W - W0) A = L C, W C^T = V, solved as one linear system."""
    draw = torch.Generator().manual_seed(0)
    W0, C, C_reg, V = (torch.randn(*shape, generator=draw).double() for shape in ((6, 8), (3, 8), (50, 8), (6, 3)))
    A = C_reg.T @ C_reg
    W = W0 + (V - W0 @ C.T) @ closed_form(C, A, ridge=0)
    assert torch.allclose(W @ C.T, V, atol=1e-10)
    system = torch.cat([torch.cat([A, C.T], dim=1), torch.cat([C, torch.zeros(3, 3).double()], dim=1)])
    solved = torch.linalg.solve(system, torch.cat([A @ W0.T, V.T]))[:8].T
    assert torch.allclose(W, solved, atol=1e-10)
    free = torch.linalg.svd(C).Vh[3:]  # directions that leave the constraint as it is
    other = W + 0.01 * torch.randn(6, 5, generator=draw).double() @ free
    assert torch.allclose(other @ C.T, V) and ((W - W0) @ C_reg.T).norm() < ((other - W0) @ C_reg.T).norm()


def test_rows_of_words_that_depend_on_others_change_nothing():
    draw = torch.Generator().manual_seed(0)
    C, C_reg, change = (torch.randn(*s, generator=draw).double() for s in ((3, 8), (50, 8), (6, 8)))
    twice, A = torch.cat([C, C[:1], C[1:2] + C[2:]]), C_reg.T @ C_reg
    once = change @ C.T @ closed_form(C, A)
    assert torch.allclose(change @ twice.T @ closed_form(twice, A), once, atol=1e-8)


def test_where_other_captions_say_nothing_the_matrix_stays():
    A = torch.diag(torch.tensor([1.0, 1, 0, 0]))
    M = closed_form(torch.tensor([[1.0, 0, 1, 0]]), A)  # the third direction is free to carry the word
    assert torch.allclose(M, torch.tensor([[0.0, 0, 1, 0]]).double(), atol=1e-5)


def test_each_concept_of_a_merge_keeps_its_own_keys_and_values_on_its_words(files, deltas):
    merged, _ = with_delta(files, deltas[2])
    after, both = p3_model.keys_and_values(merged), p3_model.read_delta(deltas[2], merged)[2]
    for path in deltas[:2]:
        own, _ = with_delta(files, path)
        _, captions, differences = p3_model.read_delta(path, own)
        ((token, texts),) = captions.items()
        C = words_of(merged, token, texts)
        assert torch.equal(C, words_of(own, token, texts)) and len(C) == 3 + 2 + 2  # from the token to the end
        for name, matrix in p3_model.keys_and_values(own).items():
            wanted, change = C @ matrix.T, C @ differences[name].float().T
            rounding = C.abs() @ both[name].float().abs().T * 2**-11  # of differences in half precision
            assert ((C @ after[name].T - wanted).abs() < rounding + 0.01 * change.abs().max()).all()


def test_a_merge_of_one_concept_is_it_on_its_words(files, deltas, model_options, tmp_path):
    out = tmp_path / "alone.safetensors"
    script("p3_custom_diffusion.py", "--merge", deltas[0], "--out", out, *model_options)
    (own, _), (alone, _) = (with_delta(files, path) for path in (deltas[0], out))
    C = words_of(own, "<new1>", p3_model.read_delta(out, own)[1]["<new1>"])
    a, b = (p3_model.keys_and_values(m) for m in (own, alone))
    assert all(torch.allclose(C @ a[name].T, C @ b[name].T, atol=5e-3) for name in a)
    assert any(not torch.allclose(a[name], b[name], atol=1e-2) for name in a)  # elsewhere it is nearer to the model


# ------------------------------------------------------------------------------------------------ drawing


def rewritten(path, out, change):
    """A copy of a delta with what `change` makes of its tensors and its header."""
    with safe_open(str(path), "pt") as file:
        told = json.loads(file.metadata()[p3_model.DELTA])
    tensors = load_file(path)
    told.update(change(tensors) or {})
    save_file(tensors, out, {p3_model.DELTA: json.dumps(told)})
    return out


def halve(tensors):
    tensors.update({name: t / 2 for name, t in tensors.items() if "attn2" in name})


def test_p3_infer_draws_with_a_delta_and_its_tokens_and_anew_with_another(files, json_file, deltas, tmp_path):
    def draw(delta):
        task = [json_file, tmp_path / "out", files[1], "--config", files[0], "--embeddings", tmp_path, *SMALL[6:]]
        said = script("p3_infer.py", *task, "--steps", 1, "--images", 1, "--delta", delta).stdout
        return int(said.split("wrote ")[1].split()[0]), (tmp_path / "out/0/0/source0_prompt0_0.png").read_bytes()

    other = rewritten(deltas[2], tmp_path / "other", halve)
    (made, first), (none, _), (again, second) = (draw(path) for path in (deltas[2], deltas[2], other))
    assert (made, none, again) == (4, 0, 4) and first != second


# ------------------------------------------------------------------------------------------------ bad input


DAMAGES = {
    "of another model": lambda tensors: {"model": "0" * 16},
    "NaN or infinity": lambda tensors: tensors.update({k: v / 0 for k, v in tensors.items() if "attn2" in k}),
    "not a delta": lambda tensors: {"captions": {"<new1>": 3}},
    "<new1>: its vectors are": lambda tensors: tensors.update({"<new1>": torch.zeros(1, 7)}),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_a_delta_that_does_not_fit_is_refused_by_its_name(complaint, model, deltas, tmp_path):
    bad = rewritten(deltas[0], tmp_path / "bad.safetensors", DAMAGES[complaint])
    with pytest.raises(UserError) as error:
        p3_model.load_delta(model, p3_model.learned_tokens(model), bad)
    assert str(error.value).startswith(f"{bad}: ") and complaint in str(error.value)


def test_a_file_that_is_no_delta_is_refused_by_its_name(model, tmp_path):
    (tmp_path / "text").write_text("hello" * 99)
    torch.save({"<new1>": torch.zeros(1, 32)}, tmp_path / "pickle.pt")
    save_file({"<new1>": torch.zeros(1, 32)}, tmp_path / "embedding.safetensors")
    save_file({"<new1>": torch.zeros(1, 32)}, tmp_path / "deep.safetensors", {p3_model.DELTA: "[" * 100_000})
    for name in ("text", "pickle.pt", "embedding.safetensors", "deep.safetensors", "none"):
        with pytest.raises(UserError) as error:
            p3_model.read_delta(tmp_path / name, model)
        assert str(error.value).startswith(f"{tmp_path / name}: ")


def test_two_files_with_one_token_are_not_merged(deltas, model_options, tmp_path):
    options = ["--merge", deltas[0], deltas[2], "--out", tmp_path / "out", *model_options]
    (error,) = script("p3_custom_diffusion.py", *options, code=2).stderr.strip().splitlines()
    assert error.startswith(f"error: {deltas[2]}: '<new1>' is a word") and not (tmp_path / "out").exists()


def test_an_option_that_is_wrong_is_named(json_file, model_options, tmp_path):
    task, out = ["--json", json_file, "--data", json_file.parent, *model_options], tmp_path / "out/x.safetensors"
    for options, complaint in (
        ([], "required: --out"),
        (["--out", tmp_path], f"{tmp_path}: is a folder"),
        (["--out", out, "--only", "7"], "--only 7: "),
        (["--out", out, "--lr", "0"], "argument --lr: "),
        (["--out", out, "--data", tmp_path], f"{tmp_path / '0'}: no such folder"),
    ):
        (error,) = script("p3_custom_diffusion.py", *task, *options, code=2).stderr.strip().splitlines()
        assert error.startswith("error: ") and complaint in error
    assert not list(tmp_path.iterdir())
