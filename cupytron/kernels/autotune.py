"""Choose between several functions for one operation, by trying them on the problems of the run itself.

    tuner = RuntimeAutoTuner()
    sum_rows = tuner.wrap("sum_rows", {"ones": by_product, "sum": by_sum}, default="ones")
    with tuner.tuning():
        step()                # tries the candidates on copies of what each call is given
    step()                    # calls the fastest that is right

A problem is an operation with the shapes, dtypes and layouts of its arguments. A candidate is refused if it
raises, or if its results are not the reference's but for rounding; of the others the fastest is chosen.

Nothing is ever tried outside `tuning`: there an unknown problem goes to the default. Inside, results come
from what was in force before, so that a choice never changes between a forward and its backward, and never
on one rank alone: `synchronise`, the only place where ranks wait for each other, puts rank 0's choices in
force on all of them.

Candidates for one operation round differently. So choices decide about the last bits of a run, and
deterministic runs have none (candidates.allowed).
"""

import contextlib
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupytron import backend
from cupytron.kernels import tables, trial
from cupytron.kernels.operation import (
    Arguments,
    Function,
    Functions,
    Operation,
    describe,
    describe_first,
)
from cupytron.kernels.tables import Choice, Found, Others


class Chooser(NamedTuple):
    """Something else that chooses by measuring, and whose choices are kept and shared with the tuner's."""

    export: Callable[[], dict[str, int]]
    restore: Callable[[dict[str, int]], None]
    switch: Callable[[bool], None]  # whether it may measure


