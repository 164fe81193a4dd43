"""The batch script of every site, compared whole; `make lint` runs shellcheck on the files."""

from dataclasses import replace
from pathlib import Path

import pytest

from post_training.slurm.script import Container, Job, sbatch_script
from post_training.slurm.site import SITES_DIR, load_site

SITES = sorted(path.stem for path in SITES_DIR.glob("*.yaml"))
CONTAINER = Container(
    Path("/store/image.sif"),
    {"POST_TRAINING_IMAGE_PATH": "/store/image.sif", "NCCL_SOCKET_IFNAME": "hsn0,hsn1,hsn2,hsn3"},
    ("/pfs:/pfs", "/store:/store:ro"),
)


def job(run_dir: str, site) -> Job:
    container = CONTAINER if site.launcher.kind == "singularity" else None
    return Job("sft", Path(run_dir), Path("/work"), 3, container)


@pytest.mark.parametrize("name", SITES)
def test_sbatch_script_of_site_is_the_golden_file(name, golden):
    site = load_site(name, {"nodes": 1 if name == "laptop" else 2, "account": "a1"})
    golden(f"slurm/{name}.sh", sbatch_script(job("/work/runs/one", site), site))


def test_sbatch_script_of_an_array_of_workers_is_the_golden_file(golden):
    site = load_site("clariden", {"partition": "debug"})
    workers = replace(job("/work/runs/one", site), name="generate-exp", num_workers=8)
    golden("slurm/clariden-workers.sh", sbatch_script(workers, site))


def test_sbatch_script_of_a_chain_is_the_golden_file(golden):
    site = load_site("laptop", {})
    chained = replace(job("/work/runs/one", site), is_chained=True)
    golden("slurm/laptop-chain.sh", sbatch_script(chained, site))


def test_sbatch_script_that_vets_its_nodes_is_the_golden_file(golden):
    site = load_site("clariden", {"nodes": 2})
    vetted = replace(job("/work/runs/one", site), is_vetted=True)
    golden("slurm/clariden-vet.sh", sbatch_script(vetted, site))


def test_sbatch_script_of_an_odd_path_is_the_golden_file(golden):
    site = load_site("laptop", {})
    odd = """/work/it's "odd" $HOME;#%j größe"""
    golden("slurm/odd-path.sh", sbatch_script(job(odd, site), site))
