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
"""
