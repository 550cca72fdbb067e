"""Textual Inversion (Gal et al. 2023): new words for a frozen text encoder, as a patch to a model.

tokens = LearnedTokens(model.cond_stage_model)
tokens.add("<new1>", vectors, init_word="corgi")        # [n, 768] to start from; then optimise tokens.parameters()
tokens.save("new1.safetensors", step=500)
LearnedTokens(model.cond_stage_model).load("new1.safetensors")      # prompts may say <new1> now
"""

import hashlib
import json
import pathlib
import warnings
import zipfile

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn
from transformers import AddedToken

from ldm import ModelError
from ldm.checkpoint import Inert, StoredTensor, atomic, read_checkpoint

METADATA = ("init_word", "base_model", "step", "scores")
HEADER = "textual_inversion"  # the one entry of __metadata__: safetensors writes several in any order


class LearnedTokens(nn.Module):
    """One or several learned vectors for each placeholder, in float32; `parameters()` are these vectors, nothing else.
    The encoder's state dict does not change: the patch adds the placeholders to the tokenizer, spelt out as several ids
    for several vectors, and answers the lookup of these ids, so that gradients reach them through a frozen encoder."""

    def __init__(self, embedder):
        super().__init__()
        self.rows, self.tokens, self.metadata = nn.ParameterList(), [], {}
        object.__setattr__(self, "embedder", embedder)  # not as a submodule: it is not ours to train or to save
        object.__setattr__(self, "table", embedder.transformer.get_input_embeddings())
        self._ids, self._lookup_below = [], self.table.forward
        self.table.forward, self.base_model = self._lookup, fingerprint(embedder.transformer)

    def _lookup(self, ids):
        """Token ids [B, N] -> vectors [B, N, dim] in the table's precision."""
        if not self._ids:
            return self._lookup_below(ids)
        found = ids[..., None] == torch.tensor(self._ids, device=ids.device)  # [B, N, rows]
        known = self._lookup_below(ids.masked_fill(found.any(-1), 0))
        learned = F.embedding(found.int().argmax(-1), torch.cat(list(self.rows)).to(known))
        return torch.where(found.any(-1, keepdim=True), learned, known)

    def detach(self):
        """Takes the patch off; the placeholders stay in the tokenizer, without a meaning."""
        self.table.forward = self._lookup_below

    def __contains__(self, token):
        return token in self.tokens

    def __getitem__(self, token):
        """The parameter [vectors, dim] of a placeholder."""
        if token not in self.tokens:
            raise ModelError(f"no learned vectors for {token!r}; there are {', '.join(self.tokens) or 'none'}")
        return self.rows[self.tokens.index(token)]

    def add(self, token, vectors, **metadata):
        """A placeholder with the vectors [n, dim] (or [dim]) to start from. ModelError for vectors of another width and
        for a word that the tokenizer has already."""
        vectors, dim = torch.atleast_2d(torch.as_tensor(vectors).detach().float()), self.table.weight.shape[1]
        if vectors.dim() != 2 or vectors.shape[1] != dim or not len(vectors) or not vectors.isfinite().all():
            raise ModelError(f"{token}: its vectors are {list(vectors.shape)}, or not finite; [n, {dim}] is wanted")
        if len(vectors) > self.embedder.max_length - 2:
            raise ModelError(f"{token}: {len(vectors)} vectors are more than a prompt holds")
        tokenizer, vocabulary = self.embedder.tokenizer, self.embedder.tokenizer.get_vocab()
        names = [token] + [f"{token}_{i}" for i in range(1, len(vectors))]  # as diffusers names them
        for name in names:
            if name in vocabulary or f"{name.lower()}</w>" in vocabulary:
                raise ModelError(f"{name!r} is a word of the vocabulary already; take a new one such as <new1>")
            if not name or name != "".join(name.split()) or not name.isprintable():
                raise ModelError(f"{name!r} is no placeholder: take one word, such as <new1>")
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])  # <New1> is not <new1>
        ids = tokenizer.convert_tokens_to_ids(names)
        self.embedder.expansions[ids[0]] = ids
        self.rows.append(nn.Parameter(vectors.clone().to(self.table.weight.device)))
        self._ids += ids
        self.tokens.append(token)
        self.metadata[token] = metadata

    def save(self, path, tokens=None, **metadata):
        """Writes {token: float32 [vectors, dim]} as safetensors, which diffusers and others load if it is one token.
        `metadata`, what was given to `add`, and `base_model` go into the header. The same content, the same bytes."""
        tokens, own = self.tokens if tokens is None else tokens, self.metadata
        told = {k: {t: own[t][k] for t in tokens if k in own[t]} for token in tokens for k in own[token]}
        told = {**(told if len(tokens) > 1 else own[tokens[0]]), "base_model": self.base_model, **metadata}
        content = {token: self[token].detach().float().cpu().clone() for token in tokens}
        with atomic(path) as temporary:
            temporary.write_bytes(to_bytes(content, {HEADER: json.dumps(told, sort_keys=True)}))

    def load(self, path, token=None):
        """Adds the placeholders of a file (see read_embeddings), its only one as `token` if given: their names."""
        embeddings, metadata = read_embeddings(path, token)
        if token is not None:
            if len(embeddings) != 1:
                raise ModelError(f"{path}: holds {', '.join(embeddings)}, which cannot all be {token}")
            embeddings = dict.fromkeys([token], *embeddings.values())
        if (base := str(metadata.get("base_model") or self.base_model)[:40]) != self.base_model:
            warnings.warn(f"{path}: learned with another text encoder ({base}, here {self.base_model})", stacklevel=2)
        for name, vectors in embeddings.items():
            try:
                own = {k: v[name] if isinstance(v, dict) and name in v else v for k, v in metadata.items()}
                self.add(name, vectors, **own)
            except ModelError as e:
                raise ModelError(f"{path}: {e}") from None
        return list(embeddings)


