from ldm.compat import DPM_Solver, NoiseScheduleVP, model_wrapper  # noqa: F401  where CompVis's code has them
