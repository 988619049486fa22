"""Records the other paths through a model's code, by running it: sizes and truths answer otherwise.

A recorded run shows one path. Here the model runs again, in isolation, with sizes that know when
code compares them (`sizes.py`). Where code compares one, or asks a tensor for its truth, it comes
to a *branch site*. Sites are answered otherwise in runs of their own, each by itself, then several
at once; so are the sites that only such a run comes to. The model also runs at other sizes, where
loops and indices, which ask nothing that can be seen, come out otherwise.

So are calls of torch's functions in code that catches errors, which raise one, and what torch is
set to (`torch.is_grad_enabled()`).

What is found is evidence, with limits. A false answer may lead to an error that a true one would
not have led to (`if h >= 16: x.view(…, h // 16)`): such a path was not followed, unless the code
itself raised at once. What becomes a plain number (`int(h)`, an index, a range) is followed no
further; nor is state that a run changes (`self.calls += 1`). Then the result says so in `lost`: a
branch on something that is not followed may depend on that.
"""

from __future__ import annotations

import dis
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from torchfuse.cases import Case, resized
from torchfuse.errors import TorchfuseError
from torchfuse.graph import Call, Graph
from torchfuse.graph.ambient import MODES, catches
from torchfuse.graph.exploring.silenced_output import output_silenced
from torchfuse.graph.exploring.sizes import BY_HASH, counted, followed, listening, plain
from torchfuse.graph.kinds import COUNTABLE
from torchfuse.graph.recording import Recorder
from torchfuse.isolation.snapshot import restored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import CodeType

    Site = tuple[CodeType, int]  # a function, and a place in its bytecode
    # Which answers of a run are false: all that a site gives, (a number) one of them, or all those
    # that are not the one given here
    Lies = Mapping[Site, int | bool | None]

__all__ = ["ExecutionPath", "ExecutionPaths", "called", "explore"]

# Runs of one case; a model with more paths than that is one that was not followed.
_RUNS = 256
# All combinations of so many sites are run; of more, each two.
_COMBINED = 5
# A site that is asked so often in one run may be a loop that a false answer never ends.
_ANSWERS = 200
# Up to so many visits of a site, each is answered otherwise by itself as well.
_VISITS = 3
# A site that a run with false answers comes to so often is in a loop that they never end.
_ENDLESS = 1000
# With false answers a call may be given so many times the elements that it has without, and so many
# more: all boxes of a detector where a few were suppressed would take minutes and gigabytes.
_TIMES_AS_LARGE, _MORE_ELEMENTS = 4, 100_000
# So it may make more calls: a loop whose end was settled by a false answer asks nothing.
_TIMES_AS_LONG, _MORE_CALLS = 4, 1000


@dataclass(frozen=True)
class ExecutionPath:
    """What was recorded on one path through the code."""

    graph: Graph
    left_at: str  # where it left the recorded path: "file.py:12", or the sizes of another call


@dataclass(frozen=True)
class ExecutionPaths:
    """The paths that were found, apart from the recorded one."""

    paths: tuple[ExecutionPath, ...]
    sites: int  # how many places were found where code asks
    runs: int  # of the model
    lost: str | None  # what could not be followed, as a clause; None: nothing


def explore(recorder: Recorder, cases: Sequence[Case], recorded: Graph) -> ExecutionPaths:
    """The paths that the model may take for inputs like the cases; `recorded` is that of these.

    The model is left as it was.
    """
    explorer = _Explorer(recorder, recorded)
    found: list[ExecutionPath] = []
    if any(read.code is None for read in recorded.reads):
        explorer.lost = "scripted code looks at values"
    with output_silenced(), listening(explorer):
        for index, case in enumerate(cases):
            found.extend(explorer.paths_of(index, case))
    return ExecutionPaths(tuple(found), len(explorer.known), explorer.runs, explorer.lost)


def called(
    recorder: Recorder, cases: Sequence[Case], recorded: Graph
) -> tuple[tuple[int, CodeType], ...] | None:
    """The user's functions that are called, each with how many recorded calls came before.

    None if the model does not run again.
    """
    found: list[tuple[int, CodeType]] = []
    run: list[_Place] = []  # of all calls so far: norms as one call are made of them afterwards
    explorer = _Explorer(recorder, Graph("", ()))

    def note(frame: Any, event: str, _: Any) -> None:
        own = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if event == "call" and explorer.graph is not None and own not in _NOT_THE_USERS:
            run.extend(map(_place_of, explorer.graph.calls[len(run) :]))
            found.append((len(run), frame.f_code))

    before = sys.gettrace()
    with output_silenced():
        sys.settrace(note)  # (a profiler of C's could not be put back)
        try:
            recorder.record(cases, explorer)
        except TorchfuseError:
            return None
        finally:
            sys.settrace(before)
    positions = _positions(run, recorded)
    return tuple((positions[position], code) for position, code in found)


