"""A small implementation of Stable Diffusion v1 (Rombach et al. 2022) under the module paths of CompVis's code."""
