"""The page of an ablation: whole, safe, and readable without anything beside it."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "experiment"))
from planted import Truth, plant, suite

from calledshot.experiment import make_report
from calledshot.lab.ablations import render, write_ablation
from calledshot.lab.drawing import Chart, Line, spread, ticks
from calledshot.recipe import UsageError

ARMS = (
    'name = "base"',
    'name = "good"\nnote = "<b>Better</b>."\nset.model.kv_heads = 1',
    'name = "b"\nset.model.layers = 3',
)
LOSSES = {"base": 1.5, "good": 1.4, "b": 1.6}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    asked = suite(*ARMS, sizes=(("S", 64), ("M", 128)))
    plan = plant(asked, lab, lambda arm, size, seed: Truth(LOSSES[arm] + 0.001 * seed) if size == "S" else None)
    return make_report(plan, lab)


def test_the_page_stands_alone(report, tmp_path):
    write_ablation(report, tmp_path / "folder" / "page.html")
    page = (tmp_path / "folder" / "page.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<script|(?:src|href)=[\"'](?!#|data:)|url\(", page)
    assert "<b>Better</b>" not in page and "&lt;b&gt;Better&lt;/b&gt;" in page
    assert page.count("<figure") == 2  # M has no finished run to draw
    for text in ("1.4010", "better", "worse", "At equal seconds", "no result of good"):
        assert text in page
    assert render(report) == render(report)
    with pytest.raises(UsageError, match="is a folder"):
        write_ablation(report, tmp_path)


def test_labels_keep_their_distance_and_their_order():
    heights = [100, 101, 102, 300, 50]
    moved = spread(heights, 13, 0, 400)
    assert sorted(range(5), key=moved.__getitem__) == sorted(range(5), key=heights.__getitem__)
    assert min(b - a for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False)) >= 13 - 1e-9
    assert moved[3] == 300 and moved[4] == 50
    assert max(spread([399, 400, 400], 13, 0, 400)) <= 400


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.9), (1e12, 7.3e12), (1.40, 1.43), (-3, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 6)
    assert 2 <= len(found) <= 7 and all(low <= one <= high for one in found)


def test_the_early_part_of_a_curve_is_left_out():
    line = Line("a", [(10, 5.0), (50, 3.0), (100, 2.0)], (100, 2.0), "red")
    svg = Chart([line], "x", "y", str).svg()
    path = re.search(r'class="line" d="([^"]+)"', svg)
    assert path and path[1].count("L") == 1
    assert Chart([], "x", "y", str).svg() == ""


def test_what_is_measured_over_all_text_ends_no_line_over_a_sample():
    line = Line("a", [(50, 3.0), (100, 2.5)], (100, 2.0), "red")
    svg = Chart([line, Line("b", [], (100, 2.1), "blue")], "x", "y", str).svg()
    paths = re.findall(r'class="line" d="M([^"]+)"', svg)
    marks = [float(y) for y in re.findall(r'class="end" cx="[^"]+" cy="([^"]+)"', svg)]
    assert len(paths) == 1 and len(marks) == 2
    assert float(paths[0].split()[-1]) < marks[1] < marks[0]  # downwards: the sample's last, b's mark, a's


def test_curves_are_over_the_sample_alone(tmp_path):
    plan = plant(suite(*ARMS[:1], seeds="[0, 1]"), tmp_path, lambda arm, size, seed: Truth(1.5 + 0.001 * seed))
    for seed in (0, 1):  # over all of the text another number than over the sample
        path = tmp_path / "runs" / f"planted-base-S-s{seed}" / "summary.json"
        path.write_text(path.read_text().replace("1.5", "1.3"))
    page = render(make_report(plan, tmp_path))
    path, mark = (
        re.search(r'class="line strong" d="M([^"]+)"', page)[1],
        re.search(r'class="end"[^>]+cy="([^"]+)"', page)[1],
    )
    heights = [float(point.split()[1]) for point in path.split("L")]
    assert heights == sorted(heights) and float(mark) - heights[-1] > 5 * (heights[-1] - heights[-2])
