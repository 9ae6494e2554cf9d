"""Tests of how much work may wait, and when a refused client should come back; the clock is the test's own."""

import pytest

from server.errors import InvalidField, QueueFull
from server.requests.admission import FIRST_GUESS_S, LONGEST_WAIT_S, Admission


class Hall:
    """An Admission, and the engine's reports that it reads."""

    def __init__(self, *, max_sequences: int = 10, max_tokens: int = 1000) -> None:
        self.now = 100.0
        self.waiting = 0
        self.admission = Admission(
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            tokens_waiting=lambda: self.waiting,
            clock=lambda: self.now,
        )

    def refusal(self, num_sequences: int = 1, *, num_tokens: int = 1) -> QueueFull:
        with pytest.raises(QueueFull) as refused:
            self.admission.check(num_sequences, num_tokens=num_tokens)
        return refused.value


def test_what_would_not_fit_into_an_empty_server_is_the_clients_error():
    with pytest.raises(InvalidField, match="11 sequences are not allowed; at most 10"):
        Hall().admission.check(11, num_tokens=1)


def test_all_of_a_request_fits_or_none():
    hall = Hall()
    hall.admission.enter(8, num_tokens=1)
    hall.admission.check(2, num_tokens=1)
    assert "the limit is 10" in hall.refusal(3).message
    hall.admission.leave()
    hall.admission.check(3, num_tokens=1)


def test_tokens_that_wait_are_bounded_but_a_lone_request_is_always_served():
    hall = Hall()
    hall.admission.check(1, num_tokens=5000)
    hall.waiting = 600
    hall.admission.check(1, num_tokens=400)
    assert "600 prompt tokens wait to be read and up to 401 more" in hall.refusal(num_tokens=401).message


def test_tokens_count_before_the_engine_has_told_of_them():
    """A burst comes between two reports of the engine: each admitted request must count for the next request."""
    hall = Hall()
    hall.admission.check(1, num_tokens=900)
    hall.admission.enter(1, num_tokens=900)
    assert "900 prompt tokens wait" in hall.refusal(num_tokens=101).message
    hall.admission.hear()  # the engine may have written this report before it received the requests
    assert "900 prompt tokens wait" in hall.refusal(num_tokens=101).message
    hall.admission.hear()
    hall.admission.check(1, num_tokens=900)


def test_when_to_come_back_is_what_the_last_endings_tell():
    hall = Hall()
    hall.admission.enter(10, num_tokens=1)
    assert hall.refusal().retry_after_s == FIRST_GUESS_S
    for _ in range(5):  # a sequence ends every half second
        hall.now += 0.5
        hall.admission.leave()
        hall.admission.enter(1, num_tokens=1)
    hall.now += 0.5
    assert hall.refusal(1).retry_after_s == pytest.approx(0.5)
    assert hall.refusal(4).retry_after_s == pytest.approx(2.0)


def test_endings_of_long_ago_say_nothing_and_nobody_is_sent_away_for_ever():
    hall = Hall()
    hall.admission.enter(11, num_tokens=1)
    hall.admission.leave()
    hall.now += 25
    assert hall.refusal(10).retry_after_s == LONGEST_WAIT_S
    hall.now += 10
    assert hall.refusal(10).retry_after_s == FIRST_GUESS_S
