"""Custom Diffusion (Kumari et al. 2023): several new words in one picture, by new keys and values for what prompts say.

    python3 p3_custom_diffusion.py --only 0 --out new1.safetensors --ckpt model.ckpt     # --only 0 1: both jointly
    python3 p3_custom_diffusion.py --merge new1.safetensors new2.safetensors --out both.safetensors --ckpt model.ckpt
    python3 p3_infer.py JSON OUT model.ckpt --delta both.safetensors --prompt "a <new1> next to a <new2>"

Trained are the token's vectors and the matrices to_k and to_v of the cross-attention. Half of each batch are pictures
that the model itself drew of plain words (the paper's prior preservation). Saved at the end; not resumed.
"""

from __future__ import annotations

import pathlib
import re

import torch
from tqdm import tqdm

import p3_model
from p3_concepts import image_files, only, read_concepts
from p3_invert import Recipe, captions_of, encode, eps_loss, held_back_loss, initial, kind_of, may_flip
from utils import Parser, add_device_options, cli, grad_scaler, output_file, pick_precision, real, whole

# Pictures to draw from are pairs: moments [N, 2, 4, h, w] as p3_invert.encode makes them, and N lists of texts to say.


def prior(model, texts, count, recipe):
    """`count` pictures that the model draws of the texts in turns; never decoded. Drawn without guidance: on its own
    distribution the network is the optimum already, so that the loss on them holds it where it is."""
    said, most, parts = [texts[i % len(texts)] for i in range(count)], p3_model.fitting_batch(model, recipe.size), []
    for i in tqdm(range(0, count, most), "draw the prior", unit="batch", leave=False):
        indices, how = range(count)[i : i + most], {"scale": 1.0, "size": recipe.size, "seed": recipe.seed}
        parts.append(p3_model.latents_of(model, said[i : i + most], indices, **how))
    mean = torch.cat(parts) / model.scale_factor
    return torch.stack([mean, torch.zeros_like(mean)], dim=1), [[text] for text in said]


def batch_of(pools, count, draw):
    """(moments [count, 2, 4, h, w], texts): of a random pool each, the picture and its text random in it."""

    def pick(items):
        return int(torch.randint(len(items), (), generator=draw))

    picks = [(moments, texts, pick(texts)) for moments, texts in (pools[pick(pools)] for _ in range(count))]
    return torch.stack([moments[i] for moments, _, i in picks]), [texts[i][pick(texts[i])] for _, texts, i in picks]


def train(model, vectors, concepts, priors, recipe):
    """Optimises token vectors (parameters) and matrices; leaves the model with them. Returns {name: half difference}.

    The loss is the paper's, eps loss on the concepts and on the prior with equal weights. Differences are kept in
    float32, whatever the network's precision, so that small steps are not rounded away.
    """
    matrices = p3_model.keys_and_values(model)
    before = {name: p.requires_grad_(True).detach().float().clone() for name, p in matrices.items()}
    learned = {name: torch.zeros_like(w, requires_grad=True) for name, w in before.items()}
    parameters, scaler = [*learned.values(), *vectors], grad_scaler(model.device, model.dtype)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr * recipe.batch, weight_decay=0.0)

    def place(differences):
        for name, p in matrices.items():
            p.data = (before[name] + differences[name].detach().to(before[name])).to(p.dtype)

    for step in (bar := tqdm(range(recipe.steps), "train", unit="step")):
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        (new, said), (known, plain) = (batch_of(pools, recipe.batch, draw) for pools in (concepts, priors))
        t = torch.randint(model.num_timesteps, (2 * recipe.batch,), generator=draw)
        loss = eps_loss(model, torch.cat([new, known]), t, said + plain, draw)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        for name, p in matrices.items():
            learned[name].grad, p.grad = p.grad.float(), None
        scaler.step(optimizer)
        scaler.update()
        place(learned)
        bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
    saved = {name: d.detach().half().cpu() for name, d in learned.items()}
    place(saved)  # what the file says, to the bit
    model.requires_grad_(False)
    return saved


def learn(model, jobs, recipe, count, out, embeddings=None):
    """Trains `jobs`, [(concept, its pictures)], jointly, from a folder of `embeddings` or words; returns a line."""
    tokens, pools, held, priors, captions = p3_model.learned_tokens(model), [], {}, [], {}
    for concept, files in jobs:
        word, token = concept.init_word or concept.word, concept.token
        if embeddings:
            p3_model.need_embeddings(tokens, embeddings, [token])
        else:
            tokens.add(token, initial(tokens, word))
        told = captions_of(concept, kind_of(concept), files)
        captions[token] = sorted({text for texts in told for text in texts})
        told = [[text.replace("{}", token) for text in texts] for texts in told]
        moments, held_moments = encode(model, files, recipe, may_flip(concept))
        pools.append((moments, [texts for texts in told for _ in range(recipe.crops)]))
        held[token] = held_moments, [texts[0] for texts in told]
        priors.append(prior(model, [text.replace("{}", word) for text in captions[token]], count, recipe))
    first = [held_back_loss(model, *seen, recipe.batch) for seen in held.values()]
    differences = train(model, list(tokens.parameters()), pools, priors, recipe)
    last = [held_back_loss(model, *seen, recipe.batch) for seen in held.values()]
    p3_model.save_delta(out, model, {token: tokens[token] for token in held}, captions, differences)
    told = ", ".join(f"{token} {a:.4f} -> {b:.4f}" for token, a, b in zip(held, first, last))
    return f"eps loss on held-back crops: {told}; wrote {out}"


