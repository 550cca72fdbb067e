"""Trains a small Stable Diffusion from scratch: its autoencoder, a CLIP, then the latent diffusion model.

    python3 train.py --data hw2_data/emoji --out runs/tiny          # all three; the same line again goes on with them

DATA is what tools/make_emoji_dataset.py writes: emoji.npz and emoji.json. Leaves in OUT: autoencoder.pt, clip.pt (a
CLIP in OpenAI's layout, which clip.load builds), model.ckpt (in the layout of sd-v1-4.ckpt, half precision, of the
words only those that occur in captions), and for each stage a folder with last.ckpt (resumable), samples/ and csv/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import sys
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports pkg_resources, which setuptools warns of
    import clip  # noqa: E402
import numpy as np  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from ldm.models.diffusion.dpm_solver import DPMSolverSampler  # noqa: E402
from ldm.util import ModelError, instantiate_from_config, load_model, read_config, seeded_noise  # noqa: E402
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from pytorch_lightning.loggers import CSVLogger  # noqa: E402
from pytorch_lightning.plugins import TorchCheckpointIO  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision.utils import save_image  # noqa: E402
from tqdm import tqdm  # noqa: E402

ATTENTION = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"

# What captions may say, and how: {subject} with its article, {style}. The first is the one of previews and benchmarks.
CAPTIONS = [
    "{subject}, in the style of {style}",
    "{subject} in the style of {style}",
    "a picture of {subject} in the style of {style}",
    "a photo of {subject}",
    "{subject}",
    "a picture in the style of {style}",
]
SHARES = torch.tensor([4.0, 2, 2, 1, 2, 1])  # how often the diffusion model hears each


# ------------------------------------------------------------------------------------------------ data


class Pictures:
    """Captioned pictures: images uint8 [N, 3, 64, 64]; subject, vendor and split int64 [N], which index the lists
    subjects (with their article), vendors and splits."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        try:
            with np.load(folder / "emoji.npz") as arrays:
                self.images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
                self.subject, self.vendor, self.split = (
                    torch.from_numpy(arrays[k].astype(np.int64)) for k in ("subject", "vendor", "split")
                )
            info = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
            self.subjects, self.vendors = [s["phrase"] for s in info["subjects"]], [v["name"] for v in info["vendors"]]
            self.splits = info["splits"]
        except (OSError, KeyError, ValueError) as e:
            raise ModelError(f"{folder}: no emoji.npz and emoji.json of tools/make_emoji_dataset.py ({e})") from None

    def rows(self, split):
        """Indices of the pictures of "train", "val", "subject" or "style"."""
        return torch.nonzero(self.split == self.splits.index(split))[:, 0]

    def caption(self, row, form=0):
        """The caption of a picture in one of the forms of CAPTIONS."""
        subject, style = self.subjects[self.subject[row]], self.vendors[self.vendor[row]]
        return CAPTIONS[form].format(subject=subject, style=style)


def to_float(images):
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def moved(x):
    """Images [B, C, H, W] in [-1, 1], each a little turned (8 degrees), shrunk or grown (15 %) and shifted (6 %), on
    white."""
    turn, size, shift = ((torch.rand(len(x), k) * 2 - 1) * most for k, most in ((1, 0.14), (1, 0.15), (2, 0.12)))
    cos, sin = turn.cos() * (1 + size), turn.sin() * (1 + size)
    theta = torch.stack([torch.cat([cos, -sin, shift[:, :1]], 1), torch.cat([sin, cos, shift[:, 1:]], 1)], 1)
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1


class Batches(Dataset):
    """`length` draws of make(n) -> a batch of about n items, in batches as the loader asks for them."""

    def __init__(self, make, length):
        self.make, self.length = make, length

    def __len__(self):
        return self.length

    def __getitems__(self, indices):
        return self.make(len(indices))


# ------------------------------------------------------------------------------------------------ autoencoder


