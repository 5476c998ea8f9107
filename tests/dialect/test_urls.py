"""Spellings of one address: whoever wrote the file, the same endpoint answers."""

from __future__ import annotations

import pytest

from blendserve.dialect.urls import canonical_url


@pytest.mark.parametrize(
    "spelling",
    [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/chat/completions",
        "//v1/chat/completions",
        "https://api.openai.com/v1/chat/completions",
        "http://127.0.0.1:8000/v1/chat/completions/?trace=1",
        "https://host.example/chat/completions",
        "/openai/v1/chat/completions",
        "/openai/deployments/my-model/chat/completions?api-version=2024-10-21",
        "https://r.openai.azure.com/openai/deployments/my-model/chat/completions?api-version=2024-10-21",
    ],
)
def test_one_endpoint_has_many_spellings(spelling: str) -> None:
    assert canonical_url(spelling) == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/embeddings", "/v1/embeddings"),
        ("/responses", "/v1/responses"),
        ("/moderations", "/v1/moderations"),
        ("/images/generations", "/v1/images/generations"),
        ("/rerank", "/rerank"),
        ("/v2/rerank/", "/v2/rerank"),
        ("https://host.example/score", "/score"),
    ],
)
def test_what_openai_does_not_have_keeps_its_path(given: str, expected: str) -> None:
    assert canonical_url(given) == expected


@pytest.mark.parametrize(
    "no_address", ["", "chat/completions", "v1/chat/completions", "ftp://host/v1/x", "http://[", "/"]
)
def test_what_is_no_address_stays(no_address: str) -> None:
    assert canonical_url(no_address) == no_address
