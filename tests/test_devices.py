"""Every command and every training on an accelerator, or rather on a pretend one: pretend.py says what that sees."""

import argparse
import inspect
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from p3_tiny import write_model
from PIL import Image
from test_digits import write_domain

import p3_model  # isort: skip  (it puts ldm on the path)
from ldm.util import CONFIGS, read_config

import diffusion
import utils
from classifiers import Inception
from utils import pick_device, pick_precision, torch_version, training_precision

if torch_version() < (2, 5):
    pytest.skip("the pretend accelerator needs torch 2.5 or newer", allow_module_level=True)

import pretend  # noqa: E402
from pretend import DEVICE, Pretend  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

CHECKPOINTS, TINY = ROOT / "checkpoints", ROOT / "tiny/textual_inversion"
PRETEND = "pretend:0"


@pytest.fixture(autouse=True)
def weights_come_with_the_model(monkeypatch):
    """ldm puts weights on the device one by one, by `parameter.data =`, which the pretend device cannot; here they come
    to the CPU, and with the whole model to the device."""
    from ldm import util

    real = util.load_weights
    monkeypatch.setattr(
        util, "load_weights", lambda model, stored, path, device, dtype: real(model, stored, path, "cpu", dtype)
    )


def run(script, device, *options):
    """main() of a script, with --device; gives the Pretend that counted."""
    path = ROOT / script
    sys.path.insert(0, str(path.parent))
    main = runpy.run_path(str(path), run_name=path.stem)["main"]
    argv = [*map(str, options), "--device", device]
    before, sys.argv = sys.argv, [script, *argv]
    try:
        with Pretend() as counted:
            assert not (main(argv) if inspect.signature(main).parameters else main())
    finally:
        sys.argv = before
        sys.path.remove(str(path.parent))
    return counted


