"""Pages: well-formed, escaped, and without anything fetched from elsewhere."""

from __future__ import annotations

import pytest
from report_pages import PageFacts

from blendserve.report.html import Html, element, page, section, table, tiles

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", HOSTILE) == (
        "<p>&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;</p>"
    )
    assert element("p", element("b", "bold"), " <") == "<p><b>bold</b> &lt;</p>"
    assert element("p", title=HOSTILE).count("<") == 2


def test_attributes_have_html_names_and_short_numbers() -> None:
    assert element("a", class_="x", text_anchor="end", x=1.50, y=2.0, z=None) == (
        '<a class="x" text-anchor="end" x="1.5" y="2"></a>'
    )
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_a_page_holds_hostile_text_as_text() -> None:
    text = page(HOSTILE, HOSTILE, [section(HOSTILE, HOSTILE, table((HOSTILE,), [(HOSTILE,)]), tiles([(HOSTILE,) * 3]))])
    facts = PageFacts.of(text)
    assert facts.problems == []
    assert "script" not in facts.tags
    assert facts.text.count(HOSTILE) == 9
    assert facts.title == HOSTILE


def test_a_page_that_loads_something_is_found_out() -> None:
    """The check that other tests rely on sees what it is for."""
    bad = [
        Html('<img src="http://example.org/a.png">'),
        Html("<script>1</script>"),
        Html('<div style="background:url(x)">'),
    ]
    for markup in bad:
        assert PageFacts.of(page("t", "s", [markup])).problems


@pytest.mark.parametrize("num_text_columns", [1, 2])
def test_table_columns_are_text_then_numbers(num_text_columns: int) -> None:
    markup = table(("a", "b", "c"), [("1", "2", "3")], num_text_columns=num_text_columns)
    assert markup.count('class="text"') == 2 * num_text_columns
    assert markup.count('class="number"') == 2 * (3 - num_text_columns)
