"""Imports run one way only, and `import ddit` never pulls in torch."""

import ast
import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import tiny

SRC = Path(__file__).resolve().parent.parent / "src"

# From top to bottom: a module imports only from groups below its own. "ddit" is the package's own __init__, whose
# names come from api; "ddit.models" is the registry of the model files.
GROUPS = (
    ("ddit.cli",),
    ("ddit.train", "ddit.eval", "ddit.app"),
    ("ddit.pipelines",),
    ("ddit.embedded",),
    ("ddit",),
    ("ddit.api",),
    ("ddit.handle", "ddit.skip"),
    ("ddit.plan",),
    ("ddit.seat", "ddit.current"),
    ("ddit.adapter", "ddit.caches", "ddit.run", "ddit.coarse", "ddit.caller"),
    ("ddit.models",),
    ("ddit.models.*",),
    ("ddit.models.flux",),
    ("ddit.models.packed",),
    ("ddit.models.base",),
    ("ddit.models.flops",),
    ("ddit.pretrained", "ddit.preset", "ddit.teacache", "ddit.planned", "ddit.log"),
    (
        "ddit.patches",
        "ddit.path",
        "ddit.sampler",
        "ddit.schedule",
        "ddit.report",
        "ddit.config",
        "ddit.low_rank",
        "ddit.profile",
        "ddit.util",
    ),
)
OUTSIDE = {
    "ddit.config": set(),
    "ddit.report": {"matplotlib"},
    "ddit.profile": set(),
    "ddit.util": {"rich", "torch"},
}
"""Packages that modules of the last group may import; torch and einops where nothing is said here."""
WITHIN = {"ddit.schedule": {"ddit.config", "ddit.patches"}, "ddit.path": {"ddit.patches"}}
"""Modules of the last group that one of them may import; `ddit.config` alone where nothing is said here."""
ONLY = {
    "ddit.skip": {
        "ddit.models",
        "ddit.models.base",
        "ddit.pretrained",
        "ddit.patches",
        "ddit.planned",
        "ddit.profile",
        "ddit.schedule",
        "ddit.config",
        "ddit.util",
    },
    "ddit.pretrained": set(),
    "ddit.teacache": set(),
    "ddit.models.flops": set(),
}
"""All that these import of the package, though more lies below them."""
IMPORTERS = {
    "ddit.skip": {
        "ddit.api",
        "ddit.eval",
    }
}
"""All that import these: without ``skip=``, nothing of skipping is loaded."""
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}
LAST = len(GROUPS) - 1
PACKAGES = tuple(
    f"ddit.{name}" for name in ("cli", "train", "eval", "app", "pipelines", "embedded", "skip", "caches", "util")
)
"""Free to import inside themselves."""


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
    """The module that holds `name`: ddit.config.PatchSchedule -> ddit.config, ddit.apply -> ddit."""
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
            if inside:
                continue
            if RANK[target] <= RANK[own] and not below:
                found.append(f"{where}: {own} may import only from groups below its own, {target} is not in one")
            elif target not in ONLY.get(own, {target}):
                found.append(f"{where}: all that {own} may import is {', '.join(sorted(ONLY[own])) or 'nothing'}")
            elif own not in IMPORTERS.get(target, {own}):
                found.append(f"{where}: {target} may be imported by {', '.join(sorted(IMPORTERS[target]))} alone")
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


def test_all_groups_are_there():
    """A module that is gone would leave its rules behind, and its place to another of the same name."""
    modules = {module for _, module, _ in package_files()}
    assert set(RANK) - {"ddit.models.*"} <= modules
    assert {*OUTSIDE, *WITHIN, *ONLY, *IMPORTERS}.union(*WITHIN.values(), *ONLY.values(), *IMPORTERS.values()) <= set(
        RANK
    )


