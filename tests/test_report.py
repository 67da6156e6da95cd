"""The report of an evaluation: its files, and the page in a real headless browser (skipped where there is none)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from manage import report
from manage.tables import summary
from utils.decode import DECODERS
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.metrics import LevelScores, scores_from_confusion

EVIL = "</script><script>window.hacked = 1</script>"
IMAGE = "<img src=x onerror='window.hacked = 2'>"
VOID = 255
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
PHOTOS, PAGE = 30, 24


def hostile_tree(background: tuple[int, ...] = (0,)) -> Hierarchy:
    """Three levels, and names that break a page which takes them for HTML or for a template."""
    return Hierarchy(
        name=EVIL,
        names=["background", EVIL, IMAGE, "{{js}}", "arm & 'leg\"", "body"],
        parents=[None, 3, 3, 5, 5, None],
        colours=[(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (221, 221, 221)],
        level_names=["parts", "halves", IMAGE],
        background=background,
    )


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


def sampled(labels: torch.Tensor, leaves: torch.Tensor, logits: torch.Tensor, band: int = 7) -> report.SmallMaps:
    """What the page shows, from bands of a few rows."""
    sampler = report.MapSampler(labels, VOID)
    for start in range(0, len(labels), band):
        sampler.add(slice(start, min(start + band, len(labels))), logits[:, start : start + band])
    return sampler.maps(leaves)


def make_report(folder: Path, h: Hierarchy, count: int) -> list[dict]:
    """A report of `count` drawn photos; returns what it knows of each."""
    pictures = folder / "pictures" / "report"
    pictures.mkdir(parents=True)
    meter, lines = LevelScores(h), []
    for i in range(count):
        labels, logits = draw(i, h)
        leaves = DECODERS["logit_sum"](logits[None], h)
        matrix = meter.update(leaves, labels[None], logits[None]).numpy()
        maps = sampled(labels, leaves[0], logits)
        photo = np.full((*labels.shape, 3), 120, np.uint8)
        drawn = report.write_photo(pictures, sample_id(i), photo, maps, h)
        lines.append(report.photo_line(sample_id(i), matrix, drawn, h))
    result = meter.compute()
    scores = {
        "checkpoint": "best.pt",
        "epoch": 3,
        "decode": "logit_sum",
        "root_bias": {},
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


# --- files ---
@pytest.fixture(scope="module")
def h() -> Hierarchy:
    return hostile_tree()


@pytest.fixture
def maps(h) -> report.SmallMaps:
    labels, logits = draw(1, h)
    return sampled(labels, DECODERS["logit_sum"](logits[None], h)[0], logits)


def test_a_small_photo_is_kept_pixel_by_pixel(h, maps):
    labels, logits = draw(1, h)
    assert np.array_equal(maps.truth, labels)
    assert np.array_equal(maps.known, labels[::2, ::2] != VOID)
    assert np.array_equal(maps.scores >= 128, logits[:, ::2, ::2] > 0)
    assert np.abs((maps.scores + 0.5) / 256 - torch.sigmoid(logits[:, ::2, ::2]).numpy()).max() <= 0.5 / 256 + 1e-6


def test_a_large_photo_is_sampled_to_the_sides_that_the_page_shows():
    rows = torch.arange(600)[:, None].expand(600, 900) // 3
    maps = sampled(rows.to(torch.uint8), rows, rows / 200 - 2 + torch.zeros(2, 600, 900))
    assert maps.truth.shape == (171, 256)
    assert maps.scores.shape == (2, 86, 128)  # every other row and column of the maps
    score = torch.sigmoid(torch.from_numpy(maps.truth[::2, ::2] / 200 - 2))
    assert np.array_equal(maps.scores[1], (score * 256).to(torch.uint8))
    assert (np.diff(maps.truth[:, 0].astype(int)) > 0).all()
    assert np.array_equal(maps.truth, maps.leaves)


def test_a_sliver_keeps_at_least_one_row():
    maps = sampled(torch.zeros(1, 2000), torch.zeros(1, 2000), torch.zeros(3, 1, 2000))
    assert maps.truth.shape == (1, 256)
    assert maps.scores.shape == (3, 1, 128)


def test_violations_of_a_photo_are_those_of_the_metric_at_the_pixels_that_the_page_shows(h, maps):
    labels, logits = (values[..., ::2, ::2] for values in draw(1, h))
    meter = LevelScores(h)
    meter.update(torch.from_numpy(maps.leaves[::2, ::2]).long()[None], labels[None], logits[None])
    assert report.violated_share(maps, h) == pytest.approx(meter.compute()["violation_rate"])


def test_a_photo_without_a_known_pixel_has_no_violations(h, maps):
    maps.known[:] = False
    assert report.violated_share(maps, h) is None


def test_a_photo_is_sorted_by_the_scores_of_the_metric(h):
    labels, logits = draw(2, h)
    matrix = LevelScores(h).update(DECODERS["logit_sum"](logits[None], h), labels[None])
    line = report.photo_line("a", matrix.numpy(), {}, h)
    scores = scores_from_confusion(matrix, h)
    assert line["mIoU"] == pytest.approx([scores[f"mIoU{level + 1}"] for level in range(h.num_levels)], abs=1e-5)


def test_classes_of_a_photo_are_those_in_truth_and_prediction(h):
    matrix = np.zeros((h.num_nodes, h.num_nodes), np.int32)
    matrix[1, 4] = 10  # leaf 1 (below 3, below 5) taken for leaf 4 (below 5)
    line = report.photo_line("a", matrix, {"violations": None}, h)
    assert line["truth"] == [1, 3, 5]
    assert line["predicted"] == [4, 5]
    assert line["IoU"] == [None, 0.0, None, 0.0, 0.0, 1.0]
    assert line["violations"] is None


def test_the_script_of_a_photo_is_a_call_with_plain_data(h, maps, tmp_path):
    name = "a'b&<c>é\u2028"
    report.write_photo(tmp_path, name, np.zeros((40, 60, 3), np.uint8), maps, h)
    script = (tmp_path / f"{name}.js").read_text(encoding="ascii")
    arguments = json.loads("[" + script.removeprefix("hsegPhoto(").removesuffix(");\n") + "]")
    assert arguments[0] == name
    assert arguments[1]["size"] == [60, 40]
    assert arguments[1]["scoreSize"] == [30, 20]


def test_a_folder_that_cannot_be_written_is_a_users_mistake(h, tmp_path):
    scores = {"config": {"exp_name": "a"}, "checkpoint": "b"}
    with pytest.raises(UserError, match=r"index\.html"):
        report.write_report(tmp_path / "gone", scores, [], h)


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


def ids(page) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('#gallery .card')].map((c) => c.dataset.id)")


def texts(page, selector: str) -> list[str]:
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def choose(page, **values: str) -> None:
    for name, value in values.items():
        page.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )


def press(page, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def point_at(page, element) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).move_to_element(element).perform()


def drawn_card(page, within: str = "#gallery"):
    """The first card, once its maps are drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    page.execute_script("document.querySelector(arguments[0]).scrollIntoView()", f"{within} .card")
    return WebDriverWait(page, 20).until(
        lambda _: page.execute_script("return document.querySelector(arguments[0])", f"{within} .card[data-drawn]")
    )


