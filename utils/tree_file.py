"""A tree file node by node: its keys and their types. What only the whole tree shows, `Hierarchy` checks."""

from typing import Any

from utils.errors import UserError

TREE_KEYS = {"name", "ignore_index", "levels", "nodes"}
NODE_KEYS = {"id", "name", "parent", "colour", "background", "mirror"}


def checked_nodes(tree: Any, source: str) -> list[dict[str, Any]]:
    """The nodes of a tree as read from JSON, sorted by id. Raises: UserError naming the source and the node."""
    _check_keys(tree, TREE_KEYS, TREE_KEYS, source)
    nodes = tree["nodes"]
    if not isinstance(nodes, list) or not nodes:
        raise UserError(f"{source}: 'nodes' must be a list with at least one node")
    for position, node in enumerate(nodes):
        _check_node(node, f"{source}: nodes[{position}]")
    return _in_id_order(nodes, source)


def _check_keys(record: Any, allowed: set[str], required: set[str], where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {record!r}")
    if unknown := sorted(set(record) - allowed):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(allowed))}")
    if missing := sorted(required - set(record)):
        raise UserError(f"{where}: the key {missing[0]!r} is missing")


def _check_node(node: Any, where: str) -> None:
    """What one node alone can show."""
    _check_keys(node, NODE_KEYS, NODE_KEYS - {"background", "mirror"}, where)
    where = f"{where}, id {node['id']!r}, name {node['name']!r}"
    if not is_int(node["id"]):
        raise UserError(f"{where}: 'id' must be an integer")
    if not is_text(node["name"]):
        raise UserError(f"{where}: 'name' must be a non-empty text of printable characters")
    if node["parent"] is not None and not is_int(node["parent"]):
        raise UserError(f"{where}: 'parent' is {node['parent']!r}; it must be the id of a node, or null for a root")
    colour = node["colour"]
    if not isinstance(colour, list) or len(colour) != 3 or not all(is_int(c) and 0 <= c <= 255 for c in colour):
        raise UserError(f"{where}: 'colour' is {colour!r}; it must be [red, green, blue], integers from 0 to 255")
    if not isinstance(node.get("background", False), bool):
        raise UserError(f"{where}: 'background' must be true or false")
    if node.get("mirror") is not None and not is_text(node["mirror"]):
        raise UserError(f"{where}: 'mirror' must be the name of a node")


def _in_id_order(nodes: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Sorted by id. Raises: UserError for duplicate ids, gaps and unknown parents."""
    by_id: dict[int, dict[str, Any]] = {}
    for node in nodes:
        if node["id"] in by_id:
            raise UserError(
                f"{source}: id {node['id']} is given to both {by_id[node['id']]['name']!r} and {node['name']!r}"
            )
        by_id[node["id"]] = node
    for v in range(len(nodes)):
        if v not in by_id:
            highest = max(by_id, key=abs)
            raise UserError(
                f"{source}: ids must be 0 to {len(nodes) - 1} without gaps; {v} is missing, while node "
                f"{highest} ({by_id[highest]['name']}) lies outside"
            )
    for node in nodes:
        if node["parent"] is not None and node["parent"] not in by_id:
            raise UserError(
                f"{source}: node {node['id']} ({node['name']}) has the parent {node['parent']}, which is no node's id"
            )
    return [by_id[v] for v in range(len(nodes))]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
