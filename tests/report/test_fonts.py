"""Texts in pictures whose letters the usual font lacks: another font of the machine, or a note instead of boxes."""

import warnings

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from diffalign.report import fonts
from diffalign.report.grids import compare_grid, image_grid

CHINESE = "一只 red 猫"


def font_with(path, letters):
    """A font whose letters are filled squares, but for the first, which is half of one."""
    pen = TTGlyphPen(None)
    pen.moveTo((50, 0)), pen.lineTo((950, 0)), pen.lineTo((950, 800)), pen.lineTo((50, 800)), pen.closePath()
    square, names = pen.glyph(), [f"g{number}" for number in range(len(letters))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names, strict=True)})
    builder.setupGlyf(dict.fromkeys([".notdef", *names], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def machine(monkeypatch):
    """Choose the fonts of this machine."""
    fonts._best.cache_clear()
    yield lambda *files: monkeypatch.setattr(fonts, "system_fonts", lambda: list(files))
    fonts._best.cache_clear()


def test_latin_texts_have_the_usual_font_and_look_for_no_other(monkeypatch):
    monkeypatch.setattr(fonts, "system_fonts", lambda: pytest.fail("fonts were looked for"))
    assert fonts.font_of("a red circle,\n“small”…") is fonts.own()
    assert fonts.drawable(["a red circle"]) == ["a red circle"]


@pytest.mark.parametrize("text", ["naïve café, 2 × 3 – ß", "красный круг", "κόκκινος"])
def test_other_alphabets_are_drawn_on_every_machine(text):
    """Pillow's own font has ASCII and a few marks only."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.drawable([text]) == [text]
    assert "DejaVu" in fonts.font_of(text).path


def test_the_font_with_the_most_of_a_text_s_letters_draws_it(tmp_path, machine):
    some = font_with(tmp_path / "some.ttf", "一red")
    every = font_with(tmp_path / "every.ttf", "一只红色的猫red")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    machine(str(tmp_path / "broken.ttf"), some, every)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.drawable([CHINESE]) == [CHINESE]
    assert fonts.font_of(CHINESE).path == every
    assert fonts.font_of("red") is fonts.own()


def test_letters_that_no_font_has_are_counted_instead_of_drawn_as_boxes(tmp_path, machine):
    machine()
    with pytest.warns(fonts.FontWarning, match=r"no font of this machine has 3 letters .*fonts-noto-cjk"):
        assert fonts.drawable([CHINESE, "plain"]) == [
            "[2 letters without a font] red [1 letters without a font]", "plain"
        ]  # fmt: skip


@pytest.mark.parametrize("kind", ["compare", "grid"])
def test_grids_of_chinese_prompts_differ_with_a_font_and_say_so_without(kind, tmp_path, machine):
    def drawn(prompt):
        if kind == "grid":
            return image_grid(torch.zeros(1, 3, 200, 200), 1, labels=[prompt]).tobytes()
        compare_grid({"模型": torch.zeros(1, 3, 64, 64)}, [prompt], None, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            return image.tobytes()

    machine(font_with(tmp_path / "font.ttf", "一只猫模型red "))
    assert drawn("一只猫") != drawn("一 猫")
    fonts._best.cache_clear()
    machine()
    with pytest.warns(fonts.FontWarning):
        assert drawn("一只猫") == drawn("猫只一"), "the number of letters alone is drawn"
