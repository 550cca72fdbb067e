from ldm.compat import LambdaLinearScheduler  # noqa: F401  where CompVis's configs look for it