_Place = tuple[int, str, str | None]


def _place_of(call: Call) -> _Place:
    return call.case, call.target, call.module_path


def _positions(run: Sequence[_Place], recorded: Graph) -> list[int]:
    """How many recorded calls came before each of a run's calls, and before its end.

    The first run of a model may make calls that later ones do not (it fills caches), and several
    calls of a norm module are one in what was recorded.
    """
    exact = {key: index for index, key in enumerate(_counted(map(_place_of, recorded.calls)), 1)}
    norms = {
        (call.case, call.module_path): index
        for index, call in enumerate(recorded.calls, 1)
        if call.kind == "batch_norm"
    }
    found = [0]
    for key in _counted(run):
        case, _, module_path, _ = key
        found.append(exact.get(key) or norms.get((case, module_path)) or found[-1])
    return found


def _counted(places: Iterable[_Place]) -> Iterator[tuple[int, str, str | None, int]]:
    """Each place with how often it came before."""
    seen: Counter[_Place] = Counter()
    for place in places:
        yield (*place, seen[place])
        seen[place] += 1


_NOT_THE_USERS = sys.stdlib_module_names | {"torch", "torchfuse"}
# A text that is made of a size: all of them come out otherwise at once.
_TEXT: Site = (explore.__code__, -1)


@dataclass
class _Explorer:
    """Runs of one model, and in each what its code asks and is answered."""

    recorder: Recorder
    recorded: Graph
    lost: str | None = None
    runs: int = 0
    known: set[Site] = field(default_factory=set)
    natural: list[dict[Site, bool]] = field(default_factory=list)  # true answers, for each size
    # In this run
    graph: Graph | None = None
    lies: Lies = field(default_factory=dict)
    asked: dict[Site, bool] = field(default_factory=dict)  # with the true answers
    visits: Counter[Site] = field(default_factory=Counter)
    mixed: set[Site] = field(default_factory=set)  # true answers differed, in any run
    usual: Counter[Site] = field(default_factory=Counter)  # the most visits in a run without lies
    largest: Counter[str] = field(default_factory=Counter)  # elements in such a run, by function
    longest: int = 0  # the most calls in such a run
    lied_after: int | None = None  # so many calls were recorded when the last false answer came

    def paths_of(self, index: int, case: Case) -> Iterator[ExecutionPath]:
        """All paths of one case other than the recorded one."""
        recorded = _detailed(self.recorded, index)
        seen = {recorded}
        yield from self._next_call(case, seen)
        base = None
        for given in (_dense(resized(case, batch=True, spatial=True)), case):
            graph = self._natural(given)
            if graph is not None and _detailed(graph) == recorded:
                base = given  # small inputs take the recorded path too, and less time
                break
            yield from self._new(graph, str(given), seen)
        if base is None:
            self._lost_at(None, f"{case} does not take the recorded path when it runs again")
            return
        asked, visits = dict(self.asked), Counter(self.visits)
        other = _dense(resized(base, batch=True, spatial=False))
        yield from self._new(self._natural(other), str(other), seen)
        yield from self._otherwise(base, asked, visits, seen)

    def _next_call(self, case: Case, seen: set[int]) -> Iterator[ExecutionPath]:
        """The path of the next call, where the recorded one changed the model's state.

        A cache is filled by the first; what changes again may be anything at a later call.
        """
        if not self.recorded.changed:
            return
        model, recorder = self.recorder.model, self.recorder
        with restored(model):
            try:
                case.method_of(model)(*case.args, **case.kwargs)
            except Exception:  # noqa: BLE001  # whatever the user's code raises
                self._lost_at(None, f"{case} cannot be called twice")
                return
            self.recorder = Recorder(model)  # as it is after that call
            graph = self._natural(case)
            self.recorder = recorder
        yield from self._new(graph, f"the next call of {case}", seen)
        if graph is not None and graph.changed:
            self._lost_at(None, f"`{min(graph.changed)}` may be another at the next call")

    @staticmethod
    def _new(graph: Graph | None, left_at: str, seen: set[int]) -> Iterator[ExecutionPath]:
        """The path that was recorded, if there is one and it is none of those seen."""
        if graph is not None and (detail := _detailed(graph)) not in seen:
            seen.add(detail)
            yield ExecutionPath(graph, left_at)

    def _natural(self, case: Case) -> Graph | None:
        """What is recorded where every answer is true; None if it ends in an error."""
        try:
            graph = self._run(case, {})
        except TorchfuseError:
            return None
        self.natural.append(dict(self.asked))
        self.usual |= self.visits
        return graph

    def _otherwise(
        self, case: Case, asked: dict[Site, bool], visits: Counter[Site], seen: set[int]
    ) -> Iterator[ExecutionPath]:
        """The paths on which some answers are false."""
        waiting: list[Lies] = []
        sites: list[Site] = []
        settled: set[Site] = set()
        others: list[Case] = []
        lost_before = self.lost
        thorough = lost_before is None  # else what is in doubt is judged by its code anyway

        def add(new: Mapping[Site, bool], count: Counter[Site], before: Lies) -> None:
            for site in new:
                # Of sizes with others: one answer for each pair of numbers. (Where all come out
                # alike, one of the two was just recorded.)
                both = thorough and count[site] > 1 and site in self.mixed
                both = both and site not in settled and _asks_for_equality(*site)
                if both:
                    settled.add(site)
                    waiting.extend({**before, site: answer} for answer in (True, False))
                if site not in sites:
                    sites.append(site)
                    if not both:
                        waiting.append({**before, site: None})
                    if thorough and 1 < count[site] <= _VISITS:
                        waiting.extend({**before, site: n} for n in range(count[site]))

        add(asked, visits, {})
        budget = self.runs + _RUNS
        alone = 0
        while self.lost is lost_before:
            if not waiting:
                if alone == len(sites) or not thorough:
                    break
                alone = len(sites)  # (a combination may come to sites of its own)
                waiting.extend(_combined([site for site in sites if site is not _TEXT]))
                continue
            if self.runs >= budget:
                self.lost = f"it has more than {_RUNS} paths"
                return
            lies = waiting.pop(0)
            graph, settled_so = self._tried(case, lies)
            # A check that raised asked as well: it may do so only because this answer is false.
            add(self.asked, self.visits, lies)
            if graph is not None:
                yield from self._new(graph, ", ".join(_place(*site) for site in lies), seen)
            elif not settled_so:
                wanted = {site: not self.asked.get(site, False) for site in lies}
                if not others:  # sizes that are odd where these are even, and even where odd
                    others.append(_trimmed(case))
                    yield from self._new(self._natural(others[0]), str(others[0]), seen)
                # Where another size takes this way by true answers, it was recorded.
                if not any(wanted.items() <= true.items() for true in self.natural):
                    self._lost_at(
                        next(iter(lies)), "the other side of a branch ends in an error at this size"
                    )

    def _tried(self, case: Case, lies: Lies) -> tuple[Graph | None, bool]:
        """What is recorded with these false answers; else whether the code ends there by itself."""
        try:
            return self._run(case, lies), True
        except TorchfuseError as error:
            cause = error.__cause__
            return None, isinstance(cause, _FailedError) or (
                cause is not None and self._raised_at_once(cause)
            )

    def _run(self, case: Case, lies: Lies) -> Graph:
        self.runs += 1
        self.lies, self.asked, self.visits, self.lied_after = lies, {}, Counter(), None
        try:
            return self.recorder.record([case], self)
        except TorchfuseError:
            raise
        except Exception as error:
            raise TorchfuseError(str(error)) from error
        except SystemExit as error:
            self._lost_at(None, "a path ends the program")
            raise TorchfuseError("SystemExit") from error

    def _raised_at_once(self, error: BaseException) -> bool:
        """Whether code raised because of a false answer, before it computed anything with it."""
        if self.graph is None or self.lied_after != len(self.graph.calls):
            return False
        last: Any = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is None:
            return False
        code = last.tb_frame.f_code
        return code.co_name == "_assert" or (code, last.tb_lasti) in _raises(code)

    # What code asks in one run

    def begin(self, graph: Graph) -> None:
        """A run is recorded in `graph`."""
        self.graph = graph

    def answer(self, name: str, real: Any) -> Any:
        """What code is told that asked a tensor for `name`."""
        if name in _SIZES:
            return followed(real)
        if name in _VALUES:
            return followed(real) if not isinstance(real, bool) else self.truth(real)
        if name in _TRUTHS or name in MODES:
            return self.truth(bool(real))
        if name in COUNTABLE and isinstance(real, tuple):
            return counted(real)
        if name in _PLAIN_ANSWERS:  # Python makes a plain number of whatever this answers
            self.lose(f"`{name}` gives a plain number")
        return real

    def plain(self, value: Any) -> Any:
        """What torch is given in place of numbers that are followed."""
        return plain(value)

    def truth(self, real: bool) -> bool:
        """How a comparison comes out: as it would, unless this run answers otherwise."""
        frame = _asking()
        if _is_torch(frame):
            return real  # torch does the same for all sizes that it takes
        return self._answered((frame.f_code, frame.f_lasti), real)

    def text(self, real: str) -> str:
        """What a size is in a text; which one it is, only comparing texts could tell."""
        if _is_torch(_asking()):
            return real
        self.asked[_TEXT] = True
        self.known.add(_TEXT)
        if _TEXT not in self.lies:
            return real
        self._note_lie()
        return f"?{real}"

    def called(self, name: str, elements: int) -> None:
        """A function of torch is given so many; raises in its place, where this run is to."""
        calls = len(self.graph.calls) if self.graph is not None else 0
        if not self.lies:
            self.largest[name] = max(self.largest[name], elements)
            self.longest = max(self.longest, calls)
        elif calls > _TIMES_AS_LONG * self.longest + _MORE_CALLS:
            self._lost_at(None, f"another path calls `{name}` without an end")
            raise _EndlessError
        elif elements > _TIMES_AS_LARGE * self.largest[name] + _MORE_ELEMENTS:
            self._lost_at(None, f"another path gives `{name}` much more than at these inputs")
            raise _EndlessError
        frame: Any = _asking()
        while frame is not None and frame.f_code.co_name != "_torchfuse_run":
            if (
                catches(frame.f_code)
                and not _is_torch(frame)
                and not self._answered((frame.f_code, frame.f_lasti), True)
            ):
                raise _FailedError if name in _OPERATORS or name[:2] == "__" else _FailedCallError
            frame = frame.f_back

    def _answered(self, site: Site, real: bool) -> bool:
        visit = self.visits[site]
        self.visits[site] += 1
        if self.asked.setdefault(site, real) != real:
            self.mixed.add(site)
        self.known.add(site)
        if self.lies and visit >= max(_ENDLESS, 2 * self.usual[site]):
            self._lost_at(site, "a loop may not end")
            raise _EndlessError
        if visit >= _VISITS and _looks_into(*site):
            self._lost_at(site, "a size or value is looked up in a container")
        if site in self.lies:
            lie = self.lies[site]
            false = real is not lie if isinstance(lie, bool) else lie in (None, visit)
            if visit >= _ANSWERS:
                self._lost_at(site, "a loop may not end")
            elif false:
                self._note_lie()
                return not real
        return real

    def _note_lie(self) -> None:
        self.lied_after = len(self.graph.calls) if self.graph is not None else None

    def lose(self, what: str) -> None:
        """A number that is followed is no more."""
        frame = _asking()
        # (who looks it up by its hash, and catches that it has none, goes on without the cache)
        if not _is_torch(frame) and not (what == BY_HASH and catches(frame.f_code)):
            self._lost_at((frame.f_code, frame.f_lasti), f"a size or value is {what}")

    def _lost_at(self, site: Site | None, what: str) -> None:
        if self.lost is None:
            self.lost = what if site is None else f"{what} ({_place(*site)})"


