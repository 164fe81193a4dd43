"""From the sources to a prepared dataset. Every row is read once, in order, in several processes;
then lengths alone decide which are used, and which share a row.

    sources -> encode (workers) -> sequences on disk -> row_plan -> rows, prepared.json

Memory holds some numbers for each row of the sources, never its tokens. The result depends on the
sources, the settings and the tokenizer; not on the number of workers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from post_training.core.files import atomic_directory
from post_training.data.column_report import ColumnReport
from post_training.data.indexed.writer import best_dtype
from post_training.data.prepared.dataset import UsedTemplate
from post_training.data.prepared.encode import ChunkEncoder, encode_chunk
from post_training.data.prepared.row_plan import TableBuilder
from post_training.data.prepared.writer import SequenceWriter, write_rows
from post_training.data.reading import name_of, read_chunks
from post_training.data.sources import Source
from post_training.data.verdicts import Verdicts

# Part of a prepared dataset's identity: to be raised when the same settings give other bytes.
VERSION = 2


def prepare(
    folder: Path,
    encoder: ChunkEncoder,
    sources: Sequence[Source],
    *,
    seed: int,
    vocab_size: int,
    identity: dict[str, Any],
    rejects_path: Path,
    on_progress: Callable[[int, int], None],
    check_inputs: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the dataset to `folder`, as a whole or not at all; its record.

    identity: what decides its bytes. rejects_path: for on_error: quarantine. on_progress: is told
    the numbers of rows and tokens so far. check_inputs: called once all is read; where it raises,
    no dataset is left.
    Errors: PostTrainingError for the first bad row under on_error: fail, and when none is left.
    """
    data, template = encoder.reader.config, encoder.encoder.template
    builder = TableBuilder()
    report = ColumnReport(encoder.reader.formats)
    with (
        atomic_directory(folder) as temporary,
        Verdicts(data.on_error, rejects_path) as verdicts,
    ):
        with SequenceWriter(temporary, best_dtype(vocab_size)) as writer:
            for chunk in read_chunks(
                encode_chunk,
                encoder,
                sources,
                data,
                lambda dataset: builder.num_rows[dataset],
                report,
            ):
                for row in chunk.rejected:
                    verdicts.reject(row.place, row.bad, row.raw)
                writer.append(chunk.sequences)
                builder.add(chunk.dataset, chunk.sequences)
                on_progress(builder.num_sequences, writer.num_tokens)
            if not builder.num_pieces:
                raise verdicts.nothing_left("row")
        check_inputs()
        return write_rows(
            temporary,
            builder,
            verdicts,
            data,
            encoder.limits,
            seed,
            sources=[
                {"name": name_of(dataset), "read_as": found.describe(), **report.record(index)}
                for index, (dataset, found) in enumerate(
                    zip(data.datasets, encoder.reader.formats, strict=True)
                )
            ],
            template=UsedTemplate(template.name, template.text, template.end_of_turn),
            identity=identity,
        )
