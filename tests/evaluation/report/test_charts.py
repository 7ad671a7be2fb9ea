import math
import re

import pytest

from evaluation.report.charts import Axis, Band, Bar, Line, heat_map, limits, line_chart, load_over_time, short, smooth, stacked_bars


def path_of(svg: str, label: str) -> str:
    return re.search(rf'data-label="{label}" d="([^"]*)"', svg).group(1)


@pytest.mark.parametrize(
    ("low", "high", "log", "labels"),
    [
        (0, 10, False, ["0", "2", "4", "6", "8", "10"]),
        (0, 2_500_000, False, ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]),
        (0, 40_000_000_000, False, ["0", "10B", "20B", "30B", "40B"]),
        (1.011, 1.019, False, ["1.012", "1.014", "1.016", "1.018"]),
        (0, 4e-5, False, ["0", "1e-5", "2e-5", "3e-5", "4e-5"]),
        (0.3, 30, True, ["0.5", "1", "2", "5", "10", "20"]),
        (1e-4, 1e4, True, ["1e-4", "0.001", "0.01", "0.1", "1", "10", "100", "1k", "10k"]),
    ],
)
def test_ticks_are_round_and_told_apart(low: float, high: float, log: bool, labels: list[str]) -> None:
    assert [label for _, label in Axis(low, high, 0, 100, log).ticks(5)] == labels


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12, "12"), (999.9, "1k"), (1_234_567, "1.23M"), (4.1e9, "4.1B"), (0.00123, "0.00123"), (3e-5, "3e-5")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_an_axis_places_values() -> None:
    assert Axis(0, 10, 50, 150).at(2.5) == 75
    assert Axis(0, 10, 150, 50).at(2.5) == 125
    assert Axis(1, 100, 0, 100, log=True).at(10) == pytest.approx(50)


def test_smoothing_is_a_mean_of_neighbours_and_survives_gaps() -> None:
    points = [(0, 1.0), (1, 4.0), (2, math.nan), (3, 6.0), (4, 8.0)]
    assert smooth(points, 3) == [(0, 2.5), (1, 2.5), (2, 5.0), (3, 7.0), (4, 7.0)]
    assert smooth(points[:2], 1) == points[:2]
    assert math.isnan(smooth([(0, math.inf)], 1)[0][1])


def test_limits_ignore_what_is_not_finite() -> None:
    assert limits([Line("a", "red", [(0, 3.0), (1, math.inf)], [(0, 1.0), (1, math.nan)])]) == (1.0, 3.0)
    assert limits([Line("a", "red", [(0, math.nan)])]) == (0.0, 1.0)


def test_a_line_has_a_gap_where_values_are_not_finite() -> None:
    svg = line_chart("loss", [Line("a", "red", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, 1.0)])], (0, 4), (1, 3))
    assert path_of(svg, "a").count("M") == 2
    assert "nan" not in svg


def test_a_logarithmic_chart_leaves_out_what_is_not_positive() -> None:
    svg = line_chart("norm", [Line("a", "red", [(0, 1.0), (1, 0.0), (2, 10.0)])], (0, 2), (1, 10), log=True)
    assert path_of(svg, "a").count("M") == 2


def test_a_single_point_and_a_constant_line_are_drawn() -> None:
    svg = line_chart("loss", [Line("a", "red", [(5, 2.0)])], (0, 5), (2.0, 2.0))
    first, second = path_of(svg, "a").removeprefix("M").split("L")
    assert first == second


def test_thinning_keeps_every_spike_and_the_page_small() -> None:
    points = [(float(x), 1.0) for x in range(50_000)]
    points[31_234] = (31_234.0, 9.0)
    line = path_of(line_chart("loss", [Line("a", "red", points)], (0, 50_000), (0, 9)), "a")
    heights = [float(point.split(" ")[1]) for point in re.split("[ML]", line)[1:]]
    assert len(heights) <= 1000
    assert min(heights) < min(sorted(heights)[1:]) - 50


def test_labels_of_narrow_phases_do_not_cover_each_other() -> None:
    bands = [Band("warming up", 0, 1), Band("web", 1, 2), Band("conversation", 99, 100)]
    svg = line_chart("loss", [], (0, 100), (0, 1), bands)
    places = re.findall(r'class="phase" x="([\d.]+)" y="(\d+)">([^<]*)', svg)
    assert [label for _, _, label in places] == ["warming up", "web", "conversation"]
    assert places[0][1] != places[1][1] and places[0][1] == places[2][1]
    assert float(places[2][0]) + 6 * len("conversation") < 560


def test_stacked_segments_follow_each_other_in_proportion() -> None:
    svg = stacked_bars("tokens", [Bar("run: web", [("a", 300.0), ("b", 100.0)])], {"a": "red", "b": "blue"})
    (x_a, width_a), (x_b, width_b) = [
        tuple(map(float, found)) for found in re.findall(r'<rect[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', svg)
    ]
    assert x_b == pytest.approx(x_a + width_a, abs=0.11)
    assert width_a == pytest.approx(3 * width_b, abs=0.2)
    assert "b: 100 tokens" in svg


def test_the_heat_map_shows_how_far_from_uniform_a_share_is() -> None:
    svg = heat_map("load", [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
    cells = re.findall(r'class="cell" fill="([^"]+)" fill-opacity="([\d.]+)"', svg)
    assert cells[0] == ("var(--above)", "1.000") and cells[3] == ("var(--below)", "1.000")
    assert {strength for _, strength in cells[4:]} == {"0.000"}
    assert "layer 0, expert 0: 50.00% of tokens, 2.00 × uniform" in svg
    assert "layer 3, expert 0: 25.00%" in heat_map("load", [[0.5, 0.5], [0.25, 0.75]], every=3)


def test_the_load_over_time_has_a_cell_for_each_stretch_of_steps() -> None:
    loads = [[[0.5, 0.5], [1.0, 0.0]]] * 3 + [[[0.5, 0.5], [0.5, 0.5]]] * 3
    svg = load_over_time("load", [100, 200, 300, 400, 500, 600], loads, every=2)
    cells = re.findall(r'<rect fill="([^"]+)" fill-opacity="([\d.]+)" x="([\d.]+)" y="(\d+)" width="([\d.]+)"', svg)
    assert len(cells) == 2 * 2 * 6
    starts = sorted({float(start) for _, _, start, _, _ in cells})
    assert [cell[:2] for cell in cells if cell[1] != "0.000"] == [("var(--above)", "1.000"), ("var(--below)", "1.000")] * 3
    assert {float(cell[2]) for cell in cells if cell[1] != "0.000"} == set(starts[:3])
    assert ">layer 2<" in svg and ">layer 1<" not in svg
    assert "layer 2, expert 0, to 300 tokens: 2.00 × uniform" in svg


def test_the_load_over_time_of_many_experts_stays_small() -> None:
    loads = [[[1 / 64] * 64] * 32] * 1000
    assert load_over_time("load", range(1, 1001), loads).count("<rect") < 20_000


def test_names_are_escaped() -> None:
    svg = line_chart("<b>", [Line('"<i>', "red", [(0, 1.0)])], (0, 1), (0, 1), [Band("<u>", 0, 1)])
    svg += stacked_bars("<b>", [Bar("<i>", [("<u>", 1.0)])], {"<u>": "red"}) + heat_map("<b>", [[1.0]])
    assert not re.search("<[biu]>", svg)
