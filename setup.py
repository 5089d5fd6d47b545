"""Builds the compiled engine where there is a compiler for it; pyproject.toml has all else."""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "mrconvnext/engines/native"


class Library(build_ext):
    """A shared object that ctypes loads: it does not depend on the version of Python, nor does its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """One wheel for all versions of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "mrconvnext.engines._native",
            sources=[f"{NATIVE}/cpu.cpp"],
            depends=[f"{NATIVE}/transform.h", f"{NATIVE}/tasks.h", f"{NATIVE}/pointwise.h"],
            language="c++",
            extra_compile_args="-std=c++17 -O3 -fno-exceptions -fno-rtti -fvisibility=hidden -Wno-psabi -g0".split(),
            optional=True,  # without it the plain engine serves
        )
    ],
    cmdclass={"build_ext": Library, "bdist_wheel": Wheel},
)
