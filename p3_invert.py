"""Textual Inversion (Gal et al. 2023): learns the vectors of one placeholder from a few pictures, keeps the best step.

    tokens = learned_tokens(model)
    invert(model, tokens, concept, image_files("hw2_data/textual_inversion/0"), Recipe(), "new1.pt", "runs/new1")

p3_textual_inversion.py runs this for all concepts of a JSON, p3_infer.py for a token that has no embedding yet.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from p3_clip import best_fifth, image_scores, text_scores
from p3_concepts import open_image
from p3_model import fitting_batch, generate, user_errors, weights_id
from utils import UserError, atomic, image_grid, load_checkpoint, output_folder, save_checkpoint, save_png


class Recipe(NamedTuple):
    """Every setting of a training; the defaults are the shipped result's."""

    steps: int = 400
    batch: int = 4
    accumulate: int = 1
    lr: float = 1.25e-3  # for one picture: times batch and accumulation, as the paper scales it
    vectors: int = 1
    init_word: str = ""  # "" takes the concept's own, or what it is
    kind: str = "auto"  # object or style; auto reads it off the prompts
    flip: str = "auto"  # on or off; auto mirrors pictures unless the concept is one that a mirror changes
    crops: int = 4  # random crops a picture; one more is held back
    norm_pull: float = 0.0  # share of the way to the vocabulary's mean norm that the vectors are pulled a step
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


def crops_of(path, size, count, flip, draw):
    """`count` random crops of a picture with its short side made `size`, every other one mirrored if `flip`.

    Returns [count, 3, size, size] in [-1, 1].
    """
    image = open_image(path)
    scale = size / min(image.size)
    image = image.resize([max(size, round(s * scale)) for s in image.size], Image.LANCZOS)
    crops = []
    for i in range(count):
        left, top = (int(torch.randint(s - size + 1, (), generator=draw)) for s in image.size)
        crop = image.crop((left, top, left + size, top + size))
        crops.append(to_tensor(ImageOps.mirror(crop) if flip and i % 2 else crop) * 2 - 1)
    return torch.stack(crops)


@torch.no_grad()
def latent_moments(model, images):
    """Mean and standard deviation of the autoencoder's posterior of images in [-1, 1]: [N, 2, 4, H/8, W/8]."""
    posterior = model.encode_first_stage(images.to(model.device))
    return torch.stack([posterior.mean.float(), posterior.std.float()], dim=1)


def cache_moments(model, files, recipe, flip):
    """(moments of the training crops, those of the held-back crops, one a picture), to be sampled anew each step."""
    draw, train, held = torch.Generator().manual_seed(recipe.seed), [], []
    for path in tqdm(files, desc="encode", unit="picture", leave=False):
        moments = latent_moments(model, crops_of(path, recipe.size, recipe.crops + 1, flip, draw))
        train.append(moments[:-1])
        held.append(moments[-1:])
    return torch.cat(train), torch.cat(held)


# -------------------------------------------------------------------------------- loss


def eps_loss(model, moments, t, prompts, draw):
    """The simple loss (Ho et al. 2020, eq. 14) of latents drawn from `moments` [B, 2, 4, h, w] at times t [B].

    `draw` is the CPU generator of the latents and of the noise.
    """
    mean, std = moments.unbind(1)
    z, eps = (torch.randn(mean.shape, generator=draw).to(mean) for _ in range(2))
    x_0 = model.get_first_stage_encoding(mean + std * z)
    t = t.to(mean.device)
    predicted = model.apply_model(model.q_sample(x_0, t, eps), t, model.get_learned_conditioning(prompts))
    return F.mse_loss(predicted.float(), eps)


@torch.no_grad()
def held_back_loss(model, moments, prompts, batch, seed=0, times=8):
    """Mean eps loss of held-back latents, each with its prompt, at `times` fixed times with fixed noise: comparable
    between steps and runs."""
    grid = ((torch.arange(times) + 0.5) / times * model.num_timesteps).long()
    pairs = list(itertools.product(range(len(moments)), grid.tolist()))
    draw, total = torch.Generator().manual_seed(seed), 0.0
    for start in range(0, len(pairs), batch):
        pick, t = zip(*pairs[start : start + batch])
        said = [prompts[i] for i in pick]
        total += len(pick) * float(eps_loss(model, moments[list(pick)], torch.tensor(t), said, draw))
    return total / len(pairs)


# -------------------------------------------------------------------------------- training


