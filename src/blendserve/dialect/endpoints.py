"""The endpoints that are answered here, by their URL. A new one is a module with an `Endpoint`, and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from blendserve.dialect.chat import CHAT
from blendserve.dialect.completions import COMPLETIONS
from blendserve.dialect.embeddings import EMBEDDINGS
from blendserve.dialect.endpoint import Endpoint
from blendserve.dialect.responses import RESPONSES

ENDPOINTS: Mapping[str, Endpoint] = {endpoint.url: endpoint for endpoint in (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS)}
