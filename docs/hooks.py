"""What the site is built with besides its pages: the reference, one page a package, found and not listed.

The four folders install as one package, which a tool that reads sources cannot see from the checkout; so they are put
together as they install, by links, in a folder that goes when the build ends.
"""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "reference"
_installed = tempfile.TemporaryDirectory(prefix="fedpeft-docs-")


def packages() -> dict[str, Path]:
    """Return folder by import name, as `pyproject.toml` installs them."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    moved: dict[str, str] = tool["package-dir"]
    folders = {}
    for name in tool["packages"]:
        top = max((each for each in moved if f"{name}.".startswith(f"{each}.")), key=len)
        folders[name] = ROOT / moved[top] / name.removeprefix(top).replace(".", "/").lstrip("/")
    return folders


def modules(folder: Path) -> list[str]:
    """Return the names of a package's own modules."""
    return sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))


@event_priority(100)  # before mkdocstrings looks where the sources are
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the package together, and its reference into the navigation."""
    site = Path(_installed.name)
    for name, folder in packages().items():
        target = site / name.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.py"):
            (target / file.name).symlink_to(file)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(site)]
    pages: list[Any] = [{name: f"{FOLDER}/{name}.md"} for name in packages()]
    assert config.nav is not None
    config.nav.append({"API reference": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write a page for each package: what it says of itself, then its modules."""
    for name, folder in packages().items():
        blocks = [f"# {name}", f"::: {name}"]
        blocks += [f"::: {name}.{module}" for module in modules(folder)]
        files.append(File.generated(config, f"{FOLDER}/{name}.md", content="\n\n".join(blocks) + "\n"))
    return files


def on_shutdown() -> None:
    """Take the links away."""
    _installed.cleanup()
