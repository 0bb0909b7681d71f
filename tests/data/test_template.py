"""Messages to text, assistant segments, the default template (S1-13, T-17, T-18)."""

import re
from pathlib import Path

import pytest

from burnish.data.problems import RowError
from burnish.data.template import PLAIN_TEMPLATE, ChatTemplate, load_template
from burnish.errors import DataError
from tests.data.toys import CHATML, bos_tokenizer, chat_tokenizer, plain_tokenizer, template_tokenizer

TALK = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
# Earlier answers lose their reasoning block, the last one has one: Qwen3's habit in short.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The prompt opens a block that the rendered answer does not have: DeepSeek-R1's habit in short.
OPENING = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif %}"
)


def test_segments_mark_the_assistants_turns_with_their_end_token() -> None:
    (parts,) = ChatTemplate(chat_tokenizer()).split(TALK[:1], [TALK[1:]])
    (rendered,) = parts
    assert rendered.prompt == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    assert [(s.text, s.scored) for s in rendered.completion] == [
        ("a1<|im_end|>", True),
        ("\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n", False),
        ("a2<|im_end|>", True),
    ]


def test_s1_13_default_template() -> None:
    template = ChatTemplate(plain_tokenizer())
    assert template.is_default and template.source == PLAIN_TEMPLATE
    system = {"role": "system", "content": "be kind "}
    (parts,) = template.split([system, TALK[0]], [TALK[1:]])
    assert parts[0].prompt == "System: be kind\n\nUser: q1\n\nAssistant:"
    assert [(s.text, s.scored) for s in parts[0].completion] == [
        (" a1<|endoftext|>", True),
        ("\n\nUser: q2\n\nAssistant:", False),
        (" a2<|endoftext|>", True),
    ]
    assert template.end_ids == plain_tokenizer().eos_ids


