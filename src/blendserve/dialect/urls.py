"""Addresses of endpoints, and the spellings of them that batch files have: with a host, a final slash, Azure's."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import urlsplit

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
EMBEDDINGS_URL = "/v1/embeddings"
RESPONSES_URL = "/v1/responses"
TEXT_URLS = (CHAT_URL, COMPLETIONS_URL, RESPONSES_URL)

_OPENAI_PATHS = re.compile(
    r"/(chat/completions|completions|embeddings|responses|moderations|images/\w+|videos|audio/\w+)"
)
_AZURE_PREFIX = re.compile(r"/openai(/deployments/[^/]+)?(?=/)")


@lru_cache(maxsize=256)
def canonical_url(url: str) -> str:
    """The path that OpenAI's documentation gives the endpoint: begins with /v1 where OpenAI has it, without a final
    slash, host or query. Texts that are no address come back as they are.

    "/chat/completions", "https://host/v1/chat/completions/" and "/openai/deployments/d/chat/completions?api-version=1"
    are all "/v1/chat/completions".
    """
    if not url.startswith(("/", "http://", "https://")):
        return url
    try:
        path = urlsplit(url).path
    except ValueError:
        return url
    path = _AZURE_PREFIX.sub("", "/" + path.strip("/"), count=1)
    if path == "/":
        return url
    return "/v1" + path if _OPENAI_PATHS.fullmatch(path) else path
