"""Pages of docs/ that are made from the program: docs/cli.md, and the marked parts of docs/batch-files.md.

A marked part stands between a line `<!-- made by scripts/write-docs: NAME -->` and a line `<!-- end -->`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from doc_cli import cli_page
from doc_errors import codes_table, error_sections
from doc_fields import (
    asks_table,
    chat_options_list,
    comparison_table,
    embeddings_list,
    fields_table,
    ignored_list,
    neutral_table,
    parameters_table,
)

DOCS = Path(__file__).parent.parent / "docs"
CLI, BATCH_FILES = DOCS / "cli.md", DOCS / "batch-files.md"


def _errors() -> str:
    with tempfile.TemporaryDirectory() as directory:
        return error_sections(Path(directory))


PARTS: dict[str, Callable[[], str]] = {
    "lines by engine": asks_table,
    "lines by tool": comparison_table,
    "fields by engine": fields_table,
    "parameters": parameters_table,
    "neutral parameters": neutral_table,
    "ignored parameters": ignored_list,
    "chat options": chat_options_list,
    "embedding parameters": embeddings_list,
    "error codes": codes_table,
    "errors": _errors,
}


def batch_files_page() -> str:
    """The page as it stands, with its marked parts made again."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{PARTS[match[2]]()}\n\n<!-- end -->"

    text = BATCH_FILES.read_text()
    parts = re.compile(r"^(<!-- made by scripts/write-docs: ([a-z ]+) -->)$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
    return parts.sub(made, text)


if __name__ == "__main__":
    CLI.write_text(cli_page())
    BATCH_FILES.write_text(batch_files_page())
