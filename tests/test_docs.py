"""The documentation does what it says: its Python runs, cases are valid, commands exist, pages build."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tumour import case as cases

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
# What the pages about results read: a tiny run in place of the demo, with the same names of files.
TINY = {
    "anatomy": {"source": "mni152", "spacing": 8},
    "model": {"seed": {"width": 6}, "step": 10},
    "truth": {"D_white": 0.4, "D_grey": 0.08, "rho": 0.03, "position": [-25, -15, 25], "age": 150, "step": 5},
    "visits": [{"day": 0, "scans": [{"kind": "density"}]}, {"day": 60, "scans": [{"kind": "density"}]}],
    "identify": {"starts": 1, "discretisation_error": False},
}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, each at its own line numbers."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match.group(1) for match in found]


def with_blocks(language: str) -> list[str]:
    """Names of the pages that have such blocks."""
    return [str(page.relative_to(ROOT)) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the tiny run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "demo.yaml").write_text(yaml.safe_dump(TINY))
    script = ROOT / "scripts" / "identify.py"
    command = [sys.executable, str(script), "demo.yaml", "--out", "demo", "--no-pictures"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "demo"


@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_of_a_page_runs(
    page: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page, one after the other in one namespace, in an empty folder."""
    codes = blocks(ROOT / page, "python")
    if any("results/demo" in code for code in codes):
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "demo").symlink_to(request.getfixturevalue("demo"))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    for code in codes:
        exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_the_cases_of_a_page_are_valid(page: str, tmp_path: Path) -> None:
    for text in blocks(ROOT / page, "yaml"):
        for name in re.findall(r"[\w./]+\.nii\.gz", text):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert cases.parse(yaml.safe_load(text), page, tmp_path).visits


def test_commands_name_files_and_options_that_exist() -> None:
    commands = [
        line
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if line.strip()
    ]
    assert len(commands) > 10
    for command in commands:
        for file in re.findall(r"(?<![\w/])(?:scripts|data)/[\w./]+", command):
            assert (ROOT / file).exists(), command
        for target in re.findall(r"^make ([a-z]+)", command):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), command
        script = re.search(r"scripts/\w+\.py", command)
        for option in re.findall(r"\s--([a-z-]+)", command.partition(script.group())[2] if script else ""):
            files = (script.group(), "scripts/options.py") if script else ()
            text = "".join((ROOT / file).read_text() for file in files)
            argument = rf"^    {option.replace('-', '_')}: (Annotated|Out\b)"
            assert f"--{option}" in text or re.search(argument, text, re.M), command


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "tumour.html").read_text(encoding="utf-8")
    assert "tumour.model.TumourModel" in api and "tumour.identification.Identifier" in api
