"""A tree file node by node: its keys and their types. What only the whole tree shows, `Hierarchy` checks."""

from typing import Any

from utils.errors import UserError


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_int(part) and 0 <= part <= 255 for part in value)


TREE_KEYS = {"name", "ignore_index", "levels", "nodes"}
OPTIONAL = {"background", "mirror"}
NODE_KEYS = {  # what each may be, and how to say it
    "id": (is_int, "an integer"),
    "name": (lambda value: is_text(value) and value != "void", "a non-empty printable text other than void"),
    "parent": (lambda value: value is None or is_int(value), "the id of a node, or null for a root"),
    "colour": (_is_colour, "[red, green, blue], integers from 0 to 255"),
    "background": (lambda value: isinstance(value, bool), "true or false"),
    "mirror": (lambda value: value is None or is_text(value), "the name of a node"),
}


def checked_nodes(tree: Any, source: str) -> list[dict[str, Any]]:
    """The nodes of a tree as read from JSON, sorted by id. Raises: UserError naming the source and the node."""
    _check_keys(tree, TREE_KEYS, TREE_KEYS, source)
    nodes = tree["nodes"]
    if not isinstance(nodes, list) or not nodes:
        raise UserError(f"{source}: 'nodes' must be a list with at least one node")
    for position, node in enumerate(nodes):
        where = f"{source}: nodes[{position}]"
        _check_keys(node, NODE_KEYS.keys(), NODE_KEYS.keys() - OPTIONAL, where)
        for key, (is_right, meant) in NODE_KEYS.items():
            if key in node and not is_right(node[key]):
                raise UserError(f"{where}, name {node['name']!r}: {key!r} is {node[key]!r}; it must be {meant}")
    ids = sorted(node["id"] for node in nodes)
    if ids != list(range(len(nodes))):
        raise UserError(f"{source}: the ids of the nodes are {ids}; they must be 0 to {len(nodes) - 1}, each once")
    for node in nodes:
        if node["parent"] not in (None, *range(len(nodes))):
            raise UserError(
                f"{source}: node {node['id']} ({node['name']}) has the parent {node['parent']}, which is no node's id"
            )
    return sorted(nodes, key=lambda node: node["id"])


def _check_keys(record: Any, allowed: Any, required: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {record!r}")
    if wrong := sorted((record.keys() - allowed) | (required - record.keys())):
        raise UserError(f"{where}: the key {wrong[0]!r} is unknown or missing; keys are {', '.join(sorted(allowed))}")
