"""One of the servers that have the same model: how many requests it is given at a time, and when it is left alone.

How many is found out (Chiu and Jain 1989: additive, here by a quarter, up; multiplicative down):

    what is seen                                            what follows
    twice as many answers as are in flight have come, and   a quarter more in flight (twice as many, until it has once brought nothing)
      the limit was what held back
    more in flight brought fewer answers than that a        back to as many as before, which stands for ten times that long: a server that
      second: they only wait longer                           queues tells by its latency alone, which is what is in flight over this rate
    429, 503, a time-out                                    three quarters in flight, once for all that were sent before; and a rest: as
                                                              long as it asks (Retry-After), else twice as long as the last
    nobody answers, or the third failure in a row           a rest; from the second in a row on, one request tries whether it is over
"""

import random

FIRST_LIMIT = 32  # in flight, to begin with
FIRST_WAIT = 0.5  # seconds, of a rest and before the second try of a request; each further one is twice as long
LONGEST_WAIT = 60.0  # seconds, of one that nobody has asked for
_GAIN = 0.3  # the share of what was added in flight that has to come back as answers a second
_HOLD = 10  # windows without growth
_NUM_BROKEN = 3  # failures in a row that are no longer the requests' own


def backoff(number: int) -> float:
    """Seconds before try `number` (from 1) is followed by another; at random, so that not all come back at once."""
    return min(FIRST_WAIT * 2.0 ** (number - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)


class Replica:
    """Told of each request when it is sent and when it ends; times are seconds of one clock.

    num_rests   in a row, since it last answered
    """

    def __init__(self, most: int) -> None:
        self._most, self.limit = most, min(FIRST_LIMIT, most)
        self.in_flight = self.num_rests = 0
        self.rest_until = 0.0
        self._num_broken = 0
        self._cut_at = 0.0  # when the limit was last lowered by the server's word
        self._step = 2.0
        self._before: tuple[int, float] | None = None  # the last limit, and answers a second with it
        self._hold = 0
        self._num_answers, self._since, self._was_full = 0, 0.0, False

    def has_room(self, now: float) -> bool:
        self._was_full = self._was_full or self.in_flight >= self.limit
        return self.in_flight < (1 if self.num_rests > 1 else self.limit) and now >= self.rest_until

    def answered(self, now: float) -> None:
        self.num_rests = self._num_broken = 0
        self._since = self._since or now
        self._num_answers += 1
        if self._num_answers >= 2 * self.limit:
            if self._was_full:
                self._adapt(self._num_answers / max(now - self._since, 1e-6))
            self._num_answers, self._since, self._was_full = 0, now, False

    def broke(self, now: float) -> None:
        """It answered with what is none."""
        self._num_broken += 1
        if self._num_broken >= _NUM_BROKEN:
            self._rest(now, 0.0)

    def is_busy(self, now: float, sent: float, wait: float) -> None:
        """It could not take a request sent at `sent`, or let it wait in vain, and asks for `wait` seconds."""
        if sent >= self._cut_at:
            self.limit, self._before, self._step, self._hold = max(1, self.limit * 3 // 4), None, 1.25, _HOLD
            self._cut_at = now
            self._num_answers, self._since, self._was_full = 0, now, False
        self._rest(now, wait)

    def is_away(self, now: float) -> None:
        """Nobody answers there."""
        self._rest(now, 0.0)

    def _rest(self, now: float, wait: float) -> None:
        if now >= self.rest_until:  # those that were sent before it began are no reason for a longer one
            self.num_rests += 1
            self.rest_until = now + backoff(self.num_rests)
        self.rest_until = max(self.rest_until, now + wait)

    def _adapt(self, rate: float) -> None:
        if self._hold:
            self._hold -= 1
        elif self._before and rate < self._before[1] * (1 + _GAIN * (self.limit / self._before[0] - 1)):
            self.limit, self._before, self._step, self._hold = self._before[0], None, 1.25, _HOLD
        else:
            self._before = self.limit, rate
            self.limit = min(self._most, max(self.limit + 1, int(self.limit * self._step)))
