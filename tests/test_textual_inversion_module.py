"""LearnedTokens: new rows learn through the frozen model, nothing else moves, and every file format is read."""

import copy
import os

import ldm_tiny
import numpy as np
import pytest
import torch
from ldm.modules.textual_inversion import HEADER, LearnedTokens, read_embeddings
from ldm.util import ModelError

from p3_invert import initial


@pytest.fixture(scope="module")
def models():
    return [ldm_tiny.tiny_model() for _ in range(2)]


@pytest.fixture
def fresh(models):
    """A function that gives one of the models (their weights are equal) and LearnedTokens on it, still empty."""
    patched = []

    def make(index=0):
        embedder = models[index].cond_stage_model
        patched.append((LearnedTokens(embedder), embedder))
        return models[index], patched[-1][0]

    tokenizers = [m.cond_stage_model.tokenizer for m in models]
    for model in models:  # a tokenizer forgets no token: each test has its own
        model.cond_stage_model.tokenizer = copy.deepcopy(model.cond_stage_model.tokenizer)
    yield make
    for tokens, embedder in reversed(patched):
        tokens.detach()
        embedder.expansions.clear()
    for model, tokenizer in zip(models, tokenizers):
        model.cond_stage_model.tokenizer = tokenizer


def loss_of(model, prompts):
    draw = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, len(prompts), 4, 8, 8, generator=draw)
    return model.p_losses(z, model.get_learned_conditioning(prompts), torch.tensor([100] * len(prompts)), noise)[0]


# -------------------------------------------------------------------------------------- what a placeholder means


def test_a_placeholder_starts_as_its_word(fresh):
    model, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "corgi"))
    said = model.get_learned_conditioning
    assert torch.equal(said("a <new1>, running"), said("a corgi, running"))


def test_several_vectors_stand_in_a_row(fresh):
    model, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "small brown dog", 3))
    said = model.get_learned_conditioning
    assert torch.equal(said("a <new1> here"), said("a small brown dog here"))


def test_initial_words_are_averaged_or_taken_in_turns(fresh):
    _, tokens = fresh()
    dog, cat = (initial(tokens, w)[0] for w in ("dog", "cat"))
    assert torch.allclose(initial(tokens, "dog, cat"), torch.stack([dog, cat]).mean(0)[None])
    assert torch.equal(initial(tokens, "dog cat", 4), torch.stack([dog, cat, dog, cat]))
    for words, vectors in (("", 1), ("a b c", 2)):
        with pytest.raises(ModelError):
            initial(tokens, words, vectors)


def test_placeholders_are_found_beside_punctuation_and_by_their_case(fresh):
    model, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "dog"))
    embedder = model.cond_stage_model
    new = embedder.tokenizer.convert_tokens_to_ids("<new1>")
    for prompt, count in (("<new1>", 1), ("a <new1>'s bone.", 1), ("(<new1>),<new1>", 2), ("<New1>", 0), ("new1", 0)):
        assert int((embedder.tokenize(prompt) == new).sum()) == count, prompt


def test_several_vectors_count_toward_the_length_of_a_prompt(fresh):
    model, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "dog", 10))
    with pytest.warns(UserWarning, match="80 tokens"):
        assert model.cond_stage_model.tokenize("<new1> " * 8).shape == (1, 77)


# -------------------------------------------------------------------------------------- learning


def test_only_the_new_rows_learn_and_all_of_them_do(fresh):
    model, tokens = fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokens.add("<new1>", initial(tokens, "corgi"))
    tokens.add("<new2>", initial(tokens, "cartoon painting", 3))
    start = [p.detach().clone() for p in tokens.parameters()]
    optimizer = torch.optim.AdamW(tokens.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, ["a <new1> by <new2>", "the <new2>"]).backward()
        assert all((p.grad.abs().amax(1) > 0).all() for p in tokens.parameters())
        optimizer.step()
    assert all(((p - s).abs().amax(1) > 0).all() for p, s in zip(tokens.parameters(), start))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_dot_product_attention"), reason="needs torch 2 on a CPU")
