"""The kinds of public datasets by name: what to write in a dataset's settings, and what becomes.

`post-training data kinds` prints them. Most are recognised by their columns, or by `format`; the
others have a built-in transform, which a dataset names as it names one of the user's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from post_training.data.public.answers import hh_rlhf, kto, sharegpt_preference, squad
from post_training.data.public.calls import glaive, hermes, smoltalk2, xlam

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A form of rows.

    datasets: that come in it. settings: what to write beside path or hub, YAML, if anything.
    becomes: what is trained, and what is left out. transform: the built-in function that
    `settings` name.
    """

    datasets: str
    settings: str
    becomes: str
    transform: Callable[[Object], list[Object]] | None = None


KINDS: dict[str, Kind] = {
    "alpaca": Kind(
        "tatsu-lab/alpaca", "format: alpaca", "the output; instruction and input are asked"
    ),
    "dolly": Kind(
        "databricks/databricks-dolly-15k", "", "the response; instruction and context are asked"
    ),
    "glaive": Kind(
        "glaiveai/glaive-function-calling-v2",
        "transform: glaive",
        "chats with tools; functions of the system text are declared by the template",
        glaive,
    ),
    "hermes": Kind(
        "NousResearch/hermes-function-calling-v1",
        "transform: hermes",
        "chats with tools; Hermes' instruction on how to call them is left out of the system "
        "message, since the template writes its own",
        hermes,
    ),
    "hh_rlhf": Kind(
        "Anthropic/hh-rlhf", "transform: hh_rlhf", "preferences, from transcripts", hh_rlhf
    ),
    "kto": Kind(
        "trl-lib/kto-mix-14k",
        "transform: kto",
        "the answers with label true; those with false are left out and counted (filtered)",
        kto,
    ),
    "openhermes": Kind("teknium/OpenHermes-2.5", "", "chats, with system_prompt where filled"),
    "sharegpt_preference": Kind(
        "llamafactory/DPO-En-Zh-20k",
        "transform: sharegpt_preference",
        "preferences, from conversations and a message each as chosen and rejected",
        sharegpt_preference,
    ),
    "smoltalk2": Kind(
        "HuggingFaceTB/smoltalk2",
        "transform: smoltalk2",
        "chats, or preferences, with thoughts and tools; custom_instructions are the system "
        "message; python_tools are refused",
        smoltalk2,
    ),
    "squad": Kind(
        "rajpurkar/squad, squad_v2",
        "transform: squad",
        "the first answer; context and question are asked; a question without an answer is left "
        "out and counted (filtered)",
        squad,
    ),
    "tulu_3": Kind("allenai/tulu-3-sft-mixture", "", "chats"),
    "tulu_3_preference": Kind("allenai/llama-3.1-tulu-3-8b-preference-mixture", "", "preferences"),
    "ultrafeedback": Kind(
        "HuggingFaceH4/ultrafeedback_binarized",
        "format: preference",
        "preferences; for sft: format: messages, which trains the chosen answer",
    ),
    "xlam": Kind(
        "Salesforce/xlam-function-calling-60k",
        "transform: xlam",
        "calls of tools; types of parameters as JSON has them",
        xlam,
    ),
}
BUILT_IN_TRANSFORMS = {name: kind.transform for name, kind in KINDS.items() if kind.transform}
