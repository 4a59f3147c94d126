"""Builds the native kernels; everything else is in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs and works, slower, and says so.
"""

from setuptools import Extension, setup

setup(ext_modules=[Extension(
    "sentei.kernels.native._native",
    sources=[f"sentei/kernels/native/{name}.cpp" for name in ("attention", "backward", "decode")],
    depends=[f"sentei/kernels/native/{name}.h" for name in ("simd", "call", "rules")],
    extra_compile_args=["-O3", "-std=c++17", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)])
