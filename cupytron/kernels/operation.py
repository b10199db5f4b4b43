"""An operation with several candidates: which problem a call is, and trying the candidates on it."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import trial
from cupytron.kernels.tables import Choice

WIN = 0.95  # what takes more than this part of the default's time is no reason to leave the default
_MEMO = 4096  # calls of one function that are remembered
_PLAIN = {int, float, bool, str, type(None)}

Function = Callable[..., Any]
Functions = tuple[Function, ...]
Arguments = Callable[[], tuple[Any, ...]]


class Operation:
    """Functions that are chosen together, such as a forward and the backward that reads what it saved.

    Args:
        name: in tables.
        members: their names, each with a function that makes the attempt's arguments of its own, or None: a
            call of it is no occasion to try.
        candidates: the members' functions by candidate.
        default: a candidate. reference: functions whose results are right.
        attempt: (functions, *arguments) -> what has to agree.
        describe: bound arguments of any member -> the problem in words.

    Attributes:
        chosen: candidates in force, by problem.
        live: whether calls are looked up; else they go straight to the default.
    """

    def __init__(
        self,
        name: str,
        members: Mapping[str, Callable[..., tuple[Any, ...]] | None],
        candidates: Mapping[str, Functions],
        default: str,
        reference: Functions | None,
        attempt: Callable[..., Any],
        describe: Callable[[dict[str, Any]], str],
    ) -> None:
        assert default in candidates, f"{name}: the default {default} is none of {list(candidates)}"
        self.name, self.members, self.candidates = name, dict(members), dict(candidates)
        self.default, self.attempt, self.describe = default, attempt, describe
        self.reference = reference or next(iter(self.candidates.values()))
        self.chosen: dict[str, str] = {}
        self.live = False
        self._memos: list[dict[Any, Function]] = [{} for _ in self.members]

    def refresh(self, tuning: bool) -> None:
        """Forget which function a call went to."""
        self.live = tuning or any(name != self.default for name in self.chosen.values())
        for memo in self._memos:
            memo.clear()

    def functions(
        self, find: Callable[["Operation", str, Arguments | None], tuple[Functions, bool]]
    ) -> dict[str, Function]:
        """What to call in the members' places, by name.

        Args:
            find: (operation, problem, the attempt's arguments) -> functions, and whether they may be
                remembered for the next call like this one.
        """
        return {name: self._dispatcher(i, find) for i, name in enumerate(self.members)}

    def _dispatcher(self, index: int, find: Callable[..., tuple[Functions, bool]]) -> Function:
        default = self.candidates[self.default][index]
        start = list(self.members.values())[index]
        signature, memo = inspect.signature(default), self._memos[index]

        def look_up(key: Any, arguments: Any, named: Any) -> Function:
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            make = None if start is None else functools.partial(start, *bound.args)
            functions, keep = find(self, self.describe(bound.arguments), make)
            if keep:
                if len(memo) >= _MEMO:  # sequences of all lengths: generation
                    memo.clear()
                memo[key] = functions[index]
            return functions[index]

        @functools.wraps(default)
        def call(*arguments: Any, **named: Any) -> Any:
            if not self.live:
                return default(*arguments, **named)
            key = _key(arguments)
            if named:
                key = key, tuple(named), _key(named.values())
            function = memo.get(key)
            if function is None:
                function = look_up(key, arguments, named)
            return function(*arguments, **named)

        call.untuned = default  # type: ignore[attr-defined]  # for whoever wraps the table again
        return call

    def measure(
        self, arguments: tuple[Any, ...], allowed: float, warmup: int, rounds: int, graphs: bool
    ) -> Choice:
        """Try all candidates on copies of the arguments.

        Args:
            allowed: how far results may be from the reference's, see trial.disagreement.
            warmup, rounds: calls of each that are not timed, and that are.
            graphs: whether a candidate has to be fit for CUDA graphs.
        """
        xp = trial.array_module(arguments)

        def attempt(functions: Functions) -> Any:
            return self.attempt(functions, *trial.copied(arguments))

        wanted = attempt(self.reference)
        # results of timed calls are of no interest: they all overwrite the same copies
        scratch = trial.copied(arguments)
        refused: dict[str, str] = {}
        calls: dict[str, Callable[[], Any]] = {}
        for name, functions in self.candidates.items():
            call = functools.partial(self.attempt, functions, *scratch)
            try:
                own = wanted if functions == self.reference else attempt(functions)
                why = trial.disagreement(own, wanted, allowed)
                del own
            except Exception as error:
                if backend.is_shortage(error):  # of this moment, not of the candidate
                    raise
                why = trial.reason(error)
            if why is None:
                calls[name] = call
            else:
                refused[name] = why
        del wanted
        slow = trial.hopeless(calls, xp) if xp is not np else {}
        # the slow ones only where the others cannot be captured
        for names in (calls.keys() - slow.keys(), slow.keys()):
            fit = {name: call for name, call in calls.items() if name in names}
            if graphs and xp is not np:
                unfit = {n: why for n, call in fit.items() if (why := trial.not_captured(xp, call))}
                refused.update(unfit)
                fit = {name: call for name, call in fit.items() if name not in unfit}
            if fit:
                break
        times, failed = trial.seconds(fit, warmup, rounds, xp) if len(fit) > 1 else ({}, {})
        refused.update(failed)
        refused = {**{name: why for name, why in slow.items() if name not in fit}, **refused}
        return Choice(self.fastest(times or dict.fromkeys(fit, 0.0)), times, refused)

    def fastest(self, times: Mapping[str, float]) -> str:
        """The default unless another one is clearly faster, or the default has no time."""
        best = min(times, key=times.__getitem__, default=self.default)
        if self.default in times and times[best] > WIN * times[self.default]:
            return self.default
        return best


def _key(values: Any) -> tuple[Any, ...]:
    """Arguments as the key of a dictionary: numbers by their type, arrays by all but their contents."""
    key: list[Any] = []
    for x in values:
        kind = type(x)
        if kind in _PLAIN:
            key.append(kind)
        elif kind is tuple or kind is list:
            key.append(_key(x))
        else:
            try:
                key.append((x.shape, x.strides, x.dtype))
            except AttributeError:
                key.append((kind, _key(x)) if isinstance(x, tuple) else kind)
    return tuple(key)


def describe(arguments: dict[str, Any]) -> str:
    """A problem in words: names, shapes, dtypes and layouts of all arrays, and which objects are there.

    Numbers are no part of it: a step, a scale or a rate of dropout makes no other problem.
    """
    return ", ".join(part for name, value in arguments.items() for part in _parts(name, value))


def describe_first(arguments: dict[str, Any]) -> str:
    """Shape and dtype of the first argument."""
    x = next(iter(arguments.values()))
    return f"{_shape(x)} {x.dtype.name}"


def _parts(name: str, value: Any) -> Iterator[str]:
    if hasattr(value, "strides"):
        how = trial.layout(value)
        yield f"{name} {_shape(value)} {value.dtype.name}{how and ':'}{how}"
    elif isinstance(value, tuple | list):
        if hasattr(value, "_fields"):
            yield name
        for index, part in enumerate(value):
            yield from _parts(f"{name}[{index}]", part)
    elif type(value) not in _PLAIN:
        yield name


def _shape(x: Any) -> str:
    return "x".join(map(str, x.shape)) or "0-d"
