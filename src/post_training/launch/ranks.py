"""This process's rank, from the launcher that started it: torch's variables, Slurm's, or none."""

from collections.abc import Mapping
from dataclasses import dataclass

from post_training.core.errors import UsageError

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_FIRST_PORT, _NUM_PORTS = 20000, 20000


@dataclass(frozen=True)
class Launch:
    """One process of a job. rendezvous: where rank 0 listens, as `host:port`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str

    def variables(self) -> dict[str, str]:
        """The variables that torch.distributed and accelerate read."""
        address, port = self.rendezvous.rsplit(":", 1)
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }


def detect_launch(environment: Mapping[str, str]) -> Launch | None:
    """The launch that `environment` describes, or None when nobody started several processes.

    torchrun's variables count before Slurm's: torchrun itself may run in a Slurm step. A batch
    script is no step: Slurm sets SLURM_NTASKS there, but only one process runs.
    Errors: UsageError when the variables are incomplete.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size, local_rank, local_size = _integers(environment, TORCH_VARIABLES)
        address = environment.get("MASTER_ADDR", "127.0.0.1")
        return Launch(
            rank, world_size, local_rank, local_size, f"{address}:{environment['MASTER_PORT']}"
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return None
    rank, world_size, local_rank, node = _integers(
        environment, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
    )
    local_size = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
    # Steps of one job may run side by side, so the port is of the step.
    job, step = _integers(environment, ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _FIRST_PORT + (job * 16 + step) % _NUM_PORTS
    # On one node its name need not resolve, as it does not in a test cluster.
    is_alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    host = "127.0.0.1" if is_alone else first_host(environment["SLURM_STEP_NODELIST"])
    return Launch(rank, world_size, local_rank, local_size, f"{host}:{port}")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `4(x2),3` as [4, 4, 3]."""
    counts: list[int] = []
    for word in text.split(","):
        count, _, repeat = word.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first node of Slurm's `nid[001-004,7],login1`: nid001."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    inside, _, suffix = rest.partition("]")
    first = inside.replace("-", ",").split(",")[0]
    return f"{prefix}{first}{suffix.split(',')[0]}"


def _integers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    try:
        return [int(environment[name]) for name in names]
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the launcher's variables are incomplete: {error}",
            hint=f"a launcher sets all of {', '.join(names)}",
        ) from None
