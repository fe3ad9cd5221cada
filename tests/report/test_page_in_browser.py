"""The comparison page in a real browser, opened from disk: what it shows, its keys, its views, narrow and dark."""

import math

import pytest
import torch
from PIL import Image

from diffalign import Prompt
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.report.html import write_page
from tests.browser import chromium, resize, scroll_panes, serious

LEFT, UP, RIGHT, DOWN, ESCAPE, ENTER, HOME, END, CONTROL = "\ue012\ue013\ue014\ue015\ue00c\ue007\ue011\ue010\ue009"
TASKS = ("counting", "colors", "counting")
SCORES = {"base": (0.5, 0.25, 0.0), "tuned": (0.25, 0.75, 0.125)}
LONG = "a photo of " + "very " * 150 + "many words, and " + "x" * 200
FOREIGN = (
    "ein Fuchs mit Hut, gemalt",
    "一只戴着红色帽子的狐狸站在雪地里",
    "قطة حمراء على كرسي أزرق",
    "👩‍🚀 🚀 <b>&amp;</b>",
    LONG,
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


def write(folder, scores, texts, tasks=(), sizes=((64, 64),), each=1, sources=False):
    """Write a page whose images have a colour of their own; ``scores``: model -> one score per prompt."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 48), (9, 9, 9)).save(folder / "source.png")
    more = {"image": str(folder / "source.png")} if sources else {}
    prompts = [Prompt(text, {"tag": tag, **more}) for text, tag in zip(texts, tasks or [""] * len(texts), strict=True)]
    judged = {}
    for m, (name, own) in enumerate(scores.items()):
        files = [folder / f"{m}-{i}.png" for i in range(len(texts) * each)]
        for i, file in enumerate(files):
            width, height = sizes[(i // each) % len(sizes)]
            Image.new("RGB", (width, height), (80 * (i // each) % 256, 200 * m % 256, 90)).save(file)
        values = torch.tensor([value - sample for value in own for sample in range(each)])
        judged[name] = ScoredImages(torch.arange(len(texts)).repeat_interleave(each), {"shapes": values}, files)
    write_page(folder / "compare.html", "A page", prompts, judged, sources)
    return (folder / "compare.html").as_uri()


@pytest.fixture
def page(browser, tmp_path):
    """A page of three prompts and two models, two images per prompt."""
    resize(browser, 1400, 900)
    texts = [f"prompt <{i}>" for i in range(3)]
    browser.get(write(tmp_path / "page", SCORES, texts, TASKS, each=2))
    yield browser
    assert browser.get_log("browser") == []  # neither errors nor requests that failed


def one(page, selector):
    return page.find_element("css selector", selector)


def texts(page, selector):
    return [found.text for found in page.find_elements("css selector", selector) if found.is_displayed()]


def prompts(page):
    return texts(page, "#rows .prompt p")


def choose(page, name, label):
    from selenium.webdriver.support.ui import Select

    Select(one(page, f"#{name}")).select_by_visible_text(label)


def press(page, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page, duration=0).send_keys(*keys).perform()


def focused(page):
    """The image that has the focus."""
    return page.execute_script("return document.activeElement.querySelector('img')?.alt")


def overflow(page):
    """Pixels by which the page, or anything visible in it, is wider than the screen; elements that scroll may be."""
    return page.execute_script("""
        const width = document.documentElement.clientWidth;
        const top = document.querySelector('dialog[open]') || document.body;
        const inside = e => e.closest('.scroll, .pane, .slider, option');
        const over = [...top.querySelectorAll('*')].filter(e => !inside(e) && e.checkVisibility())
          .map(e => e.getBoundingClientRect().right - width);
        return Math.max(document.documentElement.scrollWidth - width, ...over);""")


def test_it_shows_sorts_and_filters_with_the_set_of_each_mean(page):
    assert page.title == "A page"
    assert prompts(page) == ["prompt <0>", "prompt <1>", "prompt <2>"]
    pixel = """return [...document.querySelectorAll('#rows img')].map(image => {
        const g = document.createElement("canvas").getContext("2d"); g.drawImage(image, 0, 0);
        return [image.naturalWidth, ...g.getImageData(3, 3, 1, 1).data].slice(0, 4); })"""
    assert page.execute_script("return [...document.images].every(image => image.complete)")
    # exactly the colours that were written: small images are not compressed
    wanted = [[64, 80 * i, 200 * m, 90] for i in range(3) for m in range(2)]
    assert page.execute_script(pixel) == wanted
    assert texts(page, "#heads span") == [*SCORES, *SCORES, *SCORES]  # three prompts stand side by side
    assert texts(page, ".means p") == [
        "Mean over 3 images shown, 1 per prompt",
        "Mean over all 6 images, 2 per prompt",
    ]
    assert texts(page, ".means tbody tr") == ["base 0.25", "tuned 0.375 +0.125", "base −0.25", "tuned −0.125 +0.125"]
    assert texts(page, ".scores") == ["shapes\n0.5", "shapes\n0.25 −0.25", "shapes\n0.25", "shapes\n0.75 +0.5",
                                      "shapes\n0", "shapes\n0.125 +0.125"]  # fmt: skip

    choose(page, "sort", "gain of tuned in shapes")
    assert prompts(page) == ["prompt <1>", "prompt <2>", "prompt <0>"]
    choose(page, "sort", "loss of tuned in shapes")
    assert prompts(page) == ["prompt <0>", "prompt <2>", "prompt <1>"]
    choose(page, "sort", "order of the file")
    choose(page, "task", "counting")
    assert prompts(page) == ["prompt <0>", "prompt <2>"]
    assert one(page, "#count").text == "2 of 3 prompts"
    assert texts(page, ".means p")[0] == "Mean over 2 images found, 1 per prompt"
    assert texts(page, ".means tbody tr")[:2] == ["base 0.25", "tuned 0.188 −0.0625"]
    one(page, "#find").send_keys("<2")
    assert prompts(page) == ["prompt <2>"]
    one(page, "#find").send_keys("0")
    assert one(page, "#count").text == "0 of 3 prompts"
    assert texts(page, ".means tbody tr")[:2] == ["base –", "tuned –"]


def test_keys_reach_every_picture_and_view(page):
    from selenium.webdriver.support.ui import WebDriverWait

    tabs = "return [...document.querySelectorAll('#rows button')].filter(b => b.tabIndex === 0).length"
    assert page.execute_script(tabs) == 1
    one(page, "#find").click()
    page.execute_script("document.querySelector('#rows [tabindex=\"0\"]').focus()")
    assert focused(page) == "base: prompt <0>"
    for key, alt in ((RIGHT, "tuned: prompt <0>"), (RIGHT, "base: prompt <1>"), (LEFT, "tuned: prompt <0>"),
                     (LEFT, "base: prompt <0>"), (LEFT, "base: prompt <0>"), (END, "tuned: prompt <0>")):  # fmt: skip
        press(page, key)
        assert focused(page) == alt
    resize(page, 390, 800)  # a prompt per row, once the page is laid out again
    cards = "return document.documentElement.style.getPropertyValue('--cards')"
    WebDriverWait(page, 10).until(lambda page: page.execute_script(cards) == "1")
    for key, alt in ((DOWN, "tuned: prompt <1>"), (DOWN, "tuned: prompt <2>"), (DOWN, "tuned: prompt <2>"),
                     (UP, "tuned: prompt <1>"), (HOME, "base: prompt <1>")):  # fmt: skip
        press(page, key)
        assert focused(page) == alt
    assert page.execute_script(tabs) == 1

    press(page, ENTER)
    said = one(page, "#said")
    assert (one(page, "#caption").text, said.text) == ("prompt <1>", "base, prompt 2 of 3")
    assert said.get_attribute("role") == "status"
    press(page, RIGHT)
    assert said.text == "tuned, prompt 2 of 3"
    assert texts(page, "figure.current figcaption") == ["tuned shapes 0.75 (+0.5)"]
    press(page, DOWN, DOWN)
    assert (one(page, "#caption").text, said.text) == ("prompt <2>", "tuned, prompt 3 of 3")
    press(page, ESCAPE)
    assert not one(page, "#box").is_displayed()
    assert focused(page) == "tuned: prompt <2>"  # where the enlarged view was left


def test_views_enlarge_and_compare(page):
    from selenium.webdriver.support.ui import WebDriverWait

    page.find_elements("css selector", "#rows .picture")[3].click()
    widths = "return [...document.querySelectorAll('#stage img')].map(image => image.clientWidth)"
    first, second = page.execute_script(widths)
    assert first == second > 500
    press(page, "+", "+")
    assert one(page, "#said").text == "tuned, prompt 2 of 3, 2.25 times"
    sizes = "return [...document.querySelectorAll('.pane')].map(p => [p.scrollLeft, p.scrollWidth > 2 * p.clientWidth])"
    WebDriverWait(page, 10).until(lambda page: page.execute_script(sizes)[1][0] > 0)  # a frame later
    (left, wide), again = page.execute_script(sizes)
    assert wide
    assert again == [left, True]
    assert left > 100  # around the middle
    assert scroll_panes(page) == [[[7, 9], [7, 9]]] * 2  # together, and a follower never takes the first one back
    press(page, "0")
    assert page.execute_script(sizes) == [[0, False], [0, False]]

    one(page, "[data-view=slider]").click()
    divider = one(page, ".slider input")
    assert page.switch_to.active_element == divider
    assert divider.accessible_name == "Divider between base and tuned"
    press(page, LEFT, LEFT)
    assert divider.get_attribute("aria-valuetext") == "48 % base, 52 % tuned"
    press(page, UP)  # the divider keeps its place and the focus
    assert one(page, "#said").text == "base against tuned, prompt 1 of 3"
    assert page.switch_to.active_element.get_attribute("aria-valuetext") == "48 % base, 52 % tuned"
    upper = page.execute_script("""const upper = document.querySelector('.slider img');
        return [upper.alt, getComputedStyle(upper).clipPath]""")
    assert upper == ["base: prompt <0>", "inset(0px 52% 0px 0px)"]
    choose(page, "left", "tuned")  # the other side gives way
    assert one(page, "#said").text == "tuned against base, prompt 1 of 3"

    one(page, "[data-view=one]").click()
    press(page, LEFT)
    assert texts(page, "#stage figcaption strong") == ["base"]
    press(page, LEFT)
    assert one(page, "#previous-model").get_attribute("disabled")
    one(page, "#next-prompt").click()
    assert one(page, "#said").text == "base, prompt 2 of 3"
    one(page, "#close").click()
    assert not one(page, "#box").is_displayed()


NAMES = ("base", "runs/a-model-with-a-rather-long-name@0.5", "c", "d", "e")


@pytest.mark.parametrize(
    ("models", "options"),
    [
        (1, {}),
        (2, {"sources": True}),
        (2, {"texts": FOREIGN, "sizes": ((640, 360), (256, 1024), (512, 512))}),
        (5, {"texts": FOREIGN, "each": 2}),
    ],
    ids=["one", "edits", "long", "five"],
)
def test_pages_of_every_kind_fill_the_screen_and_are_accessible(browser, tmp_path, models, options):
    own = {"texts": [f"prompt {i}" for i in range(7)]} | options
    scores = {name: tuple(0.1 * i + m for i in range(len(own["texts"]))) for m, name in enumerate(NAMES[:models])}
    scores["base"] = (math.nan, *scores["base"][1:])
    address = write(tmp_path / "page", scores, **own)
    for width, dark in ((1400, False), (390, True)):
        resize(browser, width, 850, dark)
        browser.get(address)
        assert prompts(browser)[-1] in (own["texts"][-1], "👩‍🚀 🚀 <b>&amp;</b>")
        assert overflow(browser) <= 0
        right, edge = browser.execute_script("""return [
            Math.max(...[...document.querySelectorAll('.picture')].map(p => p.getBoundingClientRect().right)),
            document.getElementById('rows').getBoundingClientRect().right]""")
        assert edge - right < 2
        assert edge > width - 40
        findings = serious(browser) if dark == (models != 5) else []
        browser.find_elements("css selector", ".picture")[-1].click()
        assert overflow(browser) <= 0
        bottoms = "return [...document.querySelectorAll('dialog > *')].map(e => e.getBoundingClientRect().bottom)"
        assert max(browser.execute_script(bottoms)) <= 850
        assert len(browser.find_elements("css selector", "#stage figure")) == models + ("sources" in options)
        findings += serious(browser) if dark and models == 5 else []
        if models > 1:
            one(browser, "[data-view=slider]").click()
            press(browser, "+")
            findings += serious(browser) if dark and "sources" in options else []
        assert findings == []
    assert browser.get_log("browser") == []