CORE = (
    "run",
    "handle",
    "coarse",
    "seat",
    "schedule",
    "patches",
    "models",
    "models.base",
    "models.flux",
    "adapter",
    "caches",
)


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        # the arrow, in every spelling
        ("ddit.schedule", "from ddit.api import apply", 1),
        ("ddit.schedule", "import ddit.api", 1),
        ("ddit.schedule", "from ddit import api", 1),
        ("ddit.schedule", "from .api import apply", 1),
        ("ddit.schedule", "from . import api, handle", 2),
        ("ddit.schedule", "def f():\n    from ddit.api import apply", 1),
        ("ddit.api", "from ddit.handle import Handle\nfrom ddit.models import architecture_for", 0),
        ("ddit.handle", "from ddit.api import apply", 1),
        ("ddit.handle", "from ddit import apply", 1),
        ("ddit.handle", "from ddit import __version__", 0),
        ("ddit.seat", "from ddit.handle import Handle", 1),
        # neighbours
        ("ddit.adapter", "from ddit.run import RunState", 1),
        ("ddit.schedule", "from ddit.config import PatchSchedule", 0),
        ("ddit.config", "from ddit.schedule import Rule", 1),
        ("ddit.patches", "from ddit.schedule import statistics", 1),
        ("ddit.preset", "from ddit.teacache import TeaCacheConfig", 1),
        # packages
        ("ddit.train.trainer", "from ddit.train.config import TrainConfig\nfrom .samples import Samples", 0),
        ("ddit.train.trainer", "from ddit.eval.metrics import psnr", 1),
        ("ddit.eval.suites", "from ddit.embedded import MODEL_FOLDER\nfrom ddit import apply", 0),
        ("ddit.embedded.judge", "from ddit.embedded.scenes import parse", 0),
        ("ddit.embedded.judge", "from ddit.train.trainer import train", 1),
        ("ddit.train.trainer", "from ddit.cli import main", 1),
        # skipping, which knows little of the core, and of which the core knows nothing
        ("ddit.skip.policy", "from ddit.schedule import StepContext\nfrom .forecast import growth", 0),
        ("ddit.skip.skipper", "from ddit.run import RunState", 1),
        ("ddit.skip.skipper", "from ddit.adapter import PatchAdapter", 1),
        ("ddit.skip.skipper", "from ddit.handle import Handle", 1),
        ("ddit.api", "from ddit.skip.skipper import Skipper", 0),
        ("ddit.pipelines.generate", "from ddit.skip.skipper import Skipper", 1),
        *((f"ddit.{module}", "from ddit.skip.forecast import Reference", 1) for module in CORE),
        # models
        ("ddit.models.flux", "from ddit.models.base import Architecture\nfrom .flops import Costs", 0),
        ("ddit.models.flux", "from ddit.models import architecture_for", 1),
        ("ddit.models.flux", "from ddit.models.wan import Wan", 1),
        ("ddit.models.base", "from ddit.patches import pack\nfrom ddit.models.flops import count", 0),
        ("ddit.models.base", "from ddit.models.flux import Flux", 1),
        ("ddit.models.flops", "from ddit.models.base import Architecture", 1),
        ("ddit.models.flops", "from ddit.config import Coarse", 1),
        # what the last group may take from outside
        ("ddit.schedule", "import math\nimport torch\nfrom einops import rearrange", 0),
        ("ddit.schedule", "import diffusers", 1),
        ("ddit.config", "import torch", 1),
    ],
)
def test_the_checker_sees_violations(module, source, count):
    is_package = SRC.joinpath(*module.split(".")).is_dir()
    assert len(violations(source, module, is_package)) == count
    # Of modules and names that there are: the rules would not be tested on others.
    modules = {name: path for path, name, _ in package_files()}
    assert module in modules
    for _, name in imported(source, module, is_package):
        if name.startswith("ddit."):
            parent, _, last = name.rpartition(".")
            assert name in modules or re.search(rf"\b{last}\b", modules[parent].read_text("utf-8")), name


def test_a_module_of_no_group_is_a_violation():
    assert violations("import math", "ddit.nowhere") == [
        "ddit.nowhere: belongs to no group; add it to GROUPS in tests/test_imports.py"
    ]


def test_the_checker_resolves_relative_imports_of_a_package():
    assert violations("from .base import Architecture", "ddit.models", is_package=True) == []
    assert len(violations("from ..api import apply", "ddit.models", is_package=True)) == 1


def test_nothing_in_the_package_imports_the_command_line():
    pattern = re.compile(r"from ddit\.cli|import ddit\.cli|from ddit import cli")
    others = [path for path, _, _ in package_files() if path.parent.name != "cli"]
    assert [str(path) for path in others if pattern.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize("module", ["ddit", "ddit.config", "ddit.report", "ddit.cli"])
def test_importing_is_free_of_torch(module):
    code = f"import sys, {module}; print(*({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(SRC)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.fixture
def afresh():
    """Inside the test the package is not imported yet."""

    def loaded():
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "ddit"}

    before = loaded()
    for name in before:
        del sys.modules[name]
    yield loaded
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)


def test_the_core_needs_nothing_of_skipping_and_no_insides_of_diffusers(pipe, monkeypatch, afresh):
    """Another release of diffusers may break caches, which say so, but nothing else."""
    importing = builtins.__import__

    def guarded(name, scope=None, *rest):
        ours = (scope or {}).get("__name__", "").startswith("ddit")
        if ours and re.match(r"diffusers\.(hooks|models\.(cache_utils|_)|.*\._)", name):
            raise ImportError(f"cannot import name 'Gone' from {name!r} (/somewhere)")
        return importing(name, scope, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    import ddit
    import ddit.teacache

    plain = tiny.sample(pipe)
    with ddit.apply(pipe, patches=ddit.FixedSchedule(steps=(1, 2))) as run:
        tiny.sample(pipe)
    assert run.report.strip() == "1 2 2 2 2 2 2 2"
    assert [name for name in afresh() if name.startswith("ddit.skip")] == []
    for cache in ("first-block:0.1", "magcache:0.1", ddit.teacache.TeaCacheConfig(0.2, (1.0, 0.0))):
        with pytest.raises(ValueError, match="without a cache") as told:
            ddit.apply(pipe, cache=cache)
        lacks = f"version {diffusers.__version__} lacks (cannot import name 'Gone' from 'diffusers.hooks."
        assert lacks in str(told.value) and "somewhere" not in str(told.value)
    assert torch.equal(tiny.sample(pipe), plain)


def test_an_unknown_public_name_is_an_attribute_error():
    import ddit

    assert ddit.__version__
    assert set(ddit.__all__) <= set(dir(ddit))
    with pytest.raises(AttributeError, match=r"public names: .*apply"):
        _ = ddit.aply
