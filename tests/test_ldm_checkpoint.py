"""ldm.checkpoint: whatever a file holds, it is loaded right or refused in one line, and never run."""

import argparse
import io
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
from typing import Tuple

import ldm_tiny
import numpy as np
import pytest
import torch
from ldm import ModelError, checkpoint
from ldm.checkpoint import Inert, StoredTensor, read_checkpoint, read_state_dict
from ldm.modules.textual_inversion import LearnedTokens
from ldm.util import instantiate_from_config, load_model
from torch import nn

from utils import load_checkpoint, save_checkpoint


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


def test_tensors_that_share_memory_in_the_file_share_it_when_read_whole(tmp_path):
    x = torch.arange(6.0)
    torch.save({"x": x, "part": x[2:4]}, tmp_path / "t.pt")
    read = read_checkpoint(tmp_path / "t.pt", lazy=False)
    read["x"][2] = 9
    assert read["part"].tolist() == [9, 3]


def test_two_weights_of_one_memory_in_the_file_become_two(files, state, tmp_path):
    names = [f"model.diffusion_model.input_blocks.1.0.{n}" for n in ("in_layers.0.weight", "in_layers.0.bias")]
    torch.save({**state, **dict.fromkeys(names, state[names[0]])}, tmp_path / "tied.ckpt")
    own = load_model(files[0], tmp_path / "tied.ckpt").state_dict()
    own[names[0]].zero_()
    assert torch.equal(own[names[1]], state[names[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_file_is_mapped_and_gives_the_same_weights(dtype, files, state, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGE", 1000)
    model = load_model(*files, dtype=dtype)
    same(model, state, dtype)
    before = pathlib.Path(files[1]).read_bytes()
    for p in model.parameters():
        p.data.fill_(1)
    assert pathlib.Path(files[1]).read_bytes() == before


def test_the_same_content_is_the_same_bytes(tmp_path):
    content = {"state_dict": {"w": torch.ones(3)}, "step": 1}
    save_checkpoint(content, tmp_path / "a.pt")
    save_checkpoint(content, tmp_path / "another name.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another name.pt").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "another name.pt"]


def test_weights_that_are_not_finite_are_refused(files, state, tmp_path):
    name = "model.diffusion_model.out.2.bias"
    for value in (float("nan"), float("inf")):
        torch.save({**state, name: torch.full_like(state[name], value)}, tmp_path / "nan.ckpt")
        refusal(tmp_path / "nan.ckpt", name, "NaN or infinity", config=files[0])
    large = torch.full((100,), 3e38)
    assert checkpoint.is_finite(large) and not checkpoint.is_finite(large * 2)


# -------------------------------------------------------------------------------------------- hostile files


def write(path, pickled, records=(), compression=zipfile.ZIP_STORED):
    """A torch zip of these bytes of a pickle and {key: data}."""
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/version", "3\n")  # which torch asks for
        z.writestr("archive/data.pkl", pickled)
        for key, data in dict(records).items():
            z.writestr(f"archive/data/{key}", data)
    return path


def stored(key, numel=1):
    """Instructions that make a float storage whose record has the name `key`, instructions as well."""
    return b"(X\7\0\0\0storagectorch\nFloatStorage\n" + key + b"X\3\0\0\0cpuJ" + numel.to_bytes(4, "little") + b"tQ"


def tensor(numel, shape, stride, offset=0):
    """Instructions that make a float tensor of record 0, said to have `numel` numbers."""
    sizes = b"".join(b"(" + b"".join(b"\x8a\x08" + n.to_bytes(8, "little") for n in x) + b"t" for x in (shape, stride))
    storage = stored(b"X\1\0\0\x000", numel)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K" + bytes([offset]) + sizes + b"\x89}tR"


def one(value):
    """The pickle of {"x": value}, both as instructions."""
    return b"\x80\x02}X\1\0\0\0x" + value + b"s."


class Writes(nn.Module):
    """TorchScript whose __setstate__ writes a file of the author's choice."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> Tuple[str, bool]:
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: Tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(3), state[0])


def torchscript(mark):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Writes(str(mark))), buffer)
    if mark.exists():
        mark.unlink()
    return buffer.getvalue()


def two_directories(data):
    """The zip again, in which readers that go by the directory's offset find a program, and those that go by its size
    (Python's zipfile) none: `constants.pkl` has another name in the second."""
    size, offset = (int.from_bytes(data[-10 + i : -6 + i], "little") for i in (0, 4))
    directory = data[offset : offset + size]
    return data[: offset + size] + directory.replace(b"constants.pkl", b"constants.pkX") + data[-22:]


@pytest.mark.parametrize("disguise", [lambda data: data + b"PK\5\6", two_directories])
def test_a_disguised_program_is_refused_and_not_run(disguise, tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "evil.pt").write_bytes(disguise(torchscript(mark)))
    refusal(tmp_path / "evil.pt")
    assert not mark.exists()


def test_a_torchscript_archive_is_read_without_running_it(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "evil.pt").write_bytes(torchscript(mark))
    assert load_checkpoint(tmp_path / "evil.pt") == {} and not mark.exists()
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(3, 3)))
    torch.jit.save(torch.jit.script(net), str(tmp_path / "net.pt"))
    read = load_checkpoint(tmp_path / "net.pt")
    assert set(read) == set(net.state_dict())
    assert all(torch.equal(read[k], v) for k, v in net.state_dict().items())


def junk_before(data):
    return b"PK\3\4" + data


def second_zip(data):
    return data + data


def nested(n, begin, end):
    return begin * n + b"K\1" + end * n


DEEP = nested(150_000, b"", b"\x85")
NESTED_KEY = b"\x80\x02}" + DEEP + b"K\1s."
DOUBLED = b"K\1" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(40))  # of 2**40 parts
LAUGHS = b"](K\1K\1e" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(40))
COLLIDING = b"(" + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1000)) + b"u"
HOSTILE_PICKLES = {
    "a tuple of tuples as a key": (NESTED_KEY, "key"),
    "a tuple of tuples as a storage's name": (one(stored(DEEP)), "name"),
    "pairs of pairs as a storage's name": (one(stored(DOUBLED)), "name"),
    "a name that torch would import": (one(b"ctorch\n_inductor\n"), "would run"),
    "a name without end": (one(b"cldm\n" + b"a" * 1000 + b"\n"), "would run"),
    "deep lists": (one(nested(1000, b"]", b"a")), "nested"),
    "lists of lists, twice each": (one(LAUGHS), "nested"),
    "keys of one hash": (b"\x80\x02}" + COLLIDING + b".", "key"),
    "many instructions": (one(b"N0" * 500_000 + b"N"), "instructions"),
    "large": (one(b"B" + (2**24).to_bytes(4, "little") + bytes(2**24)), "bytes"),
    "a number of a million digits": (one(b"L" + b"9" * 1_000_000 + b"L\n"), "instruction LONG"),
    "an old instruction": (one(b"(S'touch mark'\nios\nsystem\n"), "instruction"),
    "an expanded tensor of 12 TB": (one(tensor(1, [1, 3, 2**20, 2**20], [0, 0, 0, 0])), "expanded"),
    "an overlapping tensor of 4 TB": (one(tensor(1, [2**20, 2**20], [0, 0])), "expanded"),
    "a tensor beyond its storage": (one(tensor(1, [2], [1])), "beyond"),
    "an offset beyond its storage": (one(tensor(1, [1], [1], 1)), "beyond"),
    "a storage beyond its record": (one(tensor(100, [100], [1])), "size"),
    "a negative size": (one(tensor(1, [2**63], [1])), "shape"),
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_a_hostile_pickle_is_refused(name, tmp_path):
    pickled, reason = HOSTILE_PICKLES[name]
    refusal(write(tmp_path / "evil.pt", pickled, {0: bytes(4)}), "refused", reason)


def test_a_changed_zip_is_refused(tmp_path):
    torch.save({"w": torch.arange(99.0)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    for change in (junk_before, second_zip):
        (tmp_path / "evil.pt").write_bytes(change(data))
        refusal(tmp_path / "evil.pt", "refused")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "twice.pt", "w") as z:
        for content in (one(b"K\1"), one(b"K\2")):
            z.writestr("archive/data.pkl", content)
    refusal(tmp_path / "twice.pt", "refused")


def test_a_deflate_bomb_is_refused(tmp_path):
    bomb = {0: bytes(2**26)}
    path = write(tmp_path / "bomb.pt", one(tensor(2**24, [2**24], [1])), bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refusal(path, "refused", "compressed")


def test_names_of_python_and_numpy_are_only_names(tmp_path):
    """A forged numpy dtype, a nest of _codecs.encode, and state set on classes: all by names that files may have."""
    state = b"(N}X\5\0\0\0pwnedK\1stb"
    for name in (b"argparse\nNamespace", b"pathlib\nPosixPath", b"collections\nOrderedDict", b"torch\nSize"):
        read = read_checkpoint(write(tmp_path / "build.pt", one(b"c" + name + b"\n" + state)))
        assert isinstance(read["x"], Inert)
    assert not any(hasattr(c, "pwned") for c in (argparse.Namespace, pathlib.PosixPath, Inert, Inert("a")))
    forged = b"cnumpy\ndtype\n(X\2\0\0\0O8K\0K\1tR(K\3X\1\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    scalar = b"cnumpy.core.multiarray\nscalar\n(" + forged + b"C\x08AAAAAAAAtR"
    assert isinstance(read_checkpoint(write(tmp_path / "numpy.pt", one(scalar)))["x"], Inert)
    nest = b"c_codecs\nencode\n(" * 30 + b"C\1a" + b"X\3\0\0\0hextR" * 30
    assert isinstance(read_checkpoint(write(tmp_path / "nest.pt", one(nest)))["x"], Inert)


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


FUNCTIONS = [
    (os.system, "touch {}"),
    (exec, "open('{}', 'w')"),
    (eval, "open('{}', 'w')"),
    (subprocess.check_output, "touch {}"),
    (open, "{}"),
    (torch.load, "{}"),
    (torch.jit.load, "{}"),
    (getattr, "{}"),
]


@pytest.mark.parametrize("function,argument", FUNCTIONS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_function_in_a_pickle_is_refused_and_not_run(function, argument, protocol, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"x": Runs(function, argument.format(mark))}, tmp_path / "evil.ckpt", pickle_protocol=protocol)
    refusal(tmp_path / "evil.ckpt", "refused, it would run")
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_content_comes_back_whatever_the_protocol(protocol, tmp_path):
    content = {
        "a": [1, 2**40, -3, 0.5, None, True, b"bytes", "text \u2713"],
        "b": (1, ("x",), {}),
        3: {"w": torch.ones(2)},
    }
    torch.save(content, tmp_path / "plain.pt", pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / "plain.pt", lazy=False)
    assert read.pop(3)["w"].tolist() == [1, 1] and content.pop(3)
    assert read == content or protocol == 2  # which has no bytes: they are a call of _codecs.encode
    torch.save({"loss": np.float64(1), "size": torch.Size([2]), "dtype": torch.float16}, tmp_path / "plain.pt")
    read = read_checkpoint(tmp_path / "plain.pt")
    assert isinstance(read["loss"], Inert) and read["size"] == (2,) and read["dtype"] == torch.float16


def test_the_format_before_torch_1_6_is_told(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refusal(tmp_path / "old.pt", "before 1.6", "torch.save it")


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
    refusal(tmp_path / "bits.ckpt", "damaged at data/", config=files[0])


def test_a_zip_of_something_else_is_refused(files, tmp_path):
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w") as z:
        z.writestr("readme.txt", "hello")
    refusal(tmp_path / "z.ckpt", config=files[0])


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


TARGETS = ["no.such.Class", "ldm.util.Nothing", "os.system", "ldm.util.instantiate_from_config", "ldm.util.torch.save"]
YAMLS = ["model: {}", "a: [1", *(f"model: {{target: {t}}}" for t in TARGETS)]


@pytest.mark.parametrize("yaml", YAMLS)
def test_a_bad_config_is_one_line(yaml, files, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml)
    with pytest.raises(ModelError) as e:
        load_model(tmp_path / "bad.yaml", files[1])
    assert "\n" not in str(e.value)
    with pytest.raises(ModelError, match="no such config"):
        load_model(tmp_path / "none.yaml", files[1])


def test_a_config_runs_nothing_but_classes_of_ldm_unless_trusted(tmp_path):
    inner = {"target": "os.mkdir", "params": {"path": str(tmp_path / "mark")}}
    nested = {"target": "ldm.util.instantiate_from_config", "params": {"config": inner, "trust": True}}
    for config in (inner, nested):
        with pytest.raises(ModelError, match="not a class of ldm"):
            instantiate_from_config(config)
    assert not (tmp_path / "mark").exists()
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    instantiate_from_config(nested, trust=True)
    assert (tmp_path / "mark").is_dir()


def test_the_fingerprint_names_the_text_encoder(files, state, tmp_path):
    first = LearnedTokens(load_model(*files).cond_stage_model).base_model
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "half.ckpt")
    assert LearnedTokens(load_model(files[0], tmp_path / "half.ckpt").cond_stage_model).base_model == first
    torch.manual_seed(1)
    assert LearnedTokens(instantiate_from_config(ldm_tiny.tiny_config().model).cond_stage_model).base_model != first


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "p.ckpt").write_bytes(pickle.dumps({"state_dict": {}}, protocol=2))
    refusal(tmp_path / "p.ckpt")
