"""Fixtures that several test files share."""

import os
import shutil
from pathlib import Path

import pytest

import models.hseg
from tests.factory import REPO, SlimEncoder, make_data
from tools.make_sample_data import Settings, make_data_set
from utils.encoder import Encoder
from utils.hierarchy import Hierarchy

SAMPLE = Settings(train=6, val=4, size=64, seed=0)


def pytest_addoption(parser) -> None:
    parser.addoption("--fuzz-seed", default=0, help="of tests/test_fuzz.py")
    parser.addoption("--fuzz-cases", default=286, help="cases of each kind")


@pytest.fixture(scope="session")
def tree() -> Hierarchy:
    return Hierarchy.load(REPO / "configs" / "hierarchies" / "pascal_part.json")


h = tree  # its name where formulas are tested


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory, tree) -> Path:
    """Ten drawn photos, 64 pixels high or wide, with their encoding; to be read only."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    make_data_set(SAMPLE, folder)
    Encoder(folder / "gt_masks", folder / "JPEGImages", folder / "gt_masks_hie", tree).run()
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Eight train and three val photos of noise over blocks, with their encoding; to be read only."""
    return make_data(tmp_path_factory.mktemp("noise") / "data")


@pytest.fixture
def slim(monkeypatch) -> None:
    """Every network that is built has a slim encoder."""
    monkeypatch.setattr(models.hseg, "build_encoder", SlimEncoder)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that reaches no network, and logs what it asks for and what its console says."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -r requirements-dev.txt")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def _folder_of(variable: str, what: str):
    """A fixture: the folder that a variable of the environment names."""

    @pytest.fixture(scope="session")
    def folder() -> Path:
        if not os.environ.get(variable):
            pytest.skip(f"needs {what}: set {variable} to its folder")
        return Path(os.environ[variable])

    return folder


pascal_part_root = _folder_of("PASCAL_PART_ROOT", "the prepared Pascal-Person-Part set")
pascal_part_raw = _folder_of("PASCAL_PART_RAW", "raw Pascal-Part annotations")
hseg_weights = _folder_of("HSEG_WEIGHTS", "ImageNet weights of MobileNetV2 and EfficientNet-Lite0")