def contents(folder):
    """{name: pixels} of every picture, and {name: text} of every csv and JSON, below a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    pictures = {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in files if p.suffix == ".png"}
    return pictures, {str(p.relative_to(folder)): p.read_text() for p in files if p.suffix in (".csv", ".json")}


# ------------------------------------------------------------------------ the commands


def save_small_unet(path):
    """An untrained network of Problem 1 whose answer depends on all that it is given."""
    from p1_model import DigitUNet

    torch.manual_seed(0)
    model = DigitUNet(16, 64)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05) if p.abs().sum() == 0 else None
    config = {"channels": 16, "deep": 64, "T": 1000, "schedule": "cosine", "objective": "v", "min_snr": 5.0}
    utils.save_checkpoint({"state_dict": utils.half(model.state_dict()), "config": config}, path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the commands take: noises, digits, a JSON with two prompts, and pictures for the grader of Problem 3."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "noise").mkdir()
    for i in range(2):
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i))
        torch.save(noise, folder / f"noise/{i:02}.pt")
    write_domain(folder / "svhn", count=20)
    task = json.loads((TINY / "input.json").read_text())
    for key, entry in task.items():
        for name in ("prompt", "prompt_4_clip_eval", "baseline"):
            entry[name] = entry[name][:1]
        entry["validation_prompts"] = dict(list(entry["validation_prompts"].items())[:1])
        (folder / "graded" / key / "0").mkdir(parents=True)
        for i in range(25):
            shutil.copy(next((TINY / key).glob("*.*g")), folder / f"graded/{key}/0/{i}.png")
    (folder / "input.json").write_text(json.dumps(task))
    (folder / "clip/val").mkdir(parents=True)
    shown = sorted((ROOT / "tiny/clip_zeroshot/val").glob("*.png"))[::10][:4]
    for path in shown:
        shutil.copy(path, folder / "clip/val")
    names = json.loads((ROOT / "tiny/clip_zeroshot/id2label.json").read_text())
    names = {i: names[i] for i in {path.name.split("_")[0] for path in shown}}
    (folder / "clip/id2label.json").write_text(json.dumps(names))
    save_small_unet(folder / "unet.pt")
    for domain in ("mnistm", "svhn"):
        (folder / "digits" / domain).mkdir(parents=True)
        for i in range(10):
            shutil.copy(folder / f"svhn/data/{i:05}.png", folder / f"digits/{domain}/{i}_001.png")
    return folder


FP32 = ["--precision", "fp32"]


def three_steps(work):
    return ["--checkpoint", work / "unet.pt", "--steps", 3, *FP32]


COMMANDS = {
    "p1_infer.py dpm++": lambda w, o: [o, "--num-per-digit", 1, *three_steps(w)],
    "p1_infer.py ddpm": lambda w, o: [o, "--num-per-digit", 1, "--sampler", "ddpm", *three_steps(w)],
    "p1_infer.py strips": lambda w, o: ["--trajectory", o / "x.png", "--interval", 0, 1000, *three_steps(w)],
    "p2_ddim.py": lambda w, o: [
        *(w / "noise", o, CHECKPOINTS / "p2_faces.pt", "--eta", 0.5, "--steps", 4),
        *("--interpolate", "slerp", "--grid", o / "row.png", *FP32),
    ],
    "p3_infer.py": lambda w, o: [
        *(w / "input.json", o, CHECKPOINTS / "tiny.ckpt", "--embeddings", TINY / "embeddings"),
        *("--images", 2, "--steps", 3, *FP32),
    ],
    "stable-diffusion/scripts/txt2img.py": lambda w, o: [
        *("--prompt", "a rocket", "--outdir", o, "--ckpt", CHECKPOINTS / "tiny.ckpt", "--H", 64, "--W", 64, "--f", 4),
        *("--n_iter", 1, "--n_samples", 2, "--ddim_steps", 4, "--ddim_eta", 0.5, "--precision", "full"),
    ],
    "p3_clip_zeroshot.py": lambda w, o: ["--data", w / "clip", "--model", CHECKPOINTS / "tiny_clip.pt", "--out", o],
    "p4_infer.py": lambda w, o: [w / "svhn/data", o / "digits.csv", "--target", "svhn"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_makes_the_same_on_the_device_as_on_the_cpu(command, work, tmp_path):
    for device in ("cpu", PRETEND):
        (tmp_path / device).mkdir()
        run(command.split()[0], device, *COMMANDS[command](work, tmp_path / device))
    (pictures, texts), (others, other_texts) = contents(tmp_path / "cpu"), contents(tmp_path / PRETEND)
    assert set(pictures) == set(others) and set(texts) == set(other_texts) and (pictures or texts)
    for name, picture in pictures.items():
        assert abs(picture - others[name]).max() <= 1, name
    for name in texts:
        if name.endswith(".csv"):
            assert texts[name] == other_texts[name]


@pytest.mark.parametrize("grader", ["digit_classifier.py", "evaluation/grade_hw2_3.py"])
def test_a_grader_says_the_same_on_the_device_as_on_the_cpu(grader, work, capsys):
    options = {
        "digit_classifier.py": ["--folder", work / "digits", "--svhn-checkpoint", CHECKPOINTS / "svhn_classifier.pth"],
        "evaluation/grade_hw2_3.py": [
            *("--json_path", work / "input.json", "--input_dir", TINY, "--output_dir", work / "graded"),
            *("--clip", CHECKPOINTS / "tiny_clip.pt"),
        ],
    }[grader]
    said = [(run(grader, device, *options), capsys.readouterr().out)[1] for device in ("cpu", PRETEND)]
    assert said[0] == said[1] and said[0]


def test_hw2_1_reads_nothing_back_but_its_pictures(work, tmp_path):
    """In 2 batches of 16 steps: hw2_1.sh's, though fewer and smaller."""
    small = ["--checkpoint", work / "unet.pt", "--num-per-digit", 2, "--batch-size", 20]
    counted = run("p1_infer.py", PRETEND, tmp_path / "out", *small)
    assert counted.reads <= 1  # the first one asks whether the device computes at all
    assert counted.downloads == 2


