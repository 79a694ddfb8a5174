"""`shot profile`: what it counts where, in traces of CPUs and of GPUs, and on real updates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import gang, shot
from torch.utils.flop_counter import FlopCounterMode

from calledshot.model import Decoder
from calledshot.recipe import Layout, Recipe, cost, load_recipe, schema, shape
from calledshot.training.engine import Engine
from calledshot.training.optimizer import orthogonalise
from calledshot.training.pieces import Piece
from calledshot.training.probe import Machine
from calledshot.training.profile import PARTS, Profile, profile
from calledshot.training.roofline import Work, newton_schulz, row, works
from calledshot.training.slots import Slot
from calledshot.training.timeline import Place, Timeline, attribute, read_trace

RECORDED = Path(__file__).parent / "traces" / "compiled.json.gz"


class Trace:
    """A trace as PyTorch's profiler writes it, made by hand: nested operators with times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.now, self.launches = 0.0, 0

    @contextmanager
    def within(self, name: str, category: str = "cpu_op", thread: int = 1) -> Iterator[None]:
        start, place = self.now, len(self.events)
        self.add(name, start, 0.0, category, thread)
        yield
        self.events[place]["dur"] = self.now - start

    def add(self, name: str, start: float, duration: float, category: str, thread: int = 1, **arguments: Any) -> None:
        self.events.append(
            {"ph": "X", "name": name, "cat": category, "tid": thread, "ts": start, "dur": duration, "args": arguments}
        )

    def take(self, name: str, duration: float, thread: int = 1) -> None:
        """An operator with nothing inside."""
        self.add(name, self.now, duration, "cpu_op", thread)
        self.now += duration

    def launch(self, kernel: str, start: float, duration: float, stream: int = 7, category: str = "kernel") -> None:
        """A kernel that the host launches now, which takes it a microsecond, and the GPU runs later."""
        self.launches += 1
        self.add("cudaLaunchKernel", self.now, 1.0, "cuda_runtime", correlation=self.launches)
        self.add(kernel, start, duration, category, stream, correlation=self.launches, stream=stream)
        self.now += 1.0

    def attributed(self) -> Timeline:
        return attribute(self.events)


def microseconds(timeline: Timeline) -> dict[tuple[str, str], float]:
    return {tuple(place): round(seconds * 1e6, 3) for place, seconds in timeline.seconds.items() if seconds > 1e-10}


def test_operators_of_a_cpu_count_where_they_stand() -> None:
    trace = Trace()
    with trace.within("shot: step", "user_annotation"):
        with trace.within("shot: data", "user_annotation"):
            trace.now += 5
        with trace.within("shot: forward", "user_annotation"):
            with trace.within("aten::linear"):
                trace.take("aten::t", 1)
                trace.take("aten::mm", 20)
            trace.now += 2  # Python
            trace.take("aten::silu", 3)
            with trace.within("aten::scaled_dot_product_attention"):
                trace.take("aten::where", 1)
                trace.take("aten::_scaled_dot_product_flash_attention_for_cpu", 9)
            with trace.within("_ChunkedCrossEntropy"):
                trace.take("aten::mm", 30)
                trace.take("aten::logsumexp", 7)
                trace.now += 1
        for name, inner in (("MmBackward0", "aten::mm"), ("SiluBackward0", "aten::silu_backward")):
            with trace.within(f"autograd::engine::evaluate_function: {name}"), trace.within(name):
                trace.take(inner, 40)
        trace.take("aten::add_", 4)  # gradients of micro-batches
        with trace.within("shot: optimizer", "user_annotation"):
            trace.take("aten::baddbmm", 6)
            trace.take("aten::lerp_", 8)
        trace.take("somebody::kernel", 0.5)
    timeline = trace.attributed()
    assert microseconds(timeline) == {
        ("data", ""): 5,
        ("matmul", "forward"): 21,
        ("host", ""): 3,
        ("elementwise", "forward"): 3,
        ("attention", "forward"): 10,
        ("head", ""): 30,
        ("cross-entropy", ""): 7,
        ("matmul", "backward"): 40,
        ("elementwise", "backward"): 40,
        ("optimizer", ""): 12,
        ("orthogonalisation", ""): 6,
        ("other", ""): 0.5,
    }
    assert sum(timeline.seconds.values()) == pytest.approx(sum(timeline.steps))
    assert timeline.unknown == {"somebody::kernel": pytest.approx(0.5e-6)}


