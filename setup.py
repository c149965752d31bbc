"""The one part of the build that pyproject.toml cannot say for good: a small library in C.

It is a plain library without Python's headers, see src/motionmerge/merge/compiled.py. Where there
is no compiler the package works without it, and merges slower.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "motionmerge.merge._kernels",
            ["src/motionmerge/merge/kernels.c"],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)
