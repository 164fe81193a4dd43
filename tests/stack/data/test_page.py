"""The HTML page of samples, read as a browser would."""

from html.parser import HTMLParser

import pytest

from post_training.data.inspection.samples import Part, Run, Sample, page
from post_training.data.inspection.tokens import Spelled
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT

EVIL = b"</div></span><script>alert('x')</script>&amp;"


class Page(HTMLParser):
    """elements: of every tag, its attributes. texts: by view, (class of the run, text) in order.
    titles: of the tokens."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[tuple[str, str]]] = {"text": [], "tokens": [], "ids": []}
        self.titles: list[str] = []
        self.view: str | None = None
        self.run_class = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.elements.append((tag, values))
        if tag == "div":
            self.view = values["class"]
        elif tag == "span" and self.view:
            self.run_class = values["class"] or ""
            self.texts[self.view].append((self.run_class, ""))
        elif tag == "i":
            self.titles.append(values["title"] or "")
            self.handle_data("|")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.view = None
        elif tag == "span":
            self.run_class = ""

    def handle_data(self, data: str) -> None:
        if self.view and self.run_class:
            name, before = self.texts[self.view][-1]
            self.texts[self.view][-1] = (name, before + data)


@pytest.fixture
def samples() -> list[Sample]:
    prompt = Run(
        PROMPT,
        1.0,
        (Spelled(5, b"<|user|>", True), Spelled(6, EVIL, False), Spelled(7, b" \n", False)),
    )
    answer = Run(
        COMPLETION,
        0.5,
        (Spelled(8, b"\xe6\x97", False), Spelled(9, b"\xa5", False), Spelled(10, b" ok", False)),
    )
    thought = Run(EXCLUDED, 1.0, (Spelled(11, b"hm", False),))
    whole = Part("<b>sums</b>.jsonl", 3, 0, 7, (prompt, answer, thought))
    cut = Part("more.jsonl", 1, 2, 9, (answer,))
    return [Sample(1, (whole, cut)), Sample(2, (cut,))]


@pytest.fixture
def parsed(samples: list[Sample]) -> Page:
    return Page(page(samples, "<sft>.yaml"))


def test_page_text_is_whole_and_in_its_class(parsed: Page):
    assert parsed.texts["text"] == [
        ("prompt", f"<|user|>{EVIL.decode()}·↵\n"),
        ("completion", "×0.5日 ok"),
        ("excluded", "hm"),
        ("completion", "×0.5日 ok"),
        ("completion", "×0.5日 ok"),
    ]


def test_page_tokens_stand_apart_with_their_ids(parsed: Page):
    spaced = EVIL.decode().replace(" ", "·")
    assert parsed.texts["tokens"][:3] == [
        ("prompt", f"|<|user|>|{spaced}|·↵"),
        ("completion", "×0.5|⟨e6 97⟩|⟨a5⟩|·ok"),
        ("excluded", "|hm"),
    ]
    assert parsed.titles[:7] == ["5", "6", "7", "8", "9", "10", "11"]


def test_page_ids_are_a_list_to_copy(parsed: Page):
    assert parsed.texts["ids"][:3] == [
        ("prompt", "5 6 7 "),
        ("completion", "×0.58 9 10 "),
        ("excluded", "11 "),
    ]


def test_page_needs_nothing_from_elsewhere_and_runs_nothing(parsed: Page):
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    for _, attributes in parsed.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    policies = [a["content"] for _, a in parsed.elements if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_page_style_is_not_escaped_and_holds_no_address(samples: list[Sample]):
    text = page(samples, "x")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "&#" not in style
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "@import" not in style


def test_page_special_tokens_are_marked_and_lookalikes_are_not(samples: list[Sample]):
    text = page(samples, "x")
    assert "<b>&lt;|user|&gt;</b>" in text
    lookalike = Run(PROMPT, 1.0, (Spelled(1, b"<|user|>", False),))
    alone = page([Sample(1, (Part("x", 1, 0, 1, (lookalike,)),))], "x")
    assert "<b>&lt;|user|&gt;</b>" not in alone
    assert "&lt;|user|&gt;" in alone


def test_page_headings_say_row_source_and_counts(parsed: Page, samples: list[Sample]):
    text = page(samples, "x")
    assert "row 1: 2 sequences: 10 tokens, 6 trained" in text
    assert "sequence 3 of &lt;b&gt;sums&lt;/b&gt;.jsonl: 7 tokens, 3 trained" in text
    assert "sequence 1 of more.jsonl: 3 tokens, 3 trained (tokens 3 to 5 of 9)" in text
    anchors = {attributes["id"] for tag, attributes in parsed.elements if tag == "section"}
    assert anchors == {"row-1", "row-2"}


def test_page_views_are_chosen_by_labelled_radio_buttons(parsed: Page):
    inputs = [attributes for tag, attributes in parsed.elements if tag == "input"]
    labels = {attributes["for"] for tag, attributes in parsed.elements if tag == "label"}
    assert {each["id"] for each in inputs} == labels == {"as-text", "as-tokens", "as-ids"}
    assert [each["id"] for each in inputs if "checked" in each] == ["as-text"]
    assert {(each["type"], each["name"]) for each in inputs} == {("radio", "view")}