def test_waiting_for_other_ranks_is_communication() -> None:
    trace = Trace()
    with trace.within("shot: step", "user_annotation"):
        trace.take("aten::mm", 10)
        trace.add("gloo:all_reduce", 12.0, 30.0, "user_annotation", 2)  # its own thread does it
        trace.take("c10d::allreduce_", 4)
        trace.now = 50.0
    # From 10 to 14 it is asked for, then waited for until 42.
    assert microseconds(trace.attributed()) == {
        ("orthogonalisation", ""): 10,
        ("communication", ""): 32,
        ("host", ""): 8,
    }


def test_fused_kernels_between_products_of_attention_are_attention() -> None:
    trace = Trace()
    with (
        trace.within("shot: step", "user_annotation"),
        trace.within("shot: forward", "user_annotation"),
        trace.within("CompiledFunction"),
        trace.within("## Call CompiledFxGraph abc ##"),
    ):
        for name in (
            "graph_0_cpp_fused_mul_rsqrt_0", "aten::mm", "graph_0_cpp_fused_cat_1", "aten::bmm",
            "graph_0_cpp_fused__softmax_2", "aten::bmm", "graph_0_cpp_fused_clone_3", "aten::mm",
            "graph_0_cpp_fused_add_4", "calledshot::grouped_linear", "graph_0_cpp_fused_silu_5",
            "calledshot::grouped_linear", "graph_0_cpp_fused_add_6",
        ):  # fmt: skip
            trace.take(name, 1)
    assert microseconds(trace.attributed()) == {
        ("elementwise", "forward"): 5,
        ("matmul", "forward"): 2,
        ("attention", "forward"): 3,
        ("experts", "forward"): 3,
    }


def gpu_trace() -> Trace:
    """A step on a GPU: the batch comes, a block forward and backward, gradients exchanged behind it, the optimizer."""
    trace = Trace()
    with trace.within("shot: step", "user_annotation"):
        with trace.within("shot: data", "user_annotation"):
            trace.now += 10
        trace.launch("Memcpy HtoD (Pinned -> Device)", 12, 3, category="gpu_memcpy")
        with trace.within("shot: forward", "user_annotation"):
            with trace.within("Torch-Compiled Region: 0/0"), trace.within("## Call CompiledFxGraph abc ##"):
                with trace.within("aten::mm"):
                    trace.launch("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", 20, 100)
                with trace.within("triton_red_fused_mul_rsqrt_0"):
                    trace.launch("triton_red_fused_mul_rsqrt_0", 120, 15)
                with trace.within("aten::_scaled_dot_product_flash_attention"):
                    trace.launch("void pytorch_flash::flash_fwd_kernel<Flash_fwd_traits>", 135, 50)
            with trace.within("_ChunkedCrossEntropy"):
                with trace.within("aten::mm"):
                    trace.launch("nvjet_tst_256x128", 190, 60)
                with trace.within("triton_red_fused_logsumexp_1"):
                    trace.launch("triton_red_fused_logsumexp_1", 250, 20)
        backward = trace.now
        # Autograd has a thread of its own there.
        trace.add("autograd::engine::evaluate_function: CompiledFunctionBackward", backward, 20, "cpu_op", 2)
        trace.add("aten::mm", backward + 1, 5, "cpu_op", 2)
        trace.add("cudaLaunchKernelExC", backward + 2, 1, "cuda_driver", 2, correlation=900)
        trace.add("nvjet_tst_64x64", 270, 200, "kernel", 7, correlation=900)
        trace.now += 30
        with trace.within("c10d::_reduce_scatter_base_"):
            trace.launch("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgs)", 300, 220, stream=13)
        with trace.within("shot: optimizer", "user_annotation"):
            trace.launch("triton_poi_fused_lerp_2", 540, 30)
        trace.add("void somebody_kernel(float*)", 575, 5, "kernel", 7, correlation=901)  # launched by who knows
        trace.now = 600.0
    return trace


