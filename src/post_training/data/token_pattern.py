"""A pattern that finds tokens in a text."""

import re


def any_of(tokens: list[str]) -> str:
    """Finds the longest token at a place. It branches by character: with a thousand special tokens,
    one that tries them in turn takes longer at each `<` of a text than tokenising it does."""
    rest_by_first: dict[str, list[str]] = {}
    for token in filter(None, tokens):
        rest_by_first.setdefault(token[0], []).append(token[1:])
    branches = [re.escape(first) + any_of(rest) for first, rest in rest_by_first.items()]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in tokens else "")