# Facts that are numbers of elements,
_SIZES = frozenset({"nbytes", "nelement", "numel", "shape", "size", "storage_offset", "stride"})
# values that are numbers,
_VALUES = frozenset({"item", "tolist"})
# and what may be otherwise for another tensor of the same type, dtype, device and rank.
_TRUTHS = frozenset(
    {
        *("is_conj", "is_contiguous", "is_leaf", "is_neg", "is_same_size", "requires_grad"),
        *("__bool__", "is_nonzero", "equal", "allclose", "__contains__"),
    }
)
_PLAIN_ANSWERS = frozenset(
    {"__len__", "__int__", "__float__", "__index__", "__complex__", "numpy", "__array__"}
)
_OWN = ("torchfuse.graph.exploring.", "torchfuse.graph.")


class _EndlessError(Exception):
    """Ends a run that would not end."""


class _FailedError(RuntimeError, ValueError, IndexError, KeyError, AssertionError):
    """What an operator of torch raises for other inputs, whichever of these it is.

    No TypeError: Python would take that for `NotImplemented`, and raise another in its place.
    """


class _FailedCallError(_FailedError, TypeError):
    """What a function of torch raises."""


# What torch calls `x + y` and the like; the rest have names such as `__radd__`.
_OPERATORS = frozenset(
    {
        *("add", "sub", "mul", "div", "true_divide", "floor_divide", "matmul", "pow", "remainder"),
        *("add_", "sub_", "mul_", "div_", "eq", "ne", "lt", "le", "gt", "ge"),
        *("bitwise_and", "bitwise_or", "bitwise_xor", "neg", "bitwise_not"),
    }
)


