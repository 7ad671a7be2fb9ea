"""Which steps have no line any more, in words."""

from mujina.gaps import lost


def test_steps_without_a_line_are_told_as_stretches():
    assert lost([1, 2, 3], 3, []) == "" == lost([], 0, [])
    assert lost([2, 5, 6, 10], 12, []) == "1, 3 to 4, 7 to 9, 11 to 12"
    assert lost([1, 4], 4, [(2, 3)]) == "" and lost([1, 4], 4, [(2, 2)]) == "3"
    assert lost(range(1, 2000, 2), 1999, []) == "2, 4, 6, 8, 10 and 994 more stretches"
    assert lost([1, 3000], 3000, []) == "2 to 2,999"
