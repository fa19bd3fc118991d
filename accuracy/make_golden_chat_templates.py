"""Makes accuracy/golden/chat_templates.json: what jinja2 renders, as transformers 5 sets it up, of conversations in the chat
templates that kvqserve recognises. usage: make_golden_chat_templates.py DIR, a folder of NAME.jinja, each the chat_template
of a tokenizer_config.json (by other names in llama.cpp's models/templates). Wants jinja2 3."""
import hashlib
import json
import pathlib
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment

BOS, EOS = "<s>", "</s>"


def conversation(*turns):
    return [{"role": {"s": "system", "u": "user", "a": "assistant"}[role], "content": content} for role, content in turns]


CONVERSATIONS = [
    conversation(("u", "Hello!")),
    conversation(("s", "Be brief."), ("u", "Hello!")),
    conversation(("u", "1 + 1?"), ("a", "2"), ("u", "And 2 + 2?")),
    conversation(("s", "  Blanks stay or go. \n"), ("u", "\n one \u00a0"), ("a", " two\t"), ("u", "\u3000three ")),
    conversation(("u", "1 + 1?"), ("a", "The answer is")),
    conversation(("s", "Be brief."), ("u", "a"), ("a", "b"), ("u", "c"), ("a", "The rest is ")),
    conversation(("u", "two"), ("u", "in a row")),
    conversation(("a", "I begin"), ("u", "Do you?")),
    conversation(("s", "alone")),
    conversation(("u", "a"), ("s", "late"), ("u", "b")),
    conversation(("u", "a"), ("a", "<think>\nhm\n</think>\n\nthought"), ("u", "b")),
    conversation(("u", "a"), ("a", "<think>\nhm\n</think>\n\nthought")),
    conversation(("u", "a"), ("a", "b"), ("u", "<tool_response>c</tool_response>"), ("a", "d"), ("u", "<tool_response>e</tool_response>")),
    conversation(("u", ""), ("a", ""), ("u", "Grüße, 世界")),
]


def refuse(message):
    raise ValueError(message)


def render(template, messages):
    """transformers' apply_chat_template; a last message of the assistant is continued (continue_final_message)."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    text = environment.from_string(template).render(messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=last is None)
    if last is None:
        return text
    if last.strip() not in text:
        raise ValueError("the template does not keep the last message")
    begin = text.rindex(last.strip())
    if text[begin:begin + len(last.lstrip())] == last:
        return text[:begin + len(last.lstrip())]
    return text[:begin + len(last.strip())]


golden = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")):
    template = path.read_text().rstrip()
    # Some write the line feed in a text as it is, some as an escape; which makes no difference to what is rendered.
    known_by = template.replace("\\n", "\n")
    rendered = []
    for messages in CONVERSATIONS:
        try:
            rendered.append(render(template, messages))
        except ValueError:
            rendered.append(None)  # refused
    golden.append({"name": path.stem, "sha256": hashlib.sha256(known_by.encode()).hexdigest(), "rendered": rendered})
out = pathlib.Path(__file__).parent / "golden" / "chat_templates.json"
out.write_text(json.dumps({"bos": BOS, "eos": EOS, "conversations": CONVERSATIONS, "templates": golden}, indent=1, ensure_ascii=False) + "\n")
