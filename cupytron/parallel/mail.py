"""What stages send each other: activations forward, their gradients backward."""

import itertools
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupytron import backend
from cupytron.backend import CPU, Device
from cupytron.comm import Communicator, Handle
from cupytron.errors import CupytronError
from cupytron.parallel.schedules import POSTED, Message, Schedule
from cupytron.stash import MicroBatch

# shape and dtype of messages, by what decides them: kind, part, and the size of the micro-batch
Shapes = dict[tuple[str, int, int, int], tuple[tuple[int, ...], Any]]


class Mail:
    """A stage's messages in one run of a schedule.

    All stages know the whole schedule, and so in which order each sends: messages carry no name. Their
    shape and dtype are sent ahead the first time that a part gets a micro-batch of some size.

    Args:
        pp: the stages. schedule: what they run.
        batches: the micro-batches.
        known: what has been agreed on in earlier runs; added to.
        device: where arrays are to arrive.
    """

    def __init__(
        self,
        pp: Communicator,
        schedule: Schedule,
        batches: Sequence[MicroBatch],
        known: Shapes,
        device: Device = CPU,
    ) -> None:
        self.device = device
        self.pp, self.schedule, self.batches, self.known = pp, schedule, batches, known
        self.arrived: dict[Message, Any] = {}
        self.under_way: dict[int, deque[Handle]] = defaultdict(deque)  # sends, by receiver
        rank, stages = self.pp.rank, [s for s in range(self.pp.size) if s != self.pp.rank]
        # what each other stage will send, in order; of that, what a receive is posted for
        self.coming = {s: deque(schedule.sent(s, rank)) for s in stages}
        self.posted: dict[int, deque[tuple[Message, Handle]]] = {s: deque() for s in stages}
        # whether all that this stage sends to another has a shape that both have known before
        self.settled = {
            s: all(self._link(m) in self.known for m in schedule.sent(rank, s)) for s in stages
        }
        # a GPU that loads kernels for the first time may wait for all that runs on it, and a receive that
        # is posted ahead runs until its message has come: so none is until all has been run once, and
        # with it all messages been known, on every stage
        known_all = all(self.settled.values()) and all(
            self._link(m) in known for stage in stages for m in self.coming[stage]
        )
        self.ahead = POSTED if known_all or not device.gpu else 0
        if not self.ahead:
            self.settled = dict.fromkeys(stages, False)
        for stage in stages:
            self._post(stage, self.ahead)

    def take(self, message: Message) -> Any:
        """The array that a message brings; waits for it."""
        sender = self.schedule.sender(message)
        while message not in self.arrived:
            if not self.posted[sender]:
                if self._link(self.coming[sender][0]) not in self.known:
                    self._agree(sender)
                self._post(sender, max(1, self.ahead))
            came, handle = self.posted[sender].popleft()
            self.arrived[came] = handle.wait()
            self._post(sender, self.ahead)
        return self.arrived.pop(message)

    def send(self, message: Message, array: Any) -> None:
        """Send an array on its way; it may not be changed any more."""
        to = self.schedule.placement.place(message.part)[0]
        if to == self.pp.rank:
            self.arrived[message] = array
            return
        if not hasattr(array, "dtype"):
            raise CupytronError(
                f"part {message.part} of the pipeline would be sent a {type(array).__name__}; a layer of a "
                "chain passes on one array"
            )
        array = backend.array_module(array).ascontiguousarray(array)
        link = self._link(message)
        if link not in self.known:
            self.known[link] = array.shape, array.dtype
            self.pp.send(_describe(array), to)
        under_way = self.under_way[to]
        if len(under_way) == POSTED and self.settled[to]:
            # the receiver has posted as many receives, and the checker knows that it is safe to wait for
            # them: so no more arrays than these are held by sends
            under_way.popleft().wait()
        under_way.append(self.pp.send(array, to, async_op=True))

    def finish(self) -> None:
        """Wait until all has been sent."""
        for handle in itertools.chain(*self.under_way.values()):
            handle.wait()

    def _link(self, message: Message) -> tuple[str, int, int, int]:
        """What decides a message's shape and dtype."""
        batch = self.batches[message.micro_batch]
        return message.kind, message.part, batch.batch_size, batch.sequence_length

    def _agree(self, sender: int) -> None:
        """Receive the shape and dtype of the next message from a stage."""
        link = self._link(self.coming[sender][0])
        self.known[link] = _read(self.pp.recv(np.empty(2 + _DIMS, np.int64), sender))

    def _post(self, sender: int, count: int) -> None:
        """Have up to `count` receives posted for the next messages from a stage."""
        coming, posted = self.coming[sender], self.posted[sender]
        while coming and len(posted) < count and self._link(coming[0]) in self.known:
            message = coming.popleft()
            shape, dtype = self.known[self._link(message)]
            room = self.device.xp.empty(shape, dtype)
            handle = self.pp.recv(room, sender, async_op=True)
            posted.append((message, handle))


_DIMS = 6  # of a message, at most


def _describe(array: Any) -> np.ndarray:
    """Dtype and shape as numbers."""
    words = np.full(2 + _DIMS, -1, np.int64)
    # ml_dtypes' bfloat16 is of kind V, as is raw memory
    words[:2] = ord(array.dtype.kind), array.dtype.itemsize
    words[2 : 2 + array.ndim] = array.shape
    return words


def _read(words: np.ndarray) -> tuple[tuple[int, ...], np.dtype]:
    shape = tuple(int(n) for n in words[2:] if n >= 0)
    kind = chr(words[0])
    return shape, backend.named_dtype("bfloat16" if kind == "V" else f"{kind}{words[1]}")
