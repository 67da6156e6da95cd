"""Who may import whom: utils <- configs <- manage <- entry points; models stands alone."""

import ast
import sys
from pathlib import Path

import pytest

from tests.factory import REPO

LAYERS = {"configs", "utils", "models", "manage", "tools", "train", "evaluate", "tests"}
MAY_IMPORT = {
    **{"utils": {"utils"}, "models": {"models"}, "configs": {"configs", "utils"}},
    **{key: {"configs", "utils", "models", "manage"} for key in ("manage", "train.py", "evaluate.py")},
    "tools": {"configs", "utils", "models", "manage", "tools"},
}
SOURCES = sorted(path for top in MAY_IMPORT for path in [REPO / top, *(REPO / top).rglob("*.py")] if path.is_file())


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_layer_imports_only_itself_and_layers_below(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops & LAYERS <= MAY_IMPORT[path.relative_to(REPO).parts[0]]


@pytest.mark.parametrize("path", sorted((REPO / "models").rglob("*.py")), ids=name_of)
def test_models_need_torch_and_torchvision_alone(path):
    foreign = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert foreign <= {"torch", "torchvision", "models", *["timm"] * (path.name == "timm.py")}


def test_reading_data_knows_no_tree_and_parts_of_the_network_do_not_know_each_other():
    for name in ("dataset", "memory", "views", "images"):
        assert "utils.hierarchy" not in imports(REPO / "utils" / f"{name}.py")
    for path in (REPO / "models").glob("*/*.py"):
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("models.")}
        assert parts <= {path.parent.name}
