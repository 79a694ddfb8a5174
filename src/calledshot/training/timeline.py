"""Where the time of training steps goes, from a trace of PyTorch's profiler (Chrome's format).

On a CPU the timeline is the thread that trains: each operator's own time, without that of the operators inside it. On a
GPU it is the kernels, each counted as what launched it; a moment at which none runs is idle.

What an operator belongs to follows from its name and from what it stands in: the marks that a profile sets (`MARK`),
steps of autograd, compiled graphs. A fused kernel of a compiled block is attention's, or the experts', if the products
before and after it are.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

MARK = "shot: "
"""What names of marks begin with."""
STEP, DATA, FORWARD = f"{MARK}step", f"{MARK}data", f"{MARK}forward"
SCOPES = ("attention", "optimizer", "communication", "data")
"""What a mark may say of all that stands in it."""

_PRODUCT = re.compile(
    r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|_scaled_mm|einsum|mv|addmv)$|mkldnn::_linear|gemm|nvjet|cutlass|xmma"
    r"|cublas|triton_tem_"
)
_ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|flex_attention|ScaledDotProduct", re.IGNORECASE)
_EXPERTS = re.compile(r"calledshot::grouped_|_grouped_mm|^(Dispatch|Combine)(Backward)?$")
_COMMUNICATION = re.compile(
    r"^(c10d|c10d_functional|_c10d_functional|symm_mem)::|^FSDP::|^(gloo|nccl):|nccl(Dev)?Kernel|^record_param_comms"
    r"|^calledshot::(exchange_plan|send_rows|return_rows)"
)
_LOSS = re.compile(r"^_ChunkedCrossEntropy")
_FUSED = re.compile(r"^(graph_\d+_)?(cpp|triton)_")
_SIMPLE = re.compile(
    r"aten::_?_?(to|to_copy|copy_?|clone|contiguous|reshape|view|unsafe_view|t|transpose|permute|expand(_as)?|slice"
    r"|select|narrow|split(_with_sizes)?|chunk|unbind|squeeze|unsqueeze|flatten|unflatten|cat|stack|pad"
    r"|constant_pad_nd|alias|detach|as_strided|empty(_like|_strided)?|new_(empty|zeros|ones)(_strided)?|zeros(_like)?"
    r"|ones(_like)?|full(_like)?|fill|zero|arange|scalar_tensor|resize|numpy_T|movedim|lift_fresh"
    r"|add(cmul|cdiv)?|sub|rsub|mul|div|neg|reciprocal|pow|square|sqrt|rsqrt|exp|log|tanh|sigmoid|silu|gelu|relu"
    r"|threshold|abs|sign|cos|sin|clamp(_min|_max)?|minimum|maximum|where|masked_fill|lerp|softmax|log_softmax"
    r"|logsumexp|sum|mean|amax|max|min|norm|linalg_vector_norm|eq|ne|le|lt|ge|gt|and|or|logical_\w+|bitwise_\w+"
    r"|index(_\w+)?|gather|scatter(_add|_reduce)?|embedding|topk|sort|cumsum|bincount|one_hot|histc|isfinite"
    r"|is_nonzero|item|local_scalar_dense|result_type|native_layer_norm|rms_norm|fused_rms_norm|foreach_\w+"
    r"|(\w+_)?backward)_?_?(\.\w+)?$"
    r"|^detach$|at::native|elementwise|reduce_kernel|[Mm]em(cpy|set)"
)
"""What moves numbers or computes one from few, by operator or kernel."""
_FRAME = re.compile(r"^(autograd::engine|torch::autograd)|Backward\d*$|^((?!::).)*$")
"""What only calls others (steps of autograd, compiled regions, whatever is no operator of a library): its own time is
the host's."""
_LAUNCHES = ("cuda_runtime", "cuda_driver", "privateuse1_runtime")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_OPERATORS = ("cpu_op", "user_annotation", *_LAUNCHES)


class Place(NamedTuple):
    """Where in a step time was spent."""

    part: str
    """data, matmul, attention, experts, elementwise, head, cross-entropy, optimizer, orthogonalisation, communication,
    host, idle or other."""
    direction: str = ""
    """forward, backward or empty."""


@dataclass(frozen=True)
class Timeline:
    """Where the time of some steps went, which adds up to how long they took."""

    steps: tuple[float, ...]
    """Seconds of each."""
    seconds: Mapping[Place, float]
    """Of all steps together."""
    unknown: Mapping[str, float]
    """Names of what is counted as `other`, with their seconds."""
    hidden_communication: float = 0.0
    """Seconds of communication behind which a GPU computed."""


class _State(NamedTuple):
    """What an event is, and hands on to those inside it."""

    part: str = "host"
    direction: str = ""
    scope: str = ""
    settled: bool = False
    """Whether it is an operator whose kind is known, and all inside it with it."""


