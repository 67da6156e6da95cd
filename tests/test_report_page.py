"""The page of an evaluation in a real headless browser (skipped where there is none)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_report import EVIL, VOID, draw, hostile_tree, make_report, sample_id
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy

pytest.importorskip("selenium", reason="needs selenium: pip install -r requirements-dev.txt")
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

PHOTOS, MORE = 30, 24
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def h() -> Hierarchy:
    return hostile_tree()


@pytest.fixture(scope="module")
def site(tmp_path_factory, h) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("evaluation #1")
    return folder / "index.html", make_report(folder, h, PHOTOS)


@pytest.fixture
def page(browser, site):
    """The report, freshly opened; nothing may complain while a test uses it."""
    browser.get(site[0].as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None


def texts(page, selector: str) -> list[str]:
    get = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return page.execute_script(get, selector)


def ids(page) -> list[str]:
    return texts(page, "#gallery .card header button")


def choose(page, name: str, value: str | int) -> None:
    set_value = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    page.execute_script(set_value + "e.dispatchEvent(new Event('input', {bubbles: true}))", name, value)


def press(page, *keys: str) -> None:
    ActionChains(page).send_keys(*keys).perform()


def arrived(page, selector: str):
    """The first such element, once it is there."""
    find = "return document.querySelector(arguments[0])"
    return WebDriverWait(page, 20).until(lambda _: page.execute_script(find, selector))


def drawn_card(page, within: str = "#gallery"):
    """The first card, once its maps are drawn."""
    page.execute_script("document.querySelector(arguments[0]).scrollIntoView()", f"{within} .card")
    return arrived(page, f"{within} .card[data-drawn]")


def enlarge(page):
    drawn_card(page).find_element("css selector", "header button").click()
    return drawn_card(page, "#viewer")


def truth_of(card, h: Hierarchy) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and logits of the photo that a card shows."""
    return draw(int(card.get_attribute("data-id")[6:10]), h)


def in_order(lines: list[dict], key: int, sign: int = 1) -> list[str]:
    """Ids from the smallest value to the largest, those without a value last."""
    value = lambda line: (line["values"][key] is None, sign * (line["values"][key] or 0))  # noqa: E731
    return [line["id"] for line in sorted(lines, key=value)]


def test_every_level_has_its_scores_and_a_confusion_in_percent(page, h):
    assert texts(page, ".panel h3") == 2 * [f"Level {level + 1}: {name}" for level, name in enumerate(h.level_names)]
    names = texts(page, ".panel:first-child .scores tbody th")
    assert names == [h.names[v] for v in h.level_classes[0]] + ["mean", "with background"]
    shares = texts(page, ".panel:last-child .confusion tbody tr:last-child td")
    assert sum(map(float, shares)) == pytest.approx(100, abs=1)
    totals = dict(zip(texts(page, ".total span"), texts(page, ".total b"), strict=True))
    assert 1 <= float(totals.pop("mistake severity")) <= 3  # a height in the tree, not a share
    assert all(text.endswith(" %") for text in totals.values())


def test_photos_are_sorted_by_what_is_chosen_found_by_id_and_shown_some_at_a_time(page, site):
    assert ids(page) == in_order(site[1], 0)[:MORE]
    page.find_element("id", "more").click()
    assert ids(page) == in_order(site[1], 0)
    choose(page, "key", 3)  # violations: the most are the worst
    assert ids(page) == in_order(site[1], 3, -1)[:MORE]
    choose(page, "key", 5)  # the IoU of a class, which half the photos do not have
    choose(page, "order", "the best")
    assert ids(page) == in_order(site[1], 5, -1)[:MORE]
    choose(page, "search", "PHOTO_0007")
    assert ids(page) == [sample_id(7)]


def test_maps_are_drawn_in_the_colours_of_the_tree(page, h):
    card = enlarge(page)
    labels, logits = truth_of(card, h)
    leaves = DECODERS["logit_sum"](logits[None], h)[0]
    drawn = page.execute_script(
        "return [...arguments[0].querySelectorAll('canvas')].map((c) =>"
        "[...c.getContext('2d').getImageData(0, 0, 60, 40).data])",
        card,
    )
    pixels = np.array(drawn).reshape(-1, 40, 60, 4)[..., :3]
    assert len(pixels) == 1 + 3 * h.num_levels  # over the photo, and three a level
    palette = np.full((256, 3), 110)
    palette[: h.num_nodes] = h.colours
    for level in range(h.num_levels):
        truth, predicted = h.level_of(labels, level), h.level_of(leaves, level)
        assert np.array_equal(pixels[1 + 3 * level], palette[truth])
        assert np.array_equal(pixels[2 + 3 * level], palette[predicted])
        assert np.array_equal(pixels[3 + 3 * level][..., 0] == 179, ((truth != predicted) & (truth != VOID)).numpy())


