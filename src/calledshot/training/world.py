"""The ranks of a job: where this process stands among them, and the little that they tell each other.

Under `torchrun`, `srun` or `shot train --ranks N` a process finds its place in its environment. Ranks are ordered by
(replicate, shard, context, tensor), the last fastest.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from calledshot.recipe import UsageError
from calledshot.recipe.layout import Layout

PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that prepares the data, or evaluates: longer than either takes. A rank that dies takes
its connections with it, so that the others do not wait for it."""
FIRST_PORT, PORTS = 20_000, 20_000
"""Where Slurm's jobs meet, by their number."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, as its launcher says."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those on this machine."""
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """From the variables of `torchrun`, or of a step of Slurm's `srun`; alone without either."""
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        ):
            if names[0] in environment and names[1] in environment:
                rank, size = int(environment[names[0]]), int(environment[names[1]])
                local = environment.get(names[3], "1").partition("(")[0].partition(",")[0]
                return cls(rank, size, int(environment.get(names[2], 0)), int(local))
        return cls()


def _meet(place: Place) -> None:
    """Sets where the ranks meet where the launcher did not: under Slurm, on the job's first node."""
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.size))
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", "")
        if not nodes:
            raise UsageError(
                "RANK and WORLD_SIZE are set, and MASTER_ADDR is not: start with `torchrun`, `srun` or "
                "`shot train --ranks N`, which set all of them, or unset them"
            )
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        os.environ["MASTER_ADDR"] = (listed.stdout.split() or [nodes.partition(",")[0]])[0]
    if "MASTER_PORT" not in os.environ:
        job = os.environ.get("SLURM_JOB_ID", "0")
        os.environ["MASTER_PORT"] = str(FIRST_PORT + int(job) % PORTS)


@dataclass
class World:
    """The job's processes. Alone, everything here is free."""

    place: Place = field(default_factory=Place)
    layout: Layout = field(default_factory=Layout)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """What FSDP shards over, with the copies before it where there are several; None without FSDP."""
    dense: dist.ProcessGroup | None = None
    """Ranks whose gradients of a weight add up: those of one place in the tensor's group. None for one rank."""
    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None
    expert: dist.ProcessGroup | None = None
    """Ranks that hold the other experts."""
    expert_dense: dist.ProcessGroup | None = None
    """Ranks that hold the same experts."""
    begun: bool = False
    """Whether the leading rank has told the others what to work on."""

    @classmethod
    def join(cls) -> World:
        """Finds the other ranks, without a layout yet. UsageError where the environment says half of what is needed."""
        place = Place.of(os.environ)
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if place.size > 1 and not dist.is_initialized():
            _meet(place)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        return cls(place, device=device)

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the run directory."""
        return self.place.rank == 0

    @property
    def data_rank(self) -> int:
        """Whose rows of a batch this rank takes, of `layout.data`."""
        return self.rank // (self.layout.tensor * self.layout.context)

    @property
    def speaks_for_data(self) -> bool:
        """Whether this rank is the first of those that see the same rows."""
        return self.rank % (self.layout.tensor * self.layout.context) == 0

    @property
    def context_rank(self) -> int:
        """Which part of its rows' positions, of `layout.context`."""
        return self.rank // self.layout.tensor % self.layout.context

    def arrange(self, layout: Layout) -> None:
        """Forms the groups that a layout asks for; all ranks call it alike."""
        self.layout = layout
        if self.size == 1:
            return
        grid = torch.arange(self.size).view(layout.replicate, layout.shard, layout.context, layout.tensor)
        together = layout.replicate * layout.shard * layout.context
        by_expert = grid.reshape(together // layout.expert, layout.expert, layout.tensor)
        self.dense = self._group(grid.reshape(together, layout.tensor).T)
        self.tensor = self._group(grid.reshape(together, layout.tensor))
        self.context = self._group(grid.permute(0, 1, 3, 2).reshape(-1, layout.context))
        if layout.expert > 1:
            self.expert = self._group(by_expert.permute(0, 2, 1).reshape(-1, layout.expert))
            self.expert_dense = self._group(by_expert.permute(1, 2, 0).reshape(-1, together // layout.expert))
        if layout.shard > 1:
            sizes = (layout.replicate, layout.shard * layout.context, layout.tensor)
            names = ("replicate", "shard", "tensor")
            whole = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
            self.mesh = whole["replicate", "shard"] if layout.replicate > 1 else whole["shard"]

    def _group(self, rows: Tensor) -> dist.ProcessGroup | None:
        """The group of the row of ranks that this rank is in; None where it would be alone."""
        if rows.size(1) == 1:
            return None
        mine, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=PATIENCE)
        return mine

    # What ranks tell each other, by way of the CPU

    def tell(self, content: Any = None) -> Any:
        """What the leading rank says, on every rank; what JSON can say."""
        if self.size == 1:
            return content
        said = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        size = torch.tensor([len(said)])
        dist.broadcast(size, 0)
        if not self.leads:
            said = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(said, 0)
        return json.loads(said.numpy().tobytes())

    def gather(self, content: bytes) -> list[bytes]:
        """What each rank says, in their order."""
        if self.size == 1:
            return [content]
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(content)
        dist.all_reduce(sizes)
        longest = max(int(sizes.max()), 1)
        sent = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
        received = torch.empty(self.size * longest, dtype=torch.uint8)
        dist.all_gather_into_tensor(received, sent)
        return [
            row.numpy().tobytes()[:size] for row, size in zip(received.view(self.size, -1), sizes.tolist(), strict=True)
        ]

    def first(self, fault: str | None) -> str | None:
        """The first rank's that has one."""
        found = [each.decode() for each in self.gather((fault or "").encode()) if each]
        return found[0] if found else None

    def any(self, *flags: bool) -> list[bool]:
        """Whether some rank says so, for each flag."""
        if self.size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(each) for each in found]

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found)
        return found.tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            self.any(False)

    def leave(self) -> None:
        """Closes the connections."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
