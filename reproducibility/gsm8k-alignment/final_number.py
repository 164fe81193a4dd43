"""Whether an answer ends with the number that the question's worked answer ends with.

GSM8K writes it after `####` (https://arxiv.org/abs/2110.14168, section 2); models write it in
other ways too, so it is the last number of the text that counts. The worked answer is where reading
question/answer rows left it: original_metadata.answer.
"""

import re
from decimal import Decimal

from post_training.data.rewards import register_reward

# With thousands apart by commas; a calculator's notes, <<2*3=6>>, are no part of the text.
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
NOTES = re.compile(r"<<.*?>>")


def last_number(text):
    found = NUMBER.findall(NOTES.sub("", text))
    return Decimal(found[-1].replace(",", "")) if found else None


@register_reward("final_number")
def final_number(answer, row):
    expected = last_number(row["original_metadata"]["answer"])
    if expected is None:
        raise ValueError("the worked answer has no number")
    return float(last_number(answer) == expected)
