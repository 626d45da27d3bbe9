"""Imports run one way only, and `import ddit` never pulls in torch."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"

# Left to right: a module imports only from groups after its own. "ddit" is the package's own __init__, whose
# names come from api; "ddit.models" is the registry of the model files.
GROUPS = (
    ("ddit.cli",),
    ("ddit.train", "ddit.eval"),
    ("ddit.known",),
    ("ddit.generate", "ddit.outputs"),
    ("ddit.embedded",),
    ("ddit",),
    ("ddit.api",),
    ("ddit.adapter", "ddit.state", "ddit.caches"),
    ("ddit.models",),
    ("ddit.models.*",),
    ("ddit.models.base",),
    ("ddit.preset", "ddit.teacache", "ddit.forecaster"),
    ("ddit.dial", "ddit.anchor"),
    (
        "ddit.patches",
        "ddit.schedule",
        "ddit.report",
        "ddit.config",
        "ddit.progress",
        "ddit.files",
        "ddit.memory",
        "ddit.extras",
        "ddit.kinds",
    ),
)
OUTSIDE = {
    "ddit.config": set(),
    "ddit.report": {"matplotlib"},
    "ddit.progress": {"rich"},
    "ddit.files": set(),
    "ddit.extras": set(),
    "ddit.kinds": set(),
    "ddit.memory": {"torch"},
}
"""Packages that modules of the last group may import; torch and einops where nothing is said here."""
WITHIN = {"ddit.schedule": {"ddit.config", "ddit.patches"}}
"""Modules of the last group that one of them may import; `ddit.config` alone where nothing is said here."""
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}
LAST = len(GROUPS) - 1
PACKAGES = ("ddit.cli", "ddit.train", "ddit.eval", "ddit.embedded")  # these import freely inside themselves


def unit(module: str) -> str | None:
    """The entry of GROUPS that `module` falls under; None if there is none."""
    for package in PACKAGES:
        if module == package or module.startswith(package + "."):
            return package
    if module in RANK:
        return module
    if re.fullmatch(r"ddit\.models\.\w+", module):
        return "ddit.models.*"
    return None


def imported(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, full name) of everything `source` imports, wherever in the file; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                parts = module.split(".")
                base = ".".join(parts[: len(parts) - up] + ([base] if base else []))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def home(name: str) -> str:
    """The module that holds `name`: ddit.config.ScheduleConfig -> ddit.config, ddit.apply -> ddit."""
    while unit(name) is None or (unit(name) == "ddit.models.*" and not is_file(name)):
        name = name.rpartition(".")[0]
    return name


def is_file(name: str) -> bool:
    """Tells the model file ddit.models.flux from ddit.models.supported_models, a name in the registry."""
    return SRC.joinpath(*name.split(".")).with_suffix(".py").exists()


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the imports of `source`, as the text of `module`, do against the rules at the top of this file."""
    own = unit(module)
    if own is None:
        return [f"{module}: belongs to no group; add it to GROUPS in tests/test_imports.py"]
    found = []
    for line, name in imported(source, module, is_package):
        where = f"{module}:{line} imports {name}"
        root = name.split(".")[0]
        if root != "ddit":
            outside = OUTSIDE.get(own, {"torch", "einops"})
            if RANK[own] == LAST and root not in sys.stdlib_module_names | outside:
                found.append(f"{where}: allowed here are {', '.join(['the standard library', *sorted(outside)])}")
        elif name != "ddit.__version__":
            target = unit(home(name))
            inside = own == target and own in PACKAGES
            below = RANK[own] == LAST and target in WITHIN.get(own, {"ddit.config"})
            if RANK[target] <= RANK[own] and not inside and not below:
                found.append(f"{where}: {own} may import only from groups after its own, {target} is not in one")
    return found


def package_files() -> list[tuple[Path, str, bool]]:
    """(path, module name, whether it is an __init__) of every file of the package."""
    files = []
    for path in sorted((SRC / "ddit").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        files.append((path, ".".join(parts[:-1] if is_package else parts), is_package))
    return files


def test_imports_run_one_way():
    files = package_files()
    assert files
    found = [v for path, module, is_pkg in files for v in violations(path.read_text("utf-8"), module, is_pkg)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        # the arrow, in every spelling
        ("ddit.schedule", "from ddit.api import apply", 1),
        ("ddit.schedule", "import ddit.api", 1),
        ("ddit.schedule", "from ddit import api", 1),
        ("ddit.schedule", "from .api import apply", 1),
        ("ddit.schedule", "from . import api, state", 2),
        ("ddit.schedule", "def f():\n    from ddit.api import apply", 1),
        ("ddit.api", "from ddit.state import RunState\nfrom ddit.models import find", 0),
        ("ddit.state", "from ddit.api import Handle", 1),
        ("ddit.state", "from ddit import apply", 1),
        ("ddit.state", "from ddit import __version__", 0),
        # neighbours
        ("ddit.adapter", "from ddit.state import RunState", 1),
        ("ddit.schedule", "from ddit.config import ScheduleConfig", 0),
        ("ddit.config", "from ddit.schedule import choose", 1),
        ("ddit.patches", "from ddit.schedule import choose_scale", 1),
        # packages
        ("ddit.train.loop", "from ddit.train.loss import distill\nfrom .data import batches", 0),
        ("ddit.train.loop", "from ddit.eval.metrics import psnr", 1),
        ("ddit.eval.run", "from ddit.embedded import load\nfrom ddit import apply", 0),
        ("ddit.embedded.draw", "from ddit.embedded.grammar import words", 0),
        ("ddit.embedded.draw", "from ddit.train.loop import fit", 1),
        ("ddit.train.loop", "from ddit.cli import main", 1),
        # models
        ("ddit.models.flux", "from ddit.models.base import Architecture\nfrom .base import Grid", 0),
        ("ddit.models.flux", "from ddit.models import find", 1),
        ("ddit.models.flux", "from ddit.models.wan import Wan", 1),
        ("ddit.models.base", "from ddit.patches import pad", 0),
        ("ddit.models.base", "from ddit.models.flux import Flux", 1),
        # what the last group may take from outside
        ("ddit.schedule", "import math\nimport torch\nfrom einops import rearrange", 0),
        ("ddit.schedule", "import diffusers", 1),
        ("ddit.config", "import torch", 1),
        ("ddit.nowhere", "import math", 1),
    ],
)
def test_the_checker_sees_violations(module, source, count):
    assert len(violations(source, module)) == count


def test_the_checker_resolves_relative_imports_of_a_package():
    assert violations("from .base import Architecture", "ddit.models", is_package=True) == []
    assert len(violations("from ..api import apply", "ddit.models", is_package=True)) == 1


def test_nothing_in_the_package_imports_the_command_line():
    pattern = re.compile(r"from ddit\.cli|import ddit\.cli|from ddit import cli")
    others = [path for path, _, _ in package_files() if path.parent.name != "cli"]
    assert [str(path) for path in others if pattern.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize("module", ["ddit", "ddit.config"])
def test_importing_is_free_of_torch(module):
    if module == "ddit.config" and not (SRC / "ddit/config.py").exists():
        pytest.skip("ddit.config is not written yet")
    code = f"import sys, {module}; print(*({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(SRC)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_an_unknown_public_name_is_an_attribute_error():
    import ddit

    assert ddit.__version__
    assert set(ddit.__all__) <= set(dir(ddit))
    with pytest.raises(AttributeError, match=r"public names: .*apply"):
        _ = ddit.aply
