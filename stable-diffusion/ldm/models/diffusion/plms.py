from ldm.models.diffusion.ddim import PLMSSampler  # noqa: F401  where CompVis's code has it
