"""Builds the native kernels; everything else is in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs and works, slower, and says so.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("sentei/kernels/native")

setup(ext_modules=[Extension(
    "sentei.kernels.native._native",
    sources=sorted(map(str, NATIVE.glob("*.cpp"))),
    depends=sorted(map(str, NATIVE.glob("*.h"))),
    extra_compile_args=["-O3", "-std=c++17", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread", "-ldl"],
    language="c++",
    optional=True,
)])