def closed_form(C, A, ridge=1e-6):
    """The matrix M [s, d], float64, by which the paper's merge (its section 3.3) is W = W0 + (V - W0 C^T) M.

    W [c, d] minimises ||W C_reg^T - W0 C_reg^T||_F subject to W C^T = V. Rows of C [s, d] are the text encoder's
    features of the new words, columns of V [c, s] what each word's own matrix W_n makes of them, rows of C_reg features
    of other captions, of which only A = C_reg^T C_reg [d, d] is needed. With multipliers L [c, s] the gradient vanishes
    where (W - W0) A = L C, so W = W0 + L C A^-1; then the constraint says L = (V - W0 C^T) (C A^-1 C^T)^-1. Hence
    M = (C A^-1 C^T)^-1 C A^-1. The columns of V - W0 C^T are (W_n - W0) c_n: no more than differences need be known.

    `ridge` times A's mean eigenvalue is added to A: where C_reg says nothing, W stays near W0. The inverse is a
    pseudo-inverse: rows of C that depend on others ask for nothing more.
    """
    C, A = C.double().cpu(), A.double().cpu()
    D = torch.linalg.solve(A + ridge * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype), C.T)  # [d, s]
    return torch.linalg.pinv(C @ D, rtol=1e-9, hermitian=True) @ D.T


def words_of(model, token, captions):
    """Features [rows, d] of a token in its captions and of what follows it there, since that tells of it too."""
    embedder, said = model.cond_stage_model, [text.replace("{}", token) for text in captions]
    first, end, rows = embedder.tokenizer.convert_tokens_to_ids(token), embedder.tokenizer.eos_token_id, []
    for ids, features in zip(embedder.tokenize(said).tolist(), model.get_learned_conditioning(said).cpu()):
        rows.append(features[ids.index(first) : ids.index(end) + 1])
    return torch.cat(rows)


def features_of_known_words(model, seed, count=1000):
    """C_reg^T C_reg [d, d], float64, of `count` captions of random words that have a vector of their own."""
    embedder, draw = model.cond_stage_model, torch.Generator().manual_seed(seed)
    sums = embedder.transformer.get_input_embeddings().weight.double().sum(1).cpu()  # a small model's unknown are alike
    _, which, times = sums.unique(return_inverse=True, return_counts=True)
    words = [(w[:-4], i) for w, i in embedder.tokenizer.get_vocab().items() if re.fullmatch("[a-z]+</w>", w)]
    words = sorted(w for w, i in words if times[which[i]] == 1)
    picks = torch.randint(len(words), (count, 3), generator=draw).tolist()
    said = ["a {} {}, in the style of {}".format(*(words[i] for i in pick)) for pick in picks]
    parts = (model.get_learned_conditioning(said[i : i + 50]).flatten(0, 1).double() for i in range(0, count, 50))
    return sum(features.T @ features for features in parts).cpu()


@torch.no_grad()
def merge(model, files, out, seed):
    """Merges deltas into one by closed_form; returns a line."""
    tokens, vectors, captions, words, trained = p3_model.learned_tokens(model), {}, {}, [], []
    for path in files:
        own, said, differences = p3_model.read_delta(path, model)
        p3_model.add_tokens(tokens, own, path)
        vectors, captions = {**vectors, **own}, {**captions, **said}
        words.append(torch.cat([words_of(model, token, texts) for token, texts in said.items()]).double())
        trained.append(differences)
    M = closed_form(torch.cat(words), features_of_known_words(model, seed))
    wanted = {name: [each[name].double() @ C.T for each, C in zip(trained, words)] for name in trained[0]}  # V - W0 C^T
    merged = {name: (torch.cat(columns, dim=1) @ M).half() for name, columns in wanted.items()}
    p3_model.save_delta(out, model, vectors, captions, merged)
    return f"merged {', '.join(vectors)}; wrote {out}"


def arguments(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--json", default="hw2_data/textual_inversion/input.json")
    option("--data", default="hw2_data/textual_inversion", help="source images, in {source}/*.jpg")
    option("--ckpt", default="stable-diffusion/ldm/models/stable-diffusion-v1/model.ckpt")
    option("--out", required=True, help="the delta to write, a .safetensors")
    option("--only", nargs="+", metavar="SOURCE", help="only these entries of the JSON (default: all, jointly)")
    option("--embeddings", help="start from the vectors in this folder, not from words")
    option("--merge", nargs="+", metavar="DELTA", help="merge these, train nothing")
    option("--steps", type=whole(), default=250)
    option("--batch-size", type=whole(), default=4, dest="batch", help="pictures of the concepts; and of the prior")
    option("--lr", type=real(positive=True), default=2e-5, help="of one picture; scaled by their number a step")
    option("--regularisation", type=whole(), default=100, dest="count", help="pictures of the prior, for each concept")
    p3_model.add_model_options(parser)
    add_device_options(parser)
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args, jobs = arguments(argv), []
    if not args.merge:
        concepts = only(read_concepts(args.json), args.only, args.json)
        jobs = [(c, image_files(pathlib.Path(args.data) / c.key)) for c in concepts]
    out, dtype = output_file(args.out), pick_precision(args.precision, args.device)
    model = p3_model.load_stable_diffusion(args.ckpt, args.device, dtype, args.config)
    args.size = args.size or p3_model.own_size(model)
    recipe = Recipe(**{k: v for k, v in vars(args).items() if k in Recipe._fields})
    done = merge(model, args.merge, out, args.seed) if args.merge else None
    print(done or learn(model, jobs, recipe, args.count, out, args.embeddings))


if __name__ == "__main__":
    main()
