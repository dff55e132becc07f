"""The lower bound of torch in a project's ``pyproject.toml``, from what a scan found that the project needs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from torchspan.core.errors import InputError
from torchspan.scan._scan import Scan

_LOWER = (">=", ">", "~=", "==", "===")
_TEXT = re.compile(r"""(["'])((?:(?!\1)[^\n\\])*)\1""")
_PROJECT = re.compile(r"^\[project\][^\n]*\n(?P<body>(?:(?!^\[)[^\n]*\n?)*)", re.MULTILINE)
_DEPENDENCIES = re.compile(r"^dependencies\s*=\s*\[", re.MULTILINE)


def fix_requires(result: Scan, paths: Sequence[str | os.PathLike[str]]) -> str:
    """Write the oldest torch that the scanned project runs on into its ``pyproject.toml``; returns what was done.

    That is what it needs, or what it runs on with torchspan where it requires torchspan. A bound is raised, never lowered.

    Args:
        result: of the scan of `paths`.
        paths: of the project; its ``pyproject.toml`` is beside the first one, or in a folder above it.

    Raises:
        InputError: there is no ``pyproject.toml`` with a ``[project]``, or no one release has all that the project uses.
    """
    file = _pyproject(Path(paths[0]).resolve())
    text = file.read_text()
    requirements = list(_requirements(text))
    has_torchspan = any(requirement.name.lower() == "torchspan" for requirement, _, _ in requirements)
    releases = result.runs if has_torchspan else result.needs
    if not releases:
        raise InputError(f"no one torch release has all that is used: no bound to write into {file}; {result.summary}")
    if releases[0] == result.known[0]:
        return f"{file}: left as it is: what is used is in every torch from {result.known[0]} on"
    changed = _with_bound(text, requirements, releases[0], file)
    if changed == text:
        return f"{file}: left as it is: torch>={releases[0]} holds already"
    file.write_text(changed)
    return f"{file}: torch>={releases[0]}" + (" (with torchspan, which it requires)" if has_torchspan else "")


def _pyproject(path: Path) -> Path:
    for folder in (path, *path.parents):
        if (folder / "pyproject.toml").is_file():
            return folder / "pyproject.toml"
    raise InputError(f"no pyproject.toml beside {str(path)!r} or above it; expected the one of the project that is scanned")


def _requirements(text: str) -> Iterator[tuple[Requirement, int, int]]:
    """The requirements in the lists of a ``pyproject.toml``, with where their text begins and ends."""
    for match in _TEXT.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if "#" in line or re.match(r"\s*(name|version|description|readme|license)\s*=", line):
            continue
        try:
            yield Requirement(match.group(2)), match.start(2), match.end(2)
        except InvalidRequirement:
            continue


def _with_bound(text: str, requirements: Sequence[tuple[Requirement, int, int]], minor: str, file: Path) -> str:
    torch = [entry for entry in requirements if canonicalize_name(entry[0].name) == "torch"]
    for requirement, start, end in reversed(torch):
        if not requirement.url and _lower_bound(requirement.specifier) < Version(minor):
            text = text[:start] + _raised(requirement, minor) + text[end:]
    return text if torch else _added(text, minor, file)


def _lower_bound(specifiers: SpecifierSet) -> Version:
    versions = [Version(specifier.version.removesuffix(".*")) for specifier in specifiers if specifier.operator in _LOWER]
    return max(versions, default=Version("0"))


def _raised(requirement: Requirement, minor: str) -> str:
    kept = sorted(str(specifier) for specifier in requirement.specifier if specifier.operator not in _LOWER)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}{extras}{','.join([f'>={minor}', *kept])}{marker}".replace('"', "'")


def _added(text: str, minor: str, file: Path) -> str:
    project = _PROJECT.search(text)
    if project is None:
        raise InputError(f"{file} has no [project] and no requirement of torch; write 'torch>={minor}' where it lists its own")
    match = _DEPENDENCIES.search(text, project.start("body"), project.end("body"))
    if match is None:
        return text[: project.start("body")] + f'dependencies = ["torch>={minor}"]\n' + text[project.start("body") :]
    is_empty = text[match.end() :].lstrip().startswith("]")
    return text[: match.end()] + f'"torch>={minor}"' + ("" if is_empty else ", ") + text[match.end() :]