def test_pointing_at_a_pixel_tells_its_classes_and_scores(page, h):
    card, row, column = drawn_card(page), 24, 36
    page.execute_script(
        "const picture = arguments[0].querySelectorAll('.picture')[3], box = picture.getBoundingClientRect();"
        "const clientX = box.left + (arguments[2] + .5) / 60 * box.width;"
        "const clientY = box.top + (arguments[1] + .5) / 40 * box.height;"
        "picture.dispatchEvent(new PointerEvent('pointermove', {clientX, clientY, bubbles: true}))",
        card,
        row,
        column,
    )
    labels, logits = truth_of(card, h)
    truth = int(labels[row, column])
    path = " › ".join(h.names[v] for v in h.paths[truth]) if truth != VOID else "void"
    assert texts(page, "#readout:not([hidden]) p")[0] == f"truth: {path}"
    shares = [float(text.strip("\u00a0%")) for text in texts(page, "#readout .node > span:last-child")]
    assert shares == pytest.approx([100 * float(logits[v, row, column].sigmoid()) for v in h.preorder], abs=1)


def test_a_photo_opens_large_and_keys_go_on_from_there(page, site):
    order = in_order(site[1], 0)
    assert enlarge(page).get_attribute("data-id") == order[0]
    press(page, *[Keys.ARROW_RIGHT] * 25)
    card = drawn_card(page, "#viewer")
    ActionChains(page).move_to_element(card.find_elements("class name", "picture")[1]).perform()
    assert texts(page, "#viewer #readout:not([hidden]) p")
    assert card.get_attribute("data-id") == order[25]
    assert texts(page, "#viewer .legend") == texts(page, "main .legend")
    press(page, Keys.ESCAPE)
    assert page.switch_to.active_element.text == order[25]  # where one has been looking


def test_six_photos_stand_in_a_row_and_nothing_moves_when_maps_arrive(page):
    """So that a link to what lies below the photos leads there."""
    tops = page.execute_script("return [...document.querySelectorAll('.card')].map((c) => c.offsetTop)")
    assert tops[:7].count(tops[0]) == 6
    place = "return document.querySelector('#details').getBoundingClientRect().top + scrollY"
    before = page.execute_script(place)
    page.execute_script("document.querySelectorAll('.card')[20].scrollIntoView()")
    drawn_card(page)
    assert page.execute_script(place) == before


def test_a_phone_shows_all_of_the_page_and_an_enlarged_photo_larger(page):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        width = drawn_card(page).find_element("class name", "picture").rect["width"]
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        assert enlarge(page).find_element("class name", "picture").rect["width"] > 2 * width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_names_are_shown_as_they_are_spelt_and_nothing_is_asked_for_outside_the_folder(page, site, h):
    assert page.title == page.find_element("tag name", "h1").text == f"{EVIL}: best.pt"
    shown = texts(page, "main .legend span[title]")
    assert [text.lstrip("›") for text in shown] == [h.names[v] for v in h.preorder]
    drawn_card(page)
    asked = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in asked if not name.startswith((site[0].parent.as_uri(), "data:"))] == []
    assert "http" not in site[0].read_text(encoding="utf-8")


def test_text_follows_the_data_and_a_photo_whose_maps_are_gone_is_named(page, browser, tmp_path):
    assert texts(page, "#means") == ["The mean leaves background out."]
    (tmp_path / "metrics.jsonl").write_text("")
    folder = tmp_path / "evaluation" / "best"
    make_report(folder, hostile_tree(background=()), 1)
    next((folder / "pictures" / "report").glob("*.js")).unlink()
    browser.get((folder / "index.html").as_uri())
    assert texts(browser, "#means") == [""]
    assert texts(browser, "#files a") == ["scores.csv", "scores.json", "metrics.jsonl"]
    browser.execute_script("document.querySelector('.card').scrollIntoView()")
    assert "is missing" in arrived(browser, ".card .warning").text
    browser.get_log("browser")  # the missing file is reported there, rightly
