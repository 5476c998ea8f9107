"""What a line may ask beyond text: read where the engine can, refused where it cannot, kept in the store."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from blendserve.dialect.extras import Abilities, Extras, take_pictures
from blendserve.dialect.images import Picture, image_size
from blendserve.dialect.schema import BatchLine, ServedModel, parse_line
from blendserve.dialect.urls import EMBEDDINGS_URL
from blendserve.errors import RequestError
from blendserve.job.reader import BadLine, BatchReader
from blendserve.models.conversation import Conversation, text_of_content

ABLE = ServedModel(("tiny",), abilities=Abilities(adapters=("pirate",), sees=True))
PLAIN = ServedModel(("tiny",))
EMBEDDER = ServedModel(("tiny",), abilities=Abilities(urls=(EMBEDDINGS_URL,)))
HELLO = [{"role": "user", "content": "hello"}]


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def jpeg(width: int, height: int) -> bytes:
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 300) + b"x" * 300
    return b"\xff\xd8" + thumbnail + b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"


def parsed(served: ServedModel = ABLE, url: str = "/v1/chat/completions", **body: Any) -> BatchLine:
    return parse_line({"custom_id": "a", "method": "POST", "url": url, "body": body}, 1, served)


def extras_of(**body: Any) -> Extras:
    return Extras.from_bytes(parsed(messages=HELLO, **body).body)


def test_a_plain_line_carries_nothing() -> None:
    line = parsed(messages=HELLO, response_format={"type": "text"}, max_tokens=3)
    assert line.body == b""
    assert Extras.from_bytes(line.body) == Extras()


def test_without_the_ability_it_stays_unsupported() -> None:
    with pytest.raises(RequestError, match="image_url"):
        parsed(PLAIN, messages=[{"role": "user", "content": [picture_part(png(2, 2))]}])


def picture_part(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def test_pictures_are_counted_and_the_conversation_is_kept_whole() -> None:
    content = [picture_part(png(640, 480)), {"type": "text", "text": "what is it?"}]
    messages = [{"role": "developer", "content": "look"}, {"role": "user", "content": content}]
    line = parsed(messages=messages)
    (conversation,) = line.prompts
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0] == {"role": "developer", "content": "look"}
    second = conversation.messages[1]
    assert text_of_content(second["content"]) == "what is it?"
    picture = Picture.from_text(second["pictures"])
    assert (picture.width, picture.height) == (640, 480)
    kept = Extras.from_bytes(line.body).messages
    assert kept == ({"role": "system", "content": "look"}, {"role": "user", "content": content})


def test_a_picture_alone_is_a_message() -> None:
    (conversation,) = parsed(messages=[{"role": "user", "content": [picture_part(b"")]}]).prompts
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0]["content"] == ""


@pytest.mark.parametrize("value", [None, "text", {"url": "file:///etc/passwd"}, {"url": 3}, {}])
def test_pictures_need_an_address_that_is_no_file(value: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        parsed(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": value}]}])
    assert refusal.value.param == "messages[0].content[0].image_url"


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (png(640, 480), (640, 480)),
        (jpeg(320, 200), (320, 200)),
        (b"GIF89a" + struct.pack("<HH", 12, 34), (12, 34)),
        (b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0\0\0\0\0" + (99).to_bytes(3, "little") + (49).to_bytes(3, "little"), (100, 50)),
        (b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0/" + ((99) | (49 << 14)).to_bytes(4, "little") + b"\0" * 9, (100, 50)),
        (b"RIFF\0\0\0\0WEBPVP8 " + b"\0" * 10 + struct.pack("<HH", 100, 50), (100, 50)),
        (b"", (0, 0)),
        (jpeg(320, 200)[:40], (0, 0)),
        (b"\xff\xd8\xff", (0, 0)),
    ],
)
def test_sizes_are_read_off_headers(data: bytes, size: tuple[int, int]) -> None:
    assert image_size(data) == size


def test_equal_pictures_have_equal_digests_and_others_are_not_fetched() -> None:
    one, other = Picture.from_url("https://example.org/a.png"), Picture.from_url("https://example.org/b.png")
    assert one == Picture.from_url("https://example.org/a.png")
    assert one.digest != other.digest
    assert (one.width, one.height) == (0, 0)
    assert Picture.from_url("data:image/png;base64,a").width == 0


def test_adapters_are_models_that_lines_may_name() -> None:
    assert Extras.from_bytes(parsed(messages=HELLO, model="pirate").body).adapter == "pirate"
    assert Extras.from_bytes(parsed(messages=HELLO, model="tiny").body).adapter is None
    with pytest.raises(RequestError, match="the line asks for model"):
        parsed(messages=HELLO, model="unknown")


def test_a_file_may_mix_adapters_but_not_models(tmp_path: Path) -> None:
    body = '{{"custom_id":"{0}","method":"POST","url":"/v1/completions","body":{{"model":"{1}","prompt":"x"}}}}'
    path = tmp_path / "in.jsonl"
    path.write_text(
        "\n".join(body.format(n, name) for n, name in enumerate(["pirate", "gpt", "pirate", "gpt", "gpt-2"]))
    )
    served = ServedModel(("tiny",), accepts_any_name=True, abilities=ABLE.abilities)
    read = list(BatchReader(path, served))
    assert [isinstance(line, BadLine) for line in read] == [False, False, False, False, True]


def test_embeddings_take_the_four_forms_of_input() -> None:
    for given, prompts in (
        ("text", ("text",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ):
        line = parsed(EMBEDDER, "/v1/embeddings", input=given, encoding_format="base64", dimensions=8, user="me")
        assert line.prompts == prompts
        assert Extras.from_bytes(line.body) == Extras(encoding_format="base64", dimensions=8)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": True}, "dimensions"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ],
)
def test_wrong_embedding_bodies_are_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parsed(EMBEDDER, "/v1/embeddings", **body)
    assert refusal.value.param == param


def test_an_engine_answers_text_or_embeddings() -> None:
    with pytest.raises(RequestError, match="it must be /v1/embeddings"):
        parsed(EMBEDDER, messages=HELLO)
    with pytest.raises(RequestError, match="/v1/completions"):
        parsed(ABLE, "/v1/embeddings", input="a")


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("https://pictures.example/a.png", True),
        ("https://Pictures.Example:8443/a.png", True),
        ("https://evil.example/a.png", False),
        ("https://pictures.example.evil.example/a.png", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("http://localhost/a.png", False),
        ("http://[::1]/a.png", False),
        ("http://127.0.0.1@pictures.example/a.png", False),
        ("http://127.0.0.1\\@pictures.example/", False),
        ("http://pictures.example\\.evil.example/", False),
        ("http://[pictures.example/", False),
    ],
)
def test_pictures_are_fetched_only_from_hosts_that_the_user_names(url: str, is_allowed: bool) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with pytest.raises(RequestError, match="--image-domain"):
        take_pictures(messages)
    if is_allowed:
        assert len(take_pictures(messages, ("pictures.example",))[1][0]) == 1
    else:
        with pytest.raises(RequestError, match=r"would be fetched from .* not allowed"):
            take_pictures(messages, ("pictures.example",))
