import pytest

from post_training.core.errors import UsageError
from post_training.stages.processes import Launch, detect_launch, first_host, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,1",
    "SLURM_STEP_NODELIST": "nid[003-004]",
}


def test_detect_launch_nothing_started_us_is_none():
    assert detect_launch({}) is None


def test_detect_launch_slurm_step_gives_the_rank():
    assert detect_launch(STEP) == Launch(4, 5, 0, 1, f"nid003:{20000 + 7 * 16 + 2}")


def test_detect_launch_step_on_one_node_meets_on_the_loopback_address():
    step = {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "5"}
    launch = detect_launch({**step, "SLURM_NODEID": "0"})
    assert launch == Launch(4, 5, 0, 5, f"127.0.0.1:{20000 + 7 * 16 + 2}")


def test_detect_launch_batch_script_is_one_process():
    assert detect_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None


def test_detect_launch_torchrun_inside_a_step_wins():
    torchrun = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "29500",
    }
    assert detect_launch({**STEP, **torchrun}) == Launch(1, 2, 1, 2, "host:29500")


def test_detect_launch_round_trips_through_its_variables():
    launch = Launch(3, 8, 1, 2, "10.0.0.1:1234")
    assert detect_launch(launch.variables()) == launch


def test_detect_launch_incomplete_variables_are_refused():
    with pytest.raises(UsageError, match="the launcher's variables are incomplete"):
        detect_launch({"RANK": "1"})


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x3)", [1, 2, 2, 2])]
)
def test_tasks_per_node_is_expanded(text, counts):
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("host", "host"),
        ("a,b", "a"),
        ("nid[003-004,7]", "nid003"),
        ("nid[7,9],x", "nid7"),
        ("x,nid[1-2]", "x"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
