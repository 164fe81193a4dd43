"""What a write that failed says of itself."""

from pathlib import Path

import pytest
import torch

from post_training.core.errors import PostTrainingError
from post_training.models.save import explain_write_errors


@pytest.mark.parametrize("path", [Path("/dev/full"), Path("/dev/shm/no-such-folder/x")])
def test_write_that_failed_says_where_and_how_much_room_is_left(path):
    told = pytest.raises(PostTrainingError, match=r"/dev: cannot write: .* MB are free there")
    with told, explain_write_errors(Path("/dev")):
        torch.save({"weight": torch.zeros(1_000_000)}, path)


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
    ],
)
def test_write_error_of_a_gathering_is_left_as_it_is(error):
    with pytest.raises(type(error)) as caught, explain_write_errors(Path("/dev")):
        raise error
    assert caught.value is error


def test_file_that_cannot_be_read_is_no_error_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), explain_write_errors(tmp_path / "run"):
        (tmp_path / "model/config.json").read_text()
    with pytest.raises(PostTrainingError), explain_write_errors(tmp_path):
        (tmp_path / "run/model/config.json").write_text("")
