"""Real updates of a recipe under PyTorch's profiler: where a step's time goes, and what would gain how much.

A step is what the trainer times: a batch is waited for, and the engine's update done. It is timed without the profiler
as well, in turns, so that what the profiler costs is known.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calledshot import machine
from calledshot.data import Batches, Prepared, prepare
from calledshot.data.prepare import Progress
from calledshot.model import block
from calledshot.objective import Batch
from calledshot.recipe import Layout, Recipe, RunError, UsageError, check, cost, identity, layout, to_toml
from calledshot.rundir import RunDirectory
from calledshot.training import probe
from calledshot.training.engine import Engine
from calledshot.training.join import joined, leading
from calledshot.training.load import sized
from calledshot.training.optimizer import KNOWN, user_class
from calledshot.training.roofline import Row, row, works
from calledshot.training.schedule import learning_rate_factor
from calledshot.training.timeline import MARK, attribute, read_trace
from calledshot.training.train import memory_of_rank
from calledshot.training.world import World

WARMUP_STEPS = 3
"""Updates before anything is timed; the first compiles."""
UNKNOWN_STEPS = 1000
"""Steps of a schedule where the duration is in minutes."""
PROBE_SECONDS = 0.5
"""Of each probe of the hardware: of its matmuls before and after the steps, and of its memory."""
PARTS = (
    *("data", "matmul", "attention", "experts", "elementwise", "head", "cross-entropy", "optimizer"),
    *("orthogonalisation", "communication", "host", "idle", "other"),
)
"""In the order of a table."""
COMPILED = ("attention", "elementwise", "cross-entropy", "optimizer", "host", "idle")
"""Parts that compiling makes fewer and larger kernels of."""
PRODUCTS = ("matmul", "attention", "experts", "head", "orthogonalisation")
COMPUTED = (*PRODUCTS, "elementwise", "cross-entropy", "optimizer")


@dataclass(frozen=True)
class Profile:
    """Where the steps of one rank went."""

    recipe: str
    machine: dict[str, Any]
    """device, dtype, compile, threads and micro_tokens, as a run would take them here, and what `describe` says of the
    processor, the allocator and the GPUs."""
    layout: dict[str, int]
    """How the ranks share the work."""
    tokens: int
    """Of a step, all ranks'."""
    steps: tuple[float, ...]
    """Seconds of each step that was profiled."""
    plain_steps: tuple[float, ...]
    """Seconds of steps without the profiler, half of them before and half after."""
    rows: tuple[Row, ...]
    """The parts, which add up to `seconds`."""
    unknown: dict[str, float]
    """What `other` is: seconds a step by name, the ten longest."""
    peaks: tuple[float, ...]
    """FLOP/s of matmuls, as probed."""
    bandwidth: float
    """Bytes a second of copying, read and written."""
    flops: float
    """Of a step of this rank, by the recipe's arithmetic, without the optimizer's."""
    page_faults: float
    """Pages that a step without the profiler got anew from the system."""
    hidden_communication: float
    """Seconds a step in which a GPU communicated and computed."""
    advice: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of a profiled step, on average."""
        return sum(self.steps) / len(self.steps)

    @property
    def plain_seconds(self) -> float:
        """Of a step without the profiler, on average."""
        return sum(self.plain_steps) / len(self.plain_steps)

    @property
    def mfu(self) -> machine.MfuRange:
        """Of the steps without the profiler."""
        return machine.mfu_range(self.flops / self.plain_seconds, self.peaks)


def profile(
    recipe: Recipe, lab: Path, *, steps: int = 5, trace: Path | None = None, progress: Progress | None = None
) -> Profile | None:
    """Profiles so many updates of a recipe, on data prepared as for training, and keeps no run; None on ranks that do
    not lead. `trace` is where the trace goes, as Chrome's and Perfetto's viewers read it (compressed for `.gz`).
    """
    if steps < 1:
        raise UsageError(f"--steps {steps}: must be 1 or more")
    if trace is not None and not trace.absolute().parent.is_dir():
        raise UsageError(f"--trace {trace}: there is no folder {trace.absolute().parent}")
    with joined() as world, tempfile.TemporaryDirectory(prefix="shot-profile-") as folder:
        if not world.leads:
            prepared = _follow(recipe, lab, world)
            if prepared is None:
                return None
        else:
            with leading(world):
                prepared = _lead(recipe, lab, world, progress)
        recipe = sized(recipe, prepared.tokenizer)
        return _profile(recipe, lab, prepared, world, steps, Path(folder), trace)


def _lead(recipe: Recipe, lab: Path, world: World, progress: Progress | None) -> Prepared:
    check(recipe)
    if recipe.optimizer.name not in KNOWN:
        user_class(recipe.optimizer.name, "optimizer.name")
    prepared = prepare(recipe, lab, progress)
    shared = layout(sized(recipe, prepared.tokenizer), world.size, memory_of_rank(world))
    world.begun = True
    world.tell(asdict(shared))
    world.arrange(shared)
    return prepared


def _follow(recipe: Recipe, lab: Path, world: World) -> Prepared | None:
    said = world.tell()
    if "end" in said:
        return None
    prepared = prepare(recipe, lab)  # which the leading rank has done
    world.arrange(Layout(**said))
    return prepared


def _profile(
    recipe: Recipe, lab: Path, prepared: Prepared, world: World, steps: int, folder: Path, trace: Path | None
) -> Profile | None:
    recipe = replace(recipe, batch=replace(recipe.batch, ramp=()))  # a step is one of full size
    chosen = _choose(recipe, world, folder)
    device = str(world.device)
    peaks = [*machine.matmul_peak(chosen.dtype, PROBE_SECONDS, device)]
    file = folder / "trace.json"
    with _named_kernels(chosen):
        engine = Engine(recipe, chosen, world, prepared.tokenizer, lab)
        plain, faults = _record(engine, prepared, steps, file)
    peaks += machine.matmul_peak(chosen.dtype, PROBE_SECONDS, device)
    bandwidth = machine.memory_bandwidth(PROBE_SECONDS, device)
    if not world.leads:
        return None
    timeline = attribute(read_trace(file), skip=1)
    if trace is not None:
        _keep(file, trace)
    step, work = sum(timeline.steps) / steps, works(engine)
    rows = [
        row(place, seconds / steps, step, work.get(place), max(peaks), bandwidth)
        for place, seconds in timeline.seconds.items()
        if seconds > 0
    ]
    here = machine.describe()
    share = (engine.rows[1] - engine.rows[0]) / engine.rows_per_batch / (world.size / world.layout.data)
    unknown = sorted(timeline.unknown.items(), key=lambda item: -item[1])[:10]
    return Profile(
        recipe=recipe.name,
        machine=asdict(chosen) | {key: here[key] for key in ("cpu", "gpus", "torch", "allocator", "openmp")},
        layout=asdict(world.layout),
        tokens=recipe.batch.tokens,
        steps=timeline.steps,
        plain_steps=tuple(plain),
        rows=tuple(sorted(rows, key=lambda one: (PARTS.index(one.part), one.direction != "forward"))),
        unknown={name: seconds / steps for name, seconds in unknown},
        peaks=tuple(peaks),
        bandwidth=bandwidth,
        flops=share * recipe.batch.tokens * cost(recipe).flops_per_token.total,
        page_faults=faults,
        hidden_communication=timeline.hidden_communication / steps,
        advice=tuple(advice(rows, recipe, chosen, world)),
    )


def _choose(recipe: Recipe, world: World, folder: Path) -> probe.Machine:
    """How a run that begins here would compute."""
    ranks, chosen = world.place.local_size, None
    machine.keep_freed_memory()
    probe.set_threads(recipe, ranks)
    if world.leads:
        scratch = RunDirectory.create(folder / "run", recipe_toml=to_toml(recipe), identity=identity(recipe))
        chosen = asdict(probe.choose(recipe, scratch, world.device, ranks))
    return probe.Machine(**world.tell(chosen))


def _record(engine: Engine, prepared: Prepared, steps: int, file: Path) -> tuple[list[float], float]:
    """Seconds of steps without the profiler, as many as are then in the trace, and their page faults, each. The trace
    has one more step, its first, which is slow; only the leading rank writes it.
    """
    before, after = steps - steps // 2, steps // 2
    total = WARMUP_STEPS + before + 1 + steps + after
    batches = Batches(prepared, engine.recipe, steps=total).prefetch(0, total, engine.share)
    updates = _Updates(engine, batches)
    updates.do(WARMUP_STEPS)
    faults = _page_faults()
    plain = updates.do(before)
    faults = _page_faults() - faults
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _marked(engine), torch.profiler.profile(activities=activities) as recorded:
        updates.do(1 + steps, torch.profiler.record_function)
    if engine.world.leads:
        recorded.export_chrome_trace(str(file))
    del recorded
    return [*plain, *updates.do(after)], faults / before


class _Updates:
    """Updates of a run, one after another from its first."""

    def __init__(self, engine: Engine, batches: Iterator[tuple[int, Batch]]) -> None:
        self.engine, self.batches, self.step = engine, batches, 0
        self.total = cost(engine.recipe).steps or UNKNOWN_STEPS

    def do(self, steps: int, mark: Callable[[str], Any] = nullcontext) -> list[float]:
        """Seconds of each of so many."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            with mark(f"{MARK}step"):
                with mark(f"{MARK}data"):
                    _, batch = next(self.batches)
                step = min(self.step, self.total - 1)
                factor = learning_rate_factor(self.engine.recipe.schedule, step, self.total)
                updated = self.engine.update(batch, self.step + 1, factor)
                self.engine.optimizer.clear()
            times.append(time.perf_counter() - start)
            self.step += 1
            if updated.squares is None:
                raise RunError(
                    f"update {self.step}: loss or gradient is not finite, so that the optimizer did nothing; "
                    "lower optimizer.learning_rate"
                )
        return times


