from evaluation.preferences.choice import Judged, by_scores, chosen_pairs


def test_best_against_worst_takes_the_first_of_equals() -> None:
    judged = by_scores([None, 1.0, 0.0, 2.0, 0.0, 2.0])
    assert chosen_pairs(judged, list("abcdef"), "best_and_worst") == [(3, 2)]


def test_every_pair_has_no_ties_and_no_text_twice() -> None:
    judged = by_scores([1.0, 0.0, None, 0.0, 1.0])
    assert chosen_pairs(judged, ["right", "wrong", "", "bad", "right"], "every_pair") == [(0, 1), (0, 3)]


def test_equal_answers_are_no_pair() -> None:
    for scores in ([1.0, 1.0], [0.0, 0.0, None], [None, None], [1.0]):
        assert chosen_pairs(by_scores(scores), list("abc"), "best_and_worst") == []
        assert chosen_pairs(by_scores(scores), list("abc"), "every_pair") == []


def test_wins_that_scores_do_not_tell() -> None:
    circle = Judged([0.0, 0.0, 0.0], [(0, 1), (1, 2), (2, 0)])
    assert chosen_pairs(circle, list("abc"), "every_pair") == [(0, 1), (1, 2), (2, 0)]
    assert chosen_pairs(circle, list("abc"), "best_and_worst") == []
