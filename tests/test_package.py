"""What is handed out: wheel and sdist, the project's papers, workflows that call what is there, and the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import yaml

import ddit
from ddit.util.extras import has

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PACKAGED = {
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src" / "ddit").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def run(*command: Any, **settings: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with an sdist and a wheel."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


def install(wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel, ddit's requirements from this one; its folder of programs."""
    venv.create(folder)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "requirements.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    return programs


def outside(programs: Path, folder: Path, *command: str) -> str:
    """Output of a program of an environment, where this tree can't be imported from."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run(programs / command[0], *command[1:], cwd=folder, env=environment)


def test_wheel_and_sdist(built, tmp_path):
    """Both hold the package, the wheel nothing else; from the wheel it runs in a fresh environment."""
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = message_from_bytes(archive.read(f"ddit-{ddit.__version__}.dist-info/METADATA"))
    assert names == PACKAGED and "ddit/py.typed" in names and any(name.endswith(".safetensors") for name in names)
    assert metadata["Version"] == ddit.__version__ and metadata["License-Expression"] == "Apache-2.0"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in PACKAGED} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "tests/tiny.py", "docs/method.md"} <= names
    assert not any("__pycache__" in name or name.startswith((".venv", "runs", "out", "shared")) for name in names)

    programs = install(wheel, tmp_path / "fresh")
    code = "import ddit; print(ddit.__file__, ddit.PatchSchedule.paper())"
    assert outside(programs, tmp_path, "python", "-c", code).startswith(str(tmp_path / "fresh"))
    assert outside(programs, tmp_path, "ddit", "--version").strip() == f"ddit {ddit.__version__}"


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel_of_the_sdist(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=tree)
    programs = install(next(tmp_path.glob("*.whl")), tmp_path / "fresh")
    assert "patches + skip" in outside(programs, tmp_path, "ddit", "demo")
    assert (tmp_path / "out" / "demo.png").is_file()


def test_one_version_and_one_address_everywhere(project):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ddit.__version__ and f"## [{ddit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "arXiv:2602.16968" in str(citation["references"])
    address = project["urls"]["Repository"]
    assert citation["repository-code"] == address
    assert f"repo_url: {address}\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"site_url: {project['urls']['Documentation']}\n" in (ROOT / "mkdocs.yml").read_text()


def commands(workflow: Path) -> list[str]:
    """Lines that a workflow runs."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_there(workflow, project):
    from ddit.cli import parser

    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}, "more is for the one job that needs it"
    for job in content["jobs"].values():
        assert {job["needs"]} <= content["jobs"].keys() if "needs" in job else True
        assert all(re.search(r"@(v\d|release/v\d)", step["uses"]) for step in job["steps"] if "uses" in step)
    lines = commands(workflow)
    assert any(line.startswith("make ") for line in lines)
    for line in lines:
        program, *words = line.split()
        if program == "make":
            assert words[0] in targets, line
        if program.endswith("bin/ddit"):
            parser().parse_args(words)
        for extra in re.findall(r'"\.\[([\w-]+)\]"', line):
            assert extra in project["optional-dependencies"], line


def test_the_matrix_has_every_python_of_the_classifiers(project):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tried = [entry["python"] for entry in jobs["test"]["strategy"]["matrix"]["include"]]
    told = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: 3." in line]
    assert tried == told and project["requires-python"] == f">={told[0]}"
    oldest = jobs["test"]["strategy"]["matrix"]["include"][0]["versions"].split()
    lowest = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    for pin in oldest:
        name, version = pin.removesuffix(".*").split("==")
        assert lowest[name] == version


@pytest.mark.parametrize("form", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_issue_forms_are_whole(form):
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    assert all(part["type"] in ("input", "textarea") and part["attributes"]["label"] for part in content["body"])
    assert len({part["id"] for part in content["body"]}) == len(content["body"])


@pytest.mark.skipif(not has("mkdocs") or not has("mkdocstrings"), reason="needs the extra docs")
def test_the_site_is_built_without_a_warning(tmp_path):
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path, cwd=ROOT)
    api = (tmp_path / "api" / "index.html").read_text()
    missing = [name for name in ddit.__all__ if name != "__version__" and f'id="ddit.{name}"' not in api]
    assert not missing
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html") if page.name != "404.html"}
    assert "Three knobs" in pages[tmp_path / "index.html"] and 'class="mermaid"' in pages[tmp_path / "index.html"]
    for page, text in pages.items():
        for link in re.findall(r'href="([^"#]+)', text):
            if re.match(r"\w+:", link):
                file = link.partition("/ddit/blob/main/")[2]
                assert not file or (ROOT / file).exists(), link
            else:
                target = page.parent / link.partition("?")[0]
                assert (target / "index.html" if target.is_dir() else target).is_file(), (page, link)