@contextmanager
def _named_kernels(chosen: probe.Machine) -> Iterator[None]:
    """Has compiled code for CPUs tell the profiler of each kernel, which it keeps in the compiler's cache apart."""
    if not chosen.compile or chosen.device != "cpu":
        yield
        return
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.enable_kernel_profile": True}):
        yield


@contextmanager
def _marked(engine: Engine) -> Iterator[None]:
    """Marks what names of operators do not tell, for as long as this lasts."""
    optimizer, model = engine.optimizer, engine.model
    marks = [
        (model, "loss", "forward"),
        (model, "_ready", "attention"),
        *((optimizer, name, "optimizer") for name in ("gradient_norm", "squares", "step", "clear")),
        *((exchange, name, "communication") for exchange in optimizer.exchanges for name in ("reduce", "share")),
    ]
    if not engine.chosen.compile:  # what is compiled says by itself what it is, and must not be compiled again
        marks.append((block, "attend", "attention"))
    with ExitStack() as stack:
        for owner, name, mark in marks:
            stack.enter_context(_replaced(owner, name, _within(f"{MARK}{mark}", getattr(owner, name))))
        yield


def _within(mark: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*arguments: Any, **keywords: Any) -> Any:
        with torch.profiler.record_function(mark):
            return function(*arguments, **keywords)

    return marked


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _keep(file: Path, trace: Path) -> None:
    try:
        if trace.suffix == ".gz":
            import gzip

            with open(file, "rb") as source, gzip.open(trace, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target)
        else:
            shutil.copyfile(file, trace)
    except OSError as error:
        raise RunError(f"{trace}: cannot be written ({error.strerror})") from error


