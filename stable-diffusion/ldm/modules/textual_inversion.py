"""Textual Inversion (Gal et al. 2023): new words for a frozen text encoder, as a patch to a model.

tokens = LearnedTokens(model.cond_stage_model)
tokens.add("<new1>", tokens.initial("corgi"), init_word="corgi")    # then optimise tokens.parameters()
tokens.save("new1.pt", step=500)
...
LearnedTokens(model.cond_stage_model).load("new1.pt")               # prompts may say <new1> now
"""

from __future__ import annotations

import pathlib
import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AddedToken

from ldm import ModelError
from ldm.checkpoint import StoredTensor, fingerprint, read_checkpoint, save_checkpoint

METADATA = ("init_word", "base_model", "step", "scores")


class LearnedTokens(nn.Module):
    """One or several learned vectors for each placeholder, in float32; `parameters()` are these vectors, nothing else.

    The text encoder's table stays as it is, bit for bit: the patch adds the placeholders to the tokenizer, has them
    spelt out as several ids where they have several vectors, and answers the lookup of these ids, so that gradients
    reach the vectors through the frozen encoder. The encoder's state dict does not change. `detach()` ends the patch.
    """

    def __init__(self, embedder):
        super().__init__()
        self.rows = nn.ParameterList()
        self.tokens, self.metadata = [], {}
        object.__setattr__(self, "embedder", embedder)  # not as a submodule: it is not ours to train or to save
        object.__setattr__(self, "table", embedder.transformer.get_input_embeddings())
        self._ids, self._lookup_below = [], self.table.forward
        self.table.forward = self._lookup

    def _lookup(self, ids):
        """Token ids [B, N] -> vectors [B, N, dim] in the table's precision."""
        if not self._ids:
            return self._lookup_below(ids)
        row_of = torch.full((max(self._ids) + 1,), -1)
        row_of[self._ids] = torch.arange(len(self._ids))
        row = row_of.to(ids.device)[ids.clamp(max=max(self._ids))].masked_fill(ids > max(self._ids), -1)
        known = self._lookup_below(ids.masked_fill(row >= 0, 0))
        learned = F.embedding(row.clamp(min=0), torch.cat(list(self.rows)).to(known))
        return torch.where((row >= 0).unsqueeze(-1), learned, known)

    def detach(self):
        """Takes the patch off; the placeholders stay in the tokenizer, without a meaning."""
        self.table.forward = self._lookup_below

    # ------------------------------------------------------------------------------------------------ tokens

    @property
    def dim(self):
        return self.table.weight.shape[1]

    @property
    def base_model(self):
        """Identifies the text encoder's weights: embeddings belong to those they were learned with."""
        return fingerprint(self.embedder.transformer)

    @property
    def mean_norm(self):
        """Mean length of the vocabulary's vectors: learned ones that are much longer drown the rest of a prompt."""
        return float(self.table.weight.detach().float().norm(dim=1).mean())

    def __contains__(self, token):
        return token in self.tokens

    def __getitem__(self, token):
        """The parameter [vectors, dim] of a placeholder."""
        if token not in self.tokens:
            raise ModelError(f"no learned vectors for {token!r}; there are {', '.join(self.tokens) or 'none'}")
        return self.rows[self.tokens.index(token)]

    def missing(self, prompt):
        """The placeholders, words like <this>, in a prompt that have no learned vectors."""
        return [p for p in re.findall(r"<[^<>\s|]+>", prompt) if p not in self.tokens]

    def initial(self, words, vectors=1):
        """Vectors [vectors, dim] to start from: one is the mean of all words, several are the words' own, in turns."""
        words = words.replace(",", " ").split() if isinstance(words, str) else list(words)
        ids = [self.embedder.tokenizer(w, add_special_tokens=False)["input_ids"] for w in words]
        if not words or not all(ids):
            raise ModelError(f"initial words {words}: give at least one word that the tokenizer knows")
        if 1 < vectors < len(words):
            raise ModelError(f"initial words {words}: more words than the {vectors} vectors")
        means = [self.table.weight.detach()[i].float().mean(0) for i in ids]
        if vectors == 1:
            means = [torch.stack(means).mean(0)]
        return torch.stack([means[i % len(means)] for i in range(vectors)]).cpu()

    def add(self, token, vectors, **metadata):
        """A placeholder with the vectors [n, dim] (or [dim]) to start from.

        ModelError for vectors of another width, and for a word that the tokenizer has already.
        """
        vectors = torch.as_tensor(vectors).detach().float()
        vectors = vectors[None] if vectors.dim() == 1 else vectors
        if vectors.dim() != 2 or vectors.shape[1] != self.dim or not len(vectors) or not vectors.isfinite().all():
            raise ModelError(
                f"{token}: its vectors are {list(vectors.shape)}, or not finite; "
                f"this text encoder takes [n, {self.dim}]"
            )
        if len(vectors) > self.embedder.max_length - 2:
            raise ModelError(f"{token}: {len(vectors)} vectors are more than a prompt holds")
        tokenizer = self.embedder.tokenizer
        names = [token] + [f"{token}_{i}" for i in range(1, len(vectors))]  # as diffusers names them
        vocabulary = tokenizer.get_vocab()
        for name in names:
            if name in vocabulary or f"{name.lower()}</w>" in vocabulary:
                raise ModelError(f"{name!r} is a word of the vocabulary already; take a new one such as <new1>")
            if not name or name != "".join(name.split()):
                raise ModelError(f"{name!r} is no placeholder: take one word, such as <new1>")
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])  # <New1> is not <new1>
        ids = tokenizer.convert_tokens_to_ids(names)
        self.embedder.expansions[ids[0]] = ids
        self.rows.append(nn.Parameter(vectors.clone().to(self.table.weight.device)))
        self._ids += ids
        self.tokens.append(token)
        self.metadata[token] = metadata

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path, tokens=None, **metadata):
        """Writes {token: float32 [vectors, dim]} with init_word, base_model, step, scores, to a temporary name first.

        `metadata` is written as it is, as is what was given to `add`; `base_model` is filled in. The layout is that of
        diffusers' learned_embeds.bin, with more entries.
        """
        tokens = self.tokens if tokens is None else list(tokens)
        content = {token: self[token].detach().float().cpu().clone() for token in tokens}
        for key in dict.fromkeys(key for token in tokens for key in self.metadata[token]):
            values = {token: self.metadata[token][key] for token in tokens if key in self.metadata[token]}
            content[key] = values if len(tokens) > 1 else values[tokens[0]]
        content.update({"base_model": self.base_model, **metadata})
        save_checkpoint(content, path)

    def load(self, path, token=None):
        """Adds the placeholders of a file (see read_embeddings), its only one as `token` if given: their names."""
        embeddings, metadata = read_embeddings(path)
        if token is not None:
            if len(embeddings) != 1:
                raise ModelError(f"{path}: holds {', '.join(embeddings)}, which cannot all be {token}")
            embeddings = dict.fromkeys([token], *embeddings.values())
        base = metadata.get("base_model")
        if base is not None and base != self.base_model:
            warnings.warn(f"{path}: learned with another text encoder ({base}, here {self.base_model})", stacklevel=2)
        for name, vectors in embeddings.items():
            try:
                own = {k: v[name] if isinstance(v, dict) and name in v else v for k, v in metadata.items()}
                self.add(name, vectors, **own)
            except ModelError as e:
                raise ModelError(f"{path}: {e}") from None
        return list(embeddings)