def test_vectors_stay_float32_below_a_half_precision_network(fresh):
    _, tokens = fresh()
    model = ldm_tiny.tiny_model()
    model.model.to(torch.bfloat16)
    tokens = LearnedTokens(model.cond_stage_model)
    tokens.add("<new1>", initial(tokens, "corgi"))
    loss_of(model, ["a <new1>"]).backward()
    assert tokens["<new1>"].dtype == tokens["<new1>"].grad.dtype == torch.float32
    assert tokens["<new1>"].grad.abs().max() > 0


def test_a_planted_embedding_is_recovered(fresh):
    """The eps that a hidden vector causes is enough to find a vector that causes the same."""
    model, tokens = fresh()
    draw = torch.Generator().manual_seed(0)
    tokens.add("<truth>", initial(tokens, "castle"))
    tokens.add("<new1>", initial(tokens, "castle") + 0.5 * torch.randn(1, 32, generator=draw))
    optimizer = torch.optim.Adam(tokens.rows[1:], lr=0.05)
    losses = []
    for _ in range(150):
        x, t = torch.randn(2, 4, 8, 8, generator=draw), torch.randint(1000, (2,), generator=draw)
        said = [model.get_learned_conditioning(f"a {word} in it").expand(2, -1, -1) for word in ("<truth>", "<new1>")]
        loss = (model.apply_model(x, t, said[1]) - model.apply_model(x, t, said[0].detach())).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.05 * sum(losses[:5])


# -------------------------------------------------------------------------------------- files


def test_two_files_give_the_conditioning_of_one_with_both(fresh, tmp_path):
    model, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "corgi"), init_word="corgi")
    tokens.add("<new2>", initial(tokens, "cartoon", 2), init_word="cartoon")
    tokens.save(tmp_path / "both.safetensors", step=7, scores={"image": 80.0})
    tokens.save(tmp_path / "one.safetensors", ["<new1>"], step=1)
    tokens.save(tmp_path / "two.safetensors", ["<new2>"])
    conditioning = model.get_learned_conditioning("a <new1> next to a <new2>")
    other, separate = fresh(1)
    assert separate.load(tmp_path / "two.safetensors") == ["<new2>"] and separate.load(
        tmp_path / "one.safetensors"
    ) == ["<new1>"]
    assert torch.equal(other.get_learned_conditioning("a <new1> next to a <new2>"), conditioning)
    vectors, metadata = read_embeddings(tmp_path / "both.safetensors")
    assert {k: tuple(v.shape) for k, v in vectors.items()} == {"<new1>": (1, 32), "<new2>": (2, 32)}
    words = {"<new1>": "corgi", "<new2>": "cartoon"}
    assert metadata == {"init_word": words, "base_model": tokens.base_model, "step": 7, "scores": {"image": 80.0}}
    assert read_embeddings(tmp_path / "one.safetensors")[1] == {
        "init_word": "corgi",
        "base_model": tokens.base_model,
        "step": 1,
    }
    assert sorted(os.listdir(tmp_path)) == ["both.safetensors", "one.safetensors", "two.safetensors"]


def test_an_embedding_is_a_small_file(fresh, tmp_path):
    _, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "corgi"))
    tokens.save(tmp_path / "e.safetensors")
    assert (tmp_path / "e.safetensors").stat().st_size < 5000


def test_the_fields_own_formats_are_read(fresh, tmp_path):
    row = torch.randn(1, 32)
    automatic = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": row},
        "name": "my-style",
        "step": 5,
        "sd_checkpoint": "abc",
        "sd_checkpoint_name": None,
    }
    rinongal = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict()}
    rinongal["string_to_param"]["*"] = torch.nn.Parameter(row)
    torch.save(automatic, tmp_path / "a1111.pt")
    torch.save({"<cat-toy>": row[0]}, tmp_path / "learned_embeds.bin")
    torch.save(rinongal, tmp_path / "embeddings.pt")
    _, tokens = fresh()
    assert tokens.load(tmp_path / "a1111.pt") == ["my-style"] and tokens.metadata["my-style"]["step"] == 5
    assert tokens.load(tmp_path / "learned_embeds.bin") == ["<cat-toy>"]
    assert tokens.load(tmp_path / "embeddings.pt", token="<r>") == ["<r>"]
    assert all(torch.equal(tokens[t].detach(), row) for t in ("my-style", "<cat-toy>", "<r>"))


