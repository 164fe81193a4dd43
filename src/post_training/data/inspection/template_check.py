"""A chat template under examination: what it can express, what is trained, what a server sends.

    check_template -> TemplateReport: findings, each passed, warned of or failed; and samples

Where a finding failed, training by this template would be refused, or would not be what a server
sends.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text as ColouredText

from post_training.core.errors import PostTrainingError
from post_training.data.chat.layout import lay_out
from post_training.data.chat.proof import PROBE, example_rows, without_thinking
from post_training.data.chat.rendering import message_dicts
from post_training.data.chat.templates import (
    MARKERS,
    ChatTemplate,
    choose_template,
    first_difference,
    misfit,
)
from post_training.data.chat.turns import TurnWriter, Written
from post_training.data.rows import COMPLETION, BadRow, Conversation

Outcome = Literal["pass", "warning", "fail"]
_STYLES = {"pass": "green", "warning": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """subject: what was looked at. said: what was found, in one line."""

    subject: str
    outcome: Outcome
    said: str


@dataclass(frozen=True)
class Sample:
    """A row of this name, as the texts by which it would be trained, or why it would be refused."""

    name: str
    texts: list[Written]
    refused: str | None = None


@dataclass(frozen=True)
class TemplateReport:
    """What was found of a template."""

    name: str
    findings: list[Finding]
    samples: list[Sample]

    @property
    def passed(self) -> bool:
        return all(finding.outcome != "fail" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "findings": [asdict(finding) for finding in self.findings],
            "samples": [
                {
                    "name": sample.name,
                    "refused": sample.refused,
                    "texts": [
                        {"text": each.text, "trained": [*_trained_spans(each)]}
                        for each in sample.texts
                    ],
                }
                for sample in self.samples
            ],
        }


def check_template(
    name: str | Path, tokenizer: Any, rows: Iterable[tuple[str, Conversation]] = (), **settings: Any
) -> TemplateReport:
    """Try a template on the examples of the proof, or on rows of the user's own, by their names.

    settings: as of choose_template.
    """
    try:
        template = choose_template(name, tokenizer, **settings)
    except PostTrainingError as error:
        said = error.problem + (f" (hint: {error.hint})" if error.hint else "")
        return TemplateReport(str(name), [Finding("use", "fail", said)], [])
    special_tokens = dict(tokenizer.special_tokens_map)
    given = list(rows)
    samples = []
    for called, row in given or example_rows():
        try:
            samples.append(Sample(called, lay_out(row, template, special_tokens, None)))
        except BadRow as bad:
            samples.append(Sample(called, [], bad.problem))
    texts = [text for sample in samples for text in sample.texts]
    findings = [
        Finding("use", "pass", f"turns are found by {template.found_by}"),
        _expresses(template),
        _ends(template, tokenizer),
        _begins(texts, tokenizer),
        _history(template, special_tokens),
        _served(template, special_tokens),
        _ids(texts, tokenizer),
        *_compared(template, tokenizer),
    ]
    if problem := misfit(template, tokenizer):
        findings.append(Finding("vocabulary", "warning", problem))
    if given:
        refused = [sample for sample in samples if sample.refused]
        said = f"{len(given) - len(refused):,} of {len(given):,} rows can be trained"
        if refused:
            said += f"; {refused[0].name}: {refused[0].refused}"
        findings.append(Finding("rows", "warning" if refused else "pass", said))
    return TemplateReport(template.name, findings, samples)


def _expresses(template: ChatTemplate) -> Finding:
    if not template.lost:
        return Finding("expresses", "pass", "all that a row may need")
    return Finding("expresses", "warning", f"no {', '.join(sorted(template.lost))}: refused")


def _ends(template: ChatTemplate, tokenizer: Any) -> Finding:
    end = template.end_of_turn
    ids = tokenizer.encode(end, add_special_tokens=False)
    if len(ids) > 1:
        said = f"{end!r} is {len(ids)} tokens, and a server stops at one"
        return Finding("end of turn", "warning", said)
    if ids != [tokenizer.eos_token_id]:
        said = f"{end!r} is trained; the tokenizer's eos is {tokenizer.eos_token!r}, so a server "
        return Finding("end of turn", "warning", f"{said}needs eos_token_id in generation_config")
    return Finding("end of turn", "pass", f"{end!r} is trained, and is the tokenizer's eos")


def _begins(texts: list[Written], tokenizer: Any) -> Finding:
    bos = tokenizer.bos_token
    if not bos or not texts:
        return Finding("begin", "pass", "the tokenizer has no bos token")
    if any(text.text.startswith(bos + bos) for text in texts):
        return Finding("begin", "fail", f"the template writes {bos!r} twice")
    ids = tokenizer(texts[0].text)["input_ids"][:2]
    if ids == [tokenizer.bos_token_id] * 2:
        said = f"the template writes {bos!r}, and the tokenizer adds another: here none is added, "
        return Finding("begin", "warning", f"{said}and who tokenizes its text must not either")
    return Finding("begin", "pass", "not two bos tokens")


def _history(template: ChatTemplate, special_tokens: dict[str, str]) -> Finding:
    if template.moves:
        said = f"the template writes {' and '.join(sorted(template.moves))} with the last message"
        said += " of the user alone; a row of several turns that has them becomes several"
        return Finding("history", "warning", said)
    several, left_out = [], False
    for name, row in example_rows():
        try:
            texts = lay_out(row, template, special_tokens, None)
        except BadRow:
            continue
        left_out = left_out or any(text.num_left_out for text in texts)
        if len(texts) > 1:
            several.append(name)
    if not several and not left_out:
        return Finding("history", "pass", "earlier turns stand as they were said")
    how = "leaves out earlier thoughts" if left_out else "writes earlier turns in another form"
    said = f"the template {how}; rows of several turns become several ({', '.join(several)})"
    return Finding("history", "warning", said)


def _served(template: ChatTemplate, special_tokens: dict[str, str]) -> Finding:
    """Whether the last turn of each example stands after the prompt that a server renders."""
    writer = TurnWriter(template.text, special_tokens, template.end_of_turn)
    for name, row in example_rows():
        dicts = without_thinking(message_dicts(row), template.thinking_off)
        if dicts.needs & template.lost:
            continue
        last = max(n for n, each in enumerate(dicts.messages) if each["role"] == "assistant")
        try:
            text = lay_out(row, template, special_tokens, None)[-1]
        except BadRow:
            continue  # Its sample says why; what is refused is not trained.
        prompt = writer.prompt(dicts.up_to(last))
        if prompt not in [text.text[:start] for start, _ in text.spans]:
            said = first_difference(text.text, prompt, "training has", "where a server sends")
            return Finding("server", "fail", f"{name}: {said}")
    more = "; without thoughts: enable_thinking: false" if template.thinking_off else ""
    return Finding(
        "server",
        "pass",
        f"the last turn of each example is trained after what a server sends{more}",
    )


def _ids(texts: list[Written], tokenizer: Any) -> Finding:
    """Whether a prompt and a sampled answer, each tokenized, are the ids of their text."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    turns = [(text.text, start, end) for text in texts for start, end in _trained_spans(text)]
    apart = [
        text[start : start + 20]
        for text, start, end in turns
        if ids(text[:start]) + ids(text[start:end]) != ids(text[:end])
    ]
    if not apart:
        said = f"{len(turns)} of {len(turns)} turns: text and sampled ids agree"
        return Finding("ids", "pass", said)
    said = f"{len(apart)} of {len(turns)} turns have other ids beside their prompt: {apart[0]!r}"
    return Finding("ids", "warning", said)


