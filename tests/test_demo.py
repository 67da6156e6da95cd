"""The page of tools/demo.py: what it is sent, and what a headless browser makes of it."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from configs.config import Config
from manage.predictor import Predictor
from tools import demo

HEAD = ("head", "upper_body", "body")


class Halves(nn.Module):
    """Says background on the left and head on the right, at any size."""

    stride = 1

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.on_left = nn.Parameter(torch.tensor([2.0 if name == "background" else -3.0 for name in names]))
        self.on_right = nn.Parameter(torch.tensor([1.0 if name in HEAD else -1.0 for name in names]))

    def forward(self, images):
        right = torch.arange(images.shape[-1]) >= images.shape[-1] // 2
        row = torch.where(right, self.on_right[:, None], self.on_left[:, None])
        return row[None, :, None].expand(len(images), -1, images.shape[-2], -1).clone()


@pytest.fixture(scope="module")
def predictor(tree):
    return Predictor(Halves(tree.names), Config(exp_name="halves", decode="logit_sum"), tree)


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (80, 60), (200, 200, 200)).save(tmp_path / "two.halves.png")
    return tmp_path / "two.halves.png"


def pictures_of(html: str) -> list[np.ndarray]:
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r'base64,([^"]+)', html)]


@pytest.mark.parametrize("criterion", ["bce", "ce"])
def test_the_page_is_sent_class_and_probability_of_each_pixel_at_each_level(predictor, photo, tree, criterion):
    result = demo.decode_again(predictor, demo.predict(predictor, str(photo)), "logit_sum", 0.0)
    picture, maps = pictures_of(demo.to_show(result, 0, criterion))
    assert picture.shape == (60, 80, 3)
    logits = result.logits[:, 0, 79]
    leaves = logits[list(tree.leaves)].softmax(0)
    for sheet, name in zip(maps.reshape(3, 60, 80, 3), reversed(HEAD), strict=True):
        node = tree.names.index(name)
        mass = sum(leaf for v, leaf in zip(tree.leaves, leaves, strict=True) if node in tree.paths[v])
        score = mass if criterion == "ce" else logits[node].sigmoid()
        assert sheet[30, 79, :2].tolist() == [node, round(255 * score.item())]
        assert sheet[30, 0, 0] == 0


# --- the page itself ---
@pytest.fixture(scope="module")
def page(browser, predictor):
    if demo.gr is None:
        pytest.skip("needs gradio: pip install -r requirements-dev.txt")
    blocks = demo.build(predictor)
    _, url, _ = demo.launch(blocks, prevent_thread_lock=True, quiet=True)
    browser.get(url)
    yield browser
    blocks.close()


def wait_until(page, said):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(page, 60, ignored_exceptions=[Exception]).until(lambda _: said())


def text(page, what: str) -> str:
    return page.find_element("css selector", what).text


def drop(page, photo) -> None:
    wait_until(page, lambda: page.find_element("css selector", "input[type=file]")).send_keys(str(photo))


def hover(page, x: float) -> str:
    """What is told at a place of the photo; x from -1, its left edge, to 1."""
    from selenium.webdriver import ActionChains

    picture = page.find_element("class name", "picture")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    ActionChains(page).move_to_element_with_offset(picture, int(0.45 * x * picture.size["width"]), 5).perform()
    return text(page, ".readout")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_photo_in_the_browser(page, photo, width):
    from selenium.webdriver.common.keys import Keys

    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.refresh()
    drop(page, photo)
    wait_until(page, lambda: "head 50 %" in text(page, ".legend"))
    assert hover(page, -1) == "background 88 %"
    assert hover(page, 1) == "body 73 % › upper_body 73 % › head 73 %"
    page.find_element("xpath", "//label[contains(., 'body')]").click()
    wait_until(page, lambda: "body 50 %" in text(page, ".legend"))
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(photo.parent)})
    page.find_element("xpath", "//button[contains(., 'Download')]").click()
    wait_until(page, lambda: list(photo.parent.glob("*.zip")))
    number = page.find_element("css selector", "input[type=number]")
    number.send_keys(Keys.CONTROL + "a" + Keys.NULL, "5", Keys.TAB)  # the path to head has 3, background -1
    wait_until(page, lambda: text(page, ".legend") == "background 100 %")


@pytest.mark.slow
def test_a_file_that_is_no_photo_is_named_and_nothing_is_asked_of_another_host(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no photo")
    page.refresh()
    drop(page, tmp_path / "broken.png")
    wait_until(page, lambda: "broken.png cannot be read" in text(page, "body"))
    entries = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
