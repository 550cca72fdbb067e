"""Textual Inversion (Gal et al. 2023): learns the vectors of one placeholder from a few pictures, keeps the best step.

    training = Inversion(model, learned_tokens(model), concept, Recipe(), "runs/new1")
    print(training.run(image_files("hw2_data/textual_inversion/0"), "embeddings/new1.safetensors"))

p3_textual_inversion.py runs this for all concepts of a JSON, p3_infer.py for a token that has no embedding yet.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import re
import time
from typing import NamedTuple

import pandas
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import utils
from diffusion import training_loss
from p3_clip import best_fifth, image_scores, text_scores
from p3_concepts import is_pair
from p3_model import fitting_batch, generate, read_embeddings
from utils import UserError


class Recipe(NamedTuple):
    """Every setting of a training; the defaults are the shipped result's."""

    steps: int = 400
    batch: int = 4
    lr: float = 1.25e-3  # for one picture: times the batch, as the paper scales it
    vectors: int = 1
    init_word: str = ""  # "" takes the concept's own, or what it is
    crops: int = 4  # random crops a picture; one more is held back
    save_every: int = 50
    preview_every: int = 100
    validation_pictures: int = 5  # of each prompt that steps are chosen on; the grader draws 25
    average: int = 1  # a step to choose from is the mean of so many saved ones, up to it
    size: int = 512
    seed: int = 0


# Captions after the paper's (Gal et al. 2023, appendix), which took CLIP's ImageNet templates.
LOOKS = ["", "good ", "close-up ", "cropped ", "bright ", "dark ", "blurry ", "clean "]
THINGS = ["an illustration", "a drawing", "a picture", "a rendition", "artwork"]
OBJECT_CAPTIONS = [f"a {look}photo of {article} {{}}" for look in LOOKS for article in ("a", "the", "one")]
STYLE_CAPTIONS = [f"a {look}painting in the style of {{}}" for look in LOOKS]
STYLE_CAPTIONS += [f"{thing} in the style of {{}}" for thing in THINGS]

# What checkpoints are chosen on: unlike the captions above, and unlike the course's prompts.
OBJECT_VALIDATION = [
    "A {} walking along a sandy beach.",
    "A {} in front of the Eiffel Tower.",
    "A {} sitting in a library.",
    "A {} on a snowy mountain.",
]
STYLE_VALIDATION = [
    "A lighthouse on a cliff in the style of {}.",
    "A crowded market in the style of {}.",
    "A castle by a lake in the style of {}.",
    "A train station in the style of {}.",
]

MIRROR_CHANGES = set("text letter letters word words number sign logo poster book map clock watch flag".split())


def kind_of(concept):
    """ "style" where a prompt says "in the style of <token>", else "object"."""
    return "style" if any(f"style of {concept.token}" in p for p in concept.prompts) else "object"


def may_flip(concept):
    """Whether the mirror image of this concept is still the concept: not so for writing, clocks and the like."""
    return not MIRROR_CHANGES & set(re.findall(r"\w+", concept.word.lower()))


def captions_of(concept, kind, files):
    """What is said of each picture: a list of texts a file, {} for the token."""
    if not isinstance(concept.captions, dict):
        return [concept.captions or (STYLE_CAPTIONS if kind == "style" else OBJECT_CAPTIONS)] * len(files)
    for path in files:
        if path.name not in concept.captions:
            raise UserError(f'{path}: the JSON\'s "train_captions" lacks it; add captions, or give one list for all')
    return [concept.captions[path.name] for path in files]


# -------------------------------------------------------------------------------- data


class Examples(NamedTuple):
    """What a token is learned from. Moments are mean and deviation of the autoencoder's posterior, sampled anew each
    step: [N, 2, 4, h, w] of as many crops of each picture, picture by picture; `held`, one of each, is never trained
    on (but of a square picture all crops are the whole: there only the noise is held back). Captions are a list of
    texts for each picture, {} for the token."""

    moments: torch.Tensor
    held: torch.Tensor
    captions: list


