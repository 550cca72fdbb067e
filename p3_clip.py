"""CLIP (Radford et al. 2021) for grading and zero-shot classification, and the grader's scores.

    clip = load_clip("ViT-B/32", device)
    clip.images(pictures) @ clip.texts(["a dog", "a cat"]).T        # cosines [N, 2]

One network, that of the `clip` package, whatever file the weights come from.
"""

from __future__ import annotations

import os
import pathlib
import warnings

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from utils import UserError, atomic, is_finite, load_checkpoint, open_image, read_json

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources, which setuptools warns of
        import clip as openai_clip
except ImportError as e:  # it needs pkg_resources, which setuptools 81 no longer has
    openai_clip, IMPORT_ERROR = None, str(e)


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the colours it saw


class Clip:
    """Two encoders into one space. `images` and `texts` give float32 unit vectors [N, D] on the CPU."""

    def __init__(self, network, device, name=""):
        self.network, self.device, self.name = network.eval().requires_grad_(False).to(device), device, name
        self.logit_scale = float(network.logit_scale.exp())  # 100 for OpenAI's models
        self.preprocess = openai_clip.clip._transform(network.visual.input_resolution)

    @torch.no_grad()
    def images(self, pictures, batch_size=64):
        """Pictures are PIL images, paths, or uint8 [3, H, W]."""
        vectors = []
        for start in range(0, len(pictures), batch_size):
            batch = torch.stack([self.preprocess(_rgb(p)) for p in pictures[start : start + batch_size]])
            vectors.append(_unit(self.network.encode_image(batch.to(self.device))))
        return torch.cat(vectors)

    @torch.no_grad()
    def texts(self, texts, batch_size=256):
        tokens = openai_clip.tokenize(texts, context_length=self.network.context_length, truncate=True)
        return torch.cat([_unit(self.network.encode_text(part.to(self.device))) for part in tokens.split(batch_size)])


def _rgb(picture):
    if torch.is_tensor(picture):
        return to_pil_image(picture)
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    return open_image(picture, upright=False)  # as the course's grader sees it


def _unit(x):
    x = x.float().cpu()
    return x / x.norm(dim=-1, keepdim=True)


# -------------------------------------------------------------------------------- the grader's scores


def image_scores(clip, pictures, sources):
    """100 * mean cosine of each picture to the sources: [len(pictures)]. Both are pictures or their `Clip.images`."""
    pictures, sources = (x if torch.is_tensor(x) else clip.images(x) for x in (pictures, sources))
    return 100 * (pictures @ sources.T).mean(1)


def text_scores(clip, pictures, text):
    """CLIP's logit of each picture for the text, 100 * cosine with OpenAI's weights: [len(pictures)]."""
    pictures = pictures if torch.is_tensor(pictures) else clip.images(pictures)
    return clip.logit_scale * (pictures @ clip.texts([text])[0])


