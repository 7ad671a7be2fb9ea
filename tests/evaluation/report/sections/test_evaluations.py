import re
from pathlib import Path

from evaluation.result import Measure, Sample, Suite, summarize
from mujina.answers import Sampling
from tests.evaluation.report.pages import Tags, build, make_run, section
from tests.evaluation.report.results import make_result, make_suite


def test_evaluations_stand_in_the_order_given_with_the_change(tmp_path: Path) -> None:
    before, after = make_result(tmp_path / "b.json", 0.125, 0.05, "hm"), make_result(tmp_path / "a.json", 0.975, 0.8, "well", "English")
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 3}), evaluation=[f"zero={before}", f"after={after}"])
    assert (
        html.index("<td>zero</td>") < html.index("12.5%") < html.index("<td>after</td>") < html.index("97.5%") < html.index("zero → after")
    )
    assert "+85.0" in html and "+75.0" in html
    assert html.index(">Japanese<") < html.index(">English<")
    assert html.count('<span class="verdict">') == 24  # twelve prompts, two labels
    assert "12 of 40 prompts" in html


def save(path: Path, suite: Suite, *samples: Sample) -> Path:
    path.write_text(summarize(suite, "hf", Sampling(5), samples).model_dump_json())
    return path


def graded(prompt: str, answer: str, mark: float, right: bool | None = None, expected: str | None = None) -> Sample:
    verdict = f"{mark:g} of 10"
    return Sample(prompt=prompt, expected=expected, answer=answer, group=None, right=right, verdict=verdict, scores={"mark": mark})


MARKS = make_suite({"mark": Measure(meaning="a judge's mark, 1 to 10", is_share=False)}, "essays")


def test_a_suite_of_marks_without_groups_or_right_and_wrong(tmp_path: Path) -> None:
    first = save(tmp_path / "a.json", MARKS, graded("why?", "so", 4), graded("how?", "thus", 5))
    second = save(tmp_path / "b.json", MARKS, graded("how?", "like this", 8.25), graded("when?", "now", 8.25))
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 3}), evaluation=[f"a={first}", f"b={second}"])
    Tags(html)
    found = section(html, "Evaluation: essays")
    assert "Mark: a judge&#x27;s mark, 1 to 10." in found
    assert '<td>a</td><td class="number">2</td><td class="number">4.5</td>' in found and '<td class="number">8.25</td>' in found
    assert '<td>a → b</td><td></td><td class="number">+3.75</td>' in found
    assert '<td>so<span class="verdict">4 of 10</span></td><td>–</td>' in found
    assert '<td>thus<span class="verdict">5 of 10</span></td><td>like this<span class="verdict">8.25 of 10</span></td>' in found


def test_right_and_wrong_are_seen(tmp_path: Path) -> None:
    result = save(tmp_path / "a.json", MARKS, graded("1?", "one", 10, True, "one"), graded("2?", "three", 1, False, "two"))
    found = section(build(tmp_path, make_run(tmp_path / "run", {"web": 3}), evaluation=[f"a={result}"]), "Evaluation: essays")
    assert '<td>one</td><td class="correct">one<span class="verdict">✓ 10 of 10</span>' in found
    assert '<td>two</td><td class="wrong">three<span class="verdict">✗ 1 of 10</span>' in found
    assert "→" not in found


def test_samples_with_one_prompt_are_compared_in_turn(tmp_path: Path) -> None:
    first = save(tmp_path / "a.json", MARKS, graded("go on", "a1", 1), graded("go on", "a2", 1))
    second = save(tmp_path / "b.json", MARKS, graded("go on", "b1", 1), graded("go on", "b2", 1))
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 3}), evaluation=[f"a={first}", f"b={second}"])
    assert re.findall(r"<td>([ab]\d)<", html) == ["a1", "b1", "a2", "b2"]


def test_each_suite_and_version_has_its_own_table(tmp_path: Path) -> None:
    run, marks = make_run(tmp_path / "run", {"web": 3}), save(tmp_path / "m.json", MARKS, graded("why?", "so", 4))
    shares = make_result(tmp_path / "s.json", 0.5, 0.25, "x")
    newer = make_result(tmp_path / "n.json", 0.5, 0.25, "x", suite=make_suite(version=2))
    html = build(tmp_path, run, evaluation=[f"a={shares}", f"b={marks}", f"c={newer}", f"d={shares}"])
    assert re.findall("<h2>Evaluation: (.*?)</h2>", html) == ["sums &amp; more", "essays", "sums &amp; more"]
    assert "a → d, points" in html and "a → c" not in html


def test_a_group_that_one_evaluation_lacks(tmp_path: Path) -> None:
    first, second = make_result(tmp_path / "a.json", 0.5, 0.25, "x", "here"), make_result(tmp_path / "b.json", 0.5, 0.25, "x", "there")
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 3}), evaluation=[f"a={first}", f"b={second}"])
    numbers = [re.findall('class="number">([^<]*)', row) for row in re.findall("<tr.*?</tr>", section(html, "Evaluation: sums &amp; more"))]
    assert numbers[2:5] == [
        ["40", "50.0%", "25.0%", "50.0%", "25.0%", "–", "–"],
        ["40", "50.0%", "25.0%", "–", "–", "50.0%", "25.0%"],
        ["+0.0", "+0.0", "–", "–", "–", "–"],
    ]


def test_a_page_without_evaluations(tmp_path: Path) -> None:
    assert "Evaluation:" not in build(tmp_path, make_run(tmp_path / "run", {"web": 3}))
