"""The label page in a real browser: by keyboard alone, with several raters, at every size, and the loop to training."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from diffalign.cli import main
from diffalign.commands.label import command
from diffalign.commands.label.answers import AnswerLog
from diffalign.structures import Prompt
from tests.browser import chromium, resize, scroll_panes, serious
from tests.commands.label.kills import write_pairs
from tests.commands.label.world import BLUE, RED, comparison, picture, serving, sitting_in
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
LOOP = re.search(r"<!-- browser: label -->\n```bash\n(.*?)```", README, re.DOTALL)
LARGE = [picture((90, 90, 200), (300, 200)), picture((200, 90, 90), (300, 200))]


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(autouse=True)
def desktop(browser):
    resize(browser, 1000, 800)


def until(condition, seconds=15.0):
    """Wait for a condition; returns its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return found


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver, duration=0).send_keys(*keys).perform()


def text(driver, name):
    return driver.find_element("id", name).text


def shown(driver):
    """The token of the pair that can be answered."""
    return driver.execute_script("return !state.busy && state.shown && state.shown.token")


def done(driver):
    return int(text(driver, "count").split()[0])


def log_in(driver, port, name, fragment=""):
    driver.get("about:blank")
    driver.get(f"http://127.0.0.1:{port}/{fragment}")
    if driver.execute_script("return sessionStorage.getItem('rater')"):
        driver.execute_script("sessionStorage.removeItem('rater')")
        driver.refresh()
    press(driver, name, "\ue007")  # the name has the focus; Enter
    until(lambda: shown(driver))


def answer(driver, key):
    """Press a key, and wait for the next pair or the end."""
    before = until(lambda: shown(driver))
    press(driver, key)
    until(lambda: shown(driver) not in (before, False) or driver.find_element("id", "end").is_displayed())


@contextmanager
def page(driver, folder, count=6, name="Ada", token=None, images=(RED, BLUE), port=0):
    pairs = [comparison(number, images=images) for number in range(count)]
    with sitting_in(folder, pairs) as sitting, serving(sitting, token) as (own, _):
        log_in(driver, own, name, f"#token={token}" if token else "")
        yield own


def stored(folder):
    """Read a copy, because a log is open in one place only."""
    with TemporaryDirectory() as copy, AnswerLog(Path(shutil.copy(folder / "answers.jsonl", copy))) as log:
        return log.answers()


def choices(folder):
    return [answer.choice for answer in stored(folder)]


def side_of(answer):
    return "left" if answer.choice == ("first", "second")[answer.left] else "right"


def test_every_answer_has_a_key(browser, tmp_path):
    arrow = {"left": "\ue012", "right": "\ue014"}
    with page(browser, tmp_path, 9):
        for key in (arrow["left"], arrow["right"], "1", "2", "=", "0", "s", "S"):
            answer(browser, key)
        assert text(browser, "count") == "8 of 9"
        assert "Saved: skipped. 8 of 9." in text(browser, "status")
        for key in ("u", "u"):
            press(browser, key)
            until(lambda: "Undone" in text(browser, "status") and not browser.execute_script("return state.busy"))
        until(lambda: done(browser) == 6)
        for _ in range(3):
            answer(browser, "=")
        assert "All 9 pairs are answered. Thank you, Ada." in text(browser, "thanks")
        assert serious(browser) == []
    found = stored(tmp_path)
    assert [side_of(a) for a in found[:4]] == ["left", "right", "left", "right"]
    assert choices(tmp_path)[4:] == ["equal", "bad", "equal", "equal", "equal"]
    assert all(0 < a.seconds < 20 for a in found)


def test_by_tab_and_enter_alone_too(browser, tmp_path):
    with page(browser, tmp_path, 3):
        names = []
        for _ in range(7):
            press(browser, "\ue004")
            names.append(browser.switch_to.active_element.accessible_name)
        assert names == ["Image 1 1 Left is better", "Image 2 2 Right is better", "= Equal", "0 Both bad", "s Skip",
                         "u Undo", "z Zoom"]  # fmt: skip
        browser.execute_script("document.querySelector('[data-pick=bad]').focus()")
        answer(browser, "\ue007")
        assert choices(tmp_path) == ["bad"]
        assert browser.switch_to.active_element.accessible_name == "0 Both bad"  # the focus stays for the next pair