@dataclass
class _Event:
    name: str
    category: str
    thread: Any
    start: float
    """Microseconds."""
    end: float
    arguments: Mapping[str, Any]
    own: float = 0.0
    """Microseconds that none of the events inside it takes."""
    state: _State = field(default_factory=_State)
    parent: _Event | None = None

    @property
    def place(self) -> Place:
        return Place(self.state.part, self.state.direction)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file, which may be compressed."""
    content = path.read_bytes()
    text = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    return json.loads(text)["traceEvents"]


def attribute(events: Iterable[Mapping[str, Any]], skip: int = 0) -> Timeline:
    """Where the steps that a trace marks spent their time, without the first `skip`. ValueError without any."""
    found = [
        _Event(
            str(each["name"]), each.get("cat", ""), each.get("tid"), float(each["ts"]),
            float(each["ts"]) + float(each["dur"]), each.get("args", {}),
        )
        for each in events
        if each.get("ph") == "X" and "dur" in each
    ]  # fmt: skip
    threads: dict[Any, list[_Event]] = defaultdict(list)
    for event in found:
        if event.category in _OPERATORS:
            threads[event.thread].append(event)
    for thread in threads.values():
        _nest(thread)
    steps = sorted((each for each in found if each.name == STEP and each.category == "user_annotation"), key=_start)
    steps = steps[skip:]
    if not steps:
        raise ValueError("the trace marks no step")
    for thread in threads.values():
        for event in thread:
            event.state = _state(event)
        _settle_fused(thread)
    kernels = [each for each in found if each.category in _ON_DEVICE]
    if kernels:
        return _on_device(steps, kernels, threads)
    return _on_host(steps, threads)


def _start(event: _Event) -> float:
    return event.start


def _nest(thread: list[_Event]) -> None:
    """Sorts a thread's events, finds what each stands in, and its own time."""
    thread.sort(key=lambda each: (each.start, -each.end))
    open_: list[_Event] = []
    for event in thread:
        while open_ and event.start >= open_[-1].end:
            open_.pop()
        event.own = event.end - event.start
        if open_:
            event.parent = open_[-1]
            event.end = min(event.end, event.parent.end)  # timestamps are rounded
            event.own = event.end - event.start
            event.parent.own -= event.own
        open_.append(event)


def _state(event: _Event) -> _State:
    """What an event is, given what it stands in."""
    around = _State() if event.parent is None else event.parent.state
    if event.name.startswith(MARK):
        what = event.name.removeprefix(MARK)
        if event.name == FORWARD:
            return _State("host", "forward")
        if what not in SCOPES:
            return _State("host")
        waits = what in ("data", "communication")
        return _State(what if waits else "host", around.direction, what, settled=waits)
    if event.name.startswith("autograd::engine::evaluate_function"):
        return _State("host", "backward")
    return _named(event.name, around)


@functools.cache
def _named(name: str, around: _State) -> _State:
    """What something of that name is inside of `around`."""
    if _COMMUNICATION.search(name):
        return _State("communication", "", "communication", True)
    if around.settled:
        return around
    scope, direction = around.scope, around.direction
    if _LOSS.match(name):
        return _State("host", "", "loss")
    if _ATTENTION.search(name):
        # A step of autograd by that name is a frame, and what it calls is named so too.
        return _State("attention", direction, "attention", not name.startswith("autograd"))
    if _EXPERTS.search(name):
        return _State("experts", direction, "experts", True)
    if _PRODUCT.search(name):
        if not scope and not direction:
            scope = "optimizer"
        part = {"": "matmul", "loss": "head", "optimizer": "orthogonalisation"}.get(scope, scope)
        # In a model's blocks, batches of products are the attention of a compiled CPU.
        return _State("attention" if part == "matmul" and "bmm" in name else part, direction, scope, True)
    if _FUSED.match(name) or _SIMPLE.search(name):
        if not scope and not direction:
            # The host copies the batch before the passes, and sums gradients and their norm after them.
            scope = "data" if "HtoD" in name else "optimizer"
        part = {"": "elementwise", "loss": "cross-entropy"}.get(scope, scope)
        return _State(part, direction, scope, True)
    if _FRAME.search(name):
        return around._replace(part="host")
    return around._replace(part={"": "other", "loss": "cross-entropy"}.get(scope, scope))


def _settle_fused(thread: Iterable[_Event]) -> None:
    """Gives fused kernels of a compiled block to the attention or the experts that they stand in the middle of."""
    graphs: dict[int, list[_Event]] = defaultdict(list)
    for event in thread:
        if event.parent is not None and event.parent.name.startswith("## Call"):
            graphs[id(event.parent)].append(event)
    for inside in graphs.values():
        before = ""
        waiting: list[_Event] = []
        for event in inside:
            if event.state.part == "elementwise":
                waiting.append(event)
            elif event.state.part != "host":
                if event.state.part == before and before in ("attention", "experts"):
                    for each in waiting:
                        each.state = event.state
                before, waiting = event.state.part, []


