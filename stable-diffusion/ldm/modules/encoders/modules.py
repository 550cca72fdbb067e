"""The text encoder: transformers' CLIPTextModel and CLIPTokenizer, without any hub."""
from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import pathlib
import tempfile
import unicodedata
import warnings

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoint import load_tensor, read_state_dict
from ldm.util import ModelError

# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size of OpenAI's text models (Radford et al. 2021, table 20)
HUB_MODELS = {
    "openai/clip-vit-large-patch14": (768, 12, 12, 3072),
    "openai/clip-vit-base-patch16": (512, 12, 8, 2048),
    "openai/clip-vit-base-patch32": (512, 12, 8, 2048),
}


class FrozenCLIPEmbedder(nn.Module):
    """Prompts -> hidden states of CLIP's text model after its final layer norm, [B, max_length, width].

    version: one of HUB_MODELS, for the sizes alone (weights come from the Stable Diffusion checkpoint; nothing is fetched), or a folder in
    transformers' layout: config.json, and where they are there the tokenizer's files and the weights. `config` overrides sizes.
    Weights have one set of names in state dicts, that of sd-v1-4.ckpt (transformer.text_model ...), whichever transformers runs.
    `expansions` {token id: ids} is where a placeholder of several learned vectors is spelt out.
    """

    def __init__(self, version="openai/clip-vit-large-patch14", device="cpu", max_length=77, config=None):
        super().__init__()
        self.version, self.max_length, self.expansions = version, max_length, {}
        self.transformer = CLIPTextModel(_text_config(version, config or {}))
        self._register_state_dict_hook(_to_checkpoint_names)
        self._register_load_state_dict_pre_hook(self._to_own_names)
        self.tokenizer = _tokenizer(version, max_length)
        folder = pathlib.Path(version)
        for weights in (folder / "model.safetensors", folder / "pytorch_model.bin"):
            if weights.is_file():
                self._load_transformers_weights(weights)
                break
        self.freeze()

    def freeze(self):
        self.eval()
        self.requires_grad_(False)

    @property
    def device(self):
        """Where the weights are: a model that was moved needs no new argument."""
        return self.transformer.get_input_embeddings().weight.device

    def tokenize(self, text):
        """Token ids [B, max_length], int64: start, the prompt's, end, padding with the pad token. Too long a prompt is cut, with a warning."""
        text = [text] if isinstance(text, str) else list(text)
        tokenizer, rows = self.tokenizer, []
        for prompt in text:
            ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            ids = [j for i in ids for j in self.expansions.get(i, (i,))]
            if len(ids) > self.max_length - 2:
                warnings.warn(f"prompt of {len(ids)} tokens cut to {self.max_length - 2}: {prompt[:60]!r} ...", stacklevel=2)
            row = [tokenizer.bos_token_id, *ids[: self.max_length - 2], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (self.max_length - len(row)))
        return torch.tensor(rows)

    def forward(self, text):
        return self.transformer(input_ids=self.tokenize(text).to(self.device)).last_hidden_state

    def encode(self, text):
        return self(text)

    # transformers 5 dropped "text_model." from its names, and position_ids from its state dicts.

    def _own_prefix(self):
        return "text_model." if hasattr(self.transformer, "text_model") else ""

    def _to_own_names(self, state_dict, prefix, *unused):
        named, own = prefix + "transformer.text_model.", prefix + "transformer." + self._own_prefix()
        for key in [k for k in state_dict if k.startswith(prefix + "transformer.")]:
            rest = key[len(named if key.startswith(named) else prefix + "transformer."):]
            value = state_dict.pop(key)
            if rest != "embeddings.position_ids":           # a constant: 0, 1, 2 ...
                state_dict[own + rest] = value
        if self._own_prefix():                              # transformers 4 has it in its state dict
            state_dict[own + "embeddings.position_ids"] = self._position_ids()

    def _position_ids(self):
        return getattr(self.transformer, "text_model", self.transformer).embeddings.position_ids

    def _load_transformers_weights(self, path):
        own = self.state_dict(keep_vars=True)
        for name, stored in read_state_dict(path).items():
            name = "transformer." + (name if name.startswith("text_model.") else "text_model." + name)
            if name in own and stored.shape == tuple(own[name].shape):
                own[name].data.copy_(load_tensor(stored, name, path))


def _to_checkpoint_names(module, state_dict, prefix, metadata):
    named, own = prefix + "transformer.text_model.", prefix + "transformer." + module._own_prefix()
    if named != own:
        for key in [k for k in state_dict if k.startswith(own)]:
            state_dict[named + key[len(own):]] = state_dict.pop(key)
        state_dict[named + "embeddings.position_ids"] = module._position_ids()


def _text_config(version, overrides):
    """CLIPTextConfig of a known model or of a folder's config.json (that of a text model, or of a whole CLIP)."""
    if pathlib.Path(version).is_dir():
        path = pathlib.Path(version) / "config.json"
        try:
            sizes = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise ModelError(f"{path}: not a readable config of a text model ({str(e)[:80]})") from None
        sizes = sizes.get("text_config", sizes)
    elif str(version) in HUB_MODELS:
        sizes = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), HUB_MODELS[str(version)]))
    else:
        raise ModelError(f"text encoder {version!r}: neither a folder nor one of {', '.join(HUB_MODELS)}")
    known = CLIPTextConfig().to_dict()
    return CLIPTextConfig(**{k: v for k, v in {**sizes, **overrides}.items() if k in known and k != "model_type"})


def _tokenizer(version, max_length):
    """CLIPTokenizer of the folder, or of CLIP's vocabulary where `version` has none."""
    if (pathlib.Path(version) / "vocab.json").is_file() or (pathlib.Path(version) / "tokenizer.json").is_file():
        return _from_folder(version, max_length)
    with tempfile.TemporaryDirectory() as folder:
        write_clip_vocabulary(folder)
        return _from_folder(folder, max_length)


def _from_folder(folder, max_length):
    logger = logging.getLogger("transformers.models.clip.tokenization_clip")
    level, logger.disabled = logger.disabled, True          # "ftfy is not installed": taken care of below
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=max_length)
    except (OSError, ValueError, TypeError) as e:
        raise ModelError(f"{folder}: not a readable CLIP tokenizer ({' '.join(str(e).split())[:100]})") from None
    finally:
        logger.disabled = level
    if getattr(tokenizer, "fix_text", 0) is None:           # transformers 4 without ftfy would strip accents and split Chinese
        tokenizer.fix_text = lambda text: unicodedata.normalize("NFC", text)
    return tokenizer


def write_clip_vocabulary(folder):
    """Writes vocab.json and merges.txt, as CLIPTokenizer wants them, from the BPE file inside the `clip` package.

    The vocabulary is: 256 bytes as printable characters, the same at a word's end, 48,894 merges, start and end (CLIP's simple_tokenizer).
    """
    spec = importlib.util.find_spec("clip")
    places = [pathlib.Path(p) / "bpe_simple_vocab_16e6.txt.gz" for p in (spec.submodule_search_locations or [])] if spec else []
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise ModelError("CLIP's vocabulary was not found: `pip install openai-clip`, or give `version` a folder with vocab.json and merges.txt")
    merges = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder = pathlib.Path(folder)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