def test_kernels_of_a_gpu_count_as_what_launched_them_and_gaps_are_idle() -> None:
    timeline = gpu_trace().attributed()
    assert microseconds(timeline) == {
        ("data", ""): 10 + 3,  # the wait for the batch, and its copy
        ("matmul", "forward"): 100,
        ("elementwise", "forward"): 15,
        ("attention", "forward"): 50,
        ("head", ""): 60,
        ("cross-entropy", ""): 20,
        ("matmul", "backward"): 200,
        ("communication", ""): 50,  # from 470, when nothing is computed beside it, to 520
        ("optimizer", ""): 30,
        ("other", ""): 5,
        ("idle", ""): 600 - 13 - 100 - 15 - 50 - 60 - 20 - 200 - 50 - 30 - 5,
    }
    assert timeline.hidden_communication == pytest.approx(170e-6)
    assert list(timeline.unknown) == ["void somebody_kernel(float*)"]
    assert sum(timeline.seconds.values()) == pytest.approx(sum(timeline.steps))


def test_a_recorded_step_of_compiled_blocks() -> None:
    """Of a trace that torch 2.13 wrote on a CPU: two layers, two micro-batches, Muon."""
    timeline = attribute(read_trace(RECORDED))
    share = {place: seconds / sum(timeline.steps) for place, seconds in timeline.seconds.items()}
    assert sum(share.values()) == pytest.approx(1)
    assert share.get(Place("other"), 0.0) < 0.02
    events = read_trace(RECORDED)
    # Four matrices a layer, forward and twice backward, in two passes.
    assert sum(each["name"] == "aten::mm" for each in events) >= 2 * 2 * 12
    for part in ("matmul", "attention", "elementwise"):
        for direction in ("forward", "backward"):
            assert 0.005 < share[Place(part, direction)] < 0.6
    for part in ("data", "head", "cross-entropy", "optimizer", "orthogonalisation", "host"):
        assert 0 < share[Place(part)] < 0.8


MODELS = {
    "dense": {},
    "no gate": {"feed_forward": "gelu", "qk_norm": False, "positions": "t5"},
    "experts": {"experts": 4, "top_k": 2, "shared_expert_hidden": 32, "dense_layers": 1},
    "encoder-decoder": {"topology": "encoder-decoder", "encoder_context": 64},
}


