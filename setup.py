"""The C++ kernels: one shared library with a plain C interface, the kernels in it once for each processor variant.

Everything else about the package stands in pyproject.toml. Where there is no C++ compiler the build goes on without
the library, and elision runs on its references; ELISION_BUILD=require makes that an error, ELISION_BUILD=skip leaves
the library out. ELISION_CXXFLAGS is added for compiler and linker, behind our own flags: sanitizers, for one.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "kernels/cpu/csrc"
LIBRARY = "libelision.so"
HOSTS = ["common", "threads", "interface", "linear_pack", "weight_memory"]
HOSTS += ["onnxruntime", "onnxruntime_linear", "onnxruntime_steps"]
X86 = platform.machine().lower() in ("x86_64", "amd64")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
VARIANTS: dict[str, list[str]] = {"portable": []}
if X86:
    VARIANTS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16}

# Contraction off: a sum is the same on every processor that runs a variant. The two warnings are about the
# compiler's own intrinsics.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
MORE = os.environ.get("ELISION_CXXFLAGS", "").split()
FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class BuildLibrary(build_ext):
    """Compiles each variant with its own flags and links them into one library, beside elision/kernels/cpu."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        base = [*FLAGS, *(["-DELISION_X86"] if X86 else [])]
        units = [(name, f"{SOURCES}/{name}.cc", base) for name in HOSTS]
        for name, flags in VARIANTS.items():
            units.append((name, f"{SOURCES}/variant.cc", [*base, *flags, f"-DELISION_VARIANT={name}"]))

        def compiled(unit: tuple[str, str, list[str]]) -> str:
            name, source, flags = unit
            # A folder each: two units come from one source.
            folder = str(Path(self.build_temp) / name)
            return self.compiler.compile(
                [source], output_dir=folder, extra_postargs=[*flags, *MORE], depends=ext.depends
            )[0]

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compiled, units))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process that has the old library mapped keeps it: the new one is another file.
        target.unlink(missing_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-pthread", *MORE], target_lang="c++"
        )


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, system = super().get_tag()
        return "py3", "none", system


wish = os.environ.get("ELISION_BUILD", "")
if wish not in ("", "require", "skip"):
    sys.exit(f"ELISION_BUILD is require or skip, not {wish!r}")
extension = Extension(
    "elision.kernels.cpu.libelision",
    sources=[f"{SOURCES}/{name}.cc" for name in [*HOSTS, "variant"]],
    depends=sorted(str(path) for path in Path(SOURCES).glob("*.h")),
    language="c++",
    optional=wish != "require",
)
setup(
    ext_modules=[] if wish == "skip" else [extension],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
)