# ------------------------------------------------------------------------ the trainings, by Lightning itself


@pytest.fixture
def waits(monkeypatch):
    """Has Lightning train on the pretend device too; a list that gets, for each step of it, how often it waited."""
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.accelerators import Accelerator
    from pytorch_lightning.strategies import SingleDeviceStrategy

    class PretendAccelerator(Accelerator):
        def setup_device(self, device):
            pass

        def teardown(self):
            pass

        def get_device_stats(self, device):
            return {}

        @staticmethod
        def parse_devices(devices):
            return [DEVICE]

        @staticmethod
        def get_parallel_devices(devices):
            return [DEVICE]

        @staticmethod
        def auto_device_count():
            return 1

        @staticmethod
        def is_available():
            return True

        @staticmethod
        def name():
            return "pretend"

    class Counting(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            self.before = sum(self.count())

        def on_train_batch_end(self, trainer, module, *_):
            steps.append(sum(self.count()) - self.before)

        def count(self):
            return pretend.now.reads, pretend.now.downloads, pretend.now.uploads

    def trainer(accelerator, **options):
        if accelerator == "pretend":
            options["callbacks"].append(Counting())
            options.update(strategy=SingleDeviceStrategy(device=DEVICE), devices=1)
            accelerator = PretendAccelerator()
        return real(accelerator=accelerator, **options)

    steps, real = [], pl.Trainer
    monkeypatch.setattr(pl, "Trainer", trainer)
    return steps


def write_data(folder):
    """The data of every training: digits/, photos/ and emoji/; gives the folder."""
    from test_p3_train import write_emoji

    for seed, name in enumerate(("mnistm", "svhn")):
        write_domain(folder / "digits" / name, count=200, seed=seed, flat=True)
    (folder / "photos").mkdir()
    random = np.random.RandomState(0)
    for i in range(60):
        Image.new("RGB", (32, 32), tuple(random.randint(0, 256, 3).tolist())).save(folder / f"photos/{i:02}.png")
    write_emoji(folder / "emoji")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("pytorch_lightning")
    return write_data(tmp_path_factory.mktemp("data"))


STEPS = ["--epoch-steps", 2, "--warmup", 1, "--precision", "fp32"]
TWO_STEPS = [  # of each stage of p3_train.py, with a small CLIP
    "--set",
    *(f"{s}.{x}" for s in ("autoencoder", "text_encoder", "judge", "diffusion") for x in ("steps=2", "batch_size=4")),
    *(f"{s}.vision_layers=[1,1,1,1]" for s in ("text_encoder", "judge")),
]
SMALL = [*STEPS, "--steps", 2, "--batch-size", 4, "--ema", 0.5]
TRAININGS = {
    "p1_train.py": (["--channels", 16, "--deep", 64], "digits"),
    "p2_train.py": (["--size", 32, "--channel", 4], "photos"),
    "p4_train.py": (["--target", "svhn", "--refine", "--start", CHECKPOINTS / "p4_svhn_dann.pt"], "digits"),
}


def learned(path):
    """The tensors of a checkpoint, or of its state dict."""
    content = torch.load(path, weights_only=False)
    content = content.get("state_dict", content)
    return {k: v.float() for k, v in content.items() if torch.is_tensor(v) and v.is_floating_point()}


def same(a, b, atol=2e-3):
    a, b = learned(a), learned(b)
    return a and set(a) == set(b) and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


@pytest.fixture
def samples_in_three_steps(monkeypatch):
    """What a training shows of itself, in 3 steps of a sampler, which pass through all that 16 or 50 do."""
    real = diffusion.timesteps
    for module in ("diffusion", "p1_model"):
        monkeypatch.setattr(f"{module}.timesteps", lambda T, steps, *how: real(T, 3, *how))


@pytest.mark.usefixtures("samples_in_three_steps")
@pytest.mark.parametrize("script", TRAININGS)
def test_a_training_learns_the_same_on_the_device_as_on_the_cpu_and_waits_in_no_step(script, data, tmp_path, waits):
    options, folder = TRAININGS[script]
    for device in ("cpu", PRETEND):
        run(script, device, "--data", data / folder, "--out", tmp_path / device, *options, *SMALL)
    assert waits == [0, 0]
    assert same(tmp_path / "cpu/best.pt", tmp_path / PRETEND / "best.pt")
    assert same(tmp_path / "cpu/last.ckpt", tmp_path / PRETEND / "last.ckpt")


def test_the_small_stable_diffusion_learns_the_same_on_the_device_and_waits_in_no_step(
    data, tmp_path, waits, monkeypatch
):
    monkeypatch.setattr("p3_clip.save_clip", torch.save)  # its tracing, on the CPU, does not work under a Pretend
    monkeypatch.setattr("p3_pictures.Inception", lambda device: Inception(torch.device("cpu")))  # nor does its archive
    config = read_config(CONFIGS["tiny"])
    config.model.params.unet_config.params.update(model_channels=32, channel_mult=[1, 1], attention_resolutions=[2])
    config.model.params.cond_stage_config.params.config.update(num_hidden_layers=2)
    OmegaConf.save(config, tmp_path / "small.yaml")
    small = ["--config", tmp_path / "small.yaml", *TWO_STEPS]
    generate = p3_model.generate
    monkeypatch.setattr("p3_model.generate", lambda *args, steps, **how: generate(*args, steps=3, **how))
    for device in ("cpu", PRETEND):
        run("p3_train.py", device, "--data", data / "emoji", "--out", tmp_path / device, *STEPS, *small)
    masks = 2  # one a layer: the clip package puts them on the device in its first step, and keeps them there
    assert waits == [0, 0, masks, 0, masks, 0, 0, 0]
    for name in ("autoencoder.pt", "text.pt", "model.ckpt"):
        a, b = tmp_path / "cpu" / name, tmp_path / PRETEND / name
        if name == "text.pt":
            a, b = (torch.load(p, weights_only=False)["text"] for p in (a, b))
            assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)
        else:
            assert same(a, b, atol=1e-2), name