def train(model, tokens, token, moments, held, captions, recipe, work, deadline=None):
    """Optimises the vectors of `token`; leaves step_00050.pt ... in the folder `work` and resumes from its state.pt.

    `moments` [N, 2, 4, h, w] has the same number of rows for each picture, one after another, `held` one; `captions` a
    list of texts for each, {} for the token.
    Every draw of a step is seeded by the step, so that a resumed training equals an uninterrupted one. Stops at
    `deadline` (time.monotonic) with everything saved. Returns the number of steps done.
    """
    vectors = tokens[token]
    optimizer = torch.optim.AdamW([vectors], lr=recipe.lr * recipe.batch * recipe.accumulate, weight_decay=0.0)
    scaler = grad_scaler(model)
    losses = resume(work, training_id(model, token, recipe), vectors, optimizer, scaler)
    mean_norm = tokens.mean_norm
    first = len(losses)
    bar = tqdm(range(first, recipe.steps), f"invert {token}", initial=first, total=recipe.steps, unit="step")
    for step in bar:
        losses.append(optimize(model, token, vectors, optimizer, scaler, moments, captions, recipe, step))
        if recipe.norm_pull:
            pull_norm(vectors, mean_norm, recipe.norm_pull)
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
        late = deadline is not None and time.monotonic() > deadline
        if late or len(losses) % recipe.save_every == 0 or len(losses) == recipe.steps:
            save_step(model, tokens, token, held, captions, recipe, work, losses, optimizer, scaler)
        if recipe.preview_every and len(losses) % recipe.preview_every == 0:
            preview(model, captions[0][0].format(token), recipe, work / f"preview_{len(losses):05d}.png")
        if late:
            break
    return len(losses)