def test_safetensors_embeddings_are_read(fresh, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    row = torch.randn(2, 32)
    safetensors.save_file({"<toy>": row}, str(tmp_path / "learned_embeds.safetensors"))
    safetensors.save_file({"emb_params": row}, str(tmp_path / "my-style.safetensors"))
    _, tokens = fresh()
    assert tokens.load(tmp_path / "learned_embeds.safetensors") == ["<toy>"]
    assert tokens.load(tmp_path / "my-style.safetensors") == ["my-style"]
    assert torch.equal(tokens["<toy>"].detach(), row) and torch.equal(tokens["my-style"].detach(), row)


def test_our_pt_files_of_before_are_read(fresh, tmp_path):
    row = torch.randn(1, 32)
    torch.save({"<new1>": row, "init_word": "corgi", "step": 3, "scores": {"image": 70.0}}, tmp_path / "new1.pt")
    _, tokens = fresh()
    assert tokens.load(tmp_path / "new1.pt") == ["<new1>"] and torch.equal(tokens["<new1>"].detach(), row)
    assert tokens.metadata["<new1>"] == {"init_word": "corgi", "step": 3, "scores": {"image": 70.0}}


def test_a_bare_tensor_is_an_embedding_where_its_token_is_given(fresh, tmp_path):
    row = torch.randn(32)
    torch.save(row, tmp_path / "bare.pt")
    _, tokens = fresh()
    assert tokens.load(tmp_path / "bare.pt", token="<new1>") == ["<new1>"]
    assert torch.equal(tokens["<new1>"].detach(), row[None])
    with pytest.raises(ModelError, match="bare.pt.*token"):
        tokens.load(tmp_path / "bare.pt")


def test_writing_twice_gives_the_same_bytes(fresh, tmp_path):
    _, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "corgi"), init_word="corgi")
    for name in ("a", "b"):
        tokens.save(tmp_path / name, step=7, scores={"image": 80.0, "text": 30.0})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_diffusers_reads_our_file_and_says_the_same_and_we_read_its(fresh, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from ldm.modules.encoders.modules import write_clip_vocabulary
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel, CLIPTokenizer

    model, tokens = fresh()
    tokens.add("<new1>", torch.randn(2, 32), init_word="corgi")
    tokens.save(tmp_path / "new1.safetensors", step=1)
    assert list(load_file(tmp_path / "new1.safetensors")) == ["<new1>"]

    encoder = CLIPTextModel(model.cond_stage_model.transformer.config)
    weights = model.cond_stage_model.transformer.state_dict()
    own = encoder.state_dict()
    encoder.load_state_dict({k: weights["text_model." + k.split("text_model.")[-1]] for k in own})
    write_clip_vocabulary(tmp_path)

    class Pipeline(diffusers.loaders.TextualInversionLoaderMixin):
        hf_device_map, _execution_device = None, "cpu"
        tokenizer, text_encoder = CLIPTokenizer.from_pretrained(str(tmp_path)), encoder.eval()
        components = {"tokenizer": tokenizer, "text_encoder": text_encoder}

    pipeline = Pipeline()
    pipeline.load_textual_inversion(str(tmp_path / "new1.safetensors"))
    prompt = pipeline.maybe_convert_prompt("a <new1>, running", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = pipeline.text_encoder(ids).last_hidden_state
    assert torch.allclose(model.get_learned_conditioning("a <new1>, running"), theirs, atol=1e-5)

    rows = pipeline.tokenizer.convert_tokens_to_ids(["<new1>", "<new1>_1"])
    save_file(
        {"<theirs>": pipeline.text_encoder.get_input_embeddings().weight.detach()[rows]}, tmp_path / "t.safetensors"
    )
    tokens.load(tmp_path / "t.safetensors")
    assert torch.equal(tokens["<theirs>"], tokens["<new1>"])


def test_an_embedding_of_another_text_encoder_is_warned_of(fresh, tmp_path):
    _, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "corgi"))
    tokens.save(tmp_path / "e.safetensors", base_model="0123456789abcdef")
    _, other = fresh(1)
    with pytest.warns(UserWarning, match="another text encoder"):
        other.load(tmp_path / "e.safetensors")


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "token,vectors,word",
    [
        ("<new1>", torch.zeros(1, 31), "31"),
        ("<new1>", torch.zeros(1, 1, 32), "32"),
        ("<new1>", torch.zeros(0, 32), "0"),
        ("<new1>", torch.full((1, 32), float("nan")), "finite"),
        ("<new1>", torch.zeros(76, 32), "76"),
        ("dog", torch.zeros(1, 32), "word of the vocabulary"),
        ("Dog", torch.zeros(1, 32), "word of the vocabulary"),
        ("*", torch.zeros(1, 32), "word of the vocabulary"),
        ("two words", torch.zeros(1, 32), "one word"),
        ("", torch.zeros(1, 32), "one word"),
        ("<new\ud800>", torch.zeros(1, 32), "one word"),
        ("<|endoftext|>", torch.zeros(1, 32), "word of the vocabulary"),
    ],
)
def test_bad_placeholders_and_vectors_are_refused(fresh, token, vectors, word):
    model, tokens = fresh()
    size = len(model.cond_stage_model.tokenizer)
    with pytest.raises(ModelError, match=word):
        tokens.add(token, vectors)
    assert not tokens.tokens and len(model.cond_stage_model.tokenizer) == size


