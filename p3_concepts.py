"""Reading hw2_data/textual_inversion: the JSON of concepts and prompts, and the folders of source images.

for concept in read_concepts("hw2_data/textual_inversion/input.json"):
    files = image_files(f"hw2_data/textual_inversion/{concept.key}")
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

from utils import UserError, read_json

GRADED_TYPES = {".jpg", ".jpeg", ".png", ".bmp", ".gif"}  # the endings that the course's grader counts
IMAGE_TYPES = GRADED_TYPES | {".webp"}


class Concept(NamedTuple):
    """One entry of the JSON: {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": [...], ...}}."""

    key: str  # names the folder of the source images and the output folder
    word: str  # src_image, what the concept is: "dog", or an artist's name
    token: str  # token_name, the placeholder in the prompts
    prompts: list
    eval_prompts: list  # prompt_4_clip_eval: the prompts with the word in the token's place; may be []
    baseline: list  # [image score, text score] a prompt; may be []
    captions: object = ()  # train_captions, of our JSONs: what Textual Inversion says of the pictures, {} for the
    # token; a dict has a tuple a file name, so that the token need not learn the rest
    validation: object = {}  # validation_prompts, likewise: what it chooses the step by, with the text for CLIP
    init_word: str = ""  # init_word, likewise: what the token starts from; "" takes src_image


def read_concepts(path):
    """The JSON's entries as a list of Concept; UserError for a file that is missing, no JSON, or lacks a key."""
    path = pathlib.Path(path)
    entries = read_json(path, "give the path of the JSON with the concepts and prompts")
    if not isinstance(entries, dict) or not entries or not all(isinstance(e, dict) for e in entries.values()):
        raise UserError(f'{path}: expected {{"0": {{"token_name": ..., "prompt": [...]}}, ...}}')
    concepts = [_concept(path, key, entry) for key, entry in entries.items()]
    tokens = [c.token for c in concepts]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{path}: two entries have the same token_name; give each concept its own")
    return concepts


def only(concepts, keys, path):
    """Those of the concepts of `path` that the option --only names, all without; UserError for a name that is none."""
    known = [c.key for c in concepts]
    for key in keys or known:
        if key not in known:
            raise UserError(f"--only {key}: {path} has no such entry; take one of {', '.join(known)}")
    return [c for c in concepts if c.key in (keys or known)]


def _concept(path, key, entry):
    for name, kind in {"src_image": str, "token_name": str, "prompt": list}.items():
        if not isinstance(entry.get(name), kind) or not entry[name]:
            wanted = "text" if kind is str else "list of texts"
            raise UserError(f'{path}: entry "{key}" needs the key "{name}", a {wanted}')
    if not key.strip(". ") or not key.isprintable() or set(key) & set("/\\:"):
        raise UserError(f"{path}: the entry name {key!r} cannot name a folder; take one such as 0")
    prompts, eval_prompts = entry["prompt"], entry.get("prompt_4_clip_eval", [])
    baseline = entry.get("baseline", [])
    if not isinstance(baseline, list) or not all(map(is_pair, baseline)):
        raise UserError(f'{path}: entry "{key}": "baseline" is a list of pairs of numbers, image score and text score')
    if not isinstance(eval_prompts, list) or not all(isinstance(p, str) for p in [*prompts, *eval_prompts]):
        raise UserError(f'{path}: entry "{key}": every prompt must be a text')
    for name, values in (("prompt_4_clip_eval", eval_prompts), ("baseline", baseline)):
        if values and len(values) != len(prompts):
            raise UserError(f'{path}: entry "{key}" has {len(prompts)} prompts but {len(values)} in "{name}"')

    def templates(name, texts):
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.count("{}") == 1 for t in texts):
            raise UserError(f'{path}: entry "{key}": "{name}" is a list of texts, each with a {{}} in it')
        return tuple(texts)

    captions = entry.get("train_captions", [])
    if isinstance(captions, dict) and all(captions.values()):
        captions = {file: templates("train_captions", texts) for file, texts in captions.items()}
    else:
        captions = templates("train_captions", captions)
    validation = entry.get("validation_prompts", [])
    if isinstance(validation, dict) and all(isinstance(told, str) for told in validation.values()):
        templates("validation_prompts", list(validation))
    else:
        validation = {t: t.replace("{}", entry["src_image"]) for t in templates("validation_prompts", validation)}
    init_word = entry.get("init_word", "")
    if not isinstance(init_word, str):
        raise UserError(f'{path}: entry "{key}": "init_word" is a text')
    texts = prompts, eval_prompts, baseline, captions, validation, init_word
    return Concept(key, entry["src_image"], entry["token_name"], *texts)


def is_pair(value):
    """Whether a value of a JSON is a list of two numbers."""
    return isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)


def placeholders(prompt):
    """The learned tokens that a prompt names, in order: "a <new1> next to a <new2>" gives ["<new1>", "<new2>"]."""
    return re.findall(r"<[^<>\s]+>", prompt)


def image_files(folder):
    """The pictures of a folder, sorted by name; UserError where there is none."""
    folder = pathlib.Path(folder)
    files = sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in IMAGE_TYPES) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: no such folder, or no pictures in it; `bash get_dataset.sh` fetches the course's")
    return files
