"""Imports run one way and in no circle: kernels, hf, grade ← core ← run, stage0, view, toy ← scripts.

All imports of the repository are read from the source, those inside functions too; nothing is imported.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {"s2r", "kernels", "hf", "grade", "core"}
MAY_IMPORT = {  # what the modules of a room may import of the repository; nobody imports a script
    "s2r": set(),  # the package itself, s2r/__init__.py
    "kernels": {"kernels"},
    "hf": {"s2r", "hf", "kernels"},  # and so no model
    "grade": {"s2r", "grade", "kernels"},
    "core": BELOW,  # the other s2r/*.py
    "flags": set(),  # s2r/run/flags.py and files.py, which view may import although it may not import the rest of run
    "run": BELOW | {"run", "flags"},
    "stage0": BELOW | {"stage0", "run", "flags"},
    "view": BELOW | {"view", "flags"},
    "toy": BELOW | {"toy", "stage0", "view", "run", "flags"},
    "script": BELOW | {"stage0", "view", "run", "flags"},
}


def room(module: str) -> str:
    """The room of a module, a key of MAY_IMPORT."""
    if module in ("s2r.run", "s2r.run.flags", "s2r.run.files"):  # importing these two runs s2r/run/__init__.py
        return "flags"
    top, *inner = module.split(".")
    if top != "s2r":
        return "kernels" if top == "kernels" else "script"
    return "s2r" if not inner else inner[0] if inner[0] in MAY_IMPORT else "core"


def graph(root: Path) -> dict[str, set[str]]:
    """Each module of a repository with the modules that it imports of `s2r`, of `kernels` and of the scripts."""
    files = [path.relative_to(root) for area in ("*.py", "s2r/**/*.py", "kernels/**/*.py") for path in root.glob(area)]
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    found = {}
    for module, file in modules.items():
        names = set()
        for node in ast.walk(ast.parse((root / file).read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = file.parts[: -node.level] if node.level else ()  # the package that the dots stand for
                source = ".".join([*above, *filter(None, [node.module])])
                inner = [f"{source}.{alias.name}" for alias in node.names]  # modules, or names that source defines:
                names |= {name if name in modules or source == "s2r" else source for name in inner}  # s2r has none
        # Importing a.b runs a/__init__.py first, unless that is running already because we are inside a.
        packages = {package for name in names for package in accumulate(name.split("."), "{}.{}".format)}
        names |= {package for package in packages if not f"{module}.".startswith(f"{package}.")}
        found[module] = {name for name in names if name in modules or name.startswith(("s2r.", "kernels."))}
    return found


def faults(root: Path) -> list[str]:
    """What breaks the order of the imports, a line each."""
    imports = graph(root)
    found = []
    for module, names in imports.items():
        for name in sorted(names):
            if name not in imports:
                found.append(f"{module} imports {name}, which does not exist")
            elif room(name) not in MAY_IMPORT[room(module)]:
                found.append(f"{module} imports {name}: {room(module)} may not import {room(name)}")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found.append(f"circle: {' ← '.join(error.args[1])}")
    return found


def test_imports_run_one_way_and_in_no_circle():
    assert not (found := faults(ROOT)), "\n".join(found)


# --- the walker itself, on a small repository ---

SOUND = {
    "kernels/__init__.py": "import torch",
    "kernels/attention.py": "import kernels",
    "s2r/__init__.py": "import os",
    "s2r/hf/__init__.py": "",
    "s2r/hf/weights.py": "from kernels import attention",
    "s2r/grade/__init__.py": "from s2r.grade.judge import equivalent",
    "s2r/grade/judge.py": "from s2r.grade.latex import numbers",
    "s2r/grade/latex.py": "import mpmath",
    "s2r/model.py": "from s2r.hf import weights\nimport kernels.attention",
    "s2r/rl.py": "from s2r.grade import equivalent",
    "s2r/run/__init__.py": "",
    "s2r/run/flags.py": "import argparse",
    "s2r/run/loop.py": "from s2r import model\nfrom s2r.run.flags import check",
    "s2r/stage0/__init__.py": "",
    "s2r/stage0/build.py": "from s2r.run.flags import start\nfrom ..run import loop",
    "s2r/view/__init__.py": "",
    "s2r/view/report.py": "import s2r.run.flags\nfrom s2r import rl",
    "s2r/toy/__init__.py": "",
    "s2r/toy/world.py": "import s2r.stage0.build, s2r.view.report, s2r.run.loop",
    "train_rl.py": "import s2r  # isort: skip\nfrom s2r.view.report import table\nfrom s2r.stage0 import build",
}


def write(root: Path, files: dict[str, str]) -> list[str]:
    """The faults of a repository with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return faults(root)


def test_walker_finds_nothing_wrong_with_a_sound_repository(tmp_path):
    assert write(tmp_path, SOUND) == []
    imports = graph(tmp_path)
    assert imports["s2r.model"] == {"s2r.hf", "s2r.hf.weights", "kernels", "kernels.attention"}
    assert imports["s2r.stage0.build"] == {"s2r.run", "s2r.run.flags", "s2r.run.loop"}


@pytest.mark.parametrize("file, line, expected", [
    ("kernels/attention.py", "import s2r", "kernels.attention imports s2r: kernels may not import s2r"),
    ("s2r/rl.py", "from s2r.run.flags import start", "core may not import flags"),
    ("s2r/rl.py", "def f():\n    from s2r.view import report", "s2r.rl imports s2r.view.report: core may"),
    ("s2r/run/loop.py", "from s2r.view.report import table", "run may not import view"),
    ("s2r/toy/world.py", "import train_rl", "toy may not import script"),
    ("s2r/rl.py", "from s2r import trajectory", "s2r.rl imports s2r.trajectory, which does not exist"),
    ("s2r/grade/latex.py", "from s2r.grade.judge import x", "circle: s2r.grade."),
    ("s2r/toy/world.py", "from s2r.toy import audit\nimport s2r.toy.audit", "s2r.toy.audit, which does not exist"),
])  # fmt: skip
def test_walker_finds_a_fault(tmp_path, file, line, expected):
    found = write(tmp_path, SOUND | {file: f"{SOUND[file]}\n{line}"})
    assert any(expected in fault for fault in found), found
