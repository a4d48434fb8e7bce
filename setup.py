"""Packaging of spas-attn: everything installs as plain Python, the kernels are Triton."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGES = ["spas_attn", "autotune", "modify_model"]
CLI = ["safetensors>=0.4.3", "tqdm>=4.60", "pillow>=10.1", "matplotlib>=3.7", "scikit-image>=0.22"]
SHAPES = [*CLI, "trimesh>=4.0"]
TEST = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "peft>=0.13", "gguf>=0.10", "ruff>=0.12", "mypy>=1.11"]


def version() -> str:
    """The version that spas_attn/__init__.py states (read, not imported: torch need not be there yet)."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "spas_attn" / "__init__.py").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError("spas_attn/__init__.py has no line __version__ = ...")
    return found[1]


def description() -> str:
    """The README, where there is one."""
    readme = ROOT / "README.md"
    return readme.read_text("utf-8") if readme.exists() else ""


setup(
    name="spas-attn",
    version=version(),
    description="Training-free block-sparse attention with thresholds calibrated per head",
    long_description=description(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    author="The spas-attn authors",
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    # Stated, so that an editable install is one line in a .pth file. Setuptools' other way, an import hook, comes after
    # sys.path, where a script in tests/ would find the folder tests/spas_attn instead of the package.
    package_dir={"": "."},
    package_data={name: ["py.typed", "*.json", "page/*.html"] for name in PACKAGES},
    entry_points={"console_scripts": ["spas-attn = modify_model.cli.main:main"]},
    python_requires=">=3.10",
    # What spas_attn and autotune import. The rest is for those who use it.
    install_requires=[
        "torch>=2.5",
        "triton>=3.4; sys_platform == 'linux'",  # no upper end: CUDA builds of torch bring their own exact version
        "numpy>=1.26",
        "scipy>=1.10",
    ],
    extras_require={
        "transformers": ["transformers>=4.56"],
        "diffusers": ["diffusers>=0.37", "transformers>=4.56", "accelerate>=1.0"],
        # For modify_model.mask_trainer and the scripts that learn masks; `datasets` as well, to read datasets.
        "train": ["transformers>=5.0", "accelerate>=1.12", "tensorboardX>=2.6"],
        "cli": CLI,
        "shapes": SHAPES,
        "sage": ["sageattention>=1.0.6"],
        "flash": ["flash-attn-4>=4.0.0b1; sys_platform == 'linux'"],  # pre-releases only: pip install --pre
        "cudnn": ["nvidia-cudnn-frontend>=1.32; sys_platform == 'linux'"],
        "lm_eval": ["lm_eval[hf,ruler]>=0.4.9"],  # for evaluate/run_lm_eval.py
        "test": TEST,
    },
)
