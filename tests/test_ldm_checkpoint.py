"""ldm.checkpoint: whatever a file holds, it is loaded right or refused in one line, and never run."""

import pickle
import sys
import types
import zipfile

import ldm_tiny
import pytest
import torch
from ldm.checkpoint import StoredTensor, fingerprint, read_checkpoint, read_state_dict
from ldm.util import ModelError, instantiate_from_config, load_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ldm_tiny.write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def state(files):
    return torch.load(files[1])["state_dict"]


def refusal(path, *words, config=None):
    """The one-line error that loading `path` ends with; it names the file."""
    with pytest.raises(ModelError) as e:
        load_model(config, path) if config else read_checkpoint(path)
    message = str(e.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
    return message


def same(model, state, dtype=torch.float32):
    own = model.state_dict()
    assert set(own) == set(state)
    for name, value in state.items():
        heavy = name.startswith(("model.", "first_stage_model."))
        assert torch.equal(own[name], value.to(dtype) if heavy else value), name


def test_weights_arrive_as_they_are(files, state):
    model = load_model(*files)
    same(model, state)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_half_precision_is_for_network_and_autoencoder(files, state):
    model = load_model(*files, dtype=torch.bfloat16)
    same(model, state, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.betas.dtype == torch.float32
    assert {p.dtype for p in model.cond_stage_model.parameters()} == {torch.float32}


def test_schedule_stays_exact_when_the_model_is_halved(files, state):
    model = load_model(*files).half()
    assert model.dtype == torch.float16 and torch.equal(model.alphas_cumprod, state["alphas_cumprod"])


def test_convolutions_are_channels_last(files):
    weight = load_model(*files).model.diffusion_model.input_blocks[1][0].in_layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_bare_state_dict_loads_too(files, state, tmp_path):
    torch.save(state, tmp_path / "bare.ckpt")
    same(load_model(files[0], tmp_path / "bare.ckpt"), state)


def test_names_of_new_transformers_and_lacking_constants_load_too(files, state, tmp_path):
    other = {
        k.replace("transformer.text_model.", "transformer."): v
        for k, v in state.items()
        if "position_ids" not in k and k not in ("betas", "posterior_variance")
    }
    torch.save({"state_dict": other}, tmp_path / "new.ckpt")
    same(load_model(files[0], tmp_path / "new.ckpt"), state)


def test_safetensors_load_too(files, state, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(
        {k: v.contiguous() for k, v in state.items()}, str(tmp_path / "m.safetensors"), metadata={"format": "pt"}
    )
    same(load_model(files[0], tmp_path / "m.safetensors"), state)


def test_averaged_copies_and_losses_are_left_out(files, state, tmp_path):
    more = {**state, "model_ema.decay": torch.ones(()), "first_stage_model.loss.logvar": torch.ones(())}
    torch.save({"state_dict": more}, tmp_path / "ema.ckpt")
    same(load_model(files[0], tmp_path / "ema.ckpt"), state)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_tensor_is_read_as_torch_reads_it(dtype, tmp_path):
    whole = (torch.randn(4, 6) * 4).to(dtype)
    tensors = {
        "whole": whole,
        "view": whole[1:3, 2:].t(),
        "none": whole[:0],
        "one": whole[0, 0],
        "parameter": torch.nn.Parameter(torch.randn(3)).data,
    }
    torch.save(tensors, tmp_path / "t.pt")
    read = {k: v.load() for k, v in read_checkpoint(tmp_path / "t.pt").items()}
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name


def test_reading_a_checkpoint_leaves_its_tensors_in_the_file(files):
    assert all(isinstance(v, StoredTensor) for v in read_state_dict(files[1]).values())


# -------------------------------------------------------------------------------------------- what pickles may carry


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def functions():
    import builtins
    import os
    import subprocess

    return [
        (os.system, "touch {}"),
        (builtins.exec, "open('{}', 'w')"),
        (builtins.eval, "open('{}', 'w')"),
        (subprocess.check_output, "touch {}"),
        (builtins.open, "{}"),
        (torch.load, "{}"),
        (getattr, "{}"),
    ]


@pytest.mark.parametrize("function,argument", functions())
def test_a_hostile_checkpoint_is_refused_and_not_run(function, argument, files, state, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state_dict": state, "callbacks": Runs(function, argument.format(mark))}, tmp_path / "evil.ckpt")
    refusal(tmp_path / "evil.ckpt", "refused", config=files[0])
    assert not mark.exists()


def test_what_a_trainer_left_behind_is_passed_over_without_its_package(files, state, tmp_path):
    """As in sd-v1-4.ckpt: {"callbacks": {<class ModelCheckpoint>: {...}}}, of packages that are not here."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    before = {n: sys.modules.pop(n, None) for n in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        home = sys.modules[names[-1]]

        class ModelCheckpoint:
            pass

        class AttributeDict(dict):
            pass

        for cls in (ModelCheckpoint, AttributeDict):
            cls.__module__, cls.__qualname__ = names[-1], cls.__name__
            setattr(home, cls.__name__, cls)
        thing = ModelCheckpoint()
        thing.best = torch.ones(2)
        content = {
            "state_dict": state,
            "callbacks": {ModelCheckpoint: {"best": torch.ones(())}},
            "other": thing,
            "hyper_parameters": AttributeDict(lr=1e-4, steps=[1, 2]),
            "optimizer_states": [{0: torch.ones(1)}],
        }
        torch.save(content, tmp_path / "lightning.ckpt")
    finally:
        for name in names:
            del sys.modules[name]
    try:
        same(load_model(files[0], tmp_path / "lightning.ckpt"), state)
        assert not set(names) & set(sys.modules)
    finally:
        sys.modules.update({n: m for n, m in before.items() if m is not None})


# ------------------------------------------------------------------------------------------------ damage and mistakes


def test_a_missing_file_is_named(files, tmp_path):
    refusal(tmp_path / "nowhere.ckpt", "no such file", config=files[0])


JUNK = [
    b"",
    b"\0" * 100,
    b"<html>quota exceeded</html>",
    b"\x80\x02}q\x00.",
    b"PK\x03\x04" + b"x" * 99,
    b"\xff" * 8 + b"{}",
    b"\x02" + b"\0" * 7 + b"{]",
]


@pytest.mark.parametrize("content", JUNK)
def test_what_is_no_checkpoint_is_refused(content, files, tmp_path):
    (tmp_path / "junk.ckpt").write_bytes(content)
    refusal(tmp_path / "junk.ckpt", config=files[0])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_broken_download_is_refused(share, files, tmp_path):
    data = open(files[1], "rb").read()
    (tmp_path / "part.ckpt").write_bytes(data[: int(share * len(data))])
    refusal(tmp_path / "part.ckpt", config=files[0])


def test_flipped_bits_are_noticed(files, tmp_path):
    data = bytearray(open(files[1], "rb").read())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "bits.ckpt").write_bytes(data)
    assert "damaged at" in refusal(tmp_path / "bits.ckpt", config=files[0])


def test_a_zip_of_something_else_is_refused(files, tmp_path):
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w") as z:
        z.writestr("readme.txt", "hello")
    refusal(tmp_path / "z.ckpt", config=files[0])


def test_a_tensor_beyond_its_data_is_refused(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(4)}}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as z, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as out:
        for name in z.namelist():
            out.writestr(name, z.read(name)[:8] if "/data/" in name else z.read(name))
    stored = read_state_dict(tmp_path / "b.ckpt")
    with pytest.raises((RuntimeError, ValueError)):
        stored["x"].load()


def test_another_networks_checkpoint_is_refused(files, state, tmp_path):
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "other.ckpt")
    refusal(tmp_path / "other.ckpt", "lacks", config=files[0])
    name = "model.diffusion_model.out.2.bias"
    torch.save({"state_dict": {**state, name: torch.ones(5)}}, tmp_path / "shape.ckpt")
    refusal(tmp_path / "shape.ckpt", name, "[5]", "[4]", config=files[0])


def test_a_file_without_weights_is_refused(files, tmp_path):
    for content in ({"state_dict": {}}, [1, 2], {"a": "b"}):
        torch.save(content, tmp_path / "none.ckpt")
        refusal(tmp_path / "none.ckpt", "no weights", config=files[0])


YAMLS = ["model: {}", "a: [1", "model: {target: no.such.Class}", "model: {target: ldm.util.Nothing}"]


@pytest.mark.parametrize("yaml", YAMLS)
def test_a_bad_config_is_one_line(yaml, files, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml)
    with pytest.raises(ModelError) as e:
        load_model(tmp_path / "bad.yaml", files[1])
    assert "\n" not in str(e.value)
    with pytest.raises(ModelError, match="no such config"):
        load_model(tmp_path / "none.yaml", files[1])


def test_the_fingerprint_names_the_text_encoder(files, state, tmp_path):
    first = fingerprint(load_model(*files).cond_stage_model.transformer)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "half.ckpt")
    assert fingerprint(load_model(files[0], tmp_path / "half.ckpt").cond_stage_model.transformer) == first
    torch.manual_seed(1)
    assert fingerprint(instantiate_from_config(ldm_tiny.tiny_config().model).cond_stage_model.transformer) != first


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "p.ckpt").write_bytes(pickle.dumps({"state_dict": {}}, protocol=2))
    refusal(tmp_path / "p.ckpt")