def _asking() -> Any:
    """The frame of the code that asks, without the recording and what leads to it."""
    frame: Any = sys._getframe(2)
    while (name := frame.f_globals.get("__name__", "")).startswith(_OWN) or (
        name in ("torch._tensor", "torch.overrides")
    ):
        frame = frame.f_back
    return frame


def _is_torch(frame: Any) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "torch" or name.startswith(("torch.", "torchfuse."))


def _place(code: CodeType, instruction: int) -> str:
    if (code, instruction) == _TEXT:
        return "a size in a text"
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{_line(code, instruction)}"


@lru_cache(maxsize=1024)
def _asks_for_equality(code: CodeType, instruction: int) -> bool:
    """Whether the instruction there is `==` or `!=`."""
    steps = {step.offset: step for step in dis.get_instructions(code)}
    step = steps.get(instruction)
    if step is None or step.opname != "COMPARE_OP":
        return False
    return any(equal in str(step.argval) for equal in ("==", "!="))  # 3.13: "bool(==)"


@lru_cache(maxsize=1024)
def _looks_into(code: CodeType, instruction: int) -> bool:
    """Whether the instruction there is `in`, which asks for one element after the other."""
    return dis.opname[code.co_code[instruction]] == "CONTAINS_OP"


def _line(code: CodeType, instruction: int) -> int:
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return line
    return code.co_firstlineno