def crops_of(path, size, count, flip, draw):
    """`count` random crops of a picture with its short side made `size`, every other one mirrored if `flip`.

    Returns [count, 3, size, size] in [-1, 1].
    """
    image = utils.open_image(path)
    scale = size / min(image.size)
    image = image.resize([max(size, round(s * scale)) for s in image.size], Image.LANCZOS)
    crops = []
    for i in range(count):
        left, top = (int(torch.randint(s - size + 1, (), generator=draw)) for s in image.size)
        crop = image.crop((left, top, left + size, top + size))
        crops.append(to_tensor(ImageOps.mirror(crop) if flip and i % 2 else crop) * 2 - 1)
    return torch.stack(crops)


@torch.no_grad()
def encode(model, files, recipe, flip):
    """(moments of the training crops, those of the held-back crops) of some pictures, as Examples has them."""
    draw, moments = torch.Generator().manual_seed(recipe.seed), []
    for path in tqdm(files, desc="encode", unit="picture", leave=False):
        crops = crops_of(path, recipe.size, recipe.crops + 1, flip, draw)
        posterior = model.encode_first_stage(crops.to(model.device))
        moments.append(torch.stack([posterior.mean.float(), posterior.std.float()], dim=1))
    moments = torch.stack(moments)  # [pictures, crops + 1, 2, 4, h, w]
    return moments[:, :-1].flatten(0, 1), moments[:, -1]


@torch.no_grad()
def initial(tokens, words, vectors=1):
    """Vectors [vectors, dim] to start from: one is the mean of all words, several are the words' own, in turns."""
    embedder, words = tokens.embedder, words.replace(",", " ").split()
    ids = [embedder.tokenizer(w, add_special_tokens=False)["input_ids"] for w in words]
    if not words or not all(ids) or 1 < vectors < len(words):
        raise UserError(f"initial words {words}: take words of the tokenizer, of several vectors one each at most")
    means = torch.stack([tokens.table.weight[i].float().mean(0) for i in ids]).cpu()
    return means.mean(0, keepdim=True) if vectors == 1 else means[torch.arange(vectors) % len(means)]


# -------------------------------------------------------------------------------- loss


def eps_loss(model, moments, t, prompts, draw):
    """The simple loss (Ho et al. 2020, eq. 14) of latents drawn from `moments` [B, 2, 4, h, w] at times t [B].

    `draw` is the CPU generator of the latents and of the noise.
    """
    mean, std = moments.unbind(1)
    z, eps = (torch.randn(mean.shape, generator=draw).to(mean) for _ in range(2))
    x_0, cond = model.get_first_stage_encoding(mean + std * z), model.get_learned_conditioning(prompts)
    network = functools.partial(model.apply_model, cond=cond)
    return training_loss(network, x_0, model.alphas_cumprod, t=t.to(mean.device), eps=eps).mean()


@torch.no_grad()
def held_back_loss(model, moments, prompts, batch, seed=0, times=8):
    """Mean eps loss of held-back latents, each with its prompt, at `times` fixed times with fixed noise: comparable
    between steps, and between runs of one batch size."""
    grid = ((torch.arange(times) + 0.5) / times * model.num_timesteps).long()
    pairs = list(itertools.product(range(len(moments)), grid.tolist()))
    draw, total = torch.Generator().manual_seed(seed), 0.0
    for start in range(0, len(pairs), batch):
        pick, t = zip(*pairs[start : start + batch])
        said = [prompts[i] for i in pick]
        total += len(pick) * float(eps_loss(model, moments[list(pick)], torch.tensor(t), said, draw))
    return total / len(pairs)


