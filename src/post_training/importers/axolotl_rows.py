"""The rows that Axolotl's YAML names, `datasets` and `test_datasets`, and their chat template.

Its `type` says the format and, of preferences, the columns and the template too.
"""

import re
from typing import Any

from post_training.core.errors import shown
from post_training.importers.training_arguments import tell_dataset, use_dataset_path
from post_training.importers.translation import Translation

_TEMPLATES = {
    "tokenizer_default": "model",
    "chatml": "chatml",
    "llama3": "llama-3",
    "mistral_v1": "mistral",
    "gemma3": "gemma3",
    "qwen3": "qwen3",
    "qwen_25": "qwen2.5",
    "qwen2_5": "qwen2.5",
    "phi_35": "phi-3.5",
}
_FORMATS = {"chat_template": None, "sharegpt": None, "alpaca": "alpaca", "completion": "text"}
_PART_OF_SPLIT = re.compile(r"([^\[\]]+)(?:\[:(\d+)(%)?\])?")
_MESSAGE_FIELDS = {"role": "role", "content": "content"}
# Rows of preferences, by the last word of their type: {column of ours: column of theirs}.
_PAIRS: dict[str, dict[str, str]] = {
    "default": {"prompt": "messages", "chosen": "chosen", "rejected": "rejected"},
    "argilla_chat": {"chosen": "chosen", "rejected": "rejected"},
    "ultra": {"chosen": "chosen", "rejected": "rejected"},
    "icr": {"prompt": "input", "chosen": "chosen", "rejected": "rejected"},
    "chat_template": {"prompt": "input", "chosen": "chosen", "rejected": "rejected"},
    "intel": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
    "prompt_pairs": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}
# The template that the first word of such a type writes.
_TEMPLATES_OF_PAIRS = {
    "chat_template": None,
    "bradley_terry": None,
    "chatml": "chatml",
    "llama3": "llama-3",
}


def use_datasets(setting: str) -> Any:
    def handle(translation: Translation, key: str, value: Any) -> None:
        block = translation.settings.setdefault(setting, {})
        block["datasets"] = []
        translation.tell(key, f"{setting}.datasets: {len(value or [])}")
        for index, given in enumerate(value or []):
            dataset = _dataset(translation, f"{key}[{index}]", given)
            block["datasets"].append(dataset)
            tell_dataset(translation, f"{key}[{index}]", given, dataset)

    return handle


def _dataset(translation: Translation, key: str, given: dict[str, Any]) -> dict[str, Any]:
    dataset: dict[str, Any] = {}
    refuse = translation.refuse
    if not isinstance(given, dict) or not isinstance(given.get("path"), str):
        refuse(key, "must be a mapping with a path")
        return dataset
    form = _format(translation, key, given.get("type", "chat_template"), dataset)
    use_dataset_path(translation, key, given["path"], dataset)
    is_file = "path" in dataset and "." in given["path"].rsplit("/", 1)[-1]
    for name, value in given.items():
        if name in ("path", "type") or value is None:
            continue
        match name:
            case "split" if is_file:
                translation.tell(
                    f"{key}.split", f"{value}: a file has one split, and no name for it"
                )
            case "split":
                _split(translation, f"{key}.split", str(value), dataset)
            case "ds_type":
                translation.tell(f"{key}.ds_type", f"{value}: the file's ending says it")
            case "name":
                dataset["subset"] = value
            case "revision":
                dataset["revision"] = value
            case "field_messages" | "field_chosen" | "field_rejected" if form == "preference":
                theirs = name.removeprefix("field_")
                dataset["columns"]["prompt" if theirs == "messages" else theirs] = value
            case "field" if form == "text":
                if value != "text":
                    dataset["columns"] = {"text": value}
            case "field_messages":
                dataset["columns"] = {**dataset.get("columns", {}), "messages": value}
            case "field_tools":
                dataset["columns"] = {**dataset.get("columns", {}), "tools": value}
            case "field_system":
                dataset["columns"] = {**dataset.get("columns", {}), "system": value}
            case "message_property_mappings":
                if others := sorted(set(value) - set(_MESSAGE_FIELDS)):
                    refuse(f"{key}.{name}", f"{others[0]}: no counterpart: role and content have")
                dataset["message_fields"] = {k: v for k, v in value.items() if k in _MESSAGE_FIELDS}
            case "message_field_role" | "message_field_content":
                fields = dataset.setdefault("message_fields", {})
                fields[name.removeprefix("message_field_")] = value
            case "message_field_training":
                dataset.setdefault("message_fields", {})["weight"] = value
            case "roles":
                dataset["roles"] = {
                    theirs: role for role, names in value.items() for theirs in names
                }
            case "roles_to_train" if value == ["assistant"]:
                translation.tell(f"{key}.roles_to_train", "no setting needed: assistant only")
            case "train_on_eos" if value in ("turn", "all"):
                translation.tell(f"{key}.train_on_eos", "no setting needed: the end of each turn")
            case "chat_template":
                use_template(translation, f"{key}.chat_template", value)
            case _:
                part = f"{key}.{name}"
                refuse(
                    part,
                    f"{shown(value)}: no counterpart, or not known here; --drop '{part}' leaves it "
                    "out",
                )
    if form is not None:
        dataset["format"] = form
    if "messages" in dataset.get("columns", {}):
        dataset["format"] = "messages"
    return dataset