def _on_host(steps: Sequence[_Event], threads: Mapping[Any, list[_Event]]) -> Timeline:
    """By operators of the thread that trains. Where that waits while another thread sends or receives for it, the time
    is communication's.
    """
    main = threads[steps[0].thread]
    sending = _merged(
        (event.start, event.end)
        for name, thread in threads.items()
        if name != steps[0].thread
        for event in thread
        if event.state.part == "communication"
    )
    inside = _covering(steps)
    seconds: dict[Place, float] = defaultdict(float)
    unknown: dict[str, float] = defaultdict(float)
    children: dict[int, list[_Event]] = defaultdict(list)
    if sending:
        for event in main:
            if event.parent is not None:
                children[id(event.parent)].append(event)
    for event in main:
        if not inside(event.start):
            continue
        place, own = event.place, event.own / 1e6
        if place.part == "host":
            place = Place("host")
            if sending:
                gaps = _gaps(event.start, event.end, [(each.start, each.end) for each in children[id(event)]])
                waited = sum(_overlap(gap, sending) for gap in gaps) / 1e6
                seconds[Place("communication")] += waited
                own -= waited
        elif place.part == "other":
            unknown[event.name] += own
        seconds[place] += own
    return Timeline(tuple((each.end - each.start) / 1e6 for each in steps), dict(seconds), dict(unknown))


def _on_device(steps: Sequence[_Event], kernels: list[_Event], threads: Mapping[Any, list[_Event]]) -> Timeline:
    """By kernels. Where several run at once, the time is that of the one that computes and began first; where none
    does, it is `data` while the host waits for a batch, and else `idle`.
    """
    launches = {
        event.arguments["correlation"]: event
        for thread in threads.values()
        for event in thread
        if event.category in _LAUNCHES and "correlation" in event.arguments
    }
    for kernel in kernels:
        launch = launches.get(kernel.arguments.get("correlation"))
        around = launch.parent.state if launch is not None and launch.parent is not None else _State()
        kernel.state = _named(kernel.name, around)
        if kernel.state.part == "host":
            kernel.state = kernel.state._replace(part="other")
    waits = _merged((e.start, e.end) for e in threads[steps[0].thread] if e.name == DATA)
    kernels.sort(key=_start)
    seconds: dict[Place, float] = defaultdict(float)
    unknown: dict[str, float] = defaultdict(float)
    hidden = 0.0
    for step in steps:
        inside = [each for each in kernels if each.end > step.start and each.start < step.end]
        edges = sorted({step.start, step.end, *(min(max(t, step.start), step.end) for e in inside for t in _times(e))})
        running: list[_Event] = []
        coming = iter([*inside, None])
        following = next(coming)
        for start, end in pairwise(edges):
            while following is not None and following.start <= start:
                running.append(following)
                following = next(coming)
            running = [each for each in running if each.end > start]
            computing = [each for each in running if each.state.part != "communication"]
            if running:
                first = (computing or running)[0]
                seconds[first.place] += (end - start) / 1e6
                if first.state.part == "other":
                    unknown[first.name] += (end - start) / 1e6
                if computing and len(computing) < len(running):
                    hidden += (end - start) / 1e6
            else:
                waited = _overlap((start, end), waits)
                seconds[Place("data")] += waited / 1e6
                seconds[Place("idle")] += (end - start - waited) / 1e6
    return Timeline(tuple((each.end - each.start) / 1e6 for each in steps), dict(seconds), dict(unknown), hidden)


# Intervals, as (start, end)


def _times(event: _Event) -> tuple[float, float]:
    return event.start, event.end


def _covering(steps: Sequence[_Event]) -> Any:
    """Whether a moment is within one of the steps, which are in order."""
    starts = [each.start for each in steps]

    def inside(moment: float) -> bool:
        number = bisect_right(starts, moment) - 1
        return number >= 0 and moment < steps[number].end

    return inside


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same moments as disjoint intervals in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _gaps(start: float, end: float, taken: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """What disjoint intervals in order leave of one that they lie in."""
    for first, last in taken:
        if first > start:
            yield start, first
        start = max(start, last)
    if end > start:
        yield start, end


def _overlap(interval: tuple[float, float], merged: Sequence[tuple[float, float]]) -> float:
    """How much of an interval disjoint ones in order cover."""
    start, end = interval
    number = max(0, bisect_right(merged, (start, float("inf"))) - 1)
    covered = 0.0
    for first, last in merged[number:]:
        if first >= end:
            break
        covered += max(0.0, min(end, last) - max(start, first))
    return covered
