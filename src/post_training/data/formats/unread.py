"""What of a row is not read: told, or refused where another trainer reads it.

A column or a message's field that changes what is said or trained elsewhere is never left out in
silence: its name is in the tables here, and a row that fills it is refused, unless its format reads
it or the dataset's settings name it under `ignore`. Any other is metadata: counted, and listed in
the report and the record (data/report.py).
"""

# Columns that change what a model is asked: Dolly's and SQuAD's context, alpaca's input,
# LLaMA-Factory's history, TRL's chat_template_kwargs and images, …
OF_THE_PROMPT = frozenset(
    (
        *("system", "system_prompt", "system_message", "developer", "history", "context", "input"),
        *("tools", "functions", "available_functions", "documents"),
        *("chat_template", "chat_template_kwargs"),
        *("image", "images", "video", "videos", "audio", "audios", "objects"),
    )
)
# Columns that change what is trained: KTO's label, a row's weight, marks and ids of other trainers.
OF_THE_ANSWER = frozenset(
    (
        *("reasoning", "reasoning_content", "reasoning_details", "thinking", "thought"),
        *("label", "labels", "weight", "sample_weight", "margin"),
        *("train", "trainable", "training", "loss", "loss_mask", "loss_weight", "loss_scale"),
        *("mask", "input_ids", "completion_mask", "assistant_masks"),
    )
)
# Fields of a message that say how much it is trained, where message_fields.weight names none:
# numbers, and those that are true or false (axolotl, verl, ms-swift, LLaMA-Factory, OpenAI).
WEIGHTS = ("weight", "loss_weight")
FLAGS = ("train", "trainable", "training", "loss", "loss_mask")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
# Others that change what is said or trained.
OF_A_MESSAGE = frozenset(
    (
        *(*WEIGHTS, *FLAGS, *THOUGHTS, *CALLS),
        *("label", "labels", "mask", "masked", "loss_scale"),
        *("train_detail", "training_detail", "prefix", "refusal"),
        *("reasoning_details", "thought", "tools", "functions", "documents", "context"),
        *("chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios"),
    )
)
# What is read of a content that is an object (blocks.py), and of a call.
OF_A_CONTENT = frozenset(("text", "parts", "blocks", "tools"))
OF_A_CALL = frozenset(("id", "type", "function", "name", "arguments"))


def hint_of_column(name: str, columns: str | None) -> str:
    """columns: the setting that would read it, if there is one."""
    if columns is not None:
        how = f"say that it is to be read in the dataset's settings: columns: {columns}"
    elif name == "label":
        how = "rows with a label are no examples to follow: choose the good ones by a transform"
    else:
        how = "put it where it is read by a transform"
    return f"{how}; or leave it out on purpose: ignore: [{name}]"


def hint_of_field(path: str) -> str:
    """path: `messages[].mask`."""
    name = path.rpartition(".")[2]
    how = "put it where it is read by a transform"
    if name in (*WEIGHTS, *FLAGS):
        how = f"say that it weighs a message: message_fields: {{weight: {name}}}"
    return f'{how}; or leave it out on purpose: ignore: ["{path}"]'
