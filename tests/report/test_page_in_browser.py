"""The comparison page in a real browser, opened from disk."""

import pytest
import torch
from PIL import Image

from diffalign import Prompt
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.report.html import write_page
from tests.browser import chromium

TASKS = ("counting", "colors", "counting")
SCORES = {"base": (0.5, 0.25, 0.0), "tuned": (0.25, 0.75, 0.125)}


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser, tmp_path):
    """A page of three prompts and two models whose images have a colour of their own."""
    prompts = [Prompt(f"prompt <{i}>", {"tag": task}) for i, task in enumerate(TASKS)]
    judged = {}
    for m, (name, scores) in enumerate(SCORES.items()):
        files = [tmp_path / f"{name}-{i}.png" for i in range(3)]
        for i, file in enumerate(files):
            Image.new("RGB", (64, 64), (80 * i, 200 * m, 90)).save(file)
        judged[name] = ScoredImages(torch.arange(3), {"shapes": torch.tensor(scores)}, files)
    write_page(tmp_path / "compare.html", "Three prompts", prompts, judged)
    browser.get((tmp_path / "compare.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []  # neither errors nor requests that failed


def one(page, selector):
    return page.find_element("css selector", selector)


def shown(page):
    return [cell.text.splitlines()[0] for cell in page.find_elements("css selector", "#rows td.text")]


def choose(page, name, label):
    from selenium.webdriver.support.ui import Select

    Select(one(page, f"#{name}")).select_by_visible_text(label)


def test_it_shows_every_prompt_and_image(page):
    assert page.title == "Three prompts"
    assert shown(page) == ["prompt <0>", "prompt <1>", "prompt <2>"]
    images = page.find_elements("css selector", "#rows img")
    assert len(images) == 6
    assert all(page.execute_script("return arguments[0].naturalWidth", image) == 64 for image in images)
    assert [h.text.splitlines()[0] for h in page.find_elements("css selector", "#head th")] == ["prompt", *SCORES]
    # Exactly the colour that was written: small images are not compressed.
    pixel = """const g = document.createElement("canvas").getContext("2d"); g.drawImage(arguments[0], 0, 0);
               return [...g.getImageData(3, 3, 1, 1).data].slice(0, 3);"""
    assert page.execute_script(pixel, images[5]) == [160, 200, 90]


def test_it_sorts_by_gain(page):
    choose(page, "sort", "gain of tuned in shapes")
    assert shown(page) == ["prompt <1>", "prompt <2>", "prompt <0>"]
    choose(page, "sort", "loss of tuned in shapes")
    assert shown(page) == ["prompt <0>", "prompt <2>", "prompt <1>"]
    choose(page, "sort", "order of the file")
    assert shown(page) == ["prompt <0>", "prompt <1>", "prompt <2>"]


def test_it_filters_by_task_and_words(page):
    choose(page, "task", "counting")
    assert shown(page) == ["prompt <0>", "prompt <2>"]
    assert one(page, "#count").text == "2 of 3 prompts"
    assert [c.text.split()[-1] for c in page.find_elements("css selector", "#head th")[1:]] == ["0.25", "0.188"]
    one(page, "#find").send_keys("<2")
    assert shown(page) == ["prompt <2>"]


def test_a_click_zooms(page):
    assert not one(page, "#box").is_displayed()
    page.find_elements("css selector", "#rows img")[2].click()
    assert one(page, "#box").is_displayed()
    assert one(page, "#caption").text == "prompt <1>"
    assert len(page.find_elements("css selector", "#zoom img")) == 2
    assert one(page, "#zoom img").size["width"] > 176
    one(page, "#close").click()
    assert not one(page, "#box").is_displayed()
