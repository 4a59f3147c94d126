"""Builds the native kernels; everything else is in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs and works, slower, and says so.
"""

from setuptools import Extension, setup

setup(ext_modules=[Extension(
    "sentei.kernels.native._native",
    sources=["sentei/kernels/native/attention.cpp", "sentei/kernels/native/backward.cpp",
             "sentei/kernels/native/linear.cpp"],
    depends=["sentei/kernels/native/simd.h", "sentei/kernels/native/call.h"],
    extra_compile_args=["-O3", "-std=c++17", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)])