def test_a_classifier_is_trained_the_same_on_the_device_as_on_the_cpu(data, tmp_path):
    options = ["--train", "svhn", "--data", data / "digits", "--epochs", 1, "--batch-size", 32, *FP32]
    for device in ("cpu", PRETEND):
        run("digit_classifier.py", device, *options, "--out", tmp_path / f"{device}.pth")
    assert same(tmp_path / "cpu.pth", tmp_path / f"{PRETEND}.pth")


def test_textual_inversion_learns_and_chooses_the_same_on_the_device_as_on_the_cpu(work, tmp_path):
    config, model = write_model(tmp_path)
    for device in ("cpu", PRETEND):
        out = tmp_path / device
        run(
            *("p3_textual_inversion.py", device, "--json", work / "input.json", "--data", TINY, "--only", 0),
            *("--ckpt", model, "--config", config, "--clip", CHECKPOINTS / "tiny_clip.pt", "--out", out),
            *("--work", out / "work", "--steps", 2, "--batch-size", 2, "--save-every", 1, "--preview-every", 2),
            *("--validation-pictures", 2, "--crops", 1, *FP32),
        )
    files = [tmp_path / device / "new1.safetensors" for device in ("cpu", PRETEND)]
    a, b = (p3_model.read_embeddings(file)[0]["<new1>"] for file in files)
    assert torch.allclose(a, b, atol=1e-4)
    scores = [json.loads((tmp_path / device / "work/new1/scores.json").read_text()) for device in ("cpu", PRETEND)]
    assert list(scores[0]) == list(scores[1]) and len(scores[0]) == 2
    assert torch.allclose(*(torch.tensor(list(s.values())) for s in scores), atol=0.05)


