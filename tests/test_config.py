"""Configs: what is written is read again, every key refuses what it cannot mean, and nothing is overwritten."""

import json
import shutil
import subprocess
import sys
import types
import typing

import pytest

from configs.config import FIELDS, GONE, TYPES, Config, config_from_dict, load_config, parse_overrides, save_config
from tests.factory import REPO
from utils.errors import UserError

SHIPPED = sorted((REPO / "configs").glob("*.json"))
OF_EACH_TYPE = {type(None): None, bool: True, int: 1, float: 1.5, str: "x", list: [[]], dict: {"bce": []}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_says_what_differs_from_the_defaults_and_is_named_as_its_file(tmp_path, path):
    config = load_config(path)
    save_config(config, tmp_path / "a.json", full=False)
    assert path.read_text() == (tmp_path / "a.json").read_text(), "write it with save_config"
    assert config.exp_name == path.stem


# ---- what is refused ---------------------------------------------------------------------------------------------


def allowed(key: str) -> set[type]:
    """The types of JSON that a key takes."""
    hint = TYPES[key]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = {typing.get_origin(option) or option for option in options}
    return kinds | {int} if float in kinds else kinds  # 1 is a number, too


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_refuses_every_other_type_also_inside_of_lists_and_objects(key):
    for kind, value in OF_EACH_TYPE.items():
        if kind not in allowed(key) or kind in (list, dict):
            with pytest.raises(UserError, match=rf"^c\.json: key '{key}[^ ]*: expected .*, found "):
                config_from_dict({key: value}, "c.json")


@pytest.mark.parametrize("key", [key for key in FIELDS if allowed(key) & {int, float}])
def test_every_number_has_bounds_of_which_the_lower_is_its_own(key):
    rule = FIELDS[key].metadata
    values = [rule["low"] - 1] if "low" in rule else [rule["above"]]
    for value in (*values, rule["high"] + 1 if "high" in rule else 2**53 + 2, float("nan")):
        value = float(value) if int not in allowed(key) else value
        with pytest.raises(UserError, match=f"key '{key}': expected"):
            config_from_dict({key: value}, "c.json")


REFUSED = {
    '{"lr": 1, "lr": 2}': "'lr' stands twice",
    "[1]": "expected a JSON object",
    '{"exp_name": "../x"}': "'exp_name': expected letters.*no folders",
    '{"batch_sise": 4}': r"unknown key 'batch_sise'; did you mean 'batch_size'\?.* lists all keys$",
    '{"qqqq": 4}': r"unknown key 'qqqq'\. `",
    '{"criterion": "tree_mim"}': "'criterion'.*did you mean 'tree_min'",
    '{"criterion": {"bce": 0}}': "'criterion'.*weight above 0",
    '{"crop_size": 100}': "'crop_size'.*multiple of 32; use 128",
    '{"scale_jitter": [2, 1]}': "'scale_jitter': expected .smallest, largest.",
    '{"decoder_channels": [8]}': "'decoder_channels': expected 5",
    '{"device": "gpu"}': "'device': expected auto",
    '{"monitor": "mIoU1"}': "'monitor': expected",
    '{"encoder_weights": "x.pth"}': "'pretrained' and 'encoder_weights' exclude",
    '{"encoder_weights": "x", "pretrained": false, "init_from": "y"}': "'init_from' and 'encoder_weights' exclude",
    '{"root_dir": ""}': "'root_dir': expected a text",
    "{": "line 1: not valid JSON",
}


@pytest.mark.parametrize(("text", "words"), REFUSED.items())
def test_a_mistake_in_a_file_names_file_and_key(tmp_path, text, words):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"(?s){path}.*{words}"):
        load_config(path)


def test_keys_that_went_are_named_but_stand_in_records(tmp_path):
    copy = tmp_path / "experiments" / "x" / "configs" / "x.json"
    copy.parent.mkdir(parents=True)
    for path in (copy, tmp_path / "x.json"):
        path.write_text(json.dumps({"exp_name": "x"} | dict.fromkeys(GONE, 1)))
    assert load_config(copy) == Config(exp_name="x")
    with pytest.raises(UserError, match=r"x\.json: leave out '\w+', which is no longer a key"):
        load_config(tmp_path / "x.json")


# ---- overrides ---------------------------------------------------------------------------------------------------

OVERRIDES = {"lr=0.02": 0.02, "pretrained=false": False, "n_val_photos=null": None, "root_dir=/a=b": "/a=b"}
OVERRIDES |= {'criterion={"bce": 1, "tree_min": 2}': {"bce": 1, "tree_min": 2}}
OVERRIDES |= {"exp_name=2024": "2024"}  # a name, not a number


def test_an_override_is_json_where_it_can_be_and_text_elsewhere_and_a_mistaken_one_is_named():
    for text, value in OVERRIDES.items():
        (parsed,) = parse_overrides([text]).values()
        assert (parsed, type(parsed)) == (value, type(value))
    with pytest.raises(UserError, match="'lr' is not an override; expected key=value"):
        load_config(None, ["lr"])
    with pytest.raises(UserError, match="with overrides: key 'lr': expected a number, found a text"):
        load_config(None, ["lr=fast"])


# ---- the script --------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    """Runs a copy of configs/config.py, which writes beside itself; from another folder."""
    for name in ("configs/__init__.py", "configs/config.py", "configs/checks.py", "utils/errors.py", "utils/files.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    command = [sys.executable, tmp_path / "configs" / "config.py"]
    return lambda *words: subprocess.run([*command, *words], cwd="/", capture_output=True, text=True, check=False)


def test_the_script_writes_what_differs_or_everything_overwrites_no_other_values_and_explains_keys(script, tmp_path):
    (tmp_path / "base.json").write_text('{"exp_name": "base", "lr": 0.5, "batch_size": 2}')
    path = tmp_path / "configs" / "x.json"
    words = ("--cfg", str(tmp_path / "base.json"), "exp_name=x", "seed=3")
    for _ in range(2):  # the same values again do no harm
        done = script(*words)
        assert (done.returncode, done.stdout) == (0, f"wrote {path}\n"), done.stderr
    assert json.loads(path.read_text()) == {"exp_name": "x", "seed": 3, "lr": 0.5, "batch_size": 2}
    done = script(*words, "lr=0.25")
    assert (done.returncode, load_config(path).lr) == (2, 0.5)
    assert done.stderr.startswith(f"error: {path} exists with other values; choose another exp_name")
    assert script("--full").returncode == 0
    assert list(json.loads(path.with_name("hseg.json").read_text())) == list(FIELDS)
    shown = script("--help").stdout
    assert all(f"  {key} = {json.dumps(value)}\n" in shown for key, value in Config().to_dict().items())


def test_importing_the_config_writes_nothing_and_needs_the_standard_library_only(script, tmp_path):
    code = "import sys; import configs.config; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    assert not list(tmp_path.rglob("*.json"))