def in_order(lines: list[dict], value) -> list[str]:
    """Ids from the smallest value to the largest, those without a value last."""
    return [line["id"] for line in sorted(lines, key=lambda line: (value(line) is None, value(line) or 0))]


def test_every_level_has_its_scores_and_confusion(page, h):
    for selector in ("#score-tables", "#confusion-tables"):
        headings = [f"Level {level + 1}: {name}" for level, name in enumerate(h.level_names)]
        assert texts(page, f"{selector} h3") == headings
    names = texts(page, "#score-tables .panel:first-child tbody th")
    assert names == [h.names[v] for v in h.level_classes[0]] + ["mean", "with background"]
    rows = texts(page, "#confusion-tables .panel:first-child tbody tr")
    assert len(rows) == len(h.level_classes[0])


def test_a_row_of_the_confusion_adds_up_to_a_hundred(page):
    cells = texts(page, "#confusion-tables .panel:last-child tbody tr:last-child td")
    assert sum(map(float, cells)) == pytest.approx(100, abs=1)
    page.execute_script(
        "s = document.getElementById('share'); s.value = 'column'; s.dispatchEvent(new Event('change'))"
    )
    columns = texts(page, "#confusion-tables .panel:last-child tbody td:last-child")
    assert sum(map(float, columns)) == pytest.approx(100, abs=1)