def engine(layout: Layout | None = None, **model: Any) -> Engine:
    """Enough of one to know what it works on."""
    keys = schema.Model(layers=2, width=64, heads=4, kv_heads=2, vocabulary=512, context=32, **model)
    recipe = Recipe(model=keys, batch=schema.Batch(tokens=8 * shape(keys).row_positions))
    layout = layout or Layout()
    with torch.device("meta"):
        trunk = Decoder(keys)
    return SimpleNamespace(  # ty: ignore
        model=trunk, recipe=recipe, world=SimpleNamespace(layout=layout), rows=(0, 8 // layout.data),
        chosen=Machine("cpu", "bfloat16", False, 1, 0), micro_batches=1, optimizer=SimpleNamespace(parts=[], slots=[]),
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [Layout(), Layout(replicate=2, tensor=2), Layout(shard=2, context=2)])
def test_the_parts_flops_are_the_recipes(name: str, layout: Layout) -> None:
    one = engine(layout, **MODELS[name])
    found = sum(work.amount for work in works(one).values() if work.unit == "FLOP")
    whole = cost(one.recipe).flops_per_token.total * one.recipe.batch.tokens
    assert found == pytest.approx(whole / layout.world, rel=1e-5)


@pytest.mark.parametrize("size", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_flops_of_newton_schulz_are_those_that_torch_counts(size: tuple[int, ...]) -> None:
    master = torch.randn(size)
    slot = Slot("blocks.0.x", "matrix", torch.nn.Parameter(master), master, Piece.whole(size))
    with FlopCounterMode(display=False) as counted:
        orthogonalise(master.mT if size[-2] > size[-1] else master)
    assert newton_schulz(slot) == counted.get_total_flops()


def test_what_a_part_would_gain() -> None:
    bound = row(Place("matmul", "forward"), 0.5, 2.0, Work(1e11, "FLOP"), flops=4e11, bandwidth=1e9)
    assert (bound.share, bound.achieved, bound.of_limit) == (0.25, 2e11, 0.5)
    assert bound.gain_seconds == 0.25
    cached = row(Place("optimizer"), 0.5, 2.0, Work(1e9, "B"), flops=4e11, bandwidth=1e9)
    assert (cached.of_limit, cached.gain_seconds) == (2.0, 0.0)
    assert row(Place("host"), 0.5, 2.0, None, 1.0, 1.0).gain_seconds == 0.5
    assert row(Place("other"), 0.5, 2.0, None, 1.0, 1.0).gain_seconds is None


SMALL = (
    "model.width=128", "model.heads=4", "model.context=128", "batch.tokens=1024", "parallel.micro_tokens=512",
    "parallel.dtype=auto",
)  # fmt: skip
"""Large enough that operators take longer than calling them."""


def check_parts(found: Profile) -> None:
    """What is always so."""
    assert sum(one.seconds for one in found.rows) == pytest.approx(found.seconds, rel=1e-6)
    assert sum(one.share for one in found.rows) == pytest.approx(1, rel=1e-6)
    assert sum(one.share for one in found.rows if one.part == "other") < 0.1
    parts = {one.part for one in found.rows}
    assert parts <= set(PARTS)
    assert {"data", "matmul", "attention", "elementwise", "head", "cross-entropy", "optimizer", "host"} <= parts
    for one in found.rows:
        if one.part in ("matmul", "attention", "head"):
            assert one.unit == "FLOP"
            assert one.achieved is not None
            assert one.limit == max(found.peaks)
    assert len(found.steps) == len(found.plain_steps)
    assert all(math.isfinite(each) and each > 0 for each in (*found.steps, *found.plain_steps, *found.peaks))


@pytest.fixture
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from calledshot import machine

    measure = machine.matmul_peak
    monkeypatch.setattr(machine, "matmul_peak", lambda dtype, seconds, device: measure(dtype, 0.0, device))
    monkeypatch.setattr(machine, "memory_bandwidth", lambda seconds, device: 1e10)


def tiny(lab: Path, *overrides: str) -> Recipe:
    recipe = load_recipe(str(lab / "tiny.toml"), (*SMALL, *overrides))
    return replace(recipe, data=replace(recipe.data, sources=(schema.Source(path=str(lab / "corpus")),)))


def test_real_updates(lab: Path, quick_peak: None, tmp_path: Path) -> None:
    recipe = tiny(lab)
    before = sorted(path for path in lab.rglob("*") if "data" not in path.relative_to(lab).parts[:1])
    trace = tmp_path / "trace.json.gz"
    found = profile(recipe, lab, steps=3, trace=trace)
    assert found is not None
    check_parts(found)
    assert found.machine["compile"] is False
    assert found.layout == {"replicate": 1, "shard": 1, "context": 1, "tensor": 1, "expert": 1}
    assert "set parallel.compile=on" in "".join(found.advice) or found.rows[0].part == "matmul"
    # No run is kept, and the file is the trace that the table was made of.
    assert sorted(path for path in lab.rglob("*") if "data" not in path.relative_to(lab).parts[:1]) == before
    again = attribute(read_trace(trace), skip=1)
    assert again.steps == found.steps


@pytest.mark.slow
def test_real_updates_compiled(lab: Path, quick_peak: None) -> None:
    found = profile(tiny(lab, "parallel.compile=on", "parallel.threads=1"), lab, steps=3)
    assert found is not None
    check_parts(found)
    assert found.machine["compile"] is True


def test_ranks_profile_together(lab: Path) -> None:
    ended = gang(lab, 2, "profile", "tiny.toml", *SMALL, "parallel.shard=2", "--steps", "1", "--json")
    assert [one.code for one in ended] == [0, 0], ended[0].said
    found = json.loads(ended[0].said[ended[0].said.index("{\n") :])
    assert found["layout"]["shard"] == 2
    rows = {(one["part"], one["direction"]): one for one in found["rows"]}
    assert rows["communication", ""]["share"] > 0.01
    assert "{\n" not in ended[1].said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--steps", "0"), "--steps 0"), (("--trace", "nowhere/trace.json"), "there is no folder")],
)
def test_what_cannot_be_is_said(lab: Path, arguments: tuple[str, ...], said: str) -> None:
    ended = shot(lab, "profile", "tiny.toml", *arguments)
    assert ended.code == 2
    assert said in ended.complaint