class Autoencoding(pl.LightningModule):
    """A variational autoencoder (Rombach et al. 2022, section 3.1) by the absolute errors of pixels and of their
    differences, which keep edges sharp, the squared ones of blocks of 4x4, which fix colours early, and a slight pull
    of latents to N(0, 1)."""

    def __init__(self, autoencoder, spec):
        super().__init__()
        self.model, self.spec = autoencoder.requires_grad_(True).to(memory_format=torch.channels_last), spec

    def of_fixed_size(self):
        return [self.model.encoder, self.model.decoder]

    def reconstruct(self, x, sample):
        """(images of images [B, 3, H, W] in [-1, 1], Kullback-Leibler divergence of the latents to N(0, 1))."""
        moments = self.model.quant_conv(self.model.encoder(x)).float()
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if sample else mean
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        return self.model.decoder(self.model.post_quant_conv(z)), kl

    def training_step(self, images, _):
        x = to_float(images)
        y, kl = self.reconstruct(x, sample=True)
        edges = sum((x.diff(dim=d) - y.float().diff(dim=d)).abs().mean() for d in (2, 3))
        colours = F.mse_loss(*(F.avg_pool2d(z.float(), 4) for z in (x, y)))
        loss = (x - y).abs().mean() + edges + 5 * colours + self.spec["kl"] * kl
        self.log_dict({"train_loss": loss, "train_kl": kl})
        return loss

    def validation_step(self, images, i):
        x = to_float(images)
        y, _ = self.reconstruct(x, sample=False)
        self.log("val_loss", (x - y).abs().mean())
        return torch.cat([x[:16], y[:16].float()]) if i == 0 else None

    def configure_optimizers(self):
        return optimizer_of(self.parameters(), self.spec)


@torch.no_grad()
def normalise_latents(autoencoder, images):
    """Scales the encoder's output and the decoder's input so that latents have unit variance: scale_factor is 1."""
    std = torch.cat([autoencoder.encode(to_float(part)).sample() for part in images.split(64)]).std()
    half = len(autoencoder.quant_conv.bias) // 2
    autoencoder.quant_conv.weight[:half] /= std
    autoencoder.quant_conv.bias[:half] /= std
    autoencoder.quant_conv.bias[half:] -= 2 * std.log()  # log variance
    autoencoder.post_quant_conv.weight *= std


# ------------------------------------------------------------------------------------------------ CLIP


class Words:
    """The words (tokens of CLIP's vocabulary) of some captions, numbered anew in their order.

    ids [V] are their numbers in the whole vocabulary; the start and the end of a text are among them.
    """

    def __init__(self, captions, length):
        self.length = length
        self.ids = clip.tokenize(captions, context_length=length, truncate=True).unique()

    def __call__(self, captions):
        """New numbers [B, length]."""
        return torch.searchsorted(self.ids, clip.tokenize(captions, context_length=self.length, truncate=True))


