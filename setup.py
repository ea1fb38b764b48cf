"""Names the packages; everything else about the project is in pyproject.toml.

``patches/`` and ``autotune/`` lie beside ``nvfp4dsl/`` in the repository and inside it once installed, so setuptools
cannot find them there by itself.
"""

from setuptools import find_packages, setup


def mapped(folder: str) -> list[str]:
    """``folder`` and the packages below it, under the names they are installed as."""
    return [f"nvfp4dsl.{folder}", *(f"nvfp4dsl.{folder}.{name}" for name in find_packages(folder))]


setup(packages=[*find_packages(include=["nvfp4dsl", "nvfp4dsl.*"]), *mapped("patches"), *mapped("autotune")])