class RuntimeAutoTuner:
    """Candidates of operations, and what was found out about them.

    Args:
        warmup_iterations: calls of each candidate before it is measured.
        measure_iterations: calls that are measured; their median counts.
        graphs: whether candidates that cannot be captured into a CUDA graph are refused.
        tf32: whether float32 matrices may be rounded to 10 bits of fraction.
        device: a backend.Device: choices are kept for its kind.

    Attributes:
        functions: what to call in an operation's place, by name: a table for ops.use.
        undecided: (operation, problem) -> why it could not be tried.
    """

    def __init__(
        self,
        warmup_iterations: int = 3,
        measure_iterations: int = 10,
        graphs: bool = False,
        tf32: bool = False,
        device: Any = backend.CPU,
    ) -> None:
        self.warmup_iterations, self.measure_iterations = warmup_iterations, measure_iterations
        self.graphs, self.tf32, self.device = graphs, tf32, device
        self.functions: dict[str, Function] = {}
        self.undecided: dict[tuple[str, str], str] = {}
        self._operations: dict[str, Operation] = {}
        self._found: Found = {}
        self._choosers: dict[str, Chooser] = {}
        self._tuning = 0  # ranks as threads may each be inside
        self._lock = threading.RLock()
        self._here = threading.local()

    @property
    def frozen(self) -> bool:
        """Whether unknown problems go to the default, untried."""
        return not self._tuning

    def wrap(
        self,
        name: str,
        candidates: Mapping[str, Function],
        default: str,
        reference: Function | None = None,
        writes: tuple[str, ...] = (),
    ) -> Function:
        """A function with the candidates' signature that calls the one that was chosen for its arguments.

        Args:
            name: of the operation.
            candidates: functions by name, for all dtypes, layouts and alignments; one that cannot do a
                problem raises.
            default: the candidate that is called where nothing has been chosen.
            reference: whose results are right; None: the first candidate's.
            writes: parameters that are written into: they are compared, too.
        """
        first = next(iter(candidates.values()))
        names = list(inspect.signature(first).parameters)
        assert set(writes) <= set(names), f"{name} has no parameters {set(writes) - set(names)}"
        places = [names.index(parameter) for parameter in writes]

        def attempt(functions: Functions, *arguments: Any) -> Any:
            result = functions[0](*arguments)
            return result, [arguments[place] for place in places]

        single = {candidate: (function,) for candidate, function in candidates.items()}
        right = (reference,) if reference else None
        members = {name: lambda *arguments: arguments}
        operation = Operation(name, members, single, default, right, attempt, describe)
        return self._add(operation)[0]

    def wrap_together(
        self,
        name: str,
        members: Mapping[str, Callable[..., tuple[Any, ...]] | None],
        candidates: Mapping[str, Functions],
        default: str,
        attempt: Callable[..., Any],
        reference: Functions | None = None,
    ) -> Functions:
        """As wrap, for functions of which one reads what another has saved: all are of one candidate.

        The problem is the first argument's shape and dtype, which has to be the same for all of them.

        Args:
            members: their names, each with a function that makes the attempt's arguments of its own, or
                None: a call of it is no occasion to try.
            candidates: the members' functions by candidate, in the same order.
            default, reference: as wrap's.
            attempt: (functions, *arguments) -> what has to agree, arrays that may be overwritten.
        """
        return self._add(
            Operation(name, members, candidates, default, reference, attempt, describe_first)
        )

    def attach(
        self,
        name: str,
        export: Callable[[], dict[str, int]],
        restore: Callable[[dict[str, int]], None],
        switch: Callable[[bool], None] = lambda on: None,
    ) -> None:
        """Keep and share the choices of something else with the tuner's.

        Args:
            export: what it has chosen, by its own keys. restore: make it use these.
            switch: allow or forbid it to measure; it may while the tuner does.
        """
        assert name not in ("format", "environment", "operations"), name
        self._choosers[name] = Chooser(export, restore, switch)
        switch(not self.frozen)

    def _add(self, operation: Operation) -> Functions:
        self._operations[operation.name] = operation
        functions = operation.functions(self._find)
        self.functions.update(functions)
        return tuple(functions.values())

    def _find(
        self, operation: Operation, problem: str, arguments: Arguments | None
    ) -> tuple[Functions, bool]:
        """The functions for a problem, after trying them if it is new and this is the time for it."""
        with self._lock:
            trying = getattr(self._here, "trying", False)  # the call comes from a candidate
            name = operation.chosen.get(problem)
            if name is None:
                place = operation.name, problem
                new = place not in self._found and place not in self.undecided
                if new and arguments is not None and not self.frozen and not trying:
                    self._try(operation, problem, arguments())
                name = operation.default
                entry = self._found.get(place)
                # one that cannot do it at all is not kept for the sake of order
                if entry and name in entry.refused and entry.choice not in entry.refused:
                    # a table may come from where there are more candidates
                    name = entry.choice if entry.choice in operation.candidates else name
            return operation.candidates[name], not trying

    def _try(self, operation: Operation, problem: str, arguments: tuple[Any, ...]) -> None:
        xp = trial.array_module(arguments)
        if xp is not np and xp.cuda.get_current_stream().is_capturing():
            return
        self._here.trying = True
        iterations = self.warmup_iterations, self.measure_iterations
        allowed = trial.tolerance(arguments, self.tf32)
        try:
            with trial.apart(xp):
                entry = operation.measure(arguments, allowed, *iterations, self.graphs)
            self._found[operation.name, problem] = entry
        except Exception as error:  # the reference failed, or there was no room for copies
            self.undecided[operation.name, problem] = trial.reason(error)
        finally:
            self._here.trying = False

    @contextlib.contextmanager
    def tuning(self, world: Any = None, file: Path | None = None) -> Iterator[None]:
        """Try what is new while this lasts; then put it in force on all ranks, and keep it on disk.

        Collective over `world`, at the end and only there: what ranks try meanwhile, and when, is their own
        business. After an error nothing new comes into force.

        Args:
            world: all ranks; None: this process alone.
            file: where rank 0 keeps the table; None: the cache's file for this environment.
        """
        self._set_tuning(+1)
        try:
            yield
        finally:
            self._set_tuning(-1)
        self.synchronise(world)
        if world is None or world.rank == 0:
            # the next run will measure again
            with contextlib.suppress(OSError):
                self.save(file)

    def _set_tuning(self, change: int) -> None:
        with self._lock:
            self._tuning += change
            self._refresh()

    def _refresh(self) -> None:
        for operation in self._operations.values():
            operation.refresh(not self.frozen)
        for chooser in self._choosers.values():
            chooser.switch(not self.frozen)

    def synchronise(self, world: Any = None) -> None:
        """Put what was found or loaded in force: on all ranks the same. Collective over `world`.

        Of each problem the first rank that has met it decides; candidates that any rank had to refuse are
        out. To be called between steps, before the first or at the end of `tuning`.
        """
        others = {name: chooser.export() for name, chooser in self._choosers.items()}
        mine = dict(self._found), others
        said = [mine] if world is None else world.gather_objects(mine)
        with self._lock:
            self._found = self._merged([found for found, _ in said])
            for name, chooser in self._choosers.items():
                merged: dict[str, int] = {}
                for _, tables_ in reversed(said):
                    merged.update(tables_.get(name, {}))
                chooser.restore(merged)
            for operation in self._operations.values():
                operation.chosen = {
                    problem: entry.choice
                    for (name, problem), entry in self._found.items()
                    # a table may come from where there are more candidates
                    if name == operation.name and entry.choice in operation.candidates
                }
            self._refresh()

    def _merged(self, ranks: list[Found]) -> Found:
        merged: Found = {}
        for rank, found in enumerate(ranks):
            for place, entry in found.items():
                mine = merged.setdefault(place, entry)
                more = {n: f"rank {rank}: {why}" for n, why in entry.refused.items()}
                refused = {**more, **mine.refused}
                times = {name: t for name, t in mine.times.items() if name not in refused}
                choice = mine.choice
                if choice in refused and place[0] in self._operations:
                    choice = self._operations[place[0]].fastest(times)
                merged[place] = Choice(choice, times, refused)
        return merged

    def load(self, file: Path | None = None) -> bool:
        """Take what a table holds; it comes into force by `synchronise`. Returns whether there was any.

        A file that is damaged, or of another device or other versions, counts as empty.

        Args:
            file: None: the cache's file for this environment.
        """
        environment = self._environment()
        found, others = tables.read(file or tables.path(environment), environment)
        with self._lock:
            self._found.update(found)
            for name, table in others.items():
                if name in self._choosers:
                    self._choosers[name].restore(table)
        return bool(found or others)

    def save(self, file: Path | None = None) -> Path:
        """Keep what was found, besides what the file holds of other problems; returns where.

        Raises:
            OSError: it cannot be written.
        """
        environment = self._environment()
        others: Others = {name: chooser.export() for name, chooser in self._choosers.items()}
        file = file or tables.path(environment)
        tables.write(file, environment, self._found, others)
        return file

    def _environment(self) -> dict[str, Any]:
        # what may be chosen without graphs, or at a lower precision, is no choice for others
        return {**tables.environment(self.device), "graphs": self.graphs, "tf32": self.tf32}

    def found(self) -> Found:
        """What is known of each (operation, problem)."""
        return dict(self._found)

    def choices(self) -> dict[str, str]:
        """The choices in force that are not the default: "operation: problem" -> candidate."""
        return {
            f"{operation.name}: {problem}": name
            for operation in self._operations.values()
            for problem, name in sorted(operation.chosen.items())
            if name != operation.default
        }

    def fingerprint(self) -> str:
        """A word for all choices in force: runs with the same one compute by the same functions."""
        others = {name: chooser.export() for name, chooser in self._choosers.items()}
        others = {name: table for name, table in others.items() if table}
        choices = self.choices()
        if not choices and not others:
            return "defaults"
        text = json.dumps([choices, others], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
