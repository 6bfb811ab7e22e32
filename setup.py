"""Packaging of fastseg: the distribution is `fastseg-kernels`, the import is `fastseg`."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["scikit-learn>=1.3", "matplotlib>=3.7", "pillow>=10.0"]

setup(
    name="fastseg-kernels",
    version="0.1.0",
    description="Fused Triton kernels for image segmentation in PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Device code lives in the top-level kernels/, which the link fastseg/kernels makes a part of the package.
    packages=find_packages(include=["fastseg", "fastseg.*"]),
    package_data={
        "fastseg": ["py.typed", "recorded/*.json"],
        "fastseg.kernels.cuda": ["**/*.cu", "**/*.cuh"],
        "fastseg.kernels.cpu": ["**/*.cpp", "**/*.h"],
    },
    # No upper bounds: pip must not replace the torch that somebody has. `fastseg doctor` says
    # whether the installed versions are among those that are tested.
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "rich>=13.0",
    ],
    extras_require={
        "cuda12": ["cupy-cuda12x>=13.0"],
        "cuda13": ["cupy-cuda13x>=14.0"],
        "demo": DEMO,
        "bench": ["pytest-benchmark>=4.0", "matplotlib>=3.7"],
        "tensorboard": ["tensorboard>=2.15"],
        "docs": ["sphinx>=8", "myst-parser>=4", "furo>=2024.8"],
        "test": [
            *DEMO,
            "ruff>=0.17",
            "setuptools>=68",
            "wheel",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "pytest-benchmark>=4.0",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "nvidia-cuda-nvrtc>=13; platform_system == 'Linux'",
        ],
    },
    entry_points={
        "console_scripts": ["fastseg = fastseg.commands.cli:main"],
        "torch_dynamo_backends": ["fastseg = fastseg.compiler.backend:compile_backend"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
