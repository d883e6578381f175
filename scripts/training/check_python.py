"""Exit with 0 if this Python has all that pyproject.toml requires, else say what it lacks and exit with 1.

It also has to run under a Python that is much too old.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("found Python %d.%d, wanted 3.11 or newer" % sys.version_info[:2])  # noqa: UP031

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
found = {}
for dependency in project["dependencies"]:
    name = re.split(r"[^\w.-]", dependency)[0]
    try:
        found[dependency] = version(name)
    except PackageNotFoundError:
        sys.exit(f"found no {name}, wanted {dependency}")

from packaging.requirements import Requirement  # noqa: E402  (transformers requires it)

for dependency, installed in found.items():
    if not Requirement(dependency).specifier.contains(installed, prereleases=True):
        sys.exit(f"found {Requirement(dependency).name} {installed}, wanted {dependency}")
