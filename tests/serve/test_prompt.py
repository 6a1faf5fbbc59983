"""What a chat template leaves out of the prompt."""

import copy

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_fa.serve.prompt import left_out

ALL = "{% for m in messages %}{{ m.role }}:{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
END = "{% endfor %}"
NO_TOOL, NO_SYSTEM = (ALL.replace("messages %}", f"messages if m.role != '{role}' %}}") for role in ("tool", "system"))


def text(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": one} for one in texts]}


def call(name):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": {"a": 1}}}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
ASKED = [text("system", "Short."), text("user", "What", "is it?")]
CALLED = [*ASKED, {"role": "assistant", "content": [], "tool_calls": [call("look")]}, text("tool", "a dog")]


def missing(template, messages, tools=None):
    def render(messages, tools):
        return render_jinja_template([messages], tools=tools, chat_template=template)[0][0]

    before = copy.deepcopy((messages, tools))
    found = left_out(render, messages, tools)
    assert (messages, tools) == before
    return found


@pytest.mark.parametrize(
    ("template", "messages", "tools", "expected"),
    [
        (ALL + END, ASKED, None, None),
        (ALL + END, ASKED, [TOOL], "tools[0]"),
        (TOOLS + ALL + END, ASKED, [TOOL, TOOL], None),
        ("{{ tools[0] | tojson }}" + ALL + END, ASKED, [TOOL, TOOL], "tools[1]"),
        # a template that mentions tools and does nothing with them
        ("{% if tools %}{% set told = tools %}{% endif %}" + ALL + END, ASKED, [TOOL], "tools[0]"),
        (ALL + END, CALLED, None, "messages[2].tool_calls[0]"),
        (ALL + CALLS + END, CALLED, None, None),
        (
            CALLS.join(["{% for m in messages %}", END]),
            [{**CALLED[2], "content": text("assistant", "so")["content"]}],
            None,
            None,
        ),
        # one that skips what tools gave
        (NO_TOOL + CALLS + END, CALLED, None, "messages[3].content"),
        (NO_SYSTEM + END, ASKED, None, "messages[0].content"),
        ("{% for m in messages %}{{ m.content[0].text }}" + END, ASKED, None, "messages[1].content"),
        ("{% for m in messages %}{{ m.content[0].text }}" + END, [text("user", "a", "  ")], None, None),
        ("{% for m in messages %}{{ m.content }}" + END, [{"role": "user", "content": "text alone"}], None, None),
        ("{{ messages[-1].content }}", [{"role": "user", "content": c} for c in "abc"], None, "messages[0].content"),
    ],
)
def test_what_never_reaches_the_prompt_is_named(template, messages, tools, expected):
    assert missing(template, messages, tools) == expected
