"""The packages that tables and URLs need. They are an extra, and loaded only where they are used."""

from __future__ import annotations

from importlib.util import find_spec

from blendserve.errors import ConfigError

DATA_PACKAGES = ("pyarrow", "fsspec")


def is_url(text: str) -> bool:
    """Whether a path is the URL of another file system."""
    return "://" in text and not text.startswith(("file://", "local://"))


def require_data(what: str = "tables") -> None:
    """Raises: ConfigError when a package of the extra is missing, with the command that installs all of them."""
    for name in DATA_PACKAGES:
        if find_spec(name) is None:
            raise ConfigError(
                f"{what} need {name}, which is not installed; from the clone: .venv/bin/pip install '.[data]'"
            )