def _split(translation: Translation, key: str, value: str, dataset: dict[str, Any]) -> None:
    """`train`, or a part of it from the first row on: `train[:1000]`, `train[:20%]`."""
    match = _PART_OF_SPLIT.fullmatch(value)
    if match is None:
        translation.refuse(key, f"{value}: rows are taken from the first on, as in train[:1000]")
        return
    name, number, is_share = match.groups()
    dataset["split"] = name
    if is_share:
        dataset["subsample_factor"] = int(number) / 100
        told = "such a share, chosen at random with the seed (theirs is the first rows)"
        translation.tell(key, f"{value}: {told}")
    elif number:
        dataset["max_rows"] = int(number)


def _format(translation: Translation, key: str, kind: Any, dataset: dict[str, Any]) -> str | None:
    """Our format of their `type`; of preferences, the columns too. None: found by the columns."""
    first, _, rest = str(kind).partition(".")
    if translation.stage != "sft":
        if first not in _TEMPLATES_OF_PAIRS or (rest or "default") not in _PAIRS:
            known = f"{'|'.join(_TEMPLATES_OF_PAIRS)}.{'|'.join(_PAIRS)}"
            translation.refuse(f"{key}.type", f"{kind}: no counterpart: {known} have")
            return None
        dataset["columns"] = dict(_PAIRS[rest or "default"])
        if template := _TEMPLATES_OF_PAIRS[first]:
            translation.put(f"{key}.type", "data.chat_template", template)
        return "preference"
    if not isinstance(kind, str) or first not in _FORMATS:
        translation.refuse(
            f"{key}.type",
            f"{shown(kind)}: no counterpart: chat_template, alpaca and completion are read",
        )
        return None
    if first == "alpaca":
        translation.notes.append(
            f"{key}: Axolotl writes such rows as '### Instruction: …', '### Response: …'; here "
            "they are turns of data.chat_template, which may be a .jinja file of your own"
        )
    return _FORMATS[first]


def use_template(translation: Translation, key: str, value: Any) -> None:
    name = _TEMPLATES.get(value, value if str(value).endswith(".jinja") else None)
    if value == "jinja" or value is None:
        translation.tell(key, "chat_template_jinja names it" if value else "not set")
    elif "{" in str(value):
        translation.refuse(
            key,
            f"write it into a file, and name that: --drop {key} --set data.chat_template=X.jinja",
        )
    elif name is None:
        translation.refuse(
            key,
            f"no counterpart: {', '.join(_TEMPLATES)} have; `--set data.chat_template=model` takes "
            f"the tokenizer's own, with --drop {key}",
        )
    else:
        translation.put(key, "data.chat_template", name)
