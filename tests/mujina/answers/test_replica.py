"""How many requests a server is given, against servers whose speed is known; in their own time."""

import heapq
import itertools
from random import Random

import pytest

from mujina.answers.replica import FIRST_LIMIT, Replica


def run(num_places: int, most: int, num_answers: int, most_queued: int | None = None) -> tuple[Replica, float, list[int], int]:
    """A server that works on `num_places` requests at a time, about a second each, and queues others, or tells 429 beyond `most_queued`.

    Returns what was found out, the seconds it took, how many were in flight at each answer, and the number of refusals.
    """
    random = Random(0)
    replica, now, counter = Replica(most), 0.0, itertools.count()
    ends: list[tuple[float, int, float, bool]] = []  # of requests: when, in which order, when sent, whether it is an answer
    free = [0.0] * num_places  # when each place is
    in_flight, told = list[int](), 0
    while len(in_flight) < num_answers:
        while replica.has_room(now):
            replica.in_flight += 1
            if most_queued is not None and replica.in_flight > num_places + most_queued:
                heapq.heappush(ends, (now + 0.001, next(counter), now, False))
                continue
            end = max(heapq.heappop(free), now) + random.uniform(0.5, 1.5)
            heapq.heappush(free, end)
            heapq.heappush(ends, (end, next(counter), now, True))
        if not ends:
            now = replica.rest_until
            continue
        now, _, sent, is_answer = heapq.heappop(ends)
        replica.in_flight -= 1
        if is_answer:
            in_flight.append(replica.in_flight + 1)
            replica.answered(now)
        else:
            told += 1
            replica.is_busy(now, sent, 0.0)
    return replica, now, in_flight, told


@pytest.mark.parametrize("num_places", [1, 40, 300])
def test_no_more_is_in_flight_than_brings_answers(num_places: int) -> None:
    _, seconds, in_flight, _ = run(num_places, most=4096, num_answers=20_000 if num_places > 1 else 2000)
    later = in_flight[len(in_flight) // 2 :]
    assert max(later) <= max(2.6 * num_places, 2 * FIRST_LIMIT)
    assert len(in_flight) / seconds > 0.7 * num_places  # the start included


def test_a_quick_server_is_given_all_there_may_be() -> None:
    replica, *_ = run(num_places=5000, most=1024, num_answers=20_000)
    assert replica.limit == 1024


def test_a_server_that_refuses_is_given_what_it_takes() -> None:
    _, seconds, in_flight, told = run(num_places=20, most=1024, num_answers=10_000, most_queued=4)
    assert max(in_flight[-1000:]) <= 32 and told < 0.1 * 10_000
    assert len(in_flight) / seconds > 0.7 * 20


def test_who_rests_is_tried_with_one_request() -> None:
    replica = Replica(100)
    now = 0.0
    for _ in range(4):
        while replica.has_room(now):
            replica.in_flight += 1
        sent, now = now, now + 0.001
        for _ in range(replica.in_flight):
            replica.in_flight -= 1
            replica.is_busy(now, sent, 7.0)
        assert not replica.has_room(now + 6.9)
        now += 70.0
    assert replica.num_rests == 4 and replica.limit < FIRST_LIMIT
    assert replica.has_room(now)
    replica.in_flight += 1
    assert not replica.has_room(now)
    replica.in_flight -= 1
    replica.answered(now)
    replica.in_flight += 1
    assert replica.has_room(now) and replica.num_rests == 0