def test_a_placeholder_is_added_once(fresh):
    _, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "dog"))
    with pytest.raises(ModelError, match="<new1>"):
        tokens.add("<new1>", initial(tokens, "dog"))


def test_unknown_tokens_are_named(fresh):
    _, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "dog"))
    with pytest.raises(ModelError, match="<new2>.*<new1>"):
        tokens["<new2>"]


def test_files_that_hold_no_embedding_are_refused(fresh, tmp_path):
    _, tokens = fresh()
    torch.save({"a": 1}, tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"<new1>": torch.zeros(1, 31)}, tmp_path / "narrow.pt")
    torch.save({"<a>": torch.zeros(1, 32), "<b>": torch.zeros(1, 32)}, tmp_path / "two.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name in ("none.pt", "list.pt", "narrow.pt", "junk.pt", "missing.pt"):
        with pytest.raises(ModelError, match=name):
            tokens.load(tmp_path / name)
    with pytest.raises(ModelError, match="cannot all be <new1>"):
        tokens.load(tmp_path / "two.pt", token="<new1>")
    assert not tokens.tokens


@pytest.mark.parametrize("header", ["not json", "5", "null", '"init_word"', "[" * 100_000])
def test_a_damaged_header_is_told(fresh, tmp_path, header):
    safetensors = pytest.importorskip("safetensors.torch")
    _, tokens = fresh()
    safetensors.save_file({"<new1>": torch.zeros(1, 32)}, tmp_path / "odd.safetensors", {HEADER: header})
    with pytest.raises(ModelError, match="odd.safetensors: its header is damaged"):
        tokens.load(tmp_path / "odd.safetensors")


def test_what_a_pt_file_tells_in_numpy_s_numbers_is_left_out(fresh, tmp_path):
    _, tokens = fresh()
    torch.save({"<new1>": torch.ones(1, 32), "step": np.int64(3), "init_word": "dog"}, tmp_path / "a.pt")
    tokens.load(tmp_path / "a.pt")
    tokens.save(tmp_path / "b.safetensors")
    assert read_embeddings(tmp_path / "b.safetensors")[1]["init_word"] == "dog"


def test_detaching_ends_the_patch(fresh):
    model, tokens = fresh()
    tokens.add("<new1>", initial(tokens, "dog"))
    tokens.detach()
    with pytest.raises(IndexError):
        model.get_learned_conditioning("<new1>")
