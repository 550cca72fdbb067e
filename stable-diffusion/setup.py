from setuptools import find_packages, setup

setup(
    name="latent-diffusion",
    version="1.0.0",
    description="A small, readable implementation of Stable Diffusion v1 under the module paths of CompVis's code",
    packages=find_packages(include=["ldm", "ldm.*"]),
    python_requires=">=3.8",
    install_requires="torch>=1.11 numpy tqdm omegaconf>=2.1.1 transformers>=4.19.2 safetensors pillow".split(),
    extras_require={"vocabulary": ["openai-clip"], "watermark": ["invisible-watermark"]},
)
