"""Whatever a template does with a message: it gets what jinja gives it, and what the template did
not write stays known."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from skipllm_core.chat_template import ChatTemplate
from skipllm_core.tainted import plain, spans_of

# The message is in capitals, and templates write none: so who wrote a character can be seen.
CONTENT = " AB\nC AB "

EXACTLY = [
    "{{ content }}x",
    "{{ content | trim }}x",
    "{{ content | replace('A', 'x') }}",
    "{{ content | replace('A', 'x', 1) }}",
    "{{ 'axa' | replace('x', content) }}",
    "{{ content | replace(content, 'x') }}{{ content | string }}",
    "{{ content[1:-1] }}{{ content[::-1] }}{{ content | reverse }}",
    "{{ (content | trim | first) ~ (content | list | last) }}",
    "{% for char in content %}{{ char }}.{% endfor %}",
    "{{ ','.join([content, 'x']) }}{{ [content, 'x'] | join('; ') }}",
    "{{ messages | map(attribute='content') | map('trim') | join(',') }}",
    "{{ content.split('C')[0] }}x{{ content.splitlines()[1] }}x{{ content.rsplit(None, 1)[0] }}",
    "{{ 'x%sx' % content }}{{ '%s.%d' % (content, 1) }}{{ '%s'|format(content) }}",
    "{{ 'a{}b{x}'.format(content, x=content) }}{{ 'a{0[content]}'.format(messages[0]) }}",
    "{{ content ~ 1 ~ 'x' ~ content }}{{ content + 'x' }}{{ 'x' + content }}{{ content * 2 }}",
    "{{ content | default('x') }}{{ nothing | default(content) }}",
    "{{ (content, 'x') | min }}{{ [content] | sort | first }}",
    "{% macro say(text) %}a{{ text }}{% endmacro %}{{ say(content) }}{{ say(text=content) }}",
    "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}{{ content }}{% endcall %}",
    "{% set x %}a{{ content }}b{% endset %}{{ x }}",
    "{% filter trim %} a{{ content }} {% endfilter %}x",
    "{% set ns = namespace(x=content) %}{{ ns.x }}",
    "{{ content | tojson }}{{ messages[0].content | tojson(ensure_ascii=true) }}",
    "{{ {'k': [content, 1, none, true]} | tojson }}{{ {'k': content} | tojson(indent=2) }}",
    "{{ {'b': content, 'a': 1} | tojson(sort_keys=true) }}",
    "{{ {'b': content} | tojson(separators=(',', ':')) }}",
    "{{ {'k': content} }}{{ [content, 'x'] }}{{ (content,) }}",
    "{% if content.startswith(' A') and 'C' in content %}yes{% endif %}",
    "{{ content | length }}{{ content.count('A') }}{{ content.find('C') }}",
]
AS_A_WHOLE = [
    "{{ content | center(20) }}",
    "{{ content | indent(2) }}",
    "{{ content | wordwrap(3) }}",
    "{{ content | truncate(6) }}",
    "{{ content.center(20) }}{{ content.zfill(20) }}{{ 'x'.join(content.expandtabs()) }}",
    "{{ content.replace('', '-') }}",
    "{{ content.format() }}{{ content % () }}",
]
# Of a text made in some way, what conditions see.
MADE = [
    "content ~ ''",
    "'%s' % content",
    "'%s' | format(content)",
    "'{}'.format(content)",
    "''.join([content])",
    "[content] | join('')",
    "content | replace('x', '')",
    "say(content)",
    "block",
    "content | string",
    "messages[0]['content']",
]


def rendered(template: str) -> tuple[str, str]:
    """(ours, transformers')"""
    messages = [{"role": "user", "content": CONTENT}]
    source = "{% set content = messages[0].content %}" + template
    (expected,), _ = render_jinja_template([messages], chat_template=source)
    return ChatTemplate(source, variables={}).render(messages), expected


def tainted_places(text: str) -> set[int]:
    return {i for span in spans_of(text) for i in range(span.start, span.end)}


@pytest.mark.parametrize("template", EXACTLY)
def test_what_the_message_wrote_stays_known_exactly(template: str) -> None:
    found, expected = rendered(template)
    assert plain(found) == expected
    capitals = {i for i, char in enumerate(expected) if char.isupper()}
    letters = {i for i, char in enumerate(expected) if char.isalpha()}
    assert tainted_places(found) & letters - _escapes(expected) == capitals


def _escapes(text: str) -> set[int]:
    """The n of JSON's and Python's line ends is part of how the message is written."""
    return {i + 1 for i in range(len(text) - 1) if text[i : i + 2] == "\\n"}


@pytest.mark.parametrize("template", AS_A_WHOLE)
def test_what_is_made_of_a_message_in_unknown_ways_counts_as_the_messages(template: str) -> None:
    found, expected = rendered(template)
    assert plain(found) == expected
    assert tainted_places(found) >= {i for i, char in enumerate(expected) if char.isupper()}


@pytest.mark.parametrize("made", MADE)
def test_conditions_see_the_text_whatever_was_done_to_it(made: str) -> None:
    setting = (
        "{% macro say(text) %}{{ text }}{% endmacro %}{% set block %}{{ content }}{% endset %}"
        f"{{% set x = {made} %}}"
    )
    asked = "{{ x == content }},{{ x.startswith(' A') }},{{ x | length }},{{ (x | trim)[:2] }}"
    found, expected = rendered(setting + asked)
    assert plain(found) == expected
    assert expected.startswith("True,True,")


@pytest.mark.parametrize("place", ["options", "tools"])
def test_whatever_else_a_client_gives_is_known_too(place: str) -> None:
    template = ChatTemplate("a{{ extra }}{{ tools[0].function.name if tools }}b", variables={})
    given: dict[str, Any] = {"options": {"extra": "AB"}, "tools": [{"function": {"name": "AB"}}]}
    found = template.render([{"role": "user", "content": "x"}], **{place: given[place]})
    assert (plain(found), tainted_places(found)) == ("aABb", {1, 2})


def test_html_is_not_escaped_in_json() -> None:
    found, _ = rendered("{{ '<a & b>' | tojson }}")
    assert found == '"<a & b>"'
