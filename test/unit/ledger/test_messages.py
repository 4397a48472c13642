"""Control messages: what goes in comes out, and whatever is no message is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger.messages import (
    AskAdmission,
    AskGrowth,
    Granted,
    MessageError,
    Release,
    Row,
    RowColumns,
    Rows,
    decode,
    encode,
)

number = st.integers(0, 2**40)
numbers = st.lists(number, max_size=5).map(tuple)
rows = st.lists(st.builds(Row, number, number, number), max_size=5).map(RowColumns.of)
message = st.one_of(
    st.builds(AskAdmission, number, number, st.booleans(), st.lists(st.tuples(number, number), max_size=5).map(tuple)),
    st.builds(AskGrowth, number, number, st.booleans(), number, numbers),
    st.builds(Granted, number, number, number, numbers),
    st.builds(Release, number),
    st.builds(Rows, rows),
)


@given(st.lists(message, max_size=6))
def test_round_trip(sent):
    assert list(decode(encode(sent))) == sent


@given(st.lists(message, min_size=1, max_size=4), st.data())
def test_a_cut_stream_is_refused(sent, data):
    words = encode(sent)
    keep = data.draw(st.integers(1, len(words) - 1))
    whole = [len(encode(sent[:count])) for count in range(len(sent) + 1)]
    if keep in whole:
        assert list(decode(words[:keep])) == sent[: whole.index(keep)]
    else:
        with pytest.raises(MessageError):
            list(decode(words[:keep]))


@given(st.lists(st.integers(-3, 12), max_size=30))
def test_any_words_are_messages_or_refused(words):
    try:
        read = list(decode(words))
    except MessageError:
        return
    assert list(decode(encode(read))) == read


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([9, 0], "unknown message kind 9 at word 0"),
        ([0, 0], "unknown message kind 0"),
        ([4], "header cut at word 0 of 1"),
        ([4, -1], "claims -1 words"),
        ([4, 2, 7], "claims 2 words, 1 are there"),
        ([4, 2, 7, 7], "kind 4 at word 0"),
        ([1, 2, 7, 7], "kind 1 at word 0"),
        ([1, 4, 7, 7, 0, 3], "kind 1 at word 0"),
        ([2, 3, 1, 1, 0], "kind 2 at word 0"),
        ([3, 2, 1, 1], "kind 3 at word 0"),
        ([5, 2, 1, 1], "not a multiple of 4"),
        ([4, 1, 7, 8, 8], "unknown message kind 8 at word 3"),
    ],
)
def test_refusals_name_the_word(words, text):
    with pytest.raises(MessageError, match=text):
        list(decode(words))
