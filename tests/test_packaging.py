"""The packages and files that pyproject.toml installs are those in the folders."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_code_is_installed():
    """The list is written by hand because jfa_bench is in bench/, and a missing folder fails only once installed."""
    folders = set()
    for package in ("jfa", "jfa_models", "jfa_bench"):
        base = ROOT / SETUPTOOLS["package-dir"].get(package, package)
        folders |= {".".join([package, *file.parent.relative_to(base).parts]) for file in base.rglob("*.py")}
    assert folders == set(SETUPTOOLS["packages"])


def test_every_other_file_of_a_package_is_installed():
    patterns = [(package, one) for package, globs in SETUPTOOLS["package-data"].items() for one in globs]
    listed = {file for package, one in patterns for file in (ROOT / package).glob(one)}
    files = {file for package in ("jfa", "jfa_models") for file in (ROOT / package).rglob("*") if file.is_file()}
    assert listed == {file for file in files if file.suffix not in (".py", ".pyc")}