def test_the_gallery_begins_with_the_worst_photo(page, site):
    assert ids(page) == in_order(site[1], lambda line: line["mIoU"][0])[:PAGE]


def test_photos_sort_at_every_level_and_the_other_way_round(page, site):
    choose(page, sort="level-2", order="best")
    score = {line["id"]: line["mIoU"][2] or 0 for line in site[1]}
    shown = [score[sample_id] for sample_id in ids(page)]
    assert shown == sorted(score.values(), reverse=True)[:PAGE]  # photos of equal score in any order
    choose(page, sort="violations", order="worst")
    assert ids(page) == in_order(site[1], lambda line: -line["violations"])[:PAGE]


def test_photos_are_filtered_by_class(page, site):
    choose(page, **{"class": "1", "where": "predicted"})
    matching = [line for line in site[1] if 1 in line["predicted"]]
    assert 0 < len(matching) < PHOTOS
    assert texts(page, ".pager output")[0].endswith(f"of {len(matching)}")
    choose(page, sort="class")
    assert ids(page) == in_order(matching, lambda line: line["IoU"][1])[:PAGE]
    choose(page, where="invented")
    invented = [line["id"] for line in matching if 1 not in line["truth"]]
    assert set(ids(page)) == set(invented[:PAGE])
    choose(page, **{"class": "", "search": "PHOTO_0007"})
    assert ids(page) == [sample_id(7)]
    choose(page, search="no such photo")
    assert texts(page, "#gallery") == ["No photo is like that."]


def test_keys_turn_the_pages(page, site):
    from selenium.webdriver.common.keys import Keys

    order = in_order(site[1], lambda line: line["mIoU"][0])
    for key, first in ((Keys.ARROW_RIGHT, PAGE), ("j", PAGE), ("k", 0), ("j", PAGE), (Keys.ARROW_LEFT, 0), ("k", 0)):
        press(page, key)
        assert ids(page) == order[first : first + PAGE]
    page.find_element("id", "search").send_keys("j")  # typing is not paging
    assert ids(page) == []


def test_maps_are_drawn_in_the_colours_of_the_tree(page, h):
    choose(page, level="all")
    card = drawn_card(page)
    number = int(card.get_attribute("data-id")[6:10])
    labels, logits = draw(number, h)
    leaves = DECODERS["logit_sum"](logits[None], h)[0]
    drawn = page.execute_script(
        "return [...arguments[0].querySelectorAll('canvas')].map((c) =>"
        "[c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])",
        card,
    )
    assert len(drawn) == 2 + 3 * h.num_levels  # on the photo, violations, and three a level
    palette = np.full((256, 3), 110)
    palette[: h.num_nodes] = h.colours
    for level in range(h.num_levels):
        for picture, wanted in ((2 + 3 * level, labels), (3 + 3 * level, leaves)):
            pixels = np.array(drawn[picture][2:]).reshape(40, 60, 4)[..., :3]
            assert np.array_equal(pixels, palette[h.level_of(wanted, level)])
        differs = np.array(drawn[4 + 3 * level][2:]).reshape(40, 60, 4)[..., 0] == 179
        truth = h.level_of(labels, level)
        assert np.array_equal(differs, ((truth != h.level_of(leaves, level)) & (truth != VOID)).numpy())


