"""The one part of the build that pyproject.toml cannot say for good: a small library in C.

It is a plain library without Python's headers, see merging/compute/compiled.py in the package.
Where there is no compiler the package works without it, and merges slower.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "motionmerge.merging.compute._kernels",
            ["src/motionmerge/merging/compute/kernels.c"],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)