def test_other_keys_do_nothing_and_a_held_key_answers_once(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    with page(browser, tmp_path, 6):
        before = shown(browser)
        press(browser, "3", "x", "\ue00c")
        for modifier in ("\ue009", "\ue00a"):  # Ctrl and Alt
            ActionChains(browser).key_down(modifier).send_keys("1").key_up(modifier).perform()
        assert shown(browser) == before
        for repeat in (False, True, True, True):
            browser.execute_script(
                "document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', repeat: arguments[0], bubbles: true}))",
                repeat,
            )
            time.sleep(0.15)
        until(lambda: shown(browser) not in (before, False))
        assert len(stored(tmp_path)) == 1


def test_a_click_on_an_image_chooses_it(browser, tmp_path):
    with page(browser, tmp_path, 3):
        before = shown(browser)
        browser.find_element("id", "right").click()
        until(lambda: shown(browser) not in (before, False))
    assert [side_of(a) for a in stored(tmp_path)] == ["right"]


def test_zoom_shows_the_same_part_of_both_images(browser, tmp_path):
    with page(browser, tmp_path, 3, images=LARGE):
        press(browser, "z")
        assert browser.find_element("id", "box").is_displayed()
        assert serious(browser) == []
        width = browser.find_element("id", "left-large").size["width"]
        press(browser, "+", "+")
        assert browser.find_element("id", "left-large").size["width"] > 2 * width
        press(browser, "\ue014", "\ue014", "\ue015")
        assert not browser.find_element("id", "source-pane").is_displayed()
        panes = "return [...document.querySelectorAll('.pane:not([hidden])')].map((p) => [p.scrollLeft, p.scrollTop])"
        until(lambda: browser.execute_script(panes)[0][0] > 0)
        until(lambda: len({tuple(place) for place in browser.execute_script(panes)}) == 1)
        assert scroll_panes(browser) == [[[7, 9], [7, 9]]] * 2
        assert len(stored(tmp_path)) == 0  # arrows move what is seen
        answer(browser, "2")
        assert browser.find_element("id", "box").is_displayed()
        press(browser, "\ue00c")
        assert not browser.find_element("id", "box").is_displayed()
    assert [side_of(a) for a in stored(tmp_path)] == ["right"]


SIZES = [(1280, 800), (1920, 1080), (390, 844), (360, 640), (844, 390)]
RECTANGLE = "return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()"


def test_everything_is_in_view_and_accessible_at_every_size(browser, tmp_path):
    with page(browser, tmp_path, 2):
        for (width, height), dark in [(size, dark) for size in SIZES for dark in (False, True)]:
            resize(browser, width, height, dark)
            assert serious(browser) == []
            boxes = {name: browser.execute_script(RECTANGLE, name) for name in ("left", "right", "choices", "prompt")}
            for name, box in boxes.items():
                assert box["left"] >= 0, name
                assert box["right"] <= width, name
                assert box["bottom"] <= max(height, 448), name  # a window of less than 28 rem scrolls
            assert min(boxes["left"]["height"], boxes["right"]["height"]) > (100 if height > 600 else 60)
            assert (boxes["right"]["top"] > boxes["left"]["bottom"]) is (width < 640)  # below each other on a phone
            back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (int(re.findall(r"\d+", back)[0]) < 64) is dark


def test_an_edit_shows_its_source_beside_both_results(browser, tmp_path):
    """Whichever pairs come before and after it."""
    (tmp_path / "source.png").write_bytes(LARGE[0])
    pairs = [comparison(number, images=LARGE) for number in range(3)]
    pairs[1] = replace(pairs[1], prompt=Prompt("make it red", {"image": str(tmp_path / "source.png")}))
    with sitting_in(tmp_path, pairs, order="given") as sitting, serving(sitting) as (port, _):
        log_in(browser, port, "Ada")
        seen = []
        for number in range(3):
            seen.append(browser.find_element("id", "source").is_displayed())
            if number == 1:
                for (width, height), dark in (((1280, 800), False), ((360, 640), True)):
                    resize(browser, width, height, dark)
                    assert serious(browser) == []
                    box = browser.execute_script(RECTANGLE, "source")
                    assert box["right"] <= width
                    assert box["height"] > 60
                    assert browser.execute_script("return document.getElementById('source').naturalWidth") == 300
                    assert browser.execute_script(RECTANGLE, "choices")["bottom"] <= height
                    press(browser, "z")  # enlarged, the three show the same part
                    assert serious(browser) == []
                    widths = "return [...document.querySelectorAll('.pane img')].map((image) => image.width)"
                    assert len({*browser.execute_script(widths)}) == 1
                    assert browser.find_element("id", "source-pane").is_displayed()
                    press(browser, "+", "+", "+", "+", "+", "+")
                    assert scroll_panes(browser) == [[[7, 9]] * 3] * 2
                    press(browser, "z")
            answer(browser, "1")
    assert seen == [False, True, False]


def test_two_raters_at_once_in_one_browser(browser, tmp_path):
    with page(browser, tmp_path, 3) as port:
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        log_in(browser, port, "Bob")
        second = browser.current_window_handle
        for _ in range(3):
            for window, key in ((first, "1"), (second, "2")):
                browser.switch_to.window(window)
                answer(browser, key)
        browser.close()
        browser.switch_to.window(first)
        browser.refresh()
        until(lambda: text(browser, "thanks") == "All 3 pairs are answered. Thank you, Ada.")
    found = stored(tmp_path)
    assert {(a.rater, side_of(a)) for a in found} == {("Ada", "left"), ("Bob", "right")}
    assert len(found) == 6


def test_an_answer_waits_for_the_server_to_come_back(browser, tmp_path, monkeypatch):
    pairs = [comparison(number) for number in range(4)]
    with sitting_in(tmp_path, pairs) as sitting, serving(sitting) as (port, _):
        log_in(browser, port, "Ada")
        answer(browser, "1")
    press(browser, "2")
    until(lambda: "No connection" in text(browser, "problem"))
    assert serious(browser) == []
    monkeypatch.setattr("tests.commands.label.world.PORT", port)
    with sitting_in(tmp_path, pairs) as sitting, serving(sitting):
        until(lambda: done(browser) == 2)
        until(lambda: text(browser, "problem") == "")
        answer(browser, "=")
    assert [side_of(a) for a in stored(tmp_path)[:2]] == ["left", "right"]
    assert len(stored(tmp_path)) == 3


def test_the_token_is_asked_for_and_hidden(browser, tmp_path):
    token = "a-token-of-some-length"
    with page(browser, tmp_path, 2, token=token) as port:
        assert browser.current_url == f"http://127.0.0.1:{port}/"
        answer(browser, "1")
        browser.refresh()  # kept for the tab
        until(lambda: shown(browser))
        browser.execute_script("sessionStorage.clear()")
        browser.get("about:blank")
        browser.get(f"http://127.0.0.1:{port}/")
        press(browser, "Eve", "\ue007")
        until(lambda: "needs the token" in text(browser, "problem"))
        assert serious(browser) == []


def test_a_broken_image_does_not_stop_the_rater(browser, tmp_path):
    pairs = [comparison(0, images=(RED[:60], BLUE)), comparison(1), comparison(2, images=(RED, b"no image"))]
    with sitting_in(tmp_path, pairs) as sitting, serving(sitting) as (port, reported):
        log_in(browser, port, "Ada")
        assert text(browser, "prompt") == "prompt 1"
        answer(browser, "1")
        assert "All 1 pairs are answered" in text(browser, "thanks")
        assert len(reported) == 2


@pytest.mark.slow  # its limits are for a machine that does nothing else
def test_two_thousand_pairs_open_in_two_seconds(browser, tmp_path):
    """From an empty tab to images that can be answered; and the command, in time of the processor."""
    rows = [json.loads(line) for line in write_pairs(tmp_path).read_text().splitlines()]
    many = [{**rows[i % len(rows)], "prompt": f"prompt {i}"} for i in range(2000)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    argv = [sys.executable, "-m", "diffalign", "label", str(tmp_path / "pairs.jsonl"), "--port", "0"]
    with subprocess.Popen(
        [*argv, "--output_dir", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        port = int(re.search(r"2000 pairs to label at http://127.0.0.1:(\d+)/", process.stdout.readline())[1])
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        log_in(browser, port, "Ada")
        times = []
        for _ in range(2):
            browser.get("about:blank")
            started = time.monotonic()
            browser.get(f"http://127.0.0.1:{port}/")
            until(lambda: shown(browser))
            times.append(time.monotonic() - started)
        assert text(browser, "count") == "0 of 2000"
        process.terminate()
        process.stdout.read()
    assert process.returncode == 0
    assert min(times) < 2
    assert sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") < 2


def test_the_loop_of_the_readme(browser, tmp_path, monkeypatch, capsys):
    """Label 20 pairs by keyboard, train Diffusion-DPO on them, compare: the README's commands on a small scale."""
    monkeypatch.chdir(ROOT)
    label, train, compare = (
        shlex.split(line, comments=True) for line in LOOP[1].replace("\\\n", " ").strip().splitlines()
    )
    keys = ["1", "2", "\ue012", "\ue014", "=", "0", "s", "1", "2", "u"]

    def by_keyboard(config, sitting, token):
        with serving(sitting, token) as (port, _):
            log_in(browser, port, "Ada")
            total = int(text(browser, "count").split()[-1])
            assert total == 20
            for step in range(100):
                key = keys[step % len(keys)]
                if browser.find_element("id", "end").is_displayed():
                    break
                before = done(browser)
                press(browser, key)
                until(lambda b=before: not browser.execute_script("return state.busy") and done(browser) != b)

    def run(words, *more):
        """A command of the README, with its folders in the test's own."""
        words = [re.sub(r"^runs/", f"{tmp_path}/", word) for word in words]
        assert main([*words[1:], *map(str, more)]) == 0, capsys.readouterr().err

    monkeypatch.setattr(command, "serve", by_keyboard)
    run(label, "--output_dir", tmp_path / "label", "--num_steps", 2, "--max_sequence_length", 16)
    assert len(stored(tmp_path / "label")) == 20
    table = tmp_path / "label/preferences.parquet"
    assert str(table) in " ".join(re.sub(r"^runs/", f"{tmp_path}/", word) for word in train)
    run(
        train,
        "--output_dir",
        tmp_path / "shapes_dpo",
        "--max_train_steps",
        2,
        "--num_pairs",
        4,
        "--train_batch_size",
        4,
        "--eval_prompts",
        "null",
    )
    assert (tmp_path / "shapes_dpo/pytorch_lora_weights.safetensors").is_file()
    small = ("--limit", 2, "--num_steps", 2, "--output_dir", tmp_path / "compare")
    run(compare, *small, "--prompts", "assets/prompts/shapes_validation.jsonl")
    assert (tmp_path / "compare/compare.html").is_file()
