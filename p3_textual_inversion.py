"""Textual Inversion (Gal et al. 2023): learns an embedding for each concept of a JSON and writes it to embeddings/.

    python3 p3_textual_inversion.py --json hw2_data/textual_inversion/input.json --data hw2_data/textual_inversion \
        --ckpt stable-diffusion/ldm/models/stable-diffusion-v1/model.ckpt --out embeddings

Steps, previews and losses go to --work; run again, it resumes there. At the end the step with the best grader's score
(CLIP ViT-B/32 on validation prompts of our own) is kept, or without a CLIP the one with the lowest held-back loss.
"""

from __future__ import annotations

import pathlib
import time

from p3_clip import load_clip
from p3_concepts import image_files, only, read_concepts
from p3_invert import Inversion, Recipe
from p3_model import add_model_options, embedding_path, learned_tokens, load_stable_diffusion, own_size
from utils import Parser, UserError, add_device_options, cli, output_folder, pick_precision, real, whole


def arguments(argv):
    default = Recipe()
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--json", default="hw2_data/textual_inversion/input.json")
    option("--data", default="hw2_data/textual_inversion", help="source images, in {source}/*.jpg")
    option("--ckpt", default="stable-diffusion/ldm/models/stable-diffusion-v1/model.ckpt")
    option("--out", default="embeddings", help="folder of the embeddings (default: embeddings)")
    option("--work", default="runs/textual_inversion", help="steps and previews; resumed if there")
    option("--only", nargs="+", metavar="SOURCE", help="only these entries of the JSON, as in --only 0")
    option("--clip", help="name, folder, file, or none (default: ViT-B/32, if it can be had)")
    option("--max-time", type=real(positive=True), metavar="MINUTES", help="for everything, the choice included")
    option("--steps", type=whole(), default=default.steps)
    option("--batch-size", type=whole(), default=default.batch, dest="batch")
    option("--lr", type=real(positive=True), default=default.lr, help="of one picture; scaled by their number a step")
    option("--vectors", type=whole(), default=default.vectors, help="vectors a token (default: 1)")
    option("--init-word", default="", help='words to start from, say "corgi" (default: the JSON\'s)')
    option("--crops", type=whole(), default=default.crops, help="random crops a picture")
    option("--save-every", type=whole(), default=default.save_every)
    option("--preview-every", type=whole(0), default=default.preview_every, help="0: no previews")
    own = default.validation_pictures
    option("--validation-pictures", type=whole(), default=own, help="of each prompt that steps are chosen on")
    option("--average", type=whole(), default=default.average, help="so many saved steps are one to choose from")
    add_model_options(parser)
    add_device_options(parser)
    return parser.parse_args(argv)


def chosen(concepts, args):
    """The concepts of --only, each with its pictures."""
    concepts = only(concepts, args.only, args.json)
    if args.init_word and len(concepts) > 1:
        raise UserError("--init-word: is for one concept; add --only with its entry")
    return [(c, image_files(pathlib.Path(args.data) / c.key)) for c in concepts]


def judge(name, device):
    """The CLIP that chooses the step; None, and a line, where the default one cannot be had."""
    if name == "none":
        return None
    try:
        return load_clip(name or "ViT-B/32", device)
    except UserError as e:
        if name:
            raise
        print(f"steps will be chosen by their loss, not by the grader's score: {e}")
        return None


@cli
def main(argv=None):
    begin = time.monotonic()
    args = arguments(argv)
    jobs = chosen(read_concepts(args.json), args)
    dtype, clip = pick_precision(args.precision, args.device), judge(args.clip, args.device)
    model = load_stable_diffusion(args.ckpt, args.device, dtype, args.config)
    out = output_folder(args.out)
    args.size = args.size or own_size(model)
    tokens, recipe = learned_tokens(model), Recipe(**{k: v for k, v in vars(args).items() if k in Recipe._fields})
    done = []
    for n, (concept, files) in enumerate(jobs):
        deadline = None
        if args.max_time:
            end = begin + 60 * args.max_time
            deadline = time.monotonic() + (end - time.monotonic()) / (len(jobs) - n)
        path = embedding_path(out, concept.token)
        work = pathlib.Path(args.work) / path.stem
        try:
            done.append(Inversion(model, tokens, concept, recipe, work).run(files, path, clip, deadline))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same line goes on from {work}") from None
    print("\n".join(done))


if __name__ == "__main__":
    main()
