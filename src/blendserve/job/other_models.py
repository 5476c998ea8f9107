"""The models that lines of a file ask for and that are not here: a reason to refuse the file before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blendserve.dialect.values import shown

_MAX_NAMES = 1000
_MAX_LISTED = 5


@dataclass(slots=True)
class _Asked:
    num_lines: int
    first_line: int


class OtherModels:
    """Lines by the name that they ask for."""

    def __init__(self) -> None:
        self._by_name: dict[str, _Asked] = {}

    def add(self, name: str, line_number: int) -> None:
        asked = self._by_name.get(name)
        if asked is not None:
            asked.num_lines += 1
        elif len(self._by_name) < _MAX_NAMES:
            self._by_name[name] = _Asked(1, line_number)

    def reason(self, path: Path, served_name: str) -> str | None:
        """Why a file is not run; None where no line asks for a model that is not here."""
        names = list(self._by_name.items())
        if not names:
            return None
        listed = ", ".join(
            f"{shown(name)} ({'1 line' if asked.num_lines == 1 else f'{asked.num_lines} lines'}, the first is line "
            f"{asked.first_line})"
            for name, asked in names[:_MAX_LISTED]
        )
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        split = "" if len(names) == 1 else "; one model answers a file, so split the file by model first"
        return (
            f"{path} asks for {'the model' if len(names) == 1 else 'the models'} {listed}{more}, and the model here is "
            f"{served_name}; nothing was run. Choose with --model which model answers these lines, such as --model "
            f"{served_name}{split}"
        )
