"""Problem 3: 25 pictures for each prompt of a JSON, OUT/{source}/{prompt}/source{source}_prompt{prompt}_{i}.png

    python3 p3_infer.py hw2_data/textual_inversion/input.json output/p3 model.ckpt --train-missing --time-limit 840

Run again after an interruption it makes what is missing: OUT/.manifest.json tells how each picture was made. With
--prompt "A <new1> next to a <new2>." it draws that prompt instead and writes OUT/prompt.png, one sheet of all pictures.
"""

from __future__ import annotations

import time

START = time.monotonic()  # the graders' clock runs while torch is being imported

import pathlib  # noqa: E402
import sys  # noqa: E402
from typing import NamedTuple  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import p3_model  # noqa: E402
import utils  # noqa: E402
from p3_concepts import image_files, placeholders, read_concepts  # noqa: E402
from utils import Parser, UserError, cli, real, save_png, whole  # noqa: E402

FEWEST_STEPS = 8  # below this DPM-Solver++ pictures fall apart
FAST = 0.55  # of the time of a step, with --fast
MANIFEST = ".manifest.json"


# -------------------------------------------------------------------------------- what is to be made


class Settings(NamedTuple):
    """All that decides a picture beside its prompt and its number."""

    images: int
    steps: int
    scale: float
    size: int
    seed: int
    precision: str
    weights: str  # utils.weights_id, and what names the delta
    fast: bool
    pag: float = 0.0


def recipe_id(settings, tokens, prompt, index):
    """Sixteen hexadecimal digits that no picture of another prompt, number, model, embedding or setting has."""
    parts = [*settings._replace(images=0), prompt, index, p3_model.embedding_id(tokens, prompt)]
    return utils.json_id([*parts, "to x_0"])  # pictures of before 2026-12 ended at t = 0


def tokens_in(prompts, concepts):
    """Learned tokens that the prompts name: the JSON's own, of any spelling, and whatever looks like <one>."""
    named = [c.token for c in concepts if any(c.token in p for p in prompts)]
    return list(dict.fromkeys(named + [t for p in prompts for t in placeholders(p)]))


def read_manifest(path):
    """{relative path: recipe} of the pictures that an earlier run finished."""
    try:
        manifest = utils.read_json(path)
    except UserError:  # none, or a damaged one: the pictures are made again
        return {}
    return manifest if isinstance(manifest, dict) else {}


def plan(concepts, settings, tokens, out):
    """([(source, prompt number, prompt, its pictures still to be made)], manifest of those that are finished)."""
    manifest, todo, finished = read_manifest(out / MANIFEST), [], {}
    for concept in concepts:
        for p, prompt in enumerate(concept.prompts):
            folder, missing = out / concept.key / str(p), []
            names = [file_name(concept.key, p, i) for i in range(settings.images)]
            sweep(folder, names)
            for i, name in enumerate(names):
                path = f"{concept.key}/{p}/{name}"
                wanted = recipe_id(settings, tokens, prompt, i)
                if manifest.get(path) == wanted and (folder / name).is_file():
                    finished[path] = wanted
                else:
                    missing.append(i)
            if missing:
                todo.append((concept.key, p, prompt, missing))
    return todo, finished


def file_name(source, prompt, index):
    return f"source{source}_prompt{prompt}_{index}.png"