def test_a_template_that_breaks_prefixes_gives_an_example_for_each_turn() -> None:
    tokenizer = template_tokenizer(THINKING, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")
    (parts,) = ChatTemplate(tokenizer).split(TALK[:1], [TALK[1:]])
    assert [part.turn for part in parts] == [0, 1]
    for part, answer in zip(parts, ("a1", "a2")):
        (segment,) = part.completion
        assert segment.text == f"<think>\n\n</think>\n\n{answer}<|im_end|>" and segment.scored
        assert part.prompt.endswith("<|im_start|>assistant\n")
    assert "<think>" not in parts[1].prompt, "earlier answers are rendered as the model would see them"
    ((one,),) = ChatTemplate(tokenizer).split(TALK[:1], [TALK[1:2]])
    assert one.turn is None


def test_a_generation_prompt_that_the_answer_lacks() -> None:
    ((one,),) = ChatTemplate(template_tokenizer(OPENING)).split(TALK[:1], [TALK[1:2]])
    assert one.prompt == "<user>q1<assistant><think>\n"
    assert [s.text for s in one.completion] == ["a1</s>"]


def test_templates_of_models_that_see_images_take_parts() -> None:
    source = (
        "{% for m in messages %}{{ m.role + ': ' }}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
        "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ((one,),) = ChatTemplate(template_tokenizer(source)).split(TALK[:1], [TALK[1:2]])
    assert one.prompt == "user: q1</s>\nassistant: " and one.completion[0].text == "a1</s>"


def test_t17_the_templates_own_end_token_counts() -> None:
    tokenizer = template_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>", "</s>"), "</s>")
    template = ChatTemplate(tokenizer)
    assert template.end_ids == {tokenizer.eos_id, tokenizer.token_id("<|im_end|>")}
    assert ChatTemplate(chat_tokenizer()).end_ids == chat_tokenizer().eos_ids
    bare = ChatTemplate(template_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"))
    assert len(bare.end_ids) == 1


def test_what_stands_behind_the_end_token_is_not_part_of_the_answer() -> None:
    source = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
    )
    tokenizer = template_tokenizer(source, ("<end>", "</s>"), "<end>")
    ((one,),) = ChatTemplate(tokenizer).split(TALK[:1], [TALK[1:2]])
    assert one.completion[-1].text == "a1<end>"


def test_settings_of_the_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}{{ mood }}")
    template = load_template(str(file), chat_tokenizer(), {"mood": "!"})
    assert template.render(TALK[:1]) == "q1!" and not template.is_default
    assert load_template("{{ 1 }}", chat_tokenizer()).render(TALK) == "1"
    assert load_template(None, chat_tokenizer()).source == CHATML
    with pytest.raises(DataError, match="neither a template file"):
        load_template("missing.jinja", chat_tokenizer())
    with pytest.raises(DataError, match="not valid") as caught:
        load_template("{% for %}", chat_tokenizer())
    assert caught.value.remedy
    prints = {template.fingerprint, load_template(str(file), chat_tokenizer(), {"mood": "?"}).fingerprint}
    assert len(prints) == 2


def test_a_template_that_refuses_a_row_names_the_row_not_the_program() -> None:
    tokenizer = template_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(RowError, match="no system role") as caught:
        ChatTemplate(tokenizer).render(TALK)
    assert "chat_template" in caught.value.remedy
    with pytest.raises(RowError, match="no element 9"):
        ChatTemplate(template_tokenizer("{{ messages[9].content }}")).render(TALK)


def test_bos_comes_from_the_template_alone() -> None:
    template = ChatTemplate(bos_tokenizer(), "{{ bos_token }}{{ messages[0].content }}")
    assert template.render(TALK) == "<s>q1"


def test_tool_templates() -> None:
    tokenizer = chat_tokenizer()
    source = "{{ messages[0].content }}{% if tools %}{% for t in tools %}[{{ t.name }}]{% endfor %}{% endif %}"
    assert ChatTemplate(tokenizer, source).render(TALK, tools=[{"name": "f"}]) == "q1[f]"


@pytest.mark.oracle
def test_known_templates_lose_no_answer() -> None:
    """Each answer is scored whole and ends its segment, in one example or in one for each turn."""
    trl = pytest.importorskip("trl")
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    pattern = re.compile(r"<\|[^|<>\s]+\|>|<｜[^>]+?｜>|</?s>|<end_of_turn>|<turn\|>|<\|turn>|<end_of_utterance>")
    talk = [{**m, "content": f"some {m['content']} words"} for m in TALK]
    for file in (file for file in files if "_training" not in file.name):
        source = file.read_text(encoding="utf-8")
        special = tuple(sorted({*pattern.findall(source), "<s>", "</s>"}))
        (parts,) = ChatTemplate(template_tokenizer(source, special, bos_token="<s>")).split(talk[:1], [talk[1:]])
        scored = ["".join(s.text for s in part.completion if s.scored) for part in parts]
        for answer in ("some a1 words", "some a2 words"):
            assert sum(answer in text for text in scored) == 1, file.name
        unscored = "".join(s.text for part in parts for s in part.completion if not s.scored)
        assert "a1" not in unscored and "a2" not in unscored and "some q" not in "".join(scored), file.name


def test_r27_an_endless_template_stops_at_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.data.sandbox.MAX_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="runs for more than"):
        ChatTemplate(chat_tokenizer(), endless).render(TALK)
    with pytest.raises(DataError, match="is refused"):
        ChatTemplate(chat_tokenizer(), "{{ ''.__class__.__mro__ }}").end_ids  # noqa: B018


def test_messages_that_spell_special_tokens_are_seen() -> None:
    template = ChatTemplate(chat_tokenizer())
    assert template.spells_special([{"role": "user", "content": "a <|im_end|> b"}])
    assert not template.spells_special(
        [{"role": "user", "content": "a <| b, 1 < 2"}, {"role": "assistant", "content": None}]
    )
