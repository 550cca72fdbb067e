"""The text encoder: transformers' CLIPTextModel and CLIPTokenizer, without any hub."""

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

from ldm import ModelError
from ldm.checkpoint import is_finite, read_state_dict

# OpenAI's text models (Radford et al. 2021, table 20)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
HUB_MODELS = {"openai/clip-vit-large-patch14": (768, 12, 12, 3072), "openai/clip-vit-base-patch32": (512, 12, 8, 2048)}


class FrozenCLIPEmbedder(nn.Module):
    """Prompts -> hidden states of CLIP's text model after its final layer norm, [B, max_length, width].

    version: one of HUB_MODELS, for its sizes alone (the Stable Diffusion checkpoint has the weights), or a folder in
    transformers' layout: config.json, and where it has them, the tokenizer's files and weights. `config` overrides
    sizes. `expansions`, {token id: ids}, spells out placeholders of several learned vectors.
    """

    def __init__(self, version="openai/clip-vit-large-patch14", device="cpu", max_length=77, config=None):
        super().__init__()
        self.version, self.max_length, self.expansions = version, max_length, {}
        self.transformer = TextModel(_text_config(version, config or {}))
        self.tokenizer = _tokenizer(version, max_length)
        files = [pathlib.Path(version) / name for name in ("model.safetensors", "pytorch_model.bin")]
        self._load_transformers_weights(next((f for f in files if f.is_file()), None))
        self.eval().requires_grad_(False)

    @property
    def device(self):
        """Where the weights are; setting it moves them."""
        return self.transformer.get_input_embeddings().weight.device

    @device.setter
    def device(self, device):
        self.to(device)

    def tokenize(self, text):
        """Token ids [B, max_length]: start, the prompt's, end, pad tokens; too long a prompt is cut, with a warning."""
        tokenizer, rows = self.tokenizer, []
        for prompt in [text] if isinstance(text, str) else text:
            ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            ids = [j for i in ids for j in self.expansions.get(i, (i,))]
            if len(ids) > self.max_length - 2:
                warnings.warn(f"{len(ids)} tokens cut to {self.max_length - 2}: {prompt[:60]!r}", stacklevel=2)
            row = [tokenizer.bos_token_id, *ids[: self.max_length - 2], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (self.max_length - len(row)))
        return torch.tensor(rows)

    def forward(self, text):
        return self.transformer(input_ids=self.tokenize(text).to(self.device)).last_hidden_state

    encode = forward

    def _load_transformers_weights(self, path):
        own = self.state_dict(keep_vars=True)
        for name, stored in read_state_dict(path).items() if path else ():
            name = "transformer." + (name if name.startswith("text_model.") else "text_model." + name)
            if name in own and stored.shape == tuple(own[name].shape):
                if not is_finite(weight := stored.load()):
                    raise ModelError(f"{path}: {name} has NaN or infinity in it; fetch it again")
                own[name].data.copy_(weight)


class TextModel(CLIPTextModel):
    """CLIPTextModel with transformers 4's names in state dicts under any version: text_model.*, a level that 5 dropped,
    and position_ids (0, 1, 2 ...), as 4.31 did."""

    def __init__(self, config):
        super().__init__(config)
        self.words = config.vocab_size
        self._register_state_dict_hook(_to_checkpoint_names)
        self._register_load_state_dict_pre_hook(self._to_own_names)

    def resize_token_embeddings(self, size=None, *args, **kwargs):
        """As in transformers, but a table of another size is always trainable: 4.46 and later leave it frozen."""
        before = len(self.get_input_embeddings().weight)
        table = super().resize_token_embeddings(size, *args, **kwargs)
        table.weight.requires_grad_(table.weight.requires_grad or len(table.weight) != before)
        return table

    def __getattr__(self, name):
        return self if name == "text_model" and name not in self._modules else super().__getattr__(name)

    def _to_own_names(self, state_dict, prefix, *unused):
        own, theirs = prefix + ("text_model." if "text_model" in self._modules else ""), prefix + "text_model."
        for key in [k for k in state_dict if k.startswith(theirs)]:
            state_dict[own + key[len(theirs) :]] = state_dict.pop(key)
        ids = state_dict.pop(own + "embeddings.position_ids", None)
        if "position_ids" not in self.text_model.embeddings._non_persistent_buffers_set:
            state_dict[own + "embeddings.position_ids"] = ids if ids is not None else _positions(self)


def _to_checkpoint_names(module, state_dict, prefix, metadata):
    for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + "text_model.")]:
        state_dict[prefix + "text_model." + key[len(prefix) :]] = state_dict.pop(key)
    state_dict.setdefault(prefix + "text_model.embeddings.position_ids", _positions(module))


def _positions(model):
    ids = model.text_model.embeddings.position_ids
    return torch.arange(ids.shape[1], device=ids.device)[None]


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
        sizes = dict(zip(SIZES, HUB_MODELS[str(version)]))
    else:
        raise ModelError(f"text encoder {version!r}: neither a folder nor one of {', '.join(HUB_MODELS)}")
    known = CLIPTextConfig().to_dict()
    return CLIPTextConfig(**{k: v for k, v in {**sizes, **overrides}.items() if k in known and k != "model_type"})


def _tokenizer(version, max_length):
    """CLIPTokenizer of the folder, or of CLIP's vocabulary where `version` has none."""
    logger = logging.getLogger("transformers.models.clip.tokenization_clip")
    own = any((pathlib.Path(version) / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(version) if own else write_clip_vocabulary(temporary)
        logger.disabled = True  # "ftfy is not installed": taken care of below
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
        except Exception as e:  # the tokenizers library raises bare Exceptions
            raise ModelError(f"{folder}: not a readable CLIP tokenizer ({' '.join(str(e).split())[:100]})") from None
        finally:
            logger.disabled = False
    if getattr(tokenizer, "fix_text", 0) is None:  # without ftfy, transformers 4 strips accents
        tokenizer.fix_text = lambda text: unicodedata.normalize("NFC", text)
    return tokenizer


def write_clip_vocabulary(folder):
    """Writes vocab.json and merges.txt, as CLIPTokenizer wants them, from the BPE file inside the `clip` package: 256
    bytes as letters, the same ending a word, merges, start, end (CLIP's simple_tokenizer)."""
    spec, folder = importlib.util.find_spec("clip"), pathlib.Path(folder)
    path = pathlib.Path(spec.origin if spec and spec.origin else "").parent / "bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file():
        raise ModelError("CLIP's vocabulary is not here: `pip install openai-clip`, or make `version` a folder")
    merges = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return str(folder)
