"""Answers are read from pieces of any size, and stamped with the time of the piece that completes a part."""

import itertools

import pytest
from scripted_server import event, part, usage

from jfa_bench.measure.client import Client, Reply, Stream
from jfa_bench.measure.latencies import Answer

WHOLE = b"".join(
    [
        b": a comment\n\n",
        part("é"),
        part(""),
        part("c", "length"),
        event({"choices": [], "usage": usage(7, 3)}),
        event("[DONE]"),
    ]
)


def read(pieces):
    """The answer to pieces that arrive at 1, 2, 3, ..., and whether the last one ended it."""
    answer, ended = Answer(sent=0.0), False
    stream = Stream(answer)
    for now, piece in enumerate(pieces, start=1):
        ended = stream.take(piece, float(now))
    stream.check()
    return answer, ended


def test_each_part_has_the_time_of_its_last_byte():
    cuts = [0, 20, WHOLE.index(b'"c"'), len(WHOLE) - 20, len(WHOLE)]
    answer, ended = read([WHOLE[a:b] for a, b in itertools.pairwise(cuts)])
    assert ended and (answer.times, answer.end) == ([2.0, 2.0, 3.0], 3.0)
    assert (answer.input_tokens, answer.output_tokens) == (7, 3)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_pieces_of_any_size_and_both_newlines(newline):
    text = WHOLE.replace(b"\n", newline)
    for size in (1, 2, 3, len(text)):
        answer, ended = read([text[at : at + size] for at in range(0, len(text), size)])
        assert ended and len(answer.times) == 3 and answer.output_tokens == 3


def test_an_event_may_have_several_lines():
    assert len(read([part("a", "stop").replace(b'"choices"', b'\ndata: "choices"')])[0].times) == 1


def test_usage_may_stand_beside_choices():
    answer, _ = read([part("a", usage=usage(7, 1)), part("b", "stop", usage=usage(7, 2))])
    assert (answer.input_tokens, answer.output_tokens) == (7, 2)


def chat(finish_reason=None, **delta):
    return event({"choices": [{"delta": delta, "finish_reason": finish_reason}]})


def test_in_a_chat_a_role_and_an_end_are_no_tokens():
    pieces = [chat(role="assistant", content=""), chat(reasoning_content="a"), chat(content="b"), chat("stop")]
    answer, _ = read(pieces)
    assert (answer.times, answer.end) == ([2.0, 3.0], 4.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (part("a"), "the stream ended without finish_reason"),
        (b'{"choices": []}', "the stream ended without finish_reason"),
        (part("a") + event({"error": {"message": "out of\nmemory"}}), "error in the stream: out of memory"),
        (part("a") + event({"error": "broken"}), "error in the stream: broken"),
        (event("{"), "the stream has an event that is no JSON object: b' {'"),
        (event("3"), "the stream has an event that is no JSON object: b' 3'"),
        (chat("stop", role="assistant"), "the stream has no token"),
    ],
)
def test_faults(text, message):
    with pytest.raises(ValueError, match=message):
        read([text])


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_chunks_are_read_from_pieces_of_any_size():
    whole = HEAD + b"5\r\nab\r\nc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
    for size in range(1, len(whole) + 1):
        reply = Reply()
        assert b"".join(reply.take(whole[at : at + size]) for at in range(0, len(whole), size)) == b"ab\r\ncde"
        assert reply.status == 200


def test_a_body_without_chunks_and_the_body_of_an_error():
    reply = Reply()
    assert reply.take(b"HTTP/1.0 200 OK\r\n\r\nab") + reply.take(b"c") == b"abc"
    reply = Reply()
    reply.take(b"HTTP/1.1 429 Too Many\r\nretry-after: 7\r\n\r\n{")
    reply.take(b"}")
    assert (reply.status, reply.retry_after, reply.body) == (429, 7, b"{}")
    with pytest.raises(ValueError, match=r"the answer is not HTTP/1\.1: 'SSH-2\.0-OpenSSH'"):
        Reply().take(b"SSH-2.0-OpenSSH\r\n\r\n")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match="is not the URL of a server, such as"):
        Client(url, {})
