"""A small implementation of Stable Diffusion v1 (Rombach et al. 2022) under the module paths of CompVis's code."""

import argparse


class ModelError(argparse.ArgumentTypeError):
    """Something the user can mend: the message is one line that names the file and the remedy. Raised by the `type` of
    an option, argparse puts the option's name before it."""