def optimize(model, token, vectors, optimizer, scaler, moments, captions, recipe, step):
    """One AdamW step; returns its loss. Only `vectors` receive gradients: everything else is frozen."""
    draw, total = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step), 0.0
    optimizer.zero_grad(set_to_none=True)
    for _ in range(recipe.accumulate):
        pick = torch.randint(len(moments), (recipe.batch,), generator=draw)
        said = [captions[i * len(captions) // len(moments)] for i in pick.tolist()]
        which = torch.rand(recipe.batch, generator=draw)
        said = [texts[int(u * len(texts))].format(token) for texts, u in zip(said, which)]
        t = torch.randint(model.num_timesteps, (recipe.batch,), generator=draw)
        loss = eps_loss(model, moments[pick.to(moments.device)], t, said, draw)
        scaler.scale(loss / recipe.accumulate).backward()
        total += float(loss.detach()) / recipe.accumulate
    scaler.step(optimizer)
    scaler.update()
    return total


def grad_scaler(model):
    """Keeps float16 gradients from vanishing; does nothing in other precisions."""
    enabled = model.dtype == torch.float16
    new = getattr(getattr(torch, "amp", None), "GradScaler", None)  # before torch 2.3: in torch.cuda.amp
    return new(model.device.type, enabled=enabled) if new else torch.cuda.amp.GradScaler(enabled=enabled)


@torch.no_grad()
def pull_norm(vectors, target, share):
    norm = vectors.norm(dim=1, keepdim=True)
    vectors.mul_(1 + share * (target / norm - 1))


def preview(model, prompt, recipe, path):
    pictures = generate(model, prompt, range(4), steps=20, size=recipe.size, seed=recipe.seed)
    save_png(image_grid(pictures, columns=2), path)


def save_step(model, tokens, token, held, captions, recipe, work, losses, optimizer, scaler):
    """step_NNNNN.pt with its held-back loss, losses.csv, and state.pt to resume from."""
    step = len(losses)
    loss = held_back_loss(model, held, [texts[0].format(token) for texts in captions], recipe.batch)
    with user_errors():
        tokens.save(work / f"step_{step:05d}.pt", [token], step=step, scores={"held_back_loss": loss})
    with atomic(work / "losses.csv") as temporary:
        temporary.write_text("step,loss\n" + "".join(f"{i + 1},{x:.6f}\n" for i, x in enumerate(losses)))
    state = {"training": training_id(model, token, recipe), "losses": losses, "vectors": tokens[token].detach().cpu()}
    save_checkpoint({**state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, work / "state.pt")


def training_id(model, token, recipe):
    """What a resumed training must share with the one it goes on from: all but how long it is and how it is judged."""
    settings = {k: v for k, v in recipe._asdict().items() if k not in ("steps", "validation_pictures", "average")}
    return {**settings, "token": token, "model": weights_id(model), "precision": str(model.dtype)}


def resume(work, training, vectors, optimizer, scaler):
    """Restores an interrupted training with the same `training_id`. Returns the losses so far, [] for a new one."""
    path = work / "state.pt"
    if not path.is_file():
        return []
    state = load_checkpoint(path)
    changed = ", ".join(k for k, v in training.items() if state["training"].get(k) != v)
    if changed:
        raise UserError(f"{path}: of a training with another {changed}; remove {work} to start anew")
    vectors.data.copy_(state["vectors"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["losses"]


# -------------------------------------------------------------------------------- choice of a checkpoint


def grader_scores(model, token, concept, kind, sources, clip, recipe):
    """(image score, text score) as the course's grader has them, averaged over validation prompts of our own."""
    validation, scores = concept.validation, []
    if not validation:
        validation = {t: t.format(concept.word) for t in (STYLE_VALIDATION if kind == "style" else OBJECT_VALIDATION)}
    indices, most = range(recipe.validation_pictures), fitting_batch(model, recipe.size)
    for template, told in validation.items():
        parts = [indices[i : i + most] for i in range(0, len(indices), most)]
        pictures = [generate(model, template.format(token), part, size=recipe.size, seed=1000) for part in parts]
        pictures = torch.cat(pictures)
        pictures = clip.images([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures])
        text = text_scores(clip, pictures, told)
        scores.append(best_fifth(image_scores(clip, pictures, sources), text))
    return [sum(s) / len(s) for s in zip(*scores)]


def choose(model, tokens, token, concept, kind, files, clip, recipe, work, deadline=None):
    """(step, vectors, scores, by what) of the best saved step: by the grader's score, without a CLIP by the loss.

    With `recipe.average` above 1 the vectors are means of saved steps (Polyak and Juditsky 1992), losses are not.
    With a deadline, steps are scored in the order of their held-back loss until time is out; scores.json keeps them.
    """
    saved = []
    for path in sorted(work.glob("step_*.pt")):
        content = load_checkpoint(path)
        saved.append((content["scores"]["held_back_loss"], content["step"], content[token]))
    vectors = [v for *_, v in saved]
    means = [torch.stack(vectors[max(0, i + 1 - recipe.average) : i + 1]).mean(0) for i in range(len(saved))]
    saved = [(loss, step, mean) for (loss, step, _), mean in zip(saved, means)]
    saved.sort(key=lambda entry: entry[:2])
    if clip is None:
        loss, step, vectors = saved[0]
        return step, vectors, {"held_back_loss": loss}, "the lowest eps loss on held-back crops"
    known = json.loads((work / "scores.json").read_text()) if (work / "scores.json").is_file() else {}
    sources, best = clip.images(files), None
    for loss, step, vectors in tqdm(saved, desc=f"score {token}", unit="checkpoint"):
        name = f"{clip.name}, {recipe.validation_pictures} pictures, mean of {recipe.average}, step {step}"
        if name not in known:
            if best is not None and deadline is not None and time.monotonic() > deadline:
                continue
            tokens[token].data.copy_(vectors)
            known[name] = grader_scores(model, token, concept, kind, sources, clip, recipe)
            with atomic(work / "scores.json") as temporary:
                temporary.write_text(json.dumps(known))
        image, text = known[name]
        if best is None or image + 2.5 * text > best[0]:
            best = image + 2.5 * text, step, vectors, {"held_back_loss": loss, "image": image, "text": text}
    return (*best[1:], "the grader's score on validation prompts")


# -------------------------------------------------------------------------------- all of it


def invert(model, tokens, concept, files, recipe, out, work, clip=None, deadline=None):
    """Learns the token of `concept` from the pictures `files` and writes the best step's vectors to the file `out`.

    `work` is the folder of steps, previews and the state to resume from. With a `deadline` (time.monotonic) and a CLIP,
    a third of the time goes to choosing. The token stays in `tokens`, ready to use. Returns a line on what was done.
    """
    token, work = concept.token, output_folder(work)
    kind = kind_of(concept) if recipe.kind == "auto" else recipe.kind
    flip = may_flip(concept) if recipe.flip == "auto" else recipe.flip == "on"
    word = recipe.init_word or concept.init_word or concept.word
    with user_errors():
        if token not in tokens:
            tokens.add(token, tokens.initial(word, recipe.vectors), init_word=word)
    moments, held = cache_moments(model, files, recipe, flip)
    captions = captions_of(concept, kind, files)
    stop = deadline
    if deadline is not None and clip is not None:
        stop = deadline - (deadline - time.monotonic()) / 3
    steps = train(model, tokens, token, moments, held, captions, recipe, work, stop)
    step, vectors, scores, why = choose(model, tokens, token, concept, kind, files, clip, recipe, work, deadline)
    tokens[token].data.copy_(vectors)
    with user_errors():
        tokens.save(out, [token], step=step, scores=scores)
    short = f" (time was out after {steps} of {recipe.steps})" if steps < recipe.steps else ""
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items())
    return f"{token} ({kind}): step {step}{short}, chosen by {why}: {numbers}; wrote {pathlib.Path(out)}"
