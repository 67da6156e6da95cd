"""The report of an evaluation: what its files hold, and its page in a real headless browser."""

from pathlib import Path

import numpy as np
import pytest
import torch

from manage import report
from manage.tables import summary
from tests.reference import tree_of
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy
from utils.metrics import LevelScores

EVIL = "</script><script>window.hacked = 1</script>"
IMAGE = "<img src=x onerror='window.hacked = 2'>"
VOID = 255
PHOTOS, MORE = 30, 24
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
ENTER = "\ue007"


def hostile_tree(background: tuple[int, ...] = (0,)) -> Hierarchy:
    """Three levels, and names that break a page which takes them for HTML or for a template."""
    names = ["background", EVIL, IMAGE, "{{js}}", "arm & 'leg\"", "body"]
    parents = [None, 3, 3, 5, 5, None]
    return tree_of(parents, names, background, name=EVIL, levels=["parts", "halves", IMAGE], ignore_index=VOID)


def sample_id(i: int) -> str:
    return f"photo_{i:04}&<b>'é#%41?"


def draw(i: int, h: Hierarchy) -> tuple[torch.Tensor, torch.Tensor]:
    """Background, one other node and void, and logits that know them, less well from photo to photo."""
    random = torch.Generator().manual_seed(i)
    coarse = torch.tensor([0, 1 + i % 5], dtype=torch.uint8)[torch.randint(0, 2, (4, 6), generator=random)]
    coarse[0, 0] = VOID
    labels = coarse.repeat_interleave(10, 0).repeat_interleave(10, 1)  # 40 x 60
    targets, _ = h.encode(labels[None])
    logits = (targets[0] - 0.5) * 8 + torch.randn(targets[0].shape, generator=random) * (0.4 + i % 7 / 2)
    return labels, logits


def sampled(labels: torch.Tensor, leaves: torch.Tensor, logits: torch.Tensor, band: int = 7) -> list[np.ndarray]:
    """What the page shows, from bands of a few rows."""
    sampler = report.MapSampler(labels, len(logits))
    for start in range(0, len(labels), band):
        sampler.add(slice(start, min(start + band, len(labels))), logits[:, start : start + band])
    return sampler.maps(leaves)


def make_report(folder: Path, h: Hierarchy, count: int) -> list[dict]:
    """A report of `count` drawn photos; returns what it knows of each."""
    pictures = folder / "pictures" / "report"
    meter, lines = LevelScores(h), []
    for i in range(count):
        labels, logits = draw(i, h)
        leaves = DECODERS["logit_sum"](logits[None], h)
        matrix, photo = meter.update(leaves, labels[None], logits[None]), np.full((40, 60, 3), 120, np.uint8)
        report.write_photo(pictures, sample_id(i), photo, sampled(labels, leaves[0], logits))
        lines.append(report.photo_line(sample_id(i), matrix, labels.shape, h))
    result = meter.compute()
    scores = {"checkpoint": "best.pt", "epoch": 3, "decode": "logit_sum", "root_bias": {}, "tta": "off"} | {
        "left_out": {f"lost{EVIL}": IMAGE},
        "scores": summary(result),
        "levels": result["levels"],
        "rules": {rule: summary(result) for rule in ("logit_sum", "leaf")},
        "config": {"exp_name": EVIL},
        "tree": h.to_dict(),
        "environment": {"time": "now", "command": EVIL},
    }
    report.write_report(folder, scores, lines, h)
    return lines


@pytest.fixture(scope="module")
def h() -> Hierarchy:
    return hostile_tree()


# --- files ---
def test_a_large_photo_is_sampled_to_the_sides_that_the_page_shows():
    rows = torch.arange(600)[:, None].expand(600, 900) // 3
    truth, leaves, scores = sampled(rows.to(torch.uint8), rows, rows / 200 - 2 + torch.zeros(2, 600, 900))
    assert truth.shape == report.shown_size((600, 900)) == (171, 256)
    assert scores.shape == (2, 86, 128)  # every other row and column of the maps
    expected = torch.sigmoid(torch.from_numpy(truth[::2, ::2] / 200 - 2))
    assert np.array_equal(scores[1], (expected * 256).to(torch.uint8))
    assert (np.diff(truth[:, 0].astype(int)) > 0).all()
    assert np.array_equal(truth, leaves)
    assert report.shown_size((1, 2000)) == (1, 256)  # keeps one row


# --- the page ---
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


def act(page):
    from selenium.webdriver import ActionChains

    return ActionChains(page)


def arrived(page, selector: str):
    """The first such element, once it is there."""
    from selenium.webdriver.support.wait import WebDriverWait

    find = "return document.querySelector(arguments[0])"
    return WebDriverWait(page, 20).until(lambda _: page.execute_script(find, selector))


def drawn_card(page, kind: str = ".card"):
    """The first card, once its maps are drawn."""
    page.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", kind)
    return arrived(page, f"{kind}[data-drawn]")


def enlarge(page):
    drawn_card(page).find_element("css selector", "header button").click()
    return drawn_card(page, ".large")


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
    choose(page, "key", 4)  # the IoU of a class, which half the photos do not have
    choose(page, "order", "the best")
    assert ids(page) == in_order(site[1], 4, -1)[:MORE]
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


def test_a_photo_is_enlarged_in_place_by_mouse_and_keys_with_the_focus_on_it(page, site):
    card, first = enlarge(page), in_order(site[1], 0)[0]
    assert page.switch_to.active_element.text == card.get_attribute("data-id") == first
    act(page).move_to_element(card.find_elements("class name", "picture")[1]).perform()
    assert texts(page, "#readout:not([hidden]) p")
    act(page).send_keys(ENTER).perform()
    assert texts(page, ".large") == []
    assert page.switch_to.active_element.text == first
    drawn_card(page).find_element("class name", "picture").click()
    assert drawn_card(page, ".large").get_attribute("data-id") == first


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
