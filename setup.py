"""What pyproject.toml cannot say: where the packages lie, and compiled parts that may be left out.

Building needs no GPU. Whatever goes wrong with the compiler, the install succeeds: the reason is
kept in ``g2r_fast/*_missing.txt``, from where ``g2r_fast.native.status()`` tells it. An isolated
build does not see torch's headers and leaves the CPU kernels to their first use.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path(__file__).resolve().with_name("g2r_fast")


def load_building():
    """g2r_fast/building.py by its path: the package may need what is not installed yet."""
    sys.dont_write_bytecode = True  # nothing of ours is left in the sources
    name = "g2r_fast_building"
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "building.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


building = load_building()
PARTS = {f"g2r_fast.{part.name}": part for part in building.parts_here()}


class BuildNative(build_ext):
    """Builds what can be built, and leaves a note where something cannot."""

    def run(self) -> None:
        self.failed, self.in_sources = {}, bool(self.inplace)
        super().run()
        if self.inplace:
            package = Path(self.get_finalized_command("build_py").get_package_dir("g2r_fast"))
        else:
            package = Path(self.build_lib, "g2r_fast")
        package.mkdir(parents=True, exist_ok=True)
        for name, part in PARTS.items():
            note = package / f"{part.name}_missing.txt"
            if part not in self.failed:
                note.unlink(missing_ok=True)
                continue
            reason = self.failed[part]
            note.write_text(f"the install could not build it ({reason})\n", encoding="utf-8")
            print(
                f"g2r_fast: the compiled part {name} is left out ({reason}). `g2r-fast build`, or "
                f"its first use, tries again; without it everything works, but {part.cost}",
                file=sys.stderr,
            )

    def build_extensions(self) -> None:
        """All together, so that no core is idle."""
        outputs = {part: Path(self.get_ext_fullpath(name)) for name, part in PARTS.items()}
        todo = {
            part: path
            for part, path in outputs.items()
            if self.force or building.problem_of(part, path, PACKAGE) is not None
        }
        for part, path in list(todo.items()):
            path.unlink(missing_ok=True)  # one that is left over would be installed
            there = PACKAGE / part.file_name
            reusable = self.in_sources and not self.force
            if reusable and building.problem_of(part, there, PACKAGE) is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(there, path)  # setuptools builds elsewhere and copies it back
                del todo[part]
        self.failed = building.build(todo, PACKAGE)

    def get_ext_filename(self, fullname: str) -> str:
        part = PARTS[fullname if fullname in PARTS else f"g2r_fast.{fullname}"]
        folder = Path("g2r_fast") if fullname in PARTS else Path()
        return str(folder / part.file_name)


setup(
    # kernels/ and csrc/ lie at the top of the repository and are installed inside the package.
    packages=[
        *find_packages(include=["g2r_fast", "g2r_fast.*"]),
        "g2r_fast.kernels",
        "g2r_fast.csrc",
    ],
    package_dir={"g2r_fast.kernels": "kernels", "g2r_fast.csrc": "csrc"},
    package_data={
        "g2r_fast": ["py.typed", "tiny_judge/*", "report_page/*"],
        "g2r_fast.csrc": [
            "*.cpp",
            "*.h",
            "cpu/*.cpp",
            "cpu/*.h",
            "cuda/*.cu",
            "cuda/*.cuh",
            "cuda/*.h",
        ],
    },
    include_package_data=False,
    ext_modules=[
        Extension(
            name,
            sources=[
                str(path.relative_to(PACKAGE.parent))
                for path in part.sources(PACKAGE.parent / "csrc")
            ],
            language="c++",
            optional=True,  # setuptools then does not look for a library that was left out
        )
        for name, part in PARTS.items()
    ],
    cmdclass={"build_ext": BuildNative},
)