def advice(rows: Sequence[Row], recipe: Recipe, chosen: probe.Machine, world: World) -> list[str]:
    """What to do about the part that loses most, where that is certain; at most two lines."""
    losses: dict[str, float] = {}
    for one in rows:
        losses[one.part] = losses.get(one.part, 0.0) + (one.gain_seconds or 0.0)
    worst = max(losses, key=losses.__getitem__)
    asked, device, ranks = recipe.parallel, world.device, world.place.local_size
    found = []
    if worst in COMPILED and not chosen.compile and (device.type == "cuda" or probe.has_compiler()):
        found.append("set parallel.compile=on, which makes few kernels of many, and the first start longer")
    cores = machine.usable_cores()
    if worst in COMPUTED and device.type == "cpu" and chosen.threads * ranks < cores:
        how = "parallel.threads=0" if asked.threads else "OMP_NUM_THREADS unset"
        found.append(f"{chosen.threads * ranks} of {cores} cores are used: take all of them, with {how}")
    if worst in PRODUCTS and asked.dtype == "float32":
        narrow, wide = (max(machine.matmul_peak(each, PROBE_SECONDS, str(device))) for each in ("bfloat16", "float32"))
        if narrow > probe.BFLOAT16_PAYS * wide:
            found.append(f"set parallel.dtype=bfloat16, whose products are {narrow / wide:.1f} x as quick here")
    usual = probe.micro_tokens(recipe, device)
    if worst in ("host", "idle") and chosen.micro_tokens < usual:
        found.append(f"leave parallel.micro_tokens out, which takes {usual:,} here, and so fewer passes")
    if worst == "communication" and world.layout.shard > 1:
        free = replace(recipe, parallel=replace(asked, shard=0, replicate=0))
        enough = layout(free, world.size, memory_of_rank(world)).shard
        if enough < world.layout.shard:
            found.append(f"set parallel.shard={enough}, into which everything fits by arithmetic")
    return [f"{worst}: {each}" for each in found[:2]]