@lru_cache(maxsize=1024)
def _raises(code: CodeType) -> frozenset[Site]:
    """The places at which a function itself raises: `raise`, `assert`."""
    return frozenset(
        (code, step.offset) for step in dis.get_instructions(code) if step.opname == "RAISE_VARARGS"
    )


def _combined(sites: Sequence[Site]) -> Iterator[Lies]:
    """Several sites answered otherwise at once: all combinations of a few, each two of many."""
    sizes = range(2, len(sites) + 1) if len(sites) <= _COMBINED else (2,)
    for size in sizes:
        for some in combinations(sites, size):
            yield dict.fromkeys(some, None)


def _dense(case: Case) -> Case:
    """The case with tensors that are no views of larger ones."""
    args, kwargs = tree_map(
        lambda value: value.clone() if isinstance(value, torch.Tensor) else value,
        (case.args, dict(case.kwargs)),
    )
    return Case(args, kwargs, case.method)


def _trimmed(case: Case) -> Case:
    """The case with images and sequences one element smaller in each dimension."""

    def trimmed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        for axis in range(2, value.dim()):
            value = value.narrow(axis, 0, max(1, value.shape[axis] - 1))
        return value.clone()

    args, kwargs = tree_map(trimmed, (case.args, dict(case.kwargs)))
    return Case(args, kwargs, case.method)


def _detailed(graph: Graph, case: int = 0) -> int:
    """A number for what one case called on what, the same for recordings that agree in that."""
    numbers: dict[int, Any] = {}
    calls = []
    for call in graph.calls:
        if call.case == case:
            for value in (*call.inputs, *call.outputs):
                numbers.setdefault(value, graph.values[value].names or len(numbers))
            reads = tuple(numbers[value] for value in call.inputs)
            makes = tuple(numbers[value] for value in call.outputs)
            calls.append((call.kind, call.target, call.module_path, reads, makes))
    return hash(tuple(calls))