def read_embeddings(path):
    """({token: float32 [vectors, dim]}, {init_word, base_model, step, scores}) of an embedding file; it runs no code.

    Formats: ours; diffusers' learned_embeds.bin or .safetensors ({token: tensor}); automatic1111's .pt and .safetensors
    (the token is the entry "name", or the file's name); rinongal's embeddings.pt (the placeholder is usually *).
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not an embedding file")
    parameters = content.get("string_to_param", content)
    state = getattr(parameters, "state", None)  # a pickled nn.ParameterDict
    if state is not None:
        parameters = {**state, **state.get("_parameters", {})} if isinstance(state, dict) else None
    parameters = parameters if isinstance(parameters, dict) else {}
    found = {str(k): v for k, v in parameters.items() if isinstance(v, StoredTensor)}
    if len(found) == 1 and (set(found) == {"emb_params"} or "name" in content):
        name = content.get("name")
        found = {name if isinstance(name, str) and name else pathlib.Path(path).stem: v for v in found.values()}
    embeddings = {token: stored.load(dtype=torch.float32) for token, stored in found.items()}
    embeddings = {token: v[None] if v.dim() == 1 else v for token, v in embeddings.items()}
    if not embeddings or any(v.dim() != 2 for v in embeddings.values()):
        raise ModelError(f"{path}: not an embedding file (ours, diffusers', automatic1111's or rinongal's)")
    return embeddings, {k: content[k] for k in METADATA if k in content and not isinstance(content[k], StoredTensor)}