def test_pointing_at_a_pixel_tells_its_classes_and_scores(page, h):
    card = drawn_card(page)
    point_at(page, card.find_elements("class name", "picture")[3])
    lines = texts(page, "#readout:not([hidden]) p")
    labels, logits = draw(int(card.get_attribute("data-id")[6:10]), h)
    x, y = page.execute_script(
        "const s = document.querySelector('.card.pointed').style;"
        "return [s.getPropertyValue('--x'), s.getPropertyValue('--y')].map(parseFloat)"
    )
    row, column = int(y / 100 * 40), int(x / 100 * 60)
    truth = int(labels[row, column])
    path = " › ".join(h.names[v] for v in h.paths[truth]) if truth != VOID else "void"
    assert lines[0] == f"truth: {path}"
    shares = [float(text.strip("⚠ %")) for text in texts(page, "#readout .node > span:last-child")]
    expected = [100 * float(torch.sigmoid(logits[v, row, column])) for v in h.preorder]
    assert shares == pytest.approx(expected, abs=1)


def test_a_photo_opens_large_and_keys_go_on_from_there(page, site):
    from selenium.webdriver.common.keys import Keys

    order = in_order(site[1], lambda line: line["mIoU"][0])
    drawn_card(page).find_element("css selector", "header button").click()
    assert drawn_card(page, "#viewer").get_attribute("data-id") == order[0]
    point_at(page, drawn_card(page, "#viewer").find_element("class name", "picture"))
    press(page, *["j"] * 25)
    point_at(page, drawn_card(page, "#viewer").find_elements("class name", "picture")[1])
    assert texts(page, "#viewer #readout:not([hidden]) p")
    assert drawn_card(page, "#viewer").get_attribute("data-id") == order[25]
    assert texts(page, "#viewer-legend") == texts(page, "#legend")
    press(page, Keys.ESCAPE)
    assert texts(page, "#viewer .card") == []
    assert ids(page) == order[24:]
    assert page.switch_to.active_element.text == order[25]  # where one has been looking


def test_the_pager_keeps_the_focus(page, site):
    from selenium.webdriver.common.keys import Keys

    bottom = page.find_elements("css selector", ".pager [aria-label='next page']")[1]
    page.execute_script("arguments[0].focus()", bottom)
    press(page, Keys.ENTER)
    top = page.find_element("css selector", ".pager [aria-label='next page']")
    assert page.switch_to.active_element == top
    press(page, Keys.ENTER)  # there is no next page, and the button says so
    assert top.get_attribute("aria-disabled") == "true"
    assert page.switch_to.active_element == top
    assert ids(page) == in_order(site[1], lambda line: line["mIoU"][0])[PAGE:]


def test_nothing_moves_when_maps_arrive(page):
    """So that a link to what lies below the photos leads there."""
    before = page.execute_script("return document.querySelector('#details').getBoundingClientRect().top + scrollY")
    page.execute_script("document.querySelectorAll('.card')[20].scrollIntoView()")
    drawn_card(page)
    assert (
        page.execute_script("return document.querySelector('#details').getBoundingClientRect().top + scrollY") == before
    )


def test_six_photos_stand_in_a_row_and_are_larger_when_enlarged_on_a_phone(page):
    tops = page.execute_script(
        "return [...document.querySelectorAll('.card')].map((c) => c.getBoundingClientRect().top)"
    )
    assert tops[:7].count(tops[0]) == 6
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    drawn_card(page).find_element("css selector", "header button").click()
    wide = [
        drawn_card(page, place).find_element("class name", "picture").rect["width"] for place in ("#gallery", "#viewer")
    ]
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide[1] > 2 * wide[0]