def fingerprint(module):
    """Sixteen hexadecimal digits that name a text encoder's weights, the same in float32 and float16."""
    rows = [m.weight.detach()[:64] for m in module.modules() if isinstance(m, nn.Embedding)]
    return hashlib.sha256(b"".join(r.half().cpu().numpy().tobytes() for r in rows)).hexdigest()[:16]


def read_embeddings(path, token=None):
    """({token: float32 [vectors, dim]}, {init_word, base_model, step, scores}) of a file: ours, or our .pt of before;
    diffusers' learned_embeds ({token: tensor}); automatic1111's (the token is its "name", or the file's); rinongal's
    embeddings.pt (the placeholder is usually *); a bare tensor, where its `token` is given."""
    content = read_checkpoint(path)
    content = {token: content} if isinstance(content, StoredTensor) and token is not None else content
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not an embedding file, or a bare tensor without the name of its token")
    parameters = content.get("string_to_param", content)
    parameters = getattr(parameters, "state", parameters)  # of a pickled nn.ParameterDict
    levels = [parameters, parameters.get("_parameters")] if isinstance(parameters, dict) else []
    entries = [entry for level in levels if isinstance(level, dict) for entry in level.items()]
    found = {str(k): v for k, v in entries if isinstance(v, StoredTensor)}
    if len(found) == 1 and (set(found) == {"emb_params"} or "name" in content):
        name = content.get("name")
        found = {name if isinstance(name, str) and name else pathlib.Path(path).stem: v for v in found.values()}
    embeddings = {name: torch.atleast_2d(stored.load(dtype=torch.float32)) for name, stored in found.items()}
    if not embeddings or any(v.dim() != 2 for v in embeddings.values()):
        raise ModelError(f"{path}: not an embedding file (ours, diffusers', automatic1111's or rinongal's)")
    if not zipfile.is_zipfile(path):
        try:
            with safe_open(str(path), "pt") as file:
                content = dict(json.loads((file.metadata() or {}).get(HEADER, "{}")))
        except (ValueError, TypeError, RecursionError):
            raise ModelError(f"{path}: its header is damaged; fetch it, or train the token, again") from None
    return embeddings, {k: v for k, v in content.items() if k in METADATA and not isinstance(v, (StoredTensor, Inert))}
