"""Self-contained HTML pages: escaped by construction, one style sheet inside, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

Attribute = str | float | None
_VOID = frozenset(("meta", "br"))
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Html(str):
    """Markup. Strings that are not of this type are text, and are escaped wherever they meet markup."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: Attribute) -> Html:
    """One element. Attributes that are None are left out; `class_` becomes class, `text_anchor` text-anchor."""
    opening = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Markup of all parts, one after the other; text is escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(title: str, subtitle: str, sections: Sequence[Html]) -> str:
    """A whole document. Styles suit phones, print, and light and dark screens; its policy forbids loading anything."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Html(_style_sheet())),
    )
    body = element("body", element("header", element("h1", title), element("p", subtitle)), element("main", *sections))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def section(heading: str, note: str, *children: Html) -> Html:
    """A heading, a line that says what to see, and what is to be seen."""
    return element("section", element("h2", heading), element("p", note, class_="note"), *children)


def figure(caption: str, drawing: Html) -> Html:
    """A drawing under its caption; it scrolls sideways where the screen is narrow."""
    return element("figure", element("figcaption", caption), element("div", drawing, class_="scroll"))


def grid(*children: Html, is_narrow: bool = False) -> Html:
    """Children beside each other where there is room: two in a row, three where they are narrow."""
    return element("div", *children, class_="grid narrow" if is_narrow else "grid")


def tiles(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Key figures: (label, value, remark)."""
    return element(
        "div",
        *(
            element(
                "div",
                element("div", label, class_="label"),
                element("div", value, class_="value"),
                element("div", remark, class_="remark"),
                class_="tile",
            )
            for label, value, remark in entries
        ),
        class_="tiles",
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, num_text_columns: int = 1) -> Html:
    """A table whose first columns are text; the others are numbers, aligned to the right."""

    def cells(name: str, values: Sequence[str]) -> Html:
        kinds = ("text" if column < num_text_columns else "number" for column in range(len(values)))
        return element("tr", *(element(name, v, class_=kind) for v, kind in zip(values, kinds, strict=True)))

    head = element("thead", cells("th", headers))
    body = element("tbody", *(cells("td", row) for row in rows))
    return element("div", element("table", head, body), class_="scroll")


def _attribute(value: str | float | None) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _style_sheet() -> str:
    return (files("blendserve.report") / "page.css").read_text(encoding="utf-8")
