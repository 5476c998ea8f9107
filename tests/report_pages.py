"""What a test may want to know of an HTML page, found with the standard parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset(("meta", "br", "link", "img", "input", "hr"))
LOADING_TAGS = frozenset(("script", "link", "img", "iframe", "object", "embed", "image", "use", "video", "audio", "a"))
LOADING_ATTRIBUTES = frozenset(("src", "href", "xlink:href", "srcset", "data", "action"))


@dataclass
class PageFacts:
    """Tags, text and tooltips of a page; `problems` lists bad nesting and whatever would be loaded or run."""

    tags: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    max_points: int = 0

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def title(self) -> str:
        return self.titles[0]

    @classmethod
    def of(cls, page: str) -> PageFacts:
        parser = _Parser()
        parser.feed(page)
        parser.close()
        parser.facts.problems += [f"<{tag}> is not closed" for tag in parser.open_tags]
        if not page.startswith("<!DOCTYPE html>"):
            parser.facts.problems.append("no doctype")
        return parser.facts


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.facts = PageFacts()
        self.open_tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.facts.tags.append(tag)
        if tag in LOADING_TAGS:
            self.facts.problems.append(f"<{tag}>")
        for name, value in attrs:
            if name in LOADING_ATTRIBUTES or name.startswith("on"):
                self.facts.problems.append(f"{tag} has {name}={value}")
            if "url(" in (value or "") or "//" in (value or ""):
                self.facts.problems.append(f"{tag} refers to {value}")
            if name == "points":
                self.facts.max_points = max(self.facts.max_points, len((value or "").split()))
            if name in ("points", "x", "y", "width", "height", "x1", "y1", "d") and "nan" in (value or ""):
                self.facts.problems.append(f"{tag} has {name}={value}")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.facts.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        inside = self.open_tags[-1] if self.open_tags else ""
        if inside == "style":
            if "url(" in data or "@import" in data:
                self.facts.problems.append("the style sheet loads something")
        elif inside == "title":
            self.facts.titles.append(data)
        elif data.strip():
            self.facts.texts.append(data)
