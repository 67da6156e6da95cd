"""Who may import whom: utils <- configs <- manage <- entry points; models stands alone."""

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ENTRY_POINTS = ("train.py", "evaluate.py")
LAYERS = ("configs", "utils", "models", "manage", "tools")
MAY_IMPORT = {
    "configs": {"configs", "utils"},
    "utils": {"utils"},
    "models": {"models"},
    "manage": {"configs", "utils", "models", "manage"},
    "tools": {"configs", "utils", "models", "manage", "tools"},
    "train.py": {"configs", "utils", "models", "manage"},
    "evaluate.py": {"configs", "utils", "models", "manage"},
}
SOURCES = sorted(path for top in MAY_IMPORT for path in [REPO / top, *(REPO / top).rglob("*.py")] if path.is_file())


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports; those for type checkers alone do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
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
    layer = path.relative_to(REPO).parts[0]
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops & {*LAYERS, "train", "evaluate", "tests"} <= MAY_IMPORT[layer]


@pytest.mark.parametrize("path", sorted((REPO / "models").rglob("*.py")), ids=name_of)
def test_models_need_torch_and_torchvision_alone(path):
    optional = {"timm.py": {"timm"}, "weights.py": {"safetensors"}}.get(path.name, set())
    foreign = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert foreign <= {"torch", "torchvision", "models"} | optional


@pytest.mark.parametrize("name", ["utils/dataset.py", "utils/memory.py", "utils/views.py", "utils/images.py"])
def test_reading_data_knows_no_tree(name):
    assert "utils.hierarchy" not in imports(REPO / name)


def test_encoders_decoders_and_heads_do_not_import_each_other():
    for part in ("encoders", "decoders", "heads"):
        others = tuple(f"models.{other}" for other in ("encoders", "decoders", "heads") if other != part)
        for path in (REPO / "models" / part).rglob("*.py"):
            assert not [name for name in imports(path) if name.startswith(others)], path


def test_the_rule_is_checked_against_real_imports():
    assert "utils.hierarchy" in imports(REPO / "utils" / "losses.py")
    assert len(SOURCES) > 20