class Contrastive(pl.LightningModule):
    """CLIP (Radford et al. 2021) with several right captions a picture: one that says only the subject is right for
    every vendor's picture of it, one that says only the style for every picture in it. Right ones share the target."""

    def __init__(self, network, spec):
        super().__init__()
        self.model, self.spec = network, spec
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    def of_fixed_size(self):
        return []  # its batches vary

    def logits(self, x, tokens):
        return self.model(((x + 1) / 2 - self.mean) / self.std, tokens)[0].float()

    def training_step(self, batch, _):
        images, tokens, subject, vendor, form = batch
        says_subject = torch.tensor(["{subject}" in c for c in CAPTIONS], device=self.device)[form]
        says_style = torch.tensor(["{style}" in c for c in CAPTIONS], device=self.device)[form]
        right = ((subject[:, None] == subject) | ~says_subject) & ((vendor[:, None] == vendor) | ~says_style)
        logits, right = self.logits(moved(to_float(images)), tokens), right.float()
        loss = (
            F.cross_entropy(logits, right / right.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, right.T / right.sum(0)[:, None])
        ) / 2
        self.log("train_loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.model.logit_scale.data.clamp_(max=math.log(100))

    def validation_step(self, batch, i):
        """The nearest of the batch's captions is the right one, for what share of its pictures."""
        images, tokens, *_ = batch
        nearest = self.logits(to_float(images), tokens).argmax(1)
        self.log("val_accuracy", (nearest == torch.arange(len(images), device=self.device)).float().mean())

    def configure_optimizers(self):
        return optimizer_of(self.parameters(), self.spec)


def text_weights(state, prefix="transformer.text_model."):
    """The text tower of a CLIP's state dict in OpenAI's names, in those of transformers."""
    names = {
        "ln_final": "final_layer_norm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "c_fc": "fc1",
        "c_proj": "fc2",
        "attn": "self_attn",
        "resblocks": "layers",
        "transformer": "encoder",
    }
    out = {
        prefix + "embeddings.token_embedding.weight": state["token_embedding.weight"],
        prefix + "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for key, value in state.items():
        if not key.startswith(("transformer.", "ln_final.")):
            continue
        key = prefix + ".".join(names.get(part, part) for part in key.split("."))
        if "in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                out[key.replace("in_proj_", f"{name}_proj.")] = part
        else:
            out[key] = value
    return out


def whole_clip(network, ids, context_length=77):
    """State dict of a CLIP for its whole vocabulary and length: words that it never saw get the mean embedding."""
    state = {k: v.float() for k, v in network.state_dict().items()}
    rows, positions = state["token_embedding.weight"], state["positional_embedding"]
    table = rows.mean(0).repeat(49408, 1)
    table[ids] = rows
    unseen = positions.new_zeros(context_length - len(positions), positions.shape[1])
    return {**state, "token_embedding.weight": table, "positional_embedding": torch.cat([positions, unseen])}


def save_as_openai(state, size, path):
    """Writes a CLIP as OpenAI published theirs, a TorchScript archive in half precision: what clip.load expects."""
    network = clip.model.build_model(dict(state)).float()
    network.load_state_dict(state)  # build_model rounds
    images, tokens = torch.zeros(1, 3, size, size), torch.zeros(1, network.context_length, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is no longer advised
        traced = torch.jit.trace_module(network, {"encode_image": images, "encode_text": tokens}).half()
        save(traced, path, torch.jit.save)


# ------------------------------------------------------------------------------------------------ diffusion


class Diffusing(pl.LightningModule):
    """The latent diffusion model on cached latents [B, 2, 4, h, w] (mean and deviation) and conditionings [B, M, D].

    In training a squared error of eps counts min(SNR, gamma) / SNR (Hang et al. 2023, Min-SNR), SNR = alpha_bar /
    (1 - alpha_bar) and gamma = spec["min_snr"]: else the least noised latents, which hold no shapes, outweigh the rest.
    """

    def __init__(self, model, spec):
        super().__init__()
        self.model, self.spec = model, spec
        model.model.to(memory_format=torch.channels_last).requires_grad_(True)

    def of_fixed_size(self):
        return [self.model.model.diffusion_model]

    def errors(self, moments, cond, t, generator=None):
        """Mean squared error of eps of each latent [B]."""
        mean, std = moments.float().unbind(1)
        z, eps = (torch.randn(mean.shape, generator=generator).to(mean) for _ in range(2))
        predicted = self.model.apply_model(self.model.q_sample(mean + std * z, t, eps), t, cond.float())
        return (predicted.float() - eps).square().mean(dim=(1, 2, 3))

    def training_step(self, batch, _):
        t = torch.randint(self.model.num_timesteps, (len(batch[0]),), device=self.device)
        alpha_bar = self.model.alphas_cumprod[t]
        weights = (self.spec["min_snr"] * (1 - alpha_bar) / alpha_bar).clamp(max=1)
        loss = (weights * self.errors(*batch, t)).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, i):
        draw = torch.Generator().manual_seed(i)
        t = torch.linspace(0, self.model.num_timesteps - 1, len(batch[0]), device=self.device).long()
        self.log("val_loss", self.errors(*batch, t, draw).mean())
        if i:
            return None
        cond, uncond = batch[1][:32].float(), self.model.get_learned_conditioning([""])
        shape = batch[0].shape[2:]
        latents, _ = DPMSolverSampler(self.model).sample(
            20,
            len(cond),
            shape,
            cond,
            x_T=seeded_noise(0, range(len(cond)), shape)().to(self.device),
            verbose=False,
            unconditional_guidance_scale=4.0,
            unconditional_conditioning=uncond,
        )
        return self.model.decode_first_stage(latents)

    def configure_optimizers(self):
        return optimizer_of(self.model.model.parameters(), self.spec)


@torch.no_grad()
def cache_latents(autoencoder, images, variants):
    """Mean and deviation of the latents of each picture, and of it moved: half [variants, N, 2, 4, h, w]."""
    cached = []
    for variant in range(variants):
        for part in tqdm(images.split(64), f"latents {variant + 1} of {variants}", leave=False):
            posterior = autoencoder.encode(moved(to_float(part)) if variant else to_float(part))
            cached.append(torch.stack([posterior.mean, posterior.std], dim=1).half())
    return torch.cat(cached).unflatten(0, (variants, len(images)))


@torch.no_grad()
def cache_conditionings(model, captions):
    """{caption: half [M, D]} of the text encoder."""
    captions = list(dict.fromkeys(captions))
    parts = [captions[i : i + 256] for i in range(0, len(captions), 256)]
    cached = [model.get_learned_conditioning(part).half() for part in tqdm(parts, "captions", leave=False)]
    return dict(zip(captions, torch.cat(cached)))


def packed(model, name, ids, step, metrics):
    """The checkpoint: half precision, the words `ids` alone, the config by its name, the schedule left to it."""
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if k not in model.schedule_names}
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    state.update({TABLE: state[TABLE][ids], "known_words": ids})
    return {"state_dict": state, "config": name, "step": step, "metrics": metrics}


# ------------------------------------------------------------------------------------------------ training


def optimizer_of(parameters, spec):
    """AdamW without decay of vectors and embeddings; a linear warm-up over 200 steps, then a cosine to 0."""
    groups = [{"params": [], "weight_decay": decay} for decay in (0.05, 0.0)]
    for p in parameters:
        if p.requires_grad:
            groups[p.dim() < 2].get("params").append(p)
    optimizer = torch.optim.AdamW(groups, lr=spec["lr"], betas=(0.9, 0.99))
    warmup, total = 200, spec["steps"]

    def factor(step):
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))

    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
    }