def test_text_follows_the_data(page, browser, tmp_path):
    assert texts(page, "#mean-note") == ["The mean leaves background out."]
    totals = dict(zip(texts(page, ".total span"), texts(page, ".total b"), strict=True))
    severity = float(totals.pop("mistake severity"))  # a height in the tree, not a share
    assert 1 <= severity <= 3
    assert {"ECE leaf", "ECE body", "violation rate"} < set(totals)
    assert all(text.endswith(" %") for text in totals.values())
    assert [link.get_attribute("href").split("/")[-1] for link in page.find_elements("css selector", "#files a")] == [
        "scores.csv",
        "scores.json",
    ]
    plain = hostile_tree(background=())
    folder = tmp_path / "evaluation" / "best"
    make_report(folder, plain, 1)
    (tmp_path / "metrics.jsonl").write_text("")
    report.write_report(folder, json.loads(data_of(folder))["scores"], [], plain)
    browser.get((folder / "index.html").as_uri())
    assert texts(browser, "#mean-note") == [""]
    assert "with background" not in texts(browser, "#score-tables th")
    assert texts(browser, "#files a")[-1] == "metrics.jsonl"


def test_names_are_shown_as_they_are_spelt(page, h):
    assert page.title == f"{EVIL}: best.pt"
    assert page.find_element("id", "title").text == f"{EVIL}: best.pt"
    shown = texts(page, "#legend span[title]")
    assert [text.lstrip("›") for text in shown] == [h.names[v] for v in h.preorder]


def test_the_page_asks_for_nothing_outside_its_folder(page, site):
    drawn_card(page)
    asked = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in asked if not name.startswith((site[0].parent.as_uri(), "data:"))] == []
    assert "http" not in site[0].read_text(encoding="utf-8")


def test_nothing_is_wider_than_a_phone(page):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    drawn_card(page)
    wide = page.execute_script("return document.documentElement.scrollWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 390


def test_a_photo_whose_maps_are_gone_is_named_on_its_card(browser, tmp_path, h):
    make_report(tmp_path, h, 1)
    for script in (tmp_path / "pictures" / "report").glob("*.js"):
        script.unlink()
    browser.get((tmp_path / "index.html").as_uri())
    from selenium.webdriver.support.wait import WebDriverWait

    browser.execute_script("document.querySelector('.card').scrollIntoView()")
    warning = WebDriverWait(browser, 20).until(lambda page: texts(page, ".card .warning"))
    browser.get_log("browser")  # the missing file is reported there, rightly
    assert "is missing" in warning[0]


def data_of(folder: Path) -> str:
    """The JSON in a page."""
    return (folder / "index.html").read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]


def test_1817_photos_open_as_a_page_of_24(browser, tmp_path, h):
    lines = make_report(tmp_path, h, 1)
    many = [lines[0] | {"id": f"{i:04}"} for i in range(1817)]
    folder = tmp_path / "pictures" / "report"
    script, photo = next(folder.glob("*.js")).read_text(), next(folder.glob("*.jpg"))
    for line in many[-24:]:
        (folder / f"{line['id']}.js").write_text(script.replace(json.dumps(sample_id(0)), json.dumps(line["id"])))
        shutil.copy(photo, folder / f"{line['id']}.jpg")
    report.write_report(tmp_path, json.loads(data_of(tmp_path))["scores"], many, h)
    browser.get((tmp_path / "index.html").as_uri())
    assert len(ids(browser)) == PAGE
    assert texts(browser, ".pager output")[0] == "1–24 of 1,817"
    browser.execute_script("document.querySelector('[aria-label=\"last page\"]').click()")
    browser.get_log("browser")  # the first page's photos were not written here
    assert drawn_card(browser).get_attribute("data-id") == "1800"
    choose(browser, order="best", sort="id")
    assert ids(browser)[0] == "1816"