def _compared(template: ChatTemplate, tokenizer: Any) -> list[Finding]:
    """With those of ours that this tokenizer has the tokens of; only markers make a family."""
    if template.is_ours:
        return []
    findings = []
    vocabulary = tokenizer.get_vocab()
    for name, markers in MARKERS.items():
        if not markers or not all(each in vocabulary for each in markers):
            continue
        ours = choose_template(name, tokenizer)
        special_tokens = dict(tokenizer.special_tokens_map)
        one, other = (
            lay_out(PROBE, each, special_tokens, None)[-1].text for each in (template, ours)
        )
        if one == other:
            findings.append(Finding(f"beside {name}", "pass", "the same text"))
            continue
        said = first_difference(one, other, "it writes", f"where our {name} writes")
        findings.append(Finding(f"beside {name}", "warning", said))
    return findings


def _trained_spans(text: Written) -> Iterable[tuple[int, int]]:
    pairs = zip(text.spans, text.parts, strict=True)
    return [span for span, part in pairs if part.kind == COMPLETION]


def show_report(report: TemplateReport, console: Console) -> None:
    """Print the findings, and the samples with what is trained in green."""
    for finding in report.findings:
        line = ColouredText(f"{finding.outcome:8}", _STYLES[finding.outcome])
        console.print(line.append(f"{finding.subject}: {finding.said}", ""), soft_wrap=True)
    for sample in report.samples:
        console.print(ColouredText(f"\n{sample.name}", "bold"))
        if sample.refused:
            console.print(ColouredText(f"refused: {sample.refused}", "red"), soft_wrap=True)
        for each in sample.texts:
            coloured = ColouredText(style="dim")
            for piece, is_trained in _pieces(each):
                brackets = ("⟦", "⟧") if is_trained else ("", "")
                coloured.append(piece.join(brackets), "not dim green" if is_trained else "")
            console.print(coloured, soft_wrap=True)


def page_of_report(report: TemplateReport) -> str:
    """The same as an HTML page."""
    findings = "".join(
        f"<tr class={f.outcome}><td>{f.outcome}<td>{escape(f.subject)}<td>{escape(f.said)}"
        for f in report.findings
    )
    samples = "".join(
        f"<h2>{escape(sample.name)}</h2>"
        + (f"<p class=fail>refused: {escape(sample.refused)}" if sample.refused else "")
        + "".join(
            "<pre>"
            + "".join(
                f"<mark>{escape(piece)}</mark>" if is_trained else escape(piece)
                for piece, is_trained in _pieces(each)
            )
            + "</pre>"
            for each in sample.texts
        )
        for sample in report.samples
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Chat template</title><style>"
        "body{font:15px sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;"
        "background:#f6f6f6;padding:1em}mark{background:#b9f0b9}td{padding:.2em .6em}"
        ".pass td:first-child{color:green}.warning td:first-child{color:#a60}"
        f".fail,.fail td:first-child{{color:#c00}}</style><h1>{escape(report.name)}</h1>"
        f"<p>What is trained is marked.<table>{findings}</table>{samples}\n"
    )


def _pieces(text: Written) -> list[tuple[str, bool]]:
    """The text in pieces, and whether each is trained."""
    pieces, done = [], 0
    for start, end in _trained_spans(text):
        pieces += [(text.text[done:start], False), (text.text[start:end], True)]
        done = end
    return [*pieces, (text.text[done:], False)]
