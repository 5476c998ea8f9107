"""A check finds what a run would refuse; the codec sends each kind of prompt the right way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from batch_fakes import SERVED, FakeCodec, batch_line, mixed_lines, run_fake, write_lines

from blendserve.dialect.codec import ModelCodec
from blendserve.errors import RequestError
from blendserve.job.check import MAX_LISTED_LINES, check_file
from blendserve.models.conversation import Conversation
from blendserve.models.tokenizer import Tokenizer


def test_a_check_counts_what_a_run_refuses(tmp_path: Path) -> None:
    lines = [*mixed_lines(200), batch_line("long", {"prompt": "x" * 3000}), batch_line("id-0")]
    path = write_lines(tmp_path / "in.jsonl", lines)
    report = check_file(path, SERVED, FakeCodec())
    run = run_fake(path, tmp_path / "out.jsonl")
    assert {code: count.num_lines for code, count in report.errors.items()} == run.errors_by_code
    assert (report.num_lines, report.num_valid) == (run.num_lines, run.num_succeeded)
    assert report.num_prompt_tokens == run.num_prompt_tokens
    bad = report.errors["invalid_json_line"]
    assert bad.line_numbers == [9 * number for number in range(1, MAX_LISTED_LINES + 1)]
    assert report.errors["context_length_exceeded"].line_numbers == [201]
    assert report.errors["duplicate_custom_id"].line_numbers == [202]


def test_a_check_without_a_codec_knows_no_lengths(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [batch_line("long", {"prompt": "x" * 3000, "n": 2})])
    report = check_file(path, SERVED)
    assert (report.num_valid, report.num_requests, report.num_prompt_tokens) == (1, 2, None)


class FakeTokenizer:
    """Token ids are lengths: enough to see which text went where."""

    has_chat_template = True

    special_texts = ()

    def render_each(self, conversations: Sequence[Conversation]) -> list[str]:
        return ["|".join(message["content"] for message in chat.messages) for chat in conversations]

    def encode_each(self, texts: Sequence[str], add_special_tokens: bool, max_tokens: int) -> list[Any]:
        assert max_tokens == 99
        return [np.asarray([1000] * add_special_tokens + [len(text)], np.int32) for text in texts]


def test_chats_get_the_template_and_texts_what_the_model_expects() -> None:
    tokenizer = FakeTokenizer()
    codec = ModelCodec(cast(Tokenizer, tokenizer), max_model_len=99)
    chat = Conversation(({"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}))
    encoded = codec.encode(["xy", chat, "z"])
    assert [np.asarray(token_ids).tolist() for token_ids in encoded] == [[1000, 2], [5], [1000, 1]]
    tokenizer.has_chat_template = False
    assert len(codec.encode(["xy"])) == 1
    with pytest.raises(RequestError, match="no chat template"):
        codec.encode(["xy", chat])
