"""The mesh: ranks in a Cartesian grid of pipeline, data and tensor axes."""

from collections.abc import Mapping
from typing import Any

from cupytron.backend import CPU, Device
from cupytron.comm.alone import SelfCommunicator
from cupytron.comm.communicator import Communicator
from cupytron.config_checks import divisors
from cupytron.errors import CupytronError

AXES = ("pp", "dp", "tp")  # outermost first: tensor-parallel ranks are neighbours


class ParallelContext:
    """A grid of ranks, and this rank's groups along its axes.

    Rank (i_pp, i_dp, i_tp) of the grid is rank (i_pp dp + i_dp) tp + i_tp of the world.

    Args:
        sizes: a mapping such as {"tp": 2, "dp": 2}, in place of the keywords.
        tp, pp: sizes of the tensor and pipeline axes. dp: of the data axis; None: what is left.
        world: all ranks; None: this process alone.
        device: where this rank computes.

    Attributes:
        world, tp, pp, dp: communicators. coordinates: this rank's place by axis. sizes: by axis.
        tuner: None, or what has chosen among kernels (kernels.autotune.RuntimeAutoTuner).
        ends: the first and the last stage of this rank's pipeline; between them, a rank alone.

    Raises:
        CupytronError: the sizes' product is not the number of ranks.
    """

    def __init__(
        self,
        sizes: Mapping[str, int] | None = None,
        *,
        tp: int = 1,
        pp: int = 1,
        dp: int | None = None,
        world: Communicator | None = None,
        device: Device = CPU,
    ) -> None:
        self.device = device
        self.tuner: Any = None
        if sizes is not None:
            if unknown := set(sizes) - set(AXES):
                raise CupytronError(
                    f"unknown axis {', '.join(sorted(unknown))}; the axes are tp, pp, dp"
                )
            tp, pp, dp = sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("dp")
        self.world = world or SelfCommunicator()
        self.sizes = _complete(self.world.size, tp, pp, dp)
        self.coordinates = place(self.world.rank, self.sizes)
        self.tp = self._along("tp")
        self.pp = self._along("pp")
        self.dp = self._along("dp")
        self.ends = self._ends()

    @property
    def groups(self) -> tuple[Communicator, ...]:
        """All communicators but the world."""
        return self.tp, self.pp, self.dp, self.ends

    @property
    def operation(self) -> str | None:
        """What this rank waits for just now; another thread may ask."""
        asked = (group.operation for group in (*self.groups, self.world))
        return next((operation for operation in asked if operation is not None), None)

    def connect(self) -> None:
        """Open what the groups need for arrays on GPUs, before anything is recorded. Collective."""
        for group in (self.tp, self.dp, self.ends):
            group.connect()
        self.pp.connect(messages=True)

    def close(self) -> None:
        """Give the groups back; the world stays open. Collective: not for a rank that has failed."""
        for group in self.groups:
            group.close()

    def _along(self, axis: str) -> Communicator:
        """The ranks that differ from this one along `axis` only."""
        color = 0
        for other in AXES:
            if other != axis:
                color = color * self.sizes[other] + self.coordinates[other]
        return self.world.split(color, self.coordinates[axis], axis)

    def _ends(self) -> Communicator:
        stages, stage = self.sizes["pp"], self.coordinates["pp"]
        if stages == 1:
            return SelfCommunicator("ends")
        pipeline = self.coordinates["dp"] * self.sizes["tp"] + self.coordinates["tp"]
        between = stage if stage < stages - 1 else 0
        return self.world.split(pipeline * stages + between, stage, "ends")


def place(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Coordinates of a rank, by axis."""
    coordinates = {}
    for axis in reversed(AXES):
        rank, coordinates[axis] = divmod(rank, sizes[axis])
    return coordinates


def _complete(ranks: int, tp: int, pp: int, dp: int | None) -> dict[str, int]:
    for axis, size in (("tp", tp), ("pp", pp), ("dp", dp)):
        if size is not None and size < 1:
            raise CupytronError(f"{axis}={size} must be at least 1")
    if dp is None and ranks % (tp * pp) == 0:
        dp = ranks // (tp * pp)
    if dp is None or tp * pp * dp != ranks:
        asked = f"tp={tp} x pp={pp}" + ("" if dp is None else f" x dp={dp}")
        raise CupytronError(f"{asked} does not fit {ranks} ranks; choose from {_fitting(ranks)}")
    return {"pp": pp, "dp": dp, "tp": tp}


def _fitting(ranks: int) -> str:
    fits = [
        f"tp={tp} pp={pp} dp={ranks // tp // pp}"
        for tp in divisors(ranks)
        for pp in divisors(ranks)
        if ranks % (tp * pp) == 0
    ]
    return "; ".join(fits[:12]) + ("; ..." if len(fits) > 12 else "")
