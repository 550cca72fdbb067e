"""The text encoder: transformers' CLIPTextModel and CLIPTokenizer, without any hub."""

import functools
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
from ldm.checkpoint import load_weights, read_state_dict

# OpenAI's text models (Radford et al. 2021, table 20)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
HUB_MODELS = {"openai/clip-vit-large-patch14": (768, 12, 12, 3072), "openai/clip-vit-base-patch32": (512, 12, 8, 2048)}

# "ftfy is not installed": _tokenizer takes care of it
logging.getLogger("transformers.models.clip.tokenization_clip").addFilter(lambda r: "ftfy" not in r.getMessage())


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
        files = (pathlib.Path(version) / name for name in ("model.safetensors", "pytorch_model.bin"))
        for path in [file for file in files if file.is_file()][:1]:
            stored = {k.split("text_model.")[-1]: v for k, v in read_state_dict(path).items()}
            load_weights(self, {f"transformer.text_model.{k}": v for k, v in stored.items()}, path)
        self.eval().requires_grad_(False)

    tokenizer = functools.cached_property(lambda self: _tokenizer(self.version, self.max_length))  # at the first prompt
    device = property(lambda self: self.transformer.device, nn.Module.to, doc="Where it is; setting it moves it.")

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


class TextModel(CLIPTextModel):
    """CLIPTextModel with the names of Stable Diffusion's checkpoints under any version of transformers: the level
    text_model, which 5 dropped, and position_ids (0, 1, 2 ...), which state dicts have not from 4.31 on."""

    base_model_prefix = "text_model"

    def __init__(self, config):
        super(CLIPTextModel, self).__init__(config)
        inner = CLIPTextModel(config)
        self.text_model = inner._modules.get("text_model", inner)
        self.text_model.embeddings.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)

    def resize_token_embeddings(self, *size, **options):
        """As in transformers, but a table of another size is always trainable: 4.46 and later leave it frozen."""
        before = self.get_input_embeddings().weight.shape
        table = super().resize_token_embeddings(*size, **options)
        table.weight.requires_grad_(table.weight.requires_grad or table.weight.shape != before)
        return table


def _text_config(version, overrides):
    """CLIPTextConfig of a known model or of a folder's config.json (that of a text model, or of a whole CLIP)."""
    try:
        sizes = dict(zip(SIZES, HUB_MODELS.get(str(version), ())))
        sizes = sizes or json.loads((pathlib.Path(version) / "config.json").read_text())
        sizes = sizes.get("text_config", sizes)
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        names = ", ".join(HUB_MODELS)
        raise ModelError(f"{version}: neither a folder with a config.json ({str(e)[:80]}) nor one of {names}") from None
    known = CLIPTextConfig().to_dict()
    return CLIPTextConfig(**{k: v for k, v in {**sizes, **overrides}.items() if k in known and k != "model_type"})


def _tokenizer(version, max_length):
    """CLIPTokenizer of the folder, or of CLIP's vocabulary where `version` has none."""
    own = any((pathlib.Path(version) / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(version) if own else write_clip_vocabulary(temporary)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
        except Exception as e:  # the tokenizers library raises bare Exceptions
            raise ModelError(f"{folder}: not a readable CLIP tokenizer ({' '.join(str(e).split())[:100]})") from None
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
