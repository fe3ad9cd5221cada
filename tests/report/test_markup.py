"""Names, tags and prompts of strangers are text in cards, tables and pages, never markup."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffalign.report.html import write_page
from diffalign.report.markdown import inert, inline_code
from diffalign.report.model_card import ModelCard, write_model_card
from diffalign.report.results import figures, to_markdown
from diffalign.structures import Prompt

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![a](http://attacker.invalid/x.png)",
    "[click](javascript:alert(1))",
    "a | b\n\n# heading",
    "`code` ``more``",
    "</script><script>alert(1)</script>",
    "\x1b[2J",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_text_of_others_is_inert(text):
    shown = inert(text)
    assert not re.search(r"[<>|`\[\]\n\x1b]", shown)
    quoted = inline_code(text)
    fence = re.match("`+", quoted)[0]
    assert quoted.endswith(fence)
    assert fence not in quoted[len(fence) : -len(fence)]
    assert "\n" not in quoted


@pytest.mark.parametrize("text", ATTACKS)
def test_names_of_models_rewards_and_tags_are_text_in_tables(text):
    scores = {text: torch.tensor([0.0, 1.0])}
    prompt = torch.tensor([0, 1])
    found = figures(prompt, scores, [text, "other"], None, {})
    table = to_markdown({text: found})
    assert not re.search(r"<|\]\(|`|\x1b", table)
    assert {line.count("|") for line in table.splitlines()} == {3}


@pytest.mark.parametrize("text", ATTACKS)
def test_a_card_shows_names_as_text(text, tmp_path):
    card = ModelCard(text, text, "flow_grpo", text, text, text, pictures=[f"{text}.png".replace("/", "")], tags=[text])
    written = write_model_card(tmp_path / "README.md", card).read_text()
    front, body = written.split("---\n", 2)[1:]
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?^\1$", "", body)  # code blocks show anything
    outside = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", outside)
    assert not re.search(r"<script|<img|\]\(http|\]\(javascript|^# heading", outside, re.M)
    assert "\x1b" not in outside
    assert front.count("tags:") == 1


@pytest.mark.parametrize("text", ATTACKS)
def test_a_page_holds_its_data_as_text(text, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    judged = SimpleNamespace(prompt=torch.tensor([0]), files=[tmp_path / "a.png"], scores={text: torch.tensor([1.0])})
    write_page(tmp_path / "page.html", text, [Prompt(text, {"tag": text})], {text: judged})
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
    assert json.loads(data)["rows"][0]["task"] == text
    assert "innerHTML" not in page