@contextlib.contextmanager
def expecting(message):
    """UserError with `message` where a file of ours has other content than we wrote, whatever that leads to."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(message) from None


# -------------------------------------------------------------------------------- the training


class Inversion:
    """One token's training. `learn` leaves step_00050.safetensors ... in `work` and resumes from its state.pt,
    `choose` finds the best of these steps, `run` does both and writes the embedding.

    Every draw of a step is seeded by the step, so that a resumed training equals an uninterrupted one.
    """

    def __init__(self, model, tokens, concept, recipe, work):
        self.model, self.tokens, self.concept, self.recipe = model, tokens, concept, recipe
        self.token, self.kind, self.work = concept.token, kind_of(concept), utils.output_folder(work)
        word = recipe.init_word or concept.init_word or concept.word
        if self.token not in tokens:
            tokens.add(self.token, initial(tokens, word, recipe.vectors), init_word=word)
        self.vectors, self.losses = tokens[self.token], []
        self.optimizer = torch.optim.AdamW([self.vectors], lr=recipe.lr * recipe.batch, weight_decay=0.0)
        self.scaler = utils.grad_scaler(model.device, model.dtype)

    def run(self, files, out, clip=None, deadline=None):
        """Learns from the pictures `files`, writes the best step's vectors to the file `out`, and leaves them in
        `tokens`, ready to use. Returns a line on what was done.

        With a `deadline` (time.monotonic) and a CLIP, a third of the time goes to choosing.
        """
        moments = encode(self.model, files, self.recipe, may_flip(self.concept))
        stop = deadline
        if deadline is not None and clip is not None:
            stop = deadline - (deadline - time.monotonic()) / 3
        self.learn(Examples(*moments, captions_of(self.concept, self.kind, files)), stop)
        step, vectors, scores, why = self.choose(files, clip, deadline)
        self.vectors.data.copy_(vectors)
        self.tokens.save(out, [self.token], step=step, scores=scores)
        done, wanted = len(self.losses), self.recipe.steps
        short = f" (time was out after {done} of {wanted})" if done < wanted else ""
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items())
        return f"{self.token} ({self.kind}): step {step}{short}, chosen by {why}: {numbers}; wrote {pathlib.Path(out)}"

    # ---------------------------------------------------------------------------- steps

    def learn(self, examples, deadline=None):
        """Optimises the vectors; stops at `deadline` (time.monotonic) with everything saved."""
        self.resume(examples)
        recipe, losses, first = self.recipe, self.losses, len(self.losses)
        bar = tqdm(range(first, recipe.steps), f"invert {self.token}", initial=first, total=recipe.steps, unit="step")
        for step in bar:
            losses.append(self.optimize(examples, step))
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
            late = deadline is not None and time.monotonic() > deadline
            if recipe.preview_every and len(losses) % recipe.preview_every == 0:  # before `save`: a kill loses none
                pictures = self.draw(examples.captions[0][0], range(4), steps=20, seed=recipe.seed)
                utils.save_png(utils.image_grid(pictures, columns=2), self.work / f"preview_{len(losses):05d}.png")
            if late or len(losses) % recipe.save_every == 0 or len(losses) == recipe.steps:
                self.save(examples)
            if late:
                break

    def optimize(self, examples, step):
        """One AdamW step; returns its loss. Only the vectors receive gradients: everything else is frozen."""
        moments, captions, batch = examples.moments, examples.captions, self.recipe.batch
        draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        self.optimizer.zero_grad(set_to_none=True)
        pick = torch.randint(len(moments), (batch,), generator=draw)
        told = [captions[i * len(captions) // len(moments)] for i in pick.tolist()]
        which = torch.rand(batch, generator=draw)
        told = [texts[int(u * len(texts))].replace("{}", self.token) for texts, u in zip(told, which)]
        t = torch.randint(self.model.num_timesteps, (batch,), generator=draw)
        loss = eps_loss(self.model, moments[pick.to(moments.device)], t, told, draw)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.detach())

    def draw(self, template, indices, **settings):
        """Pictures of a text with {} for the token, as p3_model.generate makes them."""
        return generate(self.model, template.replace("{}", self.token), indices, size=self.recipe.size, **settings)

    def save(self, examples):
        """step_NNNNN.safetensors with its held-back loss, losses.csv, and state.pt to resume from."""
        step, told = len(self.losses), [texts[0].replace("{}", self.token) for texts in examples.captions]
        loss = held_back_loss(self.model, examples.held, told, self.recipe.batch)
        path = self.work / f"step_{step:05d}.safetensors"
        self.tokens.save(path, [self.token], step=step, scores={"held_back_loss": loss})
        table = pandas.DataFrame({"step": range(1, step + 1), "loss": self.losses})
        with utils.atomic(self.work / "losses.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6f")
        state = {"training": self.identity(examples), "losses": self.losses, "vectors": self.vectors.detach().cpu()}
        state.update(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        utils.save_checkpoint(state, self.work / "state.pt")

    def identity(self, examples):
        """What a resumed training must share with the one it goes on from: all but how long it is and how it is
        judged."""
        settings = self.recipe._asdict()
        for name in ("steps", "validation_pictures", "average"):
            del settings[name]
        settings.update(model=utils.weights_id(self.model.model), precision=str(self.model.dtype))
        return {**settings, "token": self.token, "captions": utils.json_id(examples.captions)}

    def resume(self, examples):
        """Goes on from an interrupted training with the same `identity`, where there is one."""
        path = self.work / "state.pt"
        if not path.is_file():
            return
        state, changed = utils.load_checkpoint(path), ""
        with expecting(f"{path}: no state of a training; remove {self.work} to start anew"):
            changed = ", ".join(k for k, v in self.identity(examples).items() if state["training"].get(k) != v)
            if not changed:
                self.vectors.data.copy_(state["vectors"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
                self.losses = [float(x) for x in state["losses"]]
        if changed:
            raise UserError(f"{path}: of a training with other {changed}; remove {self.work} to start anew")

    # ---------------------------------------------------------------------------- choice of a step

    def saved(self):
        """[(held-back loss, step, vectors)] of the saved steps, the lowest loss first. With `recipe.average` above 1
        the vectors are means of saved steps (Polyak and Juditsky 1992), losses are not."""
        saved, vectors, n = [], [], self.recipe.average
        for path in sorted(self.work.glob("step_*.safetensors")):
            content, told = read_embeddings(path)
            with expecting(f"{path}: no saved step of {self.token}; remove it"):
                vectors.append(content[self.token].view_as(self.vectors))
                saved.append((float(told["scores"]["held_back_loss"]), int(told["step"])))
        means = [torch.stack(vectors[max(0, i + 1 - n) : i + 1]).mean(0) for i in range(len(vectors))]
        return sorted([(*entry, mean) for entry, mean in zip(saved, means)], key=lambda entry: entry[:2])

    def choose(self, files, clip=None, deadline=None):
        """(step, vectors, scores, by what) of the best saved step: by the grader's score, without a CLIP by the loss.

        With a deadline, steps are scored in the order of their held-back loss until time is out; scores.json keeps
        them.
        """
        saved, path, recipe = self.saved(), self.work / "scores.json", self.recipe
        if not saved:
            raise UserError(f"{self.work}: its steps are gone; remove it to start anew")
        if clip is None:
            loss, step, vectors = saved[0]
            return step, vectors, {"held_back_loss": loss}, "the lowest eps loss on held-back crops"
        known = utils.read_json(path) if path.is_file() else {}
        if not isinstance(known, dict) or not all(map(is_pair, known.values())):
            raise UserError(f"{path}: no scores of steps; remove it")
        sources, best = clip.images(files), None
        judge = f"{clip.name} {utils.weights_id(clip.network)}, prompts {utils.json_id(self.validation())}"
        for loss, step, vectors in tqdm(saved, desc=f"score {self.token}", unit="checkpoint"):
            name = f"{judge}, {recipe.validation_pictures} pictures, mean of {recipe.average}, step {step}"
            if name not in known:
                if best is not None and deadline is not None and time.monotonic() > deadline:
                    continue
                self.vectors.data.copy_(vectors)
                known[name] = self.grade(clip, sources)
                utils.save_json(known, path)
            image, text = known[name]
            if best is None or image + 2.5 * text > best[0]:
                best = image + 2.5 * text, step, vectors, {"held_back_loss": loss, "image": image, "text": text}
        return (*best[1:], "the grader's score on validation prompts")

    def validation(self):
        """{prompt with {} for the token: what its pictures should show}, which are the concept's or of our own."""
        templates = STYLE_VALIDATION if self.kind == "style" else OBJECT_VALIDATION
        return self.concept.validation or {t: t.replace("{}", self.concept.word) for t in templates}

    def grade(self, clip, sources):
        """(image score, text score) as the course's grader has them, averaged over the validation prompts."""
        scores, indices, most = [], range(self.recipe.validation_pictures), fitting_batch(self.model, self.recipe.size)
        parts = [indices[i : i + most] for i in range(0, len(indices), most)]
        for template, told in self.validation().items():
            pictures = clip.images(torch.cat([self.draw(template, part, seed=1000) for part in parts]))
            scores.append(best_fifth(image_scores(clip, pictures, sources), text_scores(clip, pictures, told)))
        return [sum(s) / len(s) for s in zip(*scores)]
