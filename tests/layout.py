"""Statistics of the layout: for each folder the number of its entries, layers and imports between the entries.

    uv run python tests/layout.py [ROOT]    # of this checkout, or of another commit's

An entry is a file, or a subfolder as a whole. Imports include type imports; layers is the number of entries on the
longest chain of imports, which does not exist if there is a cycle.
"""

import argparse
import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {"jfa": "jfa", "jfa_models": "jfa_models", "jfa_bench": "bench"}
ROOT = Path(__file__).parents[1]


def imports(file: Path, name: str) -> Iterator[str]:
    """The absolute names that a file imports, `from a import b` as a.b."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, one.name]) for one in node.names)


def edges(root: Path) -> dict[str, set[str]]:
    """The modules of the three packages that each module imports, by name."""
    files = {}
    for package, folder in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found = {}
    for name, file in files.items():
        asked = set(imports(file, name))
        found[name] = {one if one in files else one.rpartition(".")[0] for one in asked} & files.keys() - {name}
    return found


def layout(modules: dict[str, set[str]], folder: str) -> tuple[int, int | None, int]:
    """(entries, layers or None in a cycle, imports between entries) of a folder such as jfa.kernels."""

    def entry(name: str) -> str | None:
        inside = name.startswith(folder + ".")
        return name.removeprefix(folder + ".").split(".")[0] if inside else None

    graph: dict[str, set[str]] = {}
    for name, imported in modules.items():
        if own := entry(name):
            graph.setdefault(own, set()).update(other for one in imported if (other := entry(one)) and other != own)
    layer: dict[str, int] = {}
    try:
        for one in graphlib.TopologicalSorter(graph).static_order():
            layer[one] = 1 + max((layer[below] for below in graph[one]), default=0)
        layers = max(layer.values(), default=0)
    except graphlib.CycleError:
        layers = None
    return len(graph), layers, sum(map(len, graph.values()))


def main() -> None:
    """Prints a table of the folders, and the longest files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=ROOT)
    root = parser.parse_args().root
    modules = edges(root)
    folders = {".".join(name.split(".")[:depth]) for name in modules for depth in range(1, name.count(".") + 1)}
    print(f"{'folder':28} {'entries':>8} {'layers':>8} {'imports':>8}")
    for folder in sorted(folders):
        entries, layers, arrows = layout(modules, folder)
        print(f"{folder:28} {entries:8} {layers or 'cycle':>8} {arrows:8}")
    files = [file for folder in PACKAGES.values() for file in (root / folder).rglob("*.py")]
    lines = {str(file.relative_to(root)): file.read_text().count("\n") for file in files}
    for name in sorted(lines, key=lambda one: -lines[one])[:8]:
        print(f"{lines[name]:5} lines  {name}")


if __name__ == "__main__":
    main()