def fifth(image, text):
    """Indices of the fifth that is best by image + 2.5 * text: the course's 5 of 25."""
    return (image + 2.5 * text).topk(max(1, len(image) // 5)).indices


def best_fifth(image, text):
    """(image score, text score), averaged over that fifth."""
    best = fifth(image, text)
    return float(image[best].mean()), float(text[best].mean())


# -------------------------------------------------------------------------------- weights


def load_clip(name, device="cpu"):
    """Clip of `name`: one of OpenAI's names ("ViT-B/32"), a hub name ("openai/clip-vit-base-patch32"), a local folder
    in transformers' layout, or a file in OpenAI's format (the TorchScript archive as released, or a state dict).

    Runs no code that a file may carry. UserError for one that is missing, damaged, or of another kind of network.
    """
    if openai_clip is None:
        raise UserError(f"package clip: cannot be imported ({IMPORT_ERROR}); pip install openai-clip 'setuptools<81'")
    path = pathlib.Path(name)
    if not path.exists():
        path = _fetch(str(name))
    try:
        state = _from_transformers(path) if path.is_dir() else load_checkpoint(path)
        return Clip(_build(state.get("state_dict", state), path), device, str(name))
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not the weights of a CLIP model ({str(e)[:150]})") from None


def _build(state, path):
    """clip.model.CLIP in float32 of a state dict in OpenAI's names."""
    sizes = {"input_resolution", "context_length", "vocab_size"}
    state = {k: v for k, v in state.items() if torch.is_tensor(v) and k not in sizes and not k.endswith("attn_mask")}
    if not all(map(is_finite, state.values())):
        raise UserError(f"{path}: has NaN or infinity in its weights; fetch it again")
    try:
        network = openai_clip.model.build_model(dict(state)).float()  # build_model rounds to float16
        network.load_state_dict(state)
    except (KeyError, RuntimeError, ZeroDivisionError, IndexError, AttributeError) as e:
        raise UserError(f"{path}: not the weights of a CLIP model ({str(e)[:150]})") from None
    return network


def save_clip(state, path):
    """Writes a state dict in OpenAI's names as they published theirs, a TorchScript archive in half precision."""
    network = _build(state, path)
    size = network.visual.input_resolution
    images, tokens = torch.zeros(1, 3, size, size), torch.zeros(1, network.context_length, dtype=torch.long)
    with warnings.catch_warnings(), atomic(path) as temporary:
        warnings.simplefilter("ignore")  # tracing is no longer advised
        traced = torch.jit.trace_module(network, {"encode_image": images, "encode_text": tokens})
        torch.jit.save(traced.half(), str(temporary))


def _fetch(name):
    """Path of the weights of a published name: from the cache, or downloaded, which is said aloud."""
    if name in openai_clip.available_models():
        root = pathlib.Path(os.path.expanduser("~/.cache/clip"))
        if not (root / f"{name.replace('/', '-').replace('@', '-')}.pt").is_file():
            print(f"downloading CLIP {name} to {root}")
        try:  # _download verifies the SHA-256
            return pathlib.Path(openai_clip.clip._download(openai_clip.clip._MODELS[name], str(root)))
        except (OSError, RuntimeError) as e:
            raise UserError(_unreachable(name, e)) from None
    if name.count("/") != 1 or name.startswith((".", "/")) or name.endswith((".pt", ".pth", ".bin", ".ckpt")):
        known = ", ".join(openai_clip.available_models())
        raise UserError(f"{name}: no such file or folder, and no name of a CLIP model; take one of {known}")
    return _fetch_from_hub(name)


def _fetch_from_hub(name):
    error = ""
    for offline in (True, False):  # what transformers has cached already serves
        try:
            from huggingface_hub import snapshot_download

            if not offline:
                print(f"downloading CLIP {name} from the hub")
            wanted = ["config.json", "pytorch_model.bin"] + ["model.safetensors"] * offline
            folder = pathlib.Path(snapshot_download(name, allow_patterns=wanted, local_files_only=offline))
            if len([f for f in wanted if (folder / f).is_file()]) > 1:
                return folder
        except Exception as e:  # the hub's library has a dozen kinds of network errors
            error = e
    raise UserError(_unreachable(name, error))


def _unreachable(name, error):
    reason = " ".join(str(error).split())[:100]
    remedy = "where the network is closed, give --clip or --model the path of the weights"
    return f"CLIP {name} is not in the cache and cannot be downloaded ({reason}); {remedy}"


# -------------------------------------------------------------------------------- transformers' layout

_NAMES = [  # transformers -> OpenAI
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
]


def _from_transformers(folder):
    """State dict in OpenAI's names of a folder as transformers' CLIPModel.save_pretrained writes it."""
    config = read_json(folder / "config.json", "name a folder in transformers' CLIP layout")
    parts = [config.get(k) or {} if isinstance(config, dict) else None for k in ("text_config", "vision_config")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{folder}/config.json: holds no text_config and vision_config; expected transformers' layout")
    for part, width, heads in zip(parts, (512, 768), (8, 12)):  # transformers' defaults, those of ViT-B/32
        activation = part.get("hidden_act", "quick_gelu")
        if activation != "quick_gelu" or part.get("hidden_size", width) != 64 * part.get("num_attention_heads", heads):
            raise UserError(f"{folder}/config.json: not one of OpenAI's CLIP models (quick_gelu, 64 channels a head)")
    files = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    return openai_names(load_checkpoint(files[0] if files[0].is_file() else files[1]))


def openai_names(state):
    """Renames a state dict of transformers' CLIPModel to OpenAI's: q, k, v become one matrix, projections transpose."""
    out = {}
    for key, value in state.items():
        if key.endswith(("position_ids", ".k_proj.weight", ".v_proj.weight", ".k_proj.bias", ".v_proj.bias")):
            continue
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
            key = key.replace(".self_attn.q_proj.", ".attn.in_proj_")
        elif key in ("visual_projection.weight", "text_projection.weight"):
            key = {"v": "visual.proj", "t": "text_projection"}[key[0]]
            value = value.T
        for theirs, ours in _NAMES:
            key = key.replace(theirs, ours)
        out[key] = value
    return out


def transformers_names(state):
    """The inverse of openai_names."""
    out = {}
    for key, value in state.items():
        for theirs, ours in _NAMES:
            key = key.replace(ours, theirs)
        if ".attn.in_proj_" in key:
            for x, part in zip("qkv", value.chunk(3)):
                out[key.replace(".attn.in_proj_", f".self_attn.{x}_proj.")] = part
        elif key in ("visual.proj", "text_projection"):
            out[{"v": "visual_projection.weight", "t": "text_projection.weight"}[key[0]]] = value.T
        else:
            out[key] = value
    return out
