from post_training.records.machine import (
    describe_machine,
    find_accelerators,
    portable_environment,
    recorded_environment,
    remove_overruling,
    scheduler_job,
)


def test_recorded_environment_is_an_allow_list():
    environment = {
        "NCCL_NET": "AWS Libfabric",
        "FI_PROVIDER": "cxi",
        "NVIDIA_TF32_OVERRIDE": "1",
        "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
        "OMP_NUM_THREADS": "2",
        "SLURM_JOB_ID": "7",
        "HF_TOKEN": "x",
        "WANDB_API_KEY": "x",
        "SLURM_JWT": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "HOME": "/home/me",
        "POST_TRAINING_SITE": "laptop",
    }
    recorded = recorded_environment(environment)
    assert list(recorded) == [
        "FI_PROVIDER", "NCCL_NET", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS",
        "ONEDNN_DEFAULT_FPMATH_MODE", "POST_TRAINING_SITE", "SLURM_JOB_ID",
    ]  # fmt: skip
    assert "SLURM_JOB_ID" not in portable_environment(recorded)
    assert portable_environment(recorded)["NCCL_NET"] == "AWS Libfabric"
    assert portable_environment(recorded)["NVIDIA_TF32_OVERRIDE"] == "1"


def test_remove_overruling_takes_out_what_libraries_would_set_over_the_configuration():
    kept = {"NCCL_NET": "x", "MY_FSDP_NOTE": "x"}
    overruling = {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_OFFLOAD_PARAMS": "1"}
    environment = {**kept, **overruling}
    assert remove_overruling(environment) == list(overruling)
    assert environment == kept


def test_recorded_environment_has_what_chooses_kernels_and_no_key():
    environment = {"VLLM_ATTENTION_BACKEND": "TORCH_SDPA", "VLLM_API_KEY": "x" * 20}
    recorded = recorded_environment(environment)
    assert portable_environment(recorded) == {"VLLM_ATTENTION_BACKEND": "TORCH_SDPA"}


def test_recorded_environment_has_no_secret_and_reproduces_none():
    secrets = {
        "FI_PROXY": "tcp://me:" + "word@host",
        "NCCL_X": "hf_" + 24 * "a",
        "OMP_TOKEN": "abc123def456",
    }
    recorded = recorded_environment({**secrets, "NCCL_PROTO": "^LL128"})
    assert recorded == {
        "FI_PROXY": "[redacted: password in an address]",
        "NCCL_PROTO": "^LL128",
        "NCCL_X": "[redacted: Hugging Face token]",
        "OMP_TOKEN": "[redacted: value of OMP_TOKEN]",
    }
    assert portable_environment(recorded) == {"NCCL_PROTO": "^LL128"}


def test_accelerators_are_counted_by_model(tmp_path):
    assert find_accelerators(tmp_path) == {"accelerators": {}, "driver": None}
    for index in range(2):
        gpu = tmp_path / f"proc/driver/nvidia/gpus/{index}"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text("Model: \t\t NVIDIA GH200 120GB\nIRQ:   \t 1\n")
        node = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{index}"
        node.mkdir(parents=True)
        (node / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {90010 * index}\n")
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("570.86.15\n")
    assert find_accelerators(tmp_path) == {
        "accelerators": {"NVIDIA GH200 120GB": 2, "gfx90a": 1},
        "driver": "570.86.15",
    }


def test_machine_names_the_processor():
    assert describe_machine()["processor"]
    assert describe_machine()["cpus"] >= 1


def test_machine_names_the_instructions_that_choose_how_sums_round(monkeypatch):
    text = "flags\t\t: fpu avx2 avx512f sse2\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: text)
    assert describe_machine()["instructions"] == ["avx2", "avx512f"]


def test_scheduler_job_is_job_and_step():
    assert scheduler_job({}) is None
    assert scheduler_job({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}) == "7.1"
    assert scheduler_job({"SLURM_JOB_ID": "7"}) == "7.batch"
