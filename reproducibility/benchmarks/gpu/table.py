"""The results of `run` as Markdown."""

from typing import Any

TITLES = {
    "0": "What the device can do",
    "a": "Training: right, and the same each time",
    "b": "SFT steps",
    "c": "Reference logprobs",
    "d": "DPO steps",
    "e": "Determinism, compilation, process groups",
    "f": "Kernels of a step",
    "g": "Liger's kernels against float64",
}


def markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    device = machine["device"] or f"{machine['processor']}, {machine['cores']} cores (no GPU used)"
    lines = [
        f"**{device}**, {machine['date']}, load {machine['load']}; Python {machine['python']}, "
        f"{packages}; commit {found['commit'] or 'unknown'}"
        + ("; **tiny models: the figures say nothing about speed**" if found["tiny"] else ""),
        "",
    ]
    for letter, step in found["steps"].items():
        took = "" if step.get("seconds") is None else f", {step['seconds']} s"
        lines += [f"### {letter}: {TITLES[letter]} ({step['status']}{took})", ""]
        lines += ["| | result | figures |", "|---|---|---|"]
        for result in step["results"]:
            lines.append(f"| {result['what']} | {_verdict(result)} | {_figures(result)} |")
        for result in step["results"]:
            lines += _kernels(result.get("kernels", []))
        lines.append("")
    return "\n".join(lines)


def _verdict(result: dict[str, Any]) -> str:
    if "error" in result:
        return "error"
    if "skipped" in result:
        return "skipped"
    return {True: "good", False: "**not good**"}.get(result.get("good"), "measured")


def _figures(result: dict[str, Any]) -> str:
    text = result.get("error") or result.get("skipped")
    if text is not None:
        return text.replace("|", "\\|")
    named = {
        name: value
        for name, value in result.items()
        if name not in ("what", "good", "kernels", "losses") and value is not None
    }
    return ", ".join(f"{name} {_number(value)}" for name, value in named.items())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]  # a sha256
    return str(value)


def _kernels(kernels: list[dict[str, Any]]) -> list[str]:
    if not kernels:
        return []
    lines = ["", "| kernel | ms | share | calls |", "|---|---|---|---|"]
    for each in kernels:
        name = each["name"].replace("|", "\\|")
        lines.append(f"| `{name}` | {each['ms']} | {each['share']:.1%} | {each['calls']} |")
    return lines
