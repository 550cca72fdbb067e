from ldm.models.diffusion.dpm_solver import DPMSolverSampler  # noqa: F401  where CompVis's code has it
