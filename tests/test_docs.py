"""The documentation tells the truth: its Python runs, and what it names exists."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from narrowgauge.ops import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])

BLOCK = re.compile(
    r"(?P<comment><!--[^>]*-->\s*)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
AT_MOST_NOT_RUN = 4


def blocks(page: Path, language: str) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(page.read_text()) if block["language"] == language]


def is_run(block: re.Match[str]) -> bool:
    return NOT_RUN.match(block["comment"] or "") is None


def code_in(page: Path) -> list[str]:
    """What the page shows as code: the lines of its blocks, and what stands between backquotes."""
    text = page.read_text()
    lines = [line for block in BLOCK.finditer(text) for line in block["code"].splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


# --- Python ---


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if blocks(p, "python")]
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    before = dict(registry)  # a page may declare an operator
    namespace: dict[str, object] = {"__name__": page.stem}
    text = page.read_text()
    try:
        for block in filter(is_run, blocks(page, "python")):
            # Line numbers of a traceback are those of the page.
            code = "\n" * text[: block.start("code")].count("\n") + block["code"]
            exec(compile(code, str(page), "exec"), namespace)
    finally:
        registry.clear()
        registry.update(before)
        if emulator := sys.modules.get("narrowgauge_emulator"):
            emulator.disable_barrier(None)


def test_few_python_blocks_are_not_run() -> None:
    comments = [comment for page in PAGES for comment in re.findall(r"<!-- not run.*-->", page.read_text())]
    assert all(NOT_RUN.fullmatch(comment) for comment in comments), "a block that is not run needs a reason"
    skipped = [block for page in PAGES for block in blocks(page, "python") if not is_run(block)]
    assert len(skipped) == len(comments), "a comment `not run` does not stand before a Python block"
    assert len(skipped) <= AT_MOST_NOT_RUN


# --- what is named ---


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))


@EACH_PAGE
def test_make_targets_exist(page: Path) -> None:
    named = {target for code in code_in(page) for target in re.findall(r"^make ([a-z][\w-]*)", code)}
    assert named <= make_targets()


@EACH_PAGE
def test_commands_and_their_options_exist(page: Path) -> None:
    typer = pytest.importorskip("typer")
    from narrowgauge.cli.main import application

    commands = typer.main.get_command(application).commands
    for code in code_in(page):
        for name, rest in re.findall(r"^narrowgauge ([a-z]+)([^|]*)", code):
            assert name in commands, code
            parameters = commands[name].params
            accepted = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
            assert set(re.findall(r"--[a-z][\w-]*", rest)) <= accepted, code


@EACH_PAGE
def test_files_exist(page: Path) -> None:
    named = r"(?:csrc|python/narrowgauge|tests|bench|tools|cmake|examples|docs)/[\w./*{},-]*"
    for code in code_in(page):
        for path in re.findall(rf"(?<![\w/.<]){named}(?![\w<])", code):
            for each in expand_braces(path.rstrip(".,")):
                assert list(ROOT.glob(each)), f"{page.name} names {each}"


def expand_braces(path: str) -> list[str]:
    braces = re.search(r"\{([^}]*)\}", path)
    return [path.replace(braces[0], choice) for choice in braces[1].split(",")] if braces else [path]


@EACH_PAGE
def test_environment_variables_exist(page: Path) -> None:
    sources = [ROOT / name for name in ("Makefile", "setup.py", "CMakeLists.txt")]
    sources += [
        path for folder in ("python", "tests", "csrc", "cmake") for path in (ROOT / folder).rglob("*.*")
    ]
    readable = (path for path in sources if path.suffix in {"", ".py", ".txt", ".h", ".cpp", ".cmake"})
    known = {name for path in readable for name in re.findall(r"NARROWGAUGE_\w+", path.read_text())}
    assert set(re.findall(r"\bNARROWGAUGE_\w+\b", page.read_text())) <= known


# --- links ---


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@EACH_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


def test_the_site_has_every_page_once() -> None:
    nav = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(nav) == pages


def test_the_api_page_names_what_exists() -> None:
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert names
    for module, name in (full.rsplit(".", 1) for full in names):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
