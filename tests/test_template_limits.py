"""Chat templates of strangers that loop, grow and nest: each ends soon, in little memory, with one line."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from jaxdeploy.chat_template.limits import LARGEST, LimitError, Meter
from jaxdeploy.chat_template.sandbox import MAX_SOURCE, CompiledTemplate
from jaxdeploy.errors import CheckpointError, RequestError

SECONDS = 10
"""Generous, for a busy machine."""
MEMORY = 300 * 2**20

BIG = "{% set ns = namespace(x='x', l=[1], t=(1,), d={}) %}{% for i in range(99) %}"
GROWING = [
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ [0] * 10**9 }}",
    "{{ (1,) * 10**9 }}",
    "{{ (messages * 10**8) | length }}",
    "{{ messages[0].content * 10**8 }}",
    "{% for m in messages * 99999 %}{{ m.content * 9999 }}{% endfor %}",
    "{{ 10 ** (10**9) }}",
    "{{ (10**4000) ** (10**4000) }}",
    "{{ 2 ** -(10**9) }}",
    BIG + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    BIG + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    BIG + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    BIG + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    BIG + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    BIG + "{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}{{ ns.d | tojson }}",
    BIG + "{% set ns.d = dict(a=ns.d, b=ns.d) %}{% endfor %}{{ ns.d | string }}",
    BIG + "{% set ns.d = {'a': ns.d.items(), 'b': ns.d.items()} %}{% endfor %}{{ ns.d | string }}",
    BIG + "{% set ns.d = {'a': ns.d.values(), 'b': ns.d.values()} %}{% endfor %}{{ ns.d ~ '' }}",
    BIG + "{% set ns.l = ns.l + ['x' * 10**6 ~ i] %}{% endfor %}{{ ns.l | join | length }}",
    "{% set ns = namespace(g=[[[1]], [[1]]]) %}{% for i in range(999) %}{% set ns.g = ns.g | groupby(1) | list %}"
    "{% endfor %}{{ ns.g }}",
    "{% set a = namespace() %}{% set b = namespace() %}{% set a.x = b %}{{ a }}",
    "{{ '%1000000000s' % 'x' }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%*s' % (1000000000, 'x') }}",
    "{{ '%(a)1000000000s' % {'a': 1} }}",
    "{{ '%1000000000s' | format('x') }}",
    "{{ '%*s' | format(1000000000, 'x') }}",
    "{{ ('%s' * 10**5) % (('x' * 10**6),) }}",
    "{{ ('%(a)s' * 10**5) % {'a': 'x' * 10**6} }}",
    "{{ ('%1000000000s' | safe) % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{0:{w}}'.format(1, w=10**9) }}",
    "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "{{ ('{:1000000000}' | safe).format(1) }}",
    "{{ ('{0}' * 10**5).format('x' * 10**6) }}",
    "{{ ('{0.x}' * 10**5).format(namespace(x='x' * 10**6)) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.rjust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ '\\t'.expandtabs(tabsize=10**9) }}",
    "{{ ('x' | attr('center'))(1000000000) }}",
    "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "{{ ('y' * 10**6).join(range(9999) | map('string')) }}",
    "{{ ('y' * 10**6).join('x' * 10**6) }}",
    "{{ ('x' * 10**6).translate({120: 'y' * 10**6}) }}",
    "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ 'x'.encode('utf-8').ljust(10**9) }}",
    "{{ 'x'.encode() * 10**9 }}",
    "{{ 'x' | center(10**9) }}",
    "{{ 'x\\ny' | indent(10**9) }}",
    "{{ 'x' | indent(width=10**9, first=true) }}",
    "{{ ('x\\n' * 10**4) | indent('z' * 10**6) }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list | length }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ [[1]] | tojson(indent=10**9) }}",
    "{{ [1, 2] | tojson(separators=('x' * 10**6, 'y')) }}",
    "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
    "{{ ('x' * 10**6) | replace('', 'y' * 10**6) }}",
    "{{ ('x' * 10**6) | join('y' * 10**6) }}",
    "{{ range(99999) | join('y' * 10**6) }}",
    "{{ ['x'] | map('center', 10**9) | list }}",
    "{{ ['x'] | map('replace', 'x', 'y' * 10**6) | map('replace', 'y', 'z' * 10**6) | list }}",
    "{{ ('x' * 10**6) | wordwrap(1, true, 'y' * 10**6) }}",
    "{{ ('x' * 10**6) | list | length }}",
    "{{ ('x ' * 10**6).split() | length }}",
    "{{ ('x' * 10**6).split('x') | length }}",
    "{{ ('x\\n' * 10**6).splitlines() | length }}",
    "{{ dict.fromkeys(range(99999), 'x' * 10**6) }}",
    "{{ [('x' * 10**6)] * 1000 }}",
    "{{ {'a': 'x' * 10**6}.items() | list * 1000 }}",
    "{{ ('&' * 10**6) | forceescape | forceescape | forceescape | forceescape | forceescape }}",
    "{% set x %}{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}{% endset %}{{ x }}",
    "{% for i in range(99999) %}" + "x" * 100000 + "{% endfor %}",
    "{% for i in range(99999) %}{{ '" + "x" * 100000 + "' }}{% endfor %}",
    "{% set c = cycler('x' * 10**6) %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
    "{% set j = joiner('x' * 10**6) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
    "{% filter center(10**9) %}x{% endfilter %}",
    "{% filter replace('x', 'y' * 10**6) %}{{ 'x' * 10**6 }}{% endfilter %}",
    "{{ strftime_now('x' * 10**6) }}",
    "{{ raise_exception('x' * 10**9) }}",
]
SLOW = [
    "{% for i in range(10**15) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}x{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "{{ lipsum(10**9) }}",
    "{% set a = [range(999) | list] * 999 %}{{ a | sum(start=[]) | length }}",
    "{{ ('a' * 10**6).strip('b' * 10**6 + 'a') }}",
    "{{ ('a' * 10**6) | trim('b' * 10**6 + 'a') }}",
    "{{ ('x ' * 10**6) | wordwrap(1) }}",
    "{{ ('<' * 10**6) | striptags }}",
    "{{ ('http://a.b ' * 10**5) | urlize }}",
    "{{ ('x' * 10**6) | pprint }}",
    "{{ {'a': 'x' * 10**6} | xmlattr }}",
    "{{ ('x ' * 10**6) | title | length }}",
    "{% set l = range(99999) | list %}{% for i in l %}{{ l | sum }}{% endfor %}",
    "{% set a = 'x' * 10**6 %}{% for i in range(9999) %}{{ a in (a ~ a) }}{% endfor %}",
]
NESTED = [
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ x" + ".a" * 4000 + " }}",
    "{{ 1" + "+1" * 4000 + " }}",
    "{{ 'x'" + "|upper" * 4000 + " }}",
    "{{ x" + "[0]" * 4000 + " }}",
    "{{ x" + "()" * 4000 + " }}",
    "{% if 1 %}" * 900 + "{% endif %}" * 900,
    "{% for i in x %}" * 50 + "{% endfor %}" * 50,
    "{% macro a() %}" * 120 + "{% endmacro %}" * 120,
    "{{ " + "1 if 1 else " * 2000 + "1 }}",
    "{{ " + "1" * 9000 + " }}",
    "{#" * 4000,
    "{{ '" * 4000,
    "x" * (MAX_SOURCE + 1),
]
ATTACKS = [*GROWING, *SLOW, *NESTED]
CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}] * 3, "add_generation_prompt": True}


def most_memory() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("source", ATTACKS, ids=[source[:60] for source in ATTACKS])
def test_a_template_ends_within_limits(source: str) -> None:
    began, held = time.thread_time(), most_memory()
    with pytest.raises((RequestError, CheckpointError)) as caught:
        CompiledTemplate(source).render(CONVERSATION)
    assert time.thread_time() - began < SECONDS
    assert most_memory() - held < MEMORY
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_conversation_may_be_as_long_as_it_likes() -> None:
    """The limits grow with the messages."""
    source = (
        "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all + m.role + m.content | trim %}"
        "{{ m.content.replace('a', 'bb').strip().split(' ') | join(' ') | tojson }}{% endfor %}{{ ns.all | length }}"
    )
    messages = [{"role": "user", "content": "a word " * 60}] * 1000
    text = CompiledTemplate(source).render({"messages": messages})
    assert text.endswith(str(1000 * (4 + 7 * 60 - 1)))
    large = [{"role": "user", "content": "é" * 20_000_000}]
    assert len(CompiledTemplate("{{ messages[0].content | trim + '!' }}").render({"messages": large})) == 20_000_001


def test_what_is_usual_is_within_limits() -> None:
    source = (
        "{{ '{} {a:>4}'.format(1, a=2) }}{{ ('<{}>' | safe).format('&') }}{{ '%3s %(x)s' | replace('%', '') }}"
        "{{ '%-4s|' % 'x' }}{{ '-' * 3 }}{{ [1, 2] | sum }}{{ [3, 4] | join(', ') }}{{ 'a\nb' | indent(2) }}"
        "{{ {'a': 1} | tojson(indent=2) }}{{ 2 ** 10 }}{{ 'x'.center(3) }}{{ [1, 2, 3] | batch(2) | list }}"
    )
    text = CompiledTemplate(source).render(CONVERSATION)
    assert text == '1    2<&amp;>3s (x)sx   |---33, 4a\n  b{\n  "a": 1\n}1024 x [[1, 2], [3]]'


def test_renderings_in_threads_are_counted_apart() -> None:
    template = CompiledTemplate("{% for i in range(40000) %}{{ i }}{% endfor %}")
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(template.render(CONVERSATION))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8, "together they took more steps than one may"


def test_the_meter() -> None:
    meter = Meter({"messages": []})
    shared = ["x" * 1000]
    assert meter.size([shared, shared]) > 2000, "a text would show it twice"
    assert meter.size({"a": shared}.items()) > 1000
    with pytest.raises(LimitError, match="more than 16 MiB"):
        meter.made("x" * (LARGEST + 10**6))
    with pytest.raises(LimitError, match="too many steps"):
        meter.spend(10**9)
    with pytest.raises(LimitError, match="more than 0 s"):
        Meter("", seconds=0).spend(2000)