# ------------------------------------------------------------------------ from one machine to another


@pytest.mark.parametrize("there, here", [(PRETEND, "cpu"), ("cpu", PRETEND)])
def test_a_training_goes_on_on_another_kind_of_machine(there, here, data, tmp_path, waits, monkeypatch):
    options, folder = TRAININGS["p4_train.py"]
    line = ["--data", data / folder, "--out", tmp_path, *options, *SMALL, "--steps", 4]
    with monkeypatch.context() as patch:
        if there != "cpu":  # what is saved says that it was on a GPU, which this machine has not
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run("p4_train.py", there, *line, "--max-epochs", 1)
    run("p4_train.py", here, *line)
    assert torch.load(tmp_path / "last.pt", map_location="cpu", weights_only=False)["step"] == 4
    assert torch.load(tmp_path / "last.ckpt", map_location="cpu", weights_only=False)["global_step"] == 4


# ------------------------------------------------------------------------ precision and memory


@pytest.mark.parametrize("capability, expected", [((8, 6), torch.bfloat16), ((7, 5), torch.float16)])
def test_trainings_take_bf16_where_the_gpu_has_it_and_fp16_elsewhere(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    assert training_precision("auto", cuda) == expected
    assert training_precision("fp32", cuda) == torch.float32 and pick_precision("auto", cuda) == torch.float16


def test_a_classifier_in_fp16_is_trained_with_scaled_gradients(data, tmp_path, monkeypatch):
    import digit_classifier

    scaled = []

    class Scaler:
        def scale(self, loss):
            return loss

        def step(self, optimizer):
            scaled.append(1)
            optimizer.step()

        def update(self):
            pass

    def scaler(device, dtype):
        return scaled.append(dtype) or Scaler()

    monkeypatch.setattr(utils, "grad_scaler", scaler)
    monkeypatch.setattr(utils, "autocast", lambda device, dtype: torch.autocast("cpu", torch.bfloat16))
    args = {"data": data / "digits", "train": "mnistm", "batch_size": 32, "epochs": 1, "seed": 0, "out": tmp_path / "c"}
    digit_classifier.train(argparse.Namespace(**args), torch.device("cpu"), torch.float16)
    assert scaled[0] == torch.float16 and len(scaled) > 1


def test_a_gpu_computes_float32_as_float32(monkeypatch):
    """For every network that is run on it, peers in benchmarks among them."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [f.allow_tf32 for f in flags]
    monkeypatch.setattr(utils, "usable", lambda device: True)
    try:
        for f in flags:
            f.allow_tf32 = True
        pick_device("cuda")
        assert not any(f.allow_tf32 for f in flags)
    finally:
        for f, value in zip(flags, before):
            f.allow_tf32 = value


def test_five_guided_pictures_without_fused_attention_need_no_tensor_of_1_gb(monkeypatch):
    """As torch 1.11 runs it: the full network on 5 pictures of 512x512 in half precision; shapes only."""
    from ldm.modules import attention
    from ldm.util import instantiate_from_config

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [x.numel() * x.element_size() for x in pretend.tensors_of(result)]
            self.bytes = max([self.bytes, *sizes])
            return result

    monkeypatch.setattr(attention, "attention", attention.sliced_attention)
    with torch.device("meta"):
        unet = instantiate_from_config(read_config(CONFIGS["v1-inference"]).model.params.unet_config).half().eval()
        x, t, context = torch.empty(10, 4, 64, 64).half(), torch.empty(10), torch.empty(10, 77, 768).half()
    with torch.no_grad(), Largest() as largest:
        assert unet(x, t, context=context).shape == x.shape
    assert 2**27 <= largest.bytes < 2**30
