from post_training.records.run_record import RunDescription, RunFolder
from post_training.records.show import show_run

DESCRIPTION = RunDescription(
    stage="sft",
    recipe={"lr": 1e-3},
    topology={"world_size": 1},
    inputs={},
    image=None,
    facts={
        "machine": {"host": "here", "processor": "fast"},
        "scheduler_job": None,
        "command": ["entrypoint"],
        "code": {"from": "image"},
    },
)


def test_show_run_has_figures_and_speeds_on_lines_of_their_own(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.start(DESCRIPTION)
    metrics = {"num_steps": 12, "loss": 2.25, "timing": {"step_s": 0.5, "tokens_per_s": 1024.0}}
    folder.close("finished", outputs={"artifacts": {}}, metrics=metrics)
    show_run(tmp_path, as_json=False)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "metrics      num_steps=12, loss=2.25",
        "timing       step_s=0.5, tokens_per_s=1024",
    ]