def sweep(folder, wanted):
    """Removes what a killed run, or one of more pictures, left in a prompt's folder: the grader counts every file."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        ours = file.name.startswith(("source", ".source")) and file.suffix in (".png", ".tmp")
        if ours and file.name not in wanted:
            file.unlink()
        elif not ours:
            print(f"warning: {file} is no picture of this run; the grader refuses a folder with it", file=sys.stderr)


# -------------------------------------------------------------------------------- making it


class Clock:
    """Chooses how the next batch is made, so that all pictures are done by the deadline (seconds of time.monotonic)."""

    def __init__(self, deadline):
        self.deadline = deadline
        self.step, self.rest = 0.0, 0.0  # seconds a picture: for one step, and beside the steps

    def start(self, make, batch):
        """Measures the speed, once, where there is a deadline; make(steps) makes `batch` pictures."""
        seconds = []
        if self.deadline is None or self.step:
            return
        for steps in (1, 1, 3):  # the first one also pays for starting up
            begin = time.monotonic()
            make(steps)
            seconds.append((time.monotonic() - begin) / batch)
        self.step = max(1e-9, (seconds[2] - seconds[1]) / 2)
        self.rest = max(0.0, seconds[1] - self.step)

    def settings(self, wanted, pictures):
        """The wanted Settings, or those that let `pictures` pictures meet the deadline: fast, then also of fewer steps,
        but FEWEST_STEPS at least."""
        if self.deadline is None or not self.step:
            return wanted
        affordable = ((self.deadline - time.monotonic()) / pictures - self.rest) / self.step
        if affordable >= self.work(wanted):
            return wanted
        return wanted._replace(fast=True, steps=min(wanted.steps, max(FEWEST_STEPS, int(affordable / FAST))))

    def work(self, settings):
        """In steps of full work."""
        return settings.steps * (FAST if settings.fast else 1)

    def learn(self, seconds, settings):
        """Corrects the speed by that of the batch just made: seconds a picture."""
        self.step = max(1e-9, (seconds - self.rest) / self.work(settings))

    def needs(self, pictures, settings):
        return pictures * (self.rest + self.work(settings) * self.step)


def generate(model, prompt, indices, settings):
    """p3_model.generate in as many parts as memory asks for."""
    how = settings.steps, settings.scale, settings.size, settings.seed, settings.fast, settings.pag
    try:
        return p3_model.generate(model, prompt, indices, *how)
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        if len(indices) == 1:
            raise UserError(f"--size {settings.size}: too little memory for one picture; take a smaller size") from None
    torch.cuda.empty_cache()
    half = len(indices) // 2
    return torch.cat([generate(model, prompt, part, settings) for part in (indices[:half], indices[half:])])


def make(model, tokens, todo, finished, settings, out, clock, batch):
    """Makes and saves every picture of `todo`; returns the number of those that got less work than wanted."""
    left, lowered = sum(len(indices) for *_, indices in todo), 0
    bar = tqdm(total=left, unit="picture", desc="generate")
    for source, p, prompt, indices in todo:
        for part in (indices[i : i + batch] for i in range(0, len(indices), batch)):
            now = clock.settings(settings, left)
            if now != settings and not lowered:
                minutes = clock.needs(left, now) / 60
                bar.write(f"time is short: --fast, {now.steps} of {settings.steps} steps; {minutes:.1f} minutes to go")
            lowered += len(part) * (now != settings)
            begin = time.monotonic()
            pictures = generate(model, prompt, part, now)
            clock.learn((time.monotonic() - begin) / len(part), now)
            for i, picture in zip(part, pictures):
                path = f"{source}/{p}/{file_name(source, p, i)}"
                save_png(picture, out / path)
                finished[path] = recipe_id(now, tokens, prompt, i)
            utils.save_json(finished, out / MANIFEST)
            left -= len(part)
            bar.update(len(part))
    bar.close()
    return lowered


def sheet(model, prompt, settings, out, batch):
    """OUT/prompt.png: the pictures of one prompt, five a row."""
    parts = [range(settings.images)[i : i + batch] for i in range(0, settings.images, batch)]
    bar = tqdm(parts, unit="batch", desc="generate")
    pictures = torch.cat([generate(model, prompt, part, settings) for part in bar])
    save_png(utils.image_grid(pictures, columns=min(5, settings.images)), out / "prompt.png")


# -------------------------------------------------------------------------------- embeddings that are missing


def sources_of(missing, concepts, args):
    """[(concept, its pictures)] of the tokens without an embedding; UserError for one that cannot be trained now."""
    jobs, folders = [], [pathlib.Path(args.json).parent, p3_model.ROOT / "hw2_data/textual_inversion"]
    for token in missing:
        concept = next((c for c in concepts if c.token == token), None)
        remedy = f"train it with p3_textual_inversion.py, or put its file into {args.embeddings}"
        if concept is None:
            raise UserError(f"{args.json}: a prompt says {token}, no token_name and without embedding; {remedy}")
        if not args.train_missing:
            raise UserError(f"{args.json}: {token} has no embedding for this model; {remedy}, or add --train-missing")
        try:
            data = next((f for f in folders if (f / concept.key).is_dir()), folders[0])  # a JSON may come alone
            jobs.append((concept, image_files(data / concept.key)))
        except UserError as e:
            raise UserError(f"{token} has no embedding for this model, and none can be trained: {e}") from None
    return jobs


def train_missing(model, tokens, jobs, out, args, clock, needed):
    """Trains the tokens of `jobs` in the time that the pictures, which need so many seconds, leave: at least two fifths
    of what there is."""
    from p3_invert import Inversion, Recipe  # only now: it brings clip and torchvision

    recipe = Recipe(steps=args.train_steps, size=args.size, seed=args.seed, preview_every=0)
    now, deadline = time.monotonic(), None
    end = clock.deadline and now + max(clock.deadline - now - needed, 0.4 * (clock.deadline - now))
    for n, (concept, files) in enumerate(jobs):
        print(f"{concept.token} has no embedding for this model: training it on {len(files)} pictures now")
        if end:
            deadline = time.monotonic() + (end - time.monotonic()) / (len(jobs) - n)
        path = p3_model.embedding_path(out, concept.token)
        print(Inversion(model, tokens, concept, recipe, out / path.stem).run(files, path, deadline=deadline))


# -------------------------------------------------------------------------------- main


def arguments(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("json", help="concepts and prompts")
    option("out", help="output folder")
    option("ckpt", help="sd-v1-4.ckpt, or another checkpoint that --config describes")
    option("--embeddings", default=str(p3_model.ROOT / "embeddings"), help="folder of learned ones")
    option("--delta", help="of p3_custom_diffusion.py: its matrices, and its tokens instead of learned ones")
    option("--images", type=whole(), default=25, help="pictures a prompt (default: 25, what the grader takes)")
    option("--steps", type=whole(1, 1000), default=25, help="DPM-Solver++ steps (default: 25)")
    option("--scale", type=real(-100, 100), default=7.5, help="guidance scale (default: 7.5)")
    option("--pag", type=real(0, 100), default=0.0, help="perturbed-attention guidance, 3/2 of the time (default: 0)")
    option("--fast", action="store_true", help="half the work a picture, at a small loss of quality")
    option("--batch-size", type=whole(), help="pictures at once (default: by free memory)")
    option("--time-limit", type=real(positive=True), help="seconds, not of --prompt; --fast, then fewer steps keep it")
    option("--train-missing", action="store_true", help="learn absent tokens, by pictures beside JSON or in hw2_data")
    option("--train-steps", type=whole(), default=400, help="of --train-missing, at most")
    option("--prompt", help="draw this prompt instead of the JSON's, into OUT/prompt.png")
    p3_model.add_model_options(parser)
    utils.add_device_options(parser)
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args = arguments(argv)
    concepts = read_concepts(args.json)
    prompts = [args.prompt] if args.prompt else [p for c in concepts for p in c.prompts]
    out, dtype = pathlib.Path(args.out), utils.pick_precision(args.precision, args.device)
    model = p3_model.load_stable_diffusion(args.ckpt, args.device, dtype, args.config)
    args.size = args.size or p3_model.own_size(model)
    tokens, weights = p3_model.learned_tokens(model), utils.weights_id(model.model)
    missing = tokens_in(prompts, concepts)
    if args.delta:
        weights += p3_model.load_delta(model, tokens, args.delta)
    for folder in (args.embeddings, pathlib.Path(args.json).parent / "embeddings", out / ".embeddings"):
        missing = p3_model.load_embeddings(tokens, folder, missing)
    jobs = sources_of(missing, concepts, args)
    utils.output_folder(out)

    batch = args.batch_size or p3_model.fitting_batch(model, args.size)
    how = args.images, args.steps, args.scale, args.size, args.seed
    settings = Settings(*how, str(dtype), weights, args.fast, args.pag)
    clock = Clock(START + args.time_limit if args.time_limit else None)

    def measured(steps):
        return generate(model, "", range(batch), settings._replace(steps=steps, fast=False))

    if jobs:
        clock.start(measured, batch)
        needed = clock.needs(len(prompts) * args.images, settings)
        train_missing(model, tokens, jobs, utils.output_folder(out / ".embeddings"), args, clock, needed)
    if args.prompt:
        sheet(model, args.prompt, settings, out, batch)
        print(f"wrote {args.images} pictures of {args.prompt!r} to {out / 'prompt.png'}")
        return
    todo, finished = plan(concepts, settings, tokens, out)
    there = len(finished)
    if todo:
        clock.start(measured, batch)
    try:
        lowered = make(model, tokens, todo, finished, settings, out, clock, batch)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same line goes on with the pictures that {out} lacks") from None
    if lowered:
        print(f"{lowered} pictures were made faster than asked, for lack of time; run again to make them anew")
    seconds = time.monotonic() - START
    print(f"wrote {len(finished) - there} pictures to {out} ({there} were there already) in {seconds:.0f} s")


if __name__ == "__main__":
    main()
