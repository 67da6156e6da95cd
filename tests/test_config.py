"""Configs: what is written is read again, every key refuses what it cannot mean, and nothing is overwritten."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.config import (
    FIELDS,
    GONE,
    TYPES,
    Config,
    config_from_dict,
    differences,
    load_config,
    parse_overrides,
    save_config,
    without_gone,
)
from tests.conftest import REPO
from utils.errors import UserError

SHIPPED = sorted((REPO / "configs").glob("*.json"))
OF_EACH_TYPE = {
    type(None): None,
    bool: True,
    int: 1,
    float: 1.5,
    str: "x",
    list: [1],
    dict: {"x": 1},
}


# ---- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_says_what_differs_from_the_defaults_and_is_named_as_its_file(tmp_path, path):
    config = load_config(path)
    save_config(config, tmp_path / "a.json")
    assert load_config(tmp_path / "a.json") == config
    save_config(config, tmp_path / "a.json", full=False)
    assert path.read_text() == (tmp_path / "a.json").read_text(), "write it with save_config"
    assert set(json.loads(path.read_text())) == {"exp_name", *differences(config, Config())}
    assert config.exp_name == path.stem
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    lr=st.floats(1e-12, 100),
    names=st.lists(st.sampled_from(["tree_min", "bce", "ce"]), min_size=1, unique=True),
    weight=st.floats(0.001, 1000),
    bias=st.dictionaries(st.text(st.characters(categories=["L", "P"])), st.floats(-50, 50), max_size=3),
)
def test_numbers_and_names_lose_nothing_on_disk(tmp_path_factory, seed, lr, names, weight, bias):
    config = Config(seed=seed, lr=lr, criterion=dict.fromkeys(names, weight), root_bias=bias)
    path = tmp_path_factory.getbasetemp() / "any.json"
    save_config(config, path)
    assert load_config(path) == config


# ---- what is refused ---------------------------------------------------------------------------------------------


def allowed(key: str) -> set[type]:
    """The types of JSON that a key takes."""
    hint = TYPES[key]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = {typing.get_origin(option) or option for option in options}
    return kinds | {int} if float in kinds else kinds  # 1 is a number, too


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_refuses_every_other_type_by_name(key):
    wrong = [value for kind, value in OF_EACH_TYPE.items() if kind not in allowed(key)]
    assert len(wrong) >= 4
    for value in wrong:
        with pytest.raises(UserError, match=rf"^c\.json: key '{key}': expected .*, found "):
            config_from_dict({key: value}, "c.json")


@pytest.mark.parametrize("key", [key for key in FIELDS if allowed(key) & {list, dict}])
def test_what_stands_in_a_list_or_object_is_checked_too(key):
    for kind in allowed(key) & {list, dict}:
        value = [[]] if kind is list else {"bce": []}
        with pytest.raises(UserError, match=rf"key '{key}[.\[]"):
            config_from_dict({key: value}, "c.json")


BOUNDED = {
    key: field.metadata
    for key, field in FIELDS.items()
    if any(field.metadata[bound] is not None for bound in ("low", "high", "above")) and allowed(key) & {int, float}
}


@pytest.mark.parametrize("key", BOUNDED)
def test_every_number_has_bounds(key):
    rule, step = BOUNDED[key], 1 if float not in allowed(key) else 0.5
    lowest = rule["low"] if rule["low"] is not None else rule["above"]
    too_low = lowest - step if rule["low"] is not None else lowest
    highest = 2**53 if rule["high"] is None else rule["high"]
    for value in (too_low, highest + step if rule["high"] is not None else 2**54):
        with pytest.raises(UserError, match=f"key '{key}': expected"):
            config_from_dict({key: value}, "c.json")


def test_every_number_is_bounded_from_below():
    numbers = {key for key in FIELDS if allowed(key) & {int, float}}
    assert numbers == set(BOUNDED)


def test_an_unknown_key_is_answered_in_whole_sentences():
    lists = r"`python configs/config\.py --help` lists all keys$"
    with pytest.raises(UserError, match=rf"^c\.json: unknown key 'batch_sise'; did you mean 'batch_size'\? {lists}"):
        config_from_dict({"batch_sise": 4}, "c.json")
    with pytest.raises(UserError, match=rf"^c\.json: unknown key 'qqqq'\. {lists}"):
        config_from_dict({"qqqq": 4}, "c.json")


@pytest.mark.parametrize("key", GONE)
def test_a_key_that_went_is_named_with_what_there_is_instead(key):
    with pytest.raises(UserError, match=rf"^c\.json: leave out what is no longer a key: '{key}' \(\w"):
        config_from_dict({key: 1}, "c.json")


def test_the_copy_of_an_old_run_may_hold_keys_that_went_if_they_changed_nothing(tmp_path):
    copy = tmp_path / "experiments" / "x" / "configs" / "x.json"
    copy.parent.mkdir(parents=True)
    copy.write_text('{"exp_name": "x", "vflip": 0.0, "step_epochs": [], "n_val_pictures": 9}')
    assert load_config(copy) == Config(exp_name="x")
    copy.write_text('{"exp_name": "x", "vflip": 0.5, "step_epochs": []}')
    with pytest.raises(UserError, match=r"x\.json: leave out .*: 'vflip' \("):
        load_config(copy)
    assert without_gone({"vflip": 0.5, "lr": 1}, any_value=True) == {"lr": 1}


def test_a_folder_is_no_config_and_a_file_no_folder_for_one(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); expected a JSON file"):
        load_config(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a\.json: cannot write the config"):
        save_config(Config(), tmp_path / "file" / "a.json")


# ---- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=0.02", 0.02),
        ("n_epochs=3", 3),
        ("pretrained=false", False),
        ("n_val_photos=null", None),
        ("criterion=tree_min", "tree_min"),
        ('criterion={"bce": 1, "tree_min": 2}', {"bce": 1, "tree_min": 2}),
        ("decoder_channels=[6, 8]", [6, 8]),
        ("exp_name=2024", "2024"),  # a name, not a number
        ("device=cuda:1", "cuda:1"),
        ("root_dir=/a=b", "/a=b"),
        ("encoder_weights=", ""),
    ],
)
def test_an_override_is_json_where_it_can_be_and_text_elsewhere(text, value):
    (parsed,) = parse_overrides([text]).values()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["lr"], "'lr' is not an override; expected key=value"),
        (["lr=1", "lr=2"], "'lr' is given twice"),
        (["lr=fast"], "with overrides: key 'lr': expected a number, found a text"),
        (["lrr=1"], "unknown key 'lrr'; did you mean 'lr'"),
        (["lr=NaN"], "key 'lr'"),
        (["n_epochs=1e999"], "key 'n_epochs'"),
    ],
)
def test_a_mistaken_override_is_named(overrides, part):
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert part in str(caught.value)


# ---- the script --------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    """Runs a copy of configs/config.py, which writes beside itself; from another folder."""
    for name in ("configs/__init__.py", "configs/config.py", "configs/checks.py", "utils/errors.py", "utils/files.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(tmp_path / "configs" / "config.py"), *arguments]
        return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)

    return run


def test_the_script_writes_a_config_and_overwrites_no_other_values(script, tmp_path):
    path = tmp_path / "configs" / "x.json"
    done = script("exp_name=x", "lr=0.5")
    assert (done.returncode, done.stdout) == (0, f"wrote {path}\n"), done.stderr
    assert load_config(path) == Config(exp_name="x", lr=0.5)
    before = path.read_bytes()
    assert script("exp_name=x", "lr=0.5").returncode == 0, "the same values again do no harm"
    done = script("exp_name=x", "lr=0.25")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path} exists with other values; choose another exp_name")
    assert path.read_bytes() == before
    path.write_text("{")
    done = script("exp_name=x")
    assert (done.returncode, path.read_text()) == (2, "{")
    assert done.stderr.startswith(f"error: {path}, line 1: not valid JSON")


def test_the_script_starts_from_another_file_and_writes_what_differs_or_everything(script, tmp_path):
    (tmp_path / "base.json").write_text('{"exp_name": "base", "lr": 0.5, "batch_size": 2}')
    assert script("--cfg", str(tmp_path / "base.json"), "exp_name=y", "seed=3", "lr=0.25").returncode == 0
    path = tmp_path / "configs" / "y.json"
    assert json.loads(path.read_text()) == {"exp_name": "y", "seed": 3, "lr": 0.25, "batch_size": 2}
    assert script("exp_name=z", "--full").returncode == 0
    assert list(json.loads(path.with_name("z.json").read_text())) == list(FIELDS)
    assert script().returncode == 0
    assert load_config(path.with_name("hseg.json")) == Config()


def test_help_lists_every_key_with_its_default(script, tmp_path):
    text = script("--help").stdout
    for key, field in FIELDS.items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert f"  {key} = {json.dumps(default)}\n" in text
    assert not list((tmp_path / "configs").glob("*.json"))


def test_importing_the_config_writes_nothing_and_needs_the_standard_library_only(script, tmp_path):
    code = "import sys; import configs.config; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_label_maps_and_lists_may_lie_outside_the_data_folder_but_photos_not():
    config = Config(gt_dir="/maps", train_sample_ids_file="~/train.txt", val_sample_ids_file="lists/val.txt")
    assert config.labels_dir == Path("/maps")
    assert config.ids_file("train") == Path.home() / "train.txt"
    assert config.ids_file("val") == config.data_dir / "lists" / "val.txt"
    for keys in ({"gt_dir": "../maps"}, {"img_dir": "/photos"}):
        with pytest.raises(UserError, match="inside root_data_dir"):
            Config(**keys)
