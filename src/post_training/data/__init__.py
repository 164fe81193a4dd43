"""From files of rows to packed rows of token ids. Nothing here imports torch.

A row on its way to the trainer, and the files in the order in which they are best read:

    rows.py        the types: Record (a row as its file has it), Conversation, Text, Preference
    reading.py     datasets -> records -> rows, in several processes; what becomes of bad rows
    sources/       files, saved folders and hub datasets, cut into chunks of records
    formats/       a record's JSON object -> a row: columns, messages, tools, preferences
    chat/          a row -> its text, and which characters are trained: templates and their proof
    tokenize.py    the text -> token ids, and what the loss makes of each: a sequence
    prepared/      sequences on disk; pieces of them packed into rows; read again, row by row
    pairs/         the same for preference rows: a pair of answers to one prompt

Beside this way: transforms.py and rewards.py (functions of the user's, called in a process of their
own: user_functions.py, function_process.py), row_file.py, branches.py and preference_rows.py (rows
as the stages write them), indexed.py (Megatron's .bin/.idx), control/ (documents of GPT-NeoX),
inspection/ and lengths.py (what a person looks at).

Shapes of arrays and tensors stand in the signatures, here and in models/, train/ and annotate/:
`Int32[np.ndarray, " T"]`, `Float[Tensor, "B T D"]` (jaxtyping; the space before a single name is
for linters). Within a call one name is one size. The tests check them (tests/helpers/shapes.py).

    B   rows of a batch                 T   tokens of a sequence or row, padding included
    P   all positions of a batch: B·T   N   several of what the function is about: pairs, asked
    D   hidden size                         positions, rows of logits; n: those of one chunk
    V   ids of the vocabulary           S   sequences, or pairs, of a dataset
    R   rows of a dataset               2   chosen and rejected

A dimension that one module alone has is a word: `pieces`, `documents`; `bounds` are offsets, one
for each element and then the end. Where a docstring speaks of [N], it is the same N.
"""
