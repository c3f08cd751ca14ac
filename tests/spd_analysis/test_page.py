import base64
import io
import json
import re

import pytest
from PIL import Image

from spd_analysis.page import (
    EMBEDDED_WHOLE,
    analyses,
    clusterings,
    folded,
    page,
    pictures,
    section,
    smaller,
)


def picture(path, width, height, noise=False):
    size = (width, height)
    image = Image.effect_noise(size, 90).convert("RGB") if noise else Image.new("RGB", size, "red")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def embedded(html):
    """The bytes of every picture in the page."""
    return [base64.b64decode(d) for d in re.findall(r"data:image/png;base64,([^']+)'", html)]


def test_text_is_escaped():
    made = page("a<b", "c&d", [section("e<f", "g>h", "<p>html</p>"), folded("<i>", "<j>")], 900)
    for text in ("a&lt;b", "c&amp;d", "e&lt;f", "g&gt;h", "<p>html</p>", "&lt;i&gt;", "&lt;j&gt;"):
        assert text in made
    assert "<script>" not in made and "900px" in made


def test_pictures_are_whole_with_captions_first_in_their_order(tmp_path):
    paths = {name: picture(tmp_path / f"{name}.png", 5, 5) for name in "abc"}
    sections = pictures(tmp_path, {"c.png": ("The C", "says <c>"), "b.png": ("The B", "")})
    assert [re.search("<h2>(.*)</h2>", s)[1] for s in sections] == ["The C", "The B", "a"]
    assert [embedded(s) for s in sections] == [[paths[n].read_bytes()] for n in "cba"]
    assert "says &lt;c&gt;" in sections[0]


def test_a_very_large_picture_is_made_smaller(tmp_path):
    path = picture(tmp_path / "x.png", 2000, 1000, noise=True)
    assert path.stat().st_size > EMBEDDED_WHOLE
    (png,) = embedded(pictures(tmp_path, {})[0])
    assert Image.open(io.BytesIO(png)).size == (1400, 700)
    assert len(png) < EMBEDDED_WHOLE


@pytest.mark.parametrize("size, wanted", [((400, 100), (200, 50)), ((100, 30), (100, 30))])
def test_smaller_keeps_the_shape_and_never_grows(size, wanted, tmp_path):
    png = smaller(picture(tmp_path / "x.png", *size), width=200, colors=8)
    image = Image.open(io.BytesIO(png))
    assert image.size == wanted and image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_whatever_an_analysis_left_is_shown(tmp_path):
    assert analyses(tmp_path) == []
    a, b = tmp_path / "analysis" / "a", tmp_path / "analysis" / "b"
    for folder in (a, b, tmp_path / "analysis" / ".unfinished"):
        picture(folder / "tree.png", 5, 5)
    summary = {"n": 3, "captions": {"tree.png": ["The tree", "It grows."]}}
    (a / "summary.json").write_text(json.dumps(summary))
    text = "\n".join(analyses(tmp_path))
    assert re.findall("<h2>(.*)</h2>", text) == ["The tree", "tree"] and "It grows." in text
    assert "analysis/a/summary.json" in text and "&quot;n&quot;: 3" in text


def test_a_long_summary_is_cut_and_says_where_the_rest_is(tmp_path):
    file = picture(tmp_path / "analysis" / "a" / "x.png", 5, 5).with_name("summary.json")
    file.write_text(json.dumps(list(range(10_000)) and {"all": list(range(10_000))}))
    text = "\n".join(analyses(tmp_path))
    assert len(text) < 30_000 and f"the rest is in {file}" in text


def test_clusterings_and_ensembles_of_a_run(make_run_dir):
    run_dir = make_run_dir("a_run")
    assert clusterings(run_dir) == {}
    root = run_dir.path / "clusterings"
    one = picture(root / "one" / "clustering.png", 5, 5)
    seeds = [picture(root / "many" / f"seed_{i}" / "clustering.png", 5, 5) for i in (0, 1)]
    both = picture(root / "many" / "distances" / "distances.png", 5, 5)
    files = {title: file for title, (file, _) in clusterings(run_dir).items()}
    assert files == {"Clustering one": one, "Clustering many, seed_0": seeds[0],
                     "Ensemble many": both}  # fmt: skip
