"""A tainted text is the str that it looks like, and every character of it knows who wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipllm_core.tainted import Marks, Origin, Tainted, plain, spans_of

MARKS = Marks()
# Who wrote a character can be seen: users write these, the template the others.
USERS = "AB\t-"
TEXTS = st.text(alphabet="ab .\nAB\t-", max_size=12)
TRUSTED = st.text(alphabet="ab .\n", max_size=4)


def text_of(written: str) -> str:
    """Every run of a user's characters tainted as theirs."""
    parts = (MARKS.taint(c, Origin.USER) if c in USERS else c for c in written)
    return MARKS.join(parts)


def check(found: object, expected: object) -> None:
    assert found == expected
    if isinstance(expected, str):
        assert isinstance(found, str)
        spans = spans_of(found)
        tainted = {i for span in spans for i in range(span.start, span.end)}
        assert tainted == {i for i, char in enumerate(found) if char in USERS}
        assert all(span.origin == Origin.USER for span in spans)
    elif isinstance(expected, Iterable):
        assert isinstance(found, Iterable)
        for one, other in zip(found, expected, strict=True):
            check(one, other)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "a + b": lambda a, b: a + b,
    "a + plain": lambda a, _: a + "x",
    "plain + a": lambda a, _: "x" + a,
    "a * 3": lambda a, _: a * 3,
    "2 * a": lambda a, _: 2 * a,
    "iterated": lambda a, _: list(a),
    "reversed": lambda a, _: a[::-1],
    "every second": lambda a, _: a[1::2],
    "from the end": lambda a, _: a[-3:-1],
    "an empty slice": lambda a, _: a[5:2],
    "joined with": lambda a, b: a.join([b, "x", a]),
    "joined with none": lambda a, _: a.join([]),
    "split by white space": lambda a, _: a.split(),
    "split once by white space": lambda a, _: a.split(None, 1),
    "rsplit by white space": lambda a, _: a.rsplit(),
    "rsplit once by white space": lambda a, _: a.rsplit(None, 1),
    "splitlines": lambda a, _: a.splitlines(),
    "splitlines with their ends": lambda a, _: a.splitlines(True),
    "stripped": lambda a, _: a.strip(),
    "stripped of": lambda a, _: a.strip("aA"),
    "lstripped": lambda a, _: a.lstrip(),
    "rstripped": lambda a, _: a.rstrip("\n"),
    "%s": lambda a, _: "x%sx" % a,  # noqa: UP031
    "%s and %s": lambda a, b: MARKS.read("%s.%s" % (a, b)),  # noqa: UP031
    "{}": lambda a, b: MARKS.read("{}.{!s}".format(a, b)),  # noqa: UP032
    "str": lambda a, _: MARKS.read(str(a)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(TEXTS, TEXTS)
def test_an_operation_gives_what_it_gives_for_str_and_keeps_the_spans(
    name: str, a: str, b: str
) -> None:
    check(OPERATIONS[name](text_of(a), text_of(b)), OPERATIONS[name](a, b))


@given(TEXTS, st.sampled_from([".", "A", "ab", "-B", " "]), st.integers(-1, 2), TEXTS)
def test_a_text_is_parted_and_replaced_at_what_it_holds(
    a: str, sep: str, count: int, new: str
) -> None:
    text = text_of(a)
    check(text.split(sep, count), a.split(sep, count))
    check(text.rsplit(sep, count), a.rsplit(sep, count))
    check(text.partition(sep), a.partition(sep))
    check(text.rpartition(sep), a.rpartition(sep))
    check(text.removeprefix(sep), a.removeprefix(sep))
    check(text.removesuffix(sep), a.removesuffix(sep))
    check(text.replace(sep, text_of(new), count), a.replace(sep, new, count))


@given(TEXTS)
def test_conditions_see_the_text_as_it_is(a: str) -> None:
    text = text_of(a)
    assert isinstance(text, str)
    assert (text, hash(text), len(text), bool(text)) == (a, hash(a), len(a), bool(a))
    assert text.startswith(a[:2])
    assert text.endswith(a[-2:])
    assert a in text
    assert {text: 1}[a] == 1


def test_what_str_refuses_is_refused_alike() -> None:
    text: Any = MARKS.taint("abc", Origin.USER)
    for broken in (
        lambda: text[3],
        lambda: text["type"],
        lambda: text + 1,
        lambda: 1 + text,
        lambda: text * "a",
        lambda: text.split(""),
    ):
        with pytest.raises((TypeError, IndexError, ValueError)):
            broken()


@pytest.mark.parametrize("method", ["upper", "lower", "title", "capitalize"])
@pytest.mark.parametrize("word", ["abc dEf", "ßtraße"])  # the upper case of ß is two letters
def test_changing_case_keeps_the_text_tainted(method: str, word: str) -> None:
    found = getattr(MARKS.taint(word, Origin.USER), method)()
    assert found == getattr(word, method)()
    assert spans_of(found) == ((0, len(found), Origin.USER),)


@pytest.mark.parametrize("text", ["plain", 'a "quoted" \\ é\n\ufdd0'])
def test_spans_survive_the_ordinary_ways_of_writing_values(text: str) -> None:
    tainted = MARKS.taint({"key": [text]}, Origin.INSTRUCTOR)
    for written, whole in (
        (str(tainted), str({"key": [text]})),
        (json.dumps(str(tainted["key"][0])), json.dumps(text)),
    ):
        found = MARKS.read(written)
        assert found == whole
        for start, end, origin in spans_of(found):
            assert origin is Origin.INSTRUCTOR
            assert "key" in found[start:end] or plain(found)[start:end] in whole
        assert sum(end - start for start, end, _ in spans_of(found)) >= len(text)


def test_where_a_mark_was_lost_more_is_tainted_and_not_less() -> None:
    marked = str(text_of("abA-Bba"))
    without_end = MARKS.read(marked[: marked.rindex("q")])
    assert spans_of(without_end) == ((2, 5, Origin.USER),)
    without_beginning = MARKS.read(marked[marked.index("A") :])
    assert plain(without_beginning) == "A-Bba"
    assert spans_of(without_beginning) == ((0, 3, Origin.USER),)


def test_what_loses_the_spans_is_tainted_as_a_whole() -> None:
    text = text_of("aB")
    assert spans_of(MARKS.whole(text.center(6), text)) == ((0, 6, Origin.USER),)
    assert spans_of(MARKS.whole("x", "y", 3)) == ()


def test_nobody_can_write_marks() -> None:
    other = str(Marks().taint("A", Origin.USER))
    assert spans_of(MARKS.read(other)) == ()
    assert MARKS.read(other) == other
    assert isinstance(text_of("A"), Tainted)
