"""The pictures of the concept pages: drawn by the script, used by a page, legible in both schemes."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"
# the others compute for seconds
DRAWN = ["forms", "coding", "water", "adapters", "objectives"]


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", PICTURES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(svg):
    return sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_each_picture_is_committed_and_on_a_page(draw):
    used = {
        (page.parent / found).resolve()
        for page in DOCS.rglob("*.md")
        for found in re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", page.read_text())
    }
    assert used == {PICTURES / f"{name}.svg" for name in draw.PICTURES}
    assert used == set(PICTURES.glob("*.svg"))


@pytest.mark.parametrize("name", DRAWN)
def test_the_script_draws_what_is_committed(draw, name):
    found, kept = draw.as_svg(draw.PICTURES[name]()), (PICTURES / f"{name}.svg").read_text()
    assert words(found) == words(kept)


def contrast(one, two):
    """The contrast ratio of WCAG 2."""

    def luminance(color):
        channels = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_legible_in_both_schemes(draw):
    for color in (draw.INK, draw.MUTED, draw.BLUE, draw.ORANGE, draw.GREEN, draw.PURPLE):
        assert contrast(color, draw.PAPER) > 4.5
        assert contrast(draw.DARK[color], draw.DARK[draw.PAPER]) > 4.5
    for pale in (draw.PALE_BLUE, draw.PALE_ORANGE, draw.PALE_GREEN, draw.PALE_GRAY):
        assert contrast(draw.INK, pale) > 4.5
        assert contrast(draw.DARK[draw.INK], draw.DARK[pale]) > 4.5


def test_every_color_has_a_dark_one(draw):
    for path in PICTURES.glob("*.svg"):
        body = path.read_text().split("</style>", 1)[1]
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body)) <= set(draw.DARK), path
