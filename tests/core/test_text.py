"""Quoting of text in error messages."""

import time

from metakern.core.text import first_line, one_line, quoted, shortened


def test_quotes_are_short_whatever_they_are_of():
    nested = [1]
    for _ in range(40):
        nested = [nested] * 9
    for value in ("x" * 10**6, 10**20_000, nested, {str(i): nested for i in range(99)}, b"x" * 10**6):
        start = time.process_time()
        assert len(quoted(value)) <= 80
        assert time.process_time() - start < 0.5
    assert quoted(0.5) == "0.5"
    assert quoted("a") == "'a'"


def test_texts_are_shortened_to_the_limit():
    assert shortened("x" * 80) == "x" * 80
    assert shortened("x" * 81) == "x" * 77 + "..."
    assert shortened("abcdefgh", 5) == "ab..."


def test_messages_are_one_line():
    assert one_line("Error(s) in loading:\n\tMissing  key") == "Error(s) in loading: Missing key"
    assert len(one_line("x " * 1000)) == 300


def test_of_errors_the_first_line_is_quoted():
    assert first_line(ValueError("bad  shape\nException raised from file.cpp")) == "ValueError: bad shape"
    assert first_line(RuntimeError()) == "RuntimeError: "
    assert len(first_line(ValueError("x" * 1000))) == len("ValueError: ") + 300
