"""The loop: batches in, updates out, and a run directory that says what happened."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from calledshot import machine
from calledshot.data import Batches, HeldOut, Prepared
from calledshot.model import BatchTensors, Decoder, continuing
from calledshot.model.routing import load_figures
from calledshot.objective import Batch
from calledshot.recipe import Recipe, RunError, UsageError, cost, shape
from calledshot.recipe.cost import activation_bytes
from calledshot.recipe.units import show_bytes
from calledshot.rundir import RunDirectory, parse_time
from calledshot.training import probe, state
from calledshot.training.console import Console, quantity, step_line
from calledshot.training.evaluation import evaluate, write_samples
from calledshot.training.gauges import EnergyMeter, memory_bytes, peak_memory_bytes
from calledshot.training.optimizer import Optimizer, make_slots
from calledshot.training.schedule import learning_rate_factor
from calledshot.training.sinks import Sink
from calledshot.training.stop import Stop, Stopped

NON_FINITE_LIMIT = 5
"""Steps in a row whose loss or gradient is not finite, after which the run has failed."""
WARMUP_STEPS = 3
"""First steps of an incarnation that no rate is taken from."""
HEARTBEAT_SECONDS = 5.0
PROBE_SECONDS = 6.0
EVALUATION_SHARE = 0.1
"""Share of the minutes asked for that held-out loss during the run may take."""
PEAK_SECONDS = 60.0
"""Between two probes of the matmul peak, each of which takes about a second."""
SMOOTHING = 20
"""Steps whose median is the rate that the console shows."""


class Trainer:
    """One incarnation of a run on one machine."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        prepared: Prepared,
        console: Console,
        stop: Stop,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """`recipe` is resolved (`load.sized`); the run's lock is held and its incarnation begun."""
        self.recipe, self.run, self.prepared = recipe, run, prepared
        self.console, self.stop, self.sinks = console, stop, sinks
        self.started = time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.machine = probe.choose(recipe, run, self.device)
        self.micro_rows = self.machine.micro_tokens // shape(recipe.model).row_positions
        self.cost = cost(recipe)
        self._refuse_what_cannot_fit()
        self.counters = state.Counters()
        self.saved: int | None = None
        """Step of this run's checkpoint that was last written or taken."""
        self.peaks: list[float] = []
        self.peak_probed = -math.inf
        self.rates: list[float] = []
        self.load_LE: Tensor | None = None
        """Share of the last step's choices that each expert of each layer got."""
        self.meter, self.energy_before = EnergyMeter(self.device), 0.0
        self.held_out = HeldOut(prepared, recipe)
        self._build()

    def _refuse_what_cannot_fit(self) -> None:
        """UsageError before memory runs out, by arithmetic: an estimate that counts too little refuses too little."""
        there = machine.describe()["memory"]
        has = [size for size in (there["total_bytes"], there["limit_bytes"]) if size]
        if self.device.type == "cuda":
            has = [torch.cuda.get_device_properties(self.device).total_memory]
        model = self.recipe.model
        width = 2 if self.machine.dtype == "bfloat16" else 4
        activations = activation_bytes(self.cost.shape, self.machine.micro_tokens, width)
        # The mask of a pass stands whole on a CPU, as booleans and in the matmuls' type.
        mask = (1 + width) * self.micro_rows * shape(model).row_positions ** 2 if self.device.type == "cpu" else 0
        needs = self.cost.bytes.fixed + activations + mask
        if has and needs > min(has):
            raise UsageError(
                f"model and optimizer need {show_bytes(self.cost.bytes.fixed)} and a pass over "
                f"{self.machine.micro_tokens:,} tokens at least {show_bytes(activations + mask)}, and there are "
                f"{show_bytes(min(has))}: lower parallel.micro_tokens, model.context or model.width"
            )

    def _build(self) -> None:
        """A freshly initialised model with its masters and optimizer."""
        with torch.device("meta"):
            model = Decoder(self.recipe.model)
        model.to_empty(device=self.device)
        model.initialise(torch.Generator(self.device).manual_seed(self.recipe.seed))
        masters = {name: tensor.data for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self.model = model.to(getattr(torch, self.machine.dtype))
        self.model.reading = continuing(self.recipe, self.prepared.tokenizer)
        if self.machine.dtype == "float32":
            masters |= {name: parameter.data for name, parameter in self.model.named_parameters()}
        self.masters = masters
        self.model.blocked_attention = self.device.type == "cpu" and self.machine.compile
        if self.machine.compile:
            self.model.compile_blocks()
        slots = make_slots(self.model, masters)
        self.optimizer = Optimizer(slots, self.recipe, compiled=self.machine.compile, folder=self.run.path)

    def restore(self, run: RunDirectory, step: int | None = None, *, with_optimizer: bool = True) -> bool:
        """Take the state of a checkpoint of `run`; False when it has none."""
        found = state.find(run, step)
        if found is None:
            return False
        for fault in found.passed_over:
            self.console.say(f"warning: {fault}; an older checkpoint is taken")
            self.run.writer("events").append({"kind": "damaged_checkpoint", "message": fault, "step": found.step})
        state.copy_into(self.masters, state.read_tensors(found.path / state.MODEL, self.device), found.path)
        with torch.no_grad():
            for slot in self.optimizer.slots:
                slot.working.copy_(slot.master)
        self.counters = state.read_counters(found.path)
        self.energy_before = self.counters.energy_joules or 0.0
        self.saved = found.step if run is self.run else None
        if with_optimizer:
            self.optimizer.load_state(state.read_tensors(found.path / state.OPTIMIZER, self.device))
        else:
            self.counters.updates = 0
        return True

    def banner(self) -> str:
        """One line: what is trained, on what."""
        counts, chosen = self.cost.parameters, self.machine
        start = f", going on from step {self.counters.step}" if self.counters.step else ""
        return (
            f"{self.run.name}: {quantity(counts.total)} parameters ({quantity(counts.non_embedding)} non-embedding), "
            f"{quantity(self.cost.flops_per_token.total)} FLOPs a token; {chosen.dtype} on {chosen.device}, "
            f"{chosen.threads} threads, {'compiled' if chosen.compile else 'not compiled'}{start}"
        )

    # The run

    def train(self) -> str:
        """Trains from where the counters are to the end; the state that the run is left in: done or interrupted."""
        self._probe_peak()
        try:
            steps = self._steps()
        except Stopped:
            self.run.set_status(state="interrupted")
            return "interrupted"
        if self.counters.step > steps:
            raise UsageError(
                f"{self.run.path}: is at step {self.counters.step}, but the recipe ends at {steps}; "
                "a fork's duration counts from the beginning of the run it comes from"
            )
        skips = sorted({int(row["step"]) for row in self.run.rows("skips") if "step" in row})
        batches = Batches(self.prepared, self.recipe, steps=steps, skips=skips)
        probed = self.run.load("probes").get("evaluate_every_steps")
        every = self.recipe.evals.every_steps or probed or max(1, steps // 10)
        if 0 < self.counters.step < steps and self.counters.step % every == 0 and not self._evaluated():
            self._evaluate(self.recipe.evals.tokens)
        for source in self.prepared.sources:
            if source.name not in self.held_out.sources:
                self.console.say(
                    f"{source.name}: a single document, so nothing is held out and no held-out loss is known"
                )
        saved_at = time.monotonic()
        beat = 0.0
        for number, batch in batches.prefetch(self.counters.step, steps):
            self._record(self._step(number, batch, steps), steps)
            done, now = self.counters.step, time.monotonic()
            if now - beat > HEARTBEAT_SECONDS:
                self._status("running", steps)
                beat = now
            if self.stop.requested:
                break
            if done < steps:
                if done % every == 0:
                    self._evaluate(self.recipe.evals.tokens)
                if self._save_due(done, saved_at):
                    self.save()
                    saved_at = time.monotonic()
            if self.stop.requested:  # during the evaluation, which the next incarnation does
                break
        self.save()
        if not self.stop.requested:
            self._evaluate(self.recipe.evals.tokens)
        # Apart from the curve, which stays on the same documents from the first point to the last.
        final_tokens = self.recipe.evals.final_tokens
        called = "final held-out" if final_tokens else "all held-out"
        final = [] if self.stop.requested else self._held_out(final_tokens, called)
        outcome = "interrupted" if self.stop.requested else "done"
        if outcome == "done":
            self._summarise(batches.packing_loss, final)
        self._status(outcome, steps)
        return outcome

    def _steps(self) -> int:
        """Updates in the whole run. Minutes become tokens at the first start, by measuring, and stay so.

        Raises Stopped when a stop is asked for before that is settled.
        """
        if not self.recipe.duration.minutes:
            assert self.cost.steps is not None
            return self.cost.steps
        probes = self.run.load("probes")
        if "steps" not in probes:
            seconds = self._measure()
            spent = time.monotonic() - self.started
            tokens_per_second = self.recipe.batch.tokens / seconds
            settings, budget = self.recipe.evals, self.recipe.duration.minutes * 60
            # Held-out loss is a forward pass, a third of the work, but not compiled: measured, about training's speed.
            curve, final = (
                sum(self.held_out.select(source, tokens).tokens for source in self.held_out.sources) / tokens_per_second
                for tokens in (settings.tokens, settings.final_tokens)
            )
            evaluations = min(9, int(EVALUATION_SHARE * budget / curve)) if curve else 9
            left = max(budget - spent - (evaluations + 1) * curve - final, 0.1 * budget)
            probes = self.run.load("probes")
            steps = max(10, round(left / seconds))
            probes |= {"steps": self.counters.step + steps, "tokens_per_second": tokens_per_second}
            probes["evaluate_every_steps"] = max(1, steps // (evaluations + 1))
            self.run.save("probes", probes)
            self.console.say(
                f"{self.recipe.duration.minutes:g} minutes at {tokens_per_second:,.0f} tok/s: "
                f"{steps} steps, {steps * self.recipe.batch.tokens:,} tokens"
            )
        return int(probes["steps"])

    def _measure(self) -> float:
        """Median seconds of an update, on a model that is thrown away afterwards."""
        self.console.say("measuring this machine" + (" and compiling the model" if self.machine.compile else ""))
        batches = Batches(self.prepared, self.recipe, steps=1)
        batch, times = batches.batch(0), []
        while len(times) < WARMUP_STEPS + 3 or sum(times[WARMUP_STEPS:]) < PROBE_SECONDS:
            self.stop.check()
            start = time.perf_counter()
            self._update(batch, 1.0)
            self.optimizer.clear()
            times.append(time.perf_counter() - start)
        self._build()
        if not self.restore(self.run):
            self.counters = state.Counters()
        return statistics.median(times[WARMUP_STEPS:])

    def _step(self, number: int, batch: Batch, steps: int) -> dict[str, Any]:
        """One update and its row of metrics."""
        factor = learning_rate_factor(self.recipe.schedule, number, steps)
        start = time.perf_counter()
        norms_every = self.recipe.evals.norms_every_steps
        norms = bool(norms_every) and (number + 1) % norms_every == 0
        activations = self._activations(batch) if norms else {}
        loss, z_loss, norm, updates = self._update(batch, factor)
        seconds = time.perf_counter() - start
        counters = self.counters
        counters.step = number + 1
        counters.tokens += batch.size
        counters.flops += batch.size * self.cost.flops_per_token.total
        counters.seconds += seconds
        self.rates.append(batch.size / seconds)
        warm = len(self.rates) > WARMUP_STEPS
        flops_per_second = self.cost.flops_per_token.total * batch.size / seconds
        low, high = machine.mfu_range(flops_per_second, self.peaks)[:2] if warm else (None, None)
        row: dict[str, Any] = {
            "step": counters.step,
            "tokens": counters.tokens,
            "flops": counters.flops,
            "loss": loss,
            "z_loss": z_loss,
            "lr": self.optimizer.peaks["matrix"] * factor,
            "grad_norm": norm,
            "update_norm": None if updates is None else math.sqrt(sum(updates.values())),
            "tokens_per_second": self.rates[-1] if warm else None,
            "mfu_low": low,
            "mfu_high": high,
            "step_seconds": seconds,
            "memory_bytes": memory_bytes(self.device),
        }
        if self.load_LE is not None:
            figures = [load_figures(load_E) for load_E in self.load_LE.cpu()]
            row["experts"] = {key: statistics.mean(each[key] for each in figures) for key in figures[0]}
        if norms:
            gradients = {
                slot.name: float(torch.linalg.vector_norm(slot.gradient, dtype=torch.float32))
                for slot in self.optimizer.slots
                if slot.gradient is not None
            }
            by_name = {name: math.sqrt(square) for name, square in (updates or {}).items()}
            row["norms"] = {"gradient": gradients, "update": by_name, "activation": activations}
        self.optimizer.clear()
        self._check_finite(row, updates is not None)
        return row

    def _update(self, batch: Batch, factor: float) -> tuple[float, float, float, dict[str, float] | None]:
        """Loss, z-loss and gradient norm of a batch, and the updates' squared norms; None when the step was left
        out.
        """
        tensors = BatchTensors.of(batch, self.device)
        rows = self.micro_rows
        scale = 1.0 / tensors.weights.sum().clamp(min=1.0)
        loss = torch.zeros((), device=self.device)
        z_loss = torch.zeros((), device=self.device)
        loads: list[Tensor] = []
        for start in range(0, len(batch.inputs), rows):
            part = tensors.rows(start, start + rows)
            micro_loss, micro_z = self.model.loss(
                part.inputs, part.targets, part.weights, scale, self.recipe.objective.z_loss, **part.reading
            )
            total = micro_loss + micro_z
            if self.model.records:
                share = part.weights.sum() * scale
                total = total + self.model.auxiliary_loss() * share
                loads.append(torch.stack([record.load_E for record in self.model.records]) * share)
            total.backward()
            loss += micro_loss.detach()
            z_loss += micro_z.detach()
            for slot in self.optimizer.slots:
                slot.collect()
        norm = self.optimizer.gradient_norm()
        values = torch.stack((loss, z_loss, norm)).tolist()
        if not all(map(math.isfinite, values)):
            return (*values, None)
        squares = self.optimizer.step(self.counters.updates + 1, norm, factor)
        self.load_LE = torch.stack(loads).sum(0) if loads else None
        if self.load_LE is not None and self.recipe.model.balance == "bias":
            sparse = [block.experts for block in self.model.all_blocks if block.experts is not None]
            for experts, load_E in zip(sparse, self.load_LE, strict=True):
                experts.update_bias(load_E)
        self.counters.updates += 1
        names, sums = list(squares), torch.stack(list(squares.values())).tolist()
        return (*values, dict(zip(names, sums, strict=True)))

    @torch.no_grad()
    def _activations(self, batch: Batch) -> dict[str, float]:
        """Root mean square of each block's output on the first rows of a batch."""
        part = BatchTensors.of(batch, self.device).rows(0, self.micro_rows)
        return self.model.activation_scales(part.inputs, **part.reading)

    def _check_finite(self, row: dict[str, Any], applied: bool) -> None:
        if applied:
            self.counters.non_finite = 0
            return
        self.counters.non_finite += 1
        self.run.writer("events").append({"kind": "skipped_step", "step": row["step"], "loss": row["loss"]})
        self.console.say(f"step {row['step']}: loss or gradient is not finite; the update was left out")
        if self.counters.non_finite >= NON_FINITE_LIMIT:
            raise RunError(
                f"{self.run.path}: loss or gradient was not finite for {NON_FINITE_LIMIT} steps up to {row['step']}; "
                "fork from an earlier checkpoint with a lower optimizer.learning_rate, or skip those batches with "
                "data.skip"
            )

    # What is written down

    def _record(self, row: dict[str, Any], steps: int) -> None:
        self.run.writer("metrics").append(row)
        for sink in self.sinks:
            sink.send(row["step"], row)
        recent = self.rates[WARMUP_STEPS:][-SMOOTHING:]
        eta = None
        if recent:
            rate = statistics.median(recent)
            eta = (steps - row["step"]) * self.recipe.batch.tokens / rate
            row = {**row, "tokens_per_second": rate}
        self.console.say(step_line(row, steps, eta))

    def _probe_peak(self) -> None:
        if time.monotonic() - self.peak_probed > PEAK_SECONDS:
            self.peaks += machine.matmul_peak(self.machine.dtype, seconds=0.3, device=self.device.type)
            self.peak_probed = time.monotonic()

    def _save_due(self, step: int, saved_at: float) -> bool:
        settings = self.recipe.checkpoint
        if settings.every_steps:
            return step % settings.every_steps == 0
        return settings.every_minutes > 0 and time.monotonic() - saved_at > settings.every_minutes * 60

    def save(self) -> None:
        """A checkpoint of the present step, unless it has one. RunError when the weights are not finite: saving them
        would in the end push out the last good ones.
        """
        step = self.counters.step
        if step in (0, self.saved):
            return
        if not all(bool(master.isfinite().all()) for master in self.masters.values()):
            raise RunError(
                f"{self.run.path}: the weights are not finite at step {step}, so they were not saved; "
                "fork from an earlier checkpoint with a lower optimizer.learning_rate"
            )
        start = time.perf_counter()
        if (joules := self.meter.joules) is not None:
            self.counters.energy_joules = self.energy_before + joules
        size = state.save(self.run, self.counters, self.masters, self.optimizer.state())
        self.saved = step
        self.run.prune(self.recipe.checkpoint.keep)
        seconds = time.perf_counter() - start
        self.run.writer("events").append({"kind": "checkpoint", "step": step, "seconds": seconds, "bytes": size})

    def _evaluated(self) -> bool:
        """Whether the present step has its held-out loss already."""
        return any(row.get("step") == self.counters.step for row in self.run.standing_rows("validation"))

    def _evaluate(self, tokens: int) -> None:
        start = time.perf_counter()
        step, position = self.counters.step, self.counters.tokens
        rows = self._held_out(tokens, "held-out")
        if self.stop.requested and len(rows) < len(self.held_out.sources):
            return
        for row in rows:
            self.run.writer("validation").append({"step": step, "tokens": position, **row})
            for sink in self.sinks:
                sink.send(step, {f"held_out/{row['source']}/{key}": row[key] for key in ("loss", "bits_per_byte")})
        write_samples(self.model, self.prepared.tokenizer, self.recipe, self.run, step)
        self.run.writer("events").append({"kind": "evaluation", "step": step, "seconds": time.perf_counter() - start})
        self._probe_peak()

    def _held_out(self, tokens: int, called: str) -> list[dict[str, Any]]:
        """Held-out loss by source, said on the console."""
        rows = evaluate(self.model, self.held_out, tokens, self.stop, self.micro_rows)
        for row in rows:
            bpb = "n/a" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
            place = f"step {self.counters.step}  {called} {row['source']}"
            self.console.say(f"{place}  loss {row['loss']:.4f}  bits per byte {bpb}")
        return rows

    def _status(self, outcome: Any, steps: int, message: str = "") -> None:
        self.run.set_status(
            state=outcome, step=self.counters.step, tokens=self.counters.tokens, message=message,
            total_steps=steps, total_tokens=steps * self.recipe.batch.tokens,
        )  # fmt: skip

    def _summarise(self, packing_loss: float, final: list[dict[str, Any]]) -> None:
        rows = self.run.metrics()
        rates = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
        wall = wall_seconds(self.run)
        median = statistics.median(rates) if rates else None
        counters = self.counters
        own_tokens = len(rows) * self.recipe.batch.tokens  # a fork's counters include its parent's
        parameters = self.cost.parameters
        self.run.save(
            "summary",
            {
                "parameters": {
                    "total": parameters.total, "non_embedding": parameters.non_embedding, "active": parameters.active,
                },
                "tokens": counters.tokens,
                "flops": counters.flops,
                "seconds": wall,
                "step_seconds": counters.seconds,
                "tokens_per_second": median,
                "goodput": own_tokens / wall / median if median and wall else None,
                "mfu": mfu_summary(self.run),
                # The rows are of every incarnation, and the kernel's own maximum may lag behind what it said before.
                "peak_memory_bytes": max(peak_memory_bytes(self.device), *(row["memory_bytes"] for row in rows)),
                "energy_joules": counters.energy_joules,
                "packing_loss": packing_loss,
                "final": {row["source"]: row for row in final},
            },
        )  # fmt: skip


def mfu_summary(run: RunDirectory) -> dict[str, float] | None:
    """Median of the steps' MFU against the highest and the lowest peak probed; None where it could not be trusted."""
    rows = [row for row in run.metrics() if row.get("mfu_low") is not None and row.get("mfu_high") is not None]
    if not rows:
        return None
    return {key: statistics.median(row[f"mfu_{key}"] for row in rows) for key in ("low", "high")}


def wall_seconds(run: RunDirectory) -> float:
    """Seconds from start to last sign of life, summed over the incarnations; the time between them is not in it."""
    spans: dict[int, list[float]] = {}
    for row in (*run.rows("events"), *run.rows("metrics")):
        with suppress(KeyError, TypeError):
            moment = parse_time(row["time"])
            if math.isfinite(moment):
                spans.setdefault(int(row["incarnation"]), []).append(moment)
    return sum(max(moments) - min(moments) for moments in spans.values())
