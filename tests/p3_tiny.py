"""A Stable Diffusion small enough for tests: the real classes, random weights, latents of 8x8 for pictures of 64x64."""

import json

import numpy as np
import torch
from PIL import Image

import p3_model  # isort: skip  (it puts ldm on the path)
from ldm.util import instantiate_from_config, read_config

CONFIG = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    image_size: 8
    scale_factor: 0.18215
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {in_channels: 4, out_channels: 4, model_channels: 32, channel_mult: [1, 1], num_res_blocks: 1,
               attention_resolutions: [1], num_heads: 2, context_dim: 32, use_checkpoint: true}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig: {double_z: true, z_channels: 4, resolution: 64, in_channels: 3, out_ch: 3, ch: 32,
                   ch_mult: [1, 1, 1, 1], num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        max_length: 16
        config: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}
"""


def write_model(folder):
    """(config, checkpoint) of the tiny model, as files."""
    (folder / "tiny.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    model = instantiate_from_config(read_config(folder / "tiny.yaml").model)
    for name, p in model.named_parameters():  # so that a word matters to such a small network
        if "token_embedding" in name:
            torch.nn.init.normal_(p)
        elif ".attn2.to_" in name or "self_attn" in name:
            torch.nn.init.normal_(p, std=0.3)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "tiny.ckpt")
    return folder / "tiny.yaml", folder / "tiny.ckpt"


def load(files):
    return p3_model.load_stable_diffusion(files[1], torch.device("cpu"), torch.float32, files[0])


def write_concepts(folder, prompts=2, pictures=2):
    """input.json with <new1> (an object) and <new2> (a style), and folders 0 and 1 with source pictures beside it."""
    entries, rng = {}, np.random.RandomState(0)
    for key, word, text in (("0", "dog", "A {} number %d."), ("1", "David Revoy", "City %d in the style of {}.")):
        token = f"<new{int(key) + 1}>"
        entries[key] = {
            "src_image": word,
            "token_name": token,
            "prompt": [(text % p).format(token) for p in range(prompts)],
            "prompt_4_clip_eval": [(text % p).format(word) for p in range(prompts)],
            "baseline": [[-100, -100]] * prompts,
        }
        (folder / key).mkdir(parents=True)
        for i in range(pictures):
            image = Image.fromarray(rng.randint(0, 256, (5, 6, 3), dtype=np.uint8)).resize((96, 80), Image.BICUBIC)
            image.save(folder / key / f"{i:02}.jpg")
    (folder / "input.json").write_text(json.dumps(entries))
    return folder / "input.json"