class Seeds(pl.Callback):
    """Seeds each epoch, so that a resumed training draws what an uninterrupted one draws."""

    def on_train_epoch_start(self, trainer, module):
        torch.manual_seed(1000 + trainer.current_epoch)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the final name and renames: a full disk or a kill leaves the last.ckpt before it as it was."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        save(checkpoint, pathlib.Path(path), say=False)


class EagerValidation(pl.Callback):
    """Validates without compiled networks: each of its batch sizes would be compiled anew."""

    def on_validation_start(self, trainer, module):
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer, module):
        torch.compiler.set_stance("default")


class Samples(pl.Callback):
    """Saves the pictures that a validation returns, and the metrics' last values. Stands before the EMA callback."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if outputs is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{trainer.global_step:06d}.png"
            save_image(outputs.float().clamp(-1, 1), path, nrow=16, normalize=True, value_range=(-1, 1))


def fit(module, make, val, out, spec, args):
    """Trains a stage for spec["steps"] steps, from out/last.ckpt on where it is; returns its last metrics.

    The module then holds the averaged weights where spec has "ema", and is in eval mode.
    """
    epoch = min(500, spec["steps"])
    last = out / "last.ckpt"
    ema = []
    if "ema" in spec:  # every fourth step: averaging the whole model takes time
        ema = [
            EMAWeightAveraging(
                decay=spec["ema"] ** 4, update_every_n_steps=4, update_starting_at_step=min(200, epoch // 2)
            )
        ]
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=spec["steps"],
        precision=args.precision,
        gradient_clip_val=1.0,
        logger=CSVLogger(out, name="csv"),
        plugins=[WholeCheckpoints()],
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        enable_model_summary=False,
        callbacks=[
            Samples(out / "samples"),
            *ema,
            Seeds(),
            *([EagerValidation()] if args.compile else []),
            ModelCheckpoint(out, "last", enable_version_counter=False, save_on_train_epoch_end=True),
        ],
    )
    loaders = [
        DataLoader(Batches(make, epoch * spec["batch_size"]), spec["batch_size"], collate_fn=lambda b: b),
        DataLoader(val, batch_size=None),
    ]
    if args.compile:
        for network in module.of_fixed_size():
            network.compile(dynamic=False)
    # on a CPU, the backward pass of scaled_dot_product_attention's default is slower than that of plain products
    with sdpa_kernel([SDPBackend.MATH] if trainer.strategy.root_device.type == "cpu" else list(ATTENTION)):
        try:
            trainer.fit(module, *loaders, ckpt_path=str(last) if last.is_file() else None)
        except SystemExit:  # Lightning's own, after Ctrl-C
            goes_on = f"goes on from {last}" if last.is_file() else f"starts anew: {last} comes after {epoch} steps"
            raise KeyboardInterrupt(f"interrupted; the same line {goes_on}") from None
    module.load_state_dict(torch.load(last, weights_only=False)["state_dict"])  # the averaged ones
    module.eval()
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}


def draw(rows, n):
    return rows[torch.randint(len(rows), (n,))]


def train_autoencoder(config, pictures, out, args):
    spec, train = config.training.autoencoder, pictures.rows("train")
    autoencoder = instantiate_from_config(config.model.params.first_stage_config)
    module = Autoencoding(autoencoder, spec)
    val = list(pictures.images[pictures.rows("val")].split(64))
    metrics = fit(module, lambda n: pictures.images[draw(train, n)], val, out / "autoencoder", spec, args)
    normalise_latents(autoencoder, pictures.images[train[:: max(1, len(train) // 512)]])
    save({"state_dict": autoencoder.state_dict(), "metrics": metrics}, out / "autoencoder.pt")


def train_clip(config, pictures, out, args):
    spec, text = config.training.clip, config.model.params.cond_stage_config.params
    train, val = pictures.rows("train"), pictures.rows("val")
    words = Words(train_captions(pictures), text.max_length)
    sizes = text.config
    network = clip.model.CLIP(
        spec.embed_dim,
        pictures.images.shape[-1],
        tuple(spec.vision_layers),
        spec.vision_width,
        None,
        text.max_length,
        len(words.ids),
        sizes.hidden_size,
        sizes.num_attention_heads,
        sizes.num_hidden_layers,
    )
    members = [train[pictures.subject[train] == s] for s in pictures.subject[train].unique()]

    def make(n):
        """About n pictures, up to four of a subject: what tells styles apart needs the same subject in several."""
        some = torch.randperm(len(members))[: max(1, n // 4)]
        rows = torch.cat([members[i][torch.randperm(len(members[i]))[:4]] for i in some])
        form = torch.randint(len(CAPTIONS), (len(rows),))
        tokens = words([pictures.caption(r, f) for r, f in zip(rows, form)])
        return pictures.images[rows], tokens, pictures.subject[rows], pictures.vendor[rows], form

    known = val[:200]
    tokens = words([pictures.caption(r) for r in known])
    metrics = fit(Contrastive(network, spec), make, [(pictures.images[known], tokens)], out / "clip", spec, args)
    whole = whole_clip(network, words.ids)
    save({"text": text_weights(whole), "ids": words.ids, "metrics": metrics}, out / "text.pt")
    save_as_openai(whole, pictures.images.shape[-1], out / "clip.pt")


def train_captions(pictures):
    return list(dict.fromkeys(pictures.caption(r, f) for r in pictures.rows("train") for f in range(len(CAPTIONS))))


def train_diffusion(config, pictures, out, args):
    spec, train, val = config.training.diffusion, pictures.rows("train"), pictures.rows("val")
    text = torch.load(out / "text.pt")
    model = instantiate_from_config(config.model)
    model.first_stage_model.load_state_dict(torch.load(out / "autoencoder.pt")["state_dict"])
    model.cond_stage_model.load_state_dict(text["text"])
    if args.start:
        model.model.load_state_dict(load_model(config, args.start).model.state_dict())
    latents = cache_latents(model.first_stage_model, pictures.images[train], spec.variants)
    conds = cache_conditionings(model, ["", *train_captions(pictures)])

    def make(n):
        i, variant = torch.randint(len(train), (n,)), torch.randint(spec.variants, (n,))
        captions = [pictures.caption(train[k], f) for k, f in zip(i, SHARES.multinomial(n, replacement=True))]
        dropped = torch.rand(n) < spec.drop
        return latents[variant, i], torch.stack([conds["" if d else c] for d, c in zip(dropped, captions)])

    held = cache_latents(model.first_stage_model, pictures.images[val], 1)[0]
    told = cache_conditionings(model, [pictures.caption(r) for r in val])
    told = torch.stack([told[pictures.caption(r)] for r in val])
    held_back = list(zip(held.split(128), told.split(128)))
    metrics = fit(Diffusing(model, spec), make, held_back, out / "diffusion", spec, args)
    save(packed(model, pathlib.Path(args.config).stem, text["ids"], spec.steps, metrics), out / "model.ckpt")


def save(content, path, write=torch.save, say=True):
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(content, str(temporary))
        temporary.replace(path)
    except RuntimeError as e:  # torch's own writer, on a full disk
        raise ModelError(f"{path}: could not be written ({e}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)
    if say:
        print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


STAGES = {
    "autoencoder": ("autoencoder.pt", train_autoencoder),
    "clip": ("clip.pt", train_clip),
    "diffusion": ("model.ckpt", train_diffusion),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="hw2_data/emoji", help="folder of emoji.npz and emoji.json")
    parser.add_argument("--out", default="runs/tiny")
    parser.add_argument("--config", default=str(ROOT / "configs/stable-diffusion/tiny.yaml"))
    parser.add_argument("--precision", default="bf16-mixed", help="Lightning's, say 32-true (default: bf16-mixed)")
    parser.add_argument("--start", metavar="CKPT", help="a model.ckpt whose network the diffusion stage begins with")
    parser.add_argument("--compile", action="store_true", help="needs PyTorch 2.6 and a C++ compiler")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the config")
    args = parser.parse_args(argv)
    try:
        from omegaconf import OmegaConf

        config = OmegaConf.merge(read_config(args.config), OmegaConf.from_dotlist(args.set))
        pictures, out = Pictures(args.data), pathlib.Path(args.out)
        for name, (result, train) in STAGES.items():
            if not (out / result).is_file():
                (out / name).mkdir(parents=True, exist_ok=True)
                torch.manual_seed(0)
                train(config, pictures, out, args)
    except (ModelError, OSError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(str(e) or "interrupted", file=sys.stderr)
        return 130
    print(f"wrote {out}/{{autoencoder.pt,clip.pt,model.ckpt}}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
