"""The loop: batches in, updates out, and a run directory that says what happened."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from calledshot import machine
from calledshot.data import Batches, HeldOut, Prepared
from calledshot.model import BatchTensors
from calledshot.model.routing import load_figures
from calledshot.objective import Batch
from calledshot.recipe import Recipe, RunError, UsageError, batching, cost, shape
from calledshot.recipe.cost import activation_bytes
from calledshot.recipe.units import show_bytes
from calledshot.rundir import RunDirectory
from calledshot.training import probe, state
from calledshot.training.console import Console, quantity, step_line
from calledshot.training.engine import Engine, Updated
from calledshot.training.evaluation import evaluate, write_samples
from calledshot.training.gauges import EnergyMeter, memory_bytes, peak_memory_bytes
from calledshot.training.saving import Saver
from calledshot.training.schedule import learning_rate_factor
from calledshot.training.sinks import Sink
from calledshot.training.stop import Stop, Stopped
from calledshot.training.summary import summary
from calledshot.training.world import World

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
    """One incarnation of a run, as one of its ranks sees it."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        prepared: Prepared,
        console: Console,
        stop: Stop,
        sinks: Sequence[Sink] = (),
        world: World | None = None,
    ) -> None:
        """`recipe` is resolved (`load.sized`); the run's lock is held and its incarnation begun, by the leading rank.
        `world` has its groups."""
        self.recipe, self.run, self.prepared = recipe, run, prepared
        self.console, self.stop, self.sinks = console, stop, sinks
        self.world = world or World.join()
        self.started = time.monotonic()
        self.device = self.world.device
        ranks = self.world.place.local_size
        machine.keep_freed_memory()
        chosen = asdict(probe.choose(recipe, run, self.device, ranks)) if self.world.leads else None
        probe.set_threads(recipe, ranks)
        self.machine = probe.Machine(**self.world.tell(chosen))
        self.cost, self.batching = cost(recipe), batching(recipe)
        self._refuse_what_cannot_fit()
        self.counters = state.Counters()
        self.stopping = False
        """Whether some rank was asked to stop."""
        self.saved_at = time.monotonic()
        self.saved: int | None = None
        """Step of this run's checkpoint that was last written or taken."""
        self.peaks: list[float] = []
        self.peak_probed = -math.inf
        self.rates: list[float] = []
        self.meter, self.energy_before = EnergyMeter(self.device), 0.0
        self.held_out = HeldOut(prepared, recipe)
        self.engine = Engine(recipe, self.machine, self.world, prepared.tokenizer, run.path)
        self.saver = Saver(run, self.world.rank, self.world.size, recipe.checkpoint, gather=self.world.gather)
        self.rank_log = run.rank_writer(self.world.rank) if self.world.size > 1 else None

    def _refuse_what_cannot_fit(self) -> None:
        """UsageError before memory runs out, by arithmetic: an estimate that counts too little refuses too little."""
        there = machine.describe()["memory"]
        has = [size for size in (there["total_bytes"], there["limit_bytes"]) if size]
        if self.device.type == "cuda":
            has = [torch.cuda.get_device_properties(self.device).total_memory]
        model, layout = self.recipe.model, self.world.layout
        rows = self.machine.micro_tokens // shape(model).row_positions
        width = 2 if self.machine.dtype == "bfloat16" else 4
        activations = activation_bytes(self.cost.shape, self.machine.micro_tokens, width)
        # The mask of a pass stands whole on a CPU, as booleans and in the matmuls' type.
        mask = (1 + width) * rows * shape(model).row_positions ** 2 if self.device.type == "cpu" else 0
        fixed = self.cost.bytes.fixed // (layout.shard * layout.tensor)
        needs = (fixed + (activations + mask) // (layout.tensor * layout.context)) * self.world.place.local_size
        if has and needs > min(has):
            raise UsageError(
                f"model and optimizer need {show_bytes(fixed)} and a pass over "
                f"{self.machine.micro_tokens:,} tokens at least {show_bytes(activations + mask)}, and there are "
                f"{show_bytes(min(has))}: lower parallel.micro_tokens, model.context or model.width"
            )

    def restore(self, run: RunDirectory, step: int | None = None, *, with_optimizer: bool = True) -> bool:
        """Take the state of a checkpoint of `run`, whatever number of ranks wrote it; False when it has none."""
        share = (self.world.rank, self.world.size)
        found = state.find(run, step, share=share, agree=self.world.first)
        if found is None:
            return False
        for fault in found.passed_over:
            self.console.say(f"warning: {fault}; an older checkpoint is taken")
            self.run.writer("events").append({"kind": "damaged_checkpoint", "message": fault, "step": found.step})
        self.engine.restore(found.path, with_optimizer=with_optimizer)
        self.counters = state.read_counters(found.path)
        self.energy_before = self.counters.energy_joules or 0.0
        self.saved = found.step if run is self.run else None
        if not with_optimizer:
            self.counters.updates = 0
        return True

    def banner(self) -> str:
        """One line: what is trained, on what."""
        counts, chosen = self.cost.parameters, self.machine
        start = f", going on from step {self.counters.step}" if self.counters.step else ""
        threads = f"{chosen.threads} threads"
        if self.world.size > 1:
            sizes = {name: size for name, size in asdict(self.world.layout).items() if size > 1}
            cut = " x ".join(f"{name} {size}" for name, size in sizes.items())
            threads = f"{self.world.size} ranks ({cut}) of {threads}"
        sparse = f", {quantity(counts.active)} active" if counts.active != counts.total else ""
        return (
            f"{self.run.name}: {quantity(counts.total)} parameters ({quantity(counts.non_embedding)} non-embedding"
            f"{sparse}), "
            f"{quantity(self.cost.flops_per_token.total)} FLOPs a token; {chosen.dtype} on {chosen.device}, "
            f"{threads}, {'compiled' if chosen.compile else 'not compiled'}{start}"
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
        self.saved_at = time.monotonic()
        beat = 0.0
        for number, batch in batches.prefetch(self.counters.step, steps, self.engine.share):
            row, save = self._step(number, batch, batches.size(number), steps)
            self._record(row, steps)
            self.saver.poll()
            if self.world.size == 1:
                self.stopping = self.stopping or self.stop.requested
            done, now = self.counters.step, time.monotonic()
            if now - beat > HEARTBEAT_SECONDS:
                self._status("running", steps)
                beat = now
            if self.stopping:
                break
            if done < steps:
                if done % every == 0:
                    self._evaluate(self.recipe.evals.tokens)
                if save:
                    self.save()
            if self.stopping:  # during the evaluation, which the next incarnation does
                break
        self.save(wait=True)
        if not self.stopping:
            self._evaluate(self.recipe.evals.tokens)
        # Apart from the curve, which stays on the same documents from the first point to the last.
        final_tokens = self.recipe.evals.final_tokens
        called = "final held-out" if final_tokens else "all held-out"
        final = [] if self.stopping else self._held_out(final_tokens, called)
        outcome = "interrupted" if self.stopping else "done"
        if outcome == "done" and self.world.leads:
            peak = peak_memory_bytes(self.device)
            packing = batches.packing_loss
            self.run.save("summary", summary(self.run, self.recipe, self.cost, self.counters, peak, packing, final))
        self.saver.close()
        self._status(outcome, steps)
        return outcome

    def _steps(self) -> int:
        """Updates in the whole run. Minutes become tokens at the first start, by measuring, and stay so.

        Raises Stopped when a stop is asked for before that is settled.
        """
        if not self.recipe.duration.minutes:
            assert self.cost.steps is not None
            return self.cost.steps
        probes = self.world.tell(self.run.load("probes"))
        if "steps" not in probes:
            seconds = self._measure()
            spent = time.monotonic() - self.started
            tokens_per_second = self.recipe.batch.tokens / seconds
            settings, budget = self.recipe.evals, self.recipe.duration.minutes * 60
            row = shape(self.recipe.model).row_positions
            # Held-out loss is a forward pass, a third of the work, but not compiled: measured, about training's speed.
            curve, final = (
                sum(self.held_out.select(source, tokens).rows for source in self.held_out.sources)
                * (row / tokens_per_second)
                for tokens in (settings.tokens, settings.final_tokens)
            )
            evaluations = min(9, int(EVALUATION_SHARE * budget / curve)) if curve else 9
            left = max(budget - spent - (evaluations + 1) * curve - final, 0.1 * budget)
            probes = self.run.load("probes")
            steps = max(10, round(left / seconds))
            (steps,) = self.world.tell([steps])
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
        batch, times = batches.rows(0, *self.engine.rows), []
        more = True
        while more:
            if self.world.any(self.stop.requested)[0]:
                raise Stopped
            start = time.perf_counter()
            self.engine.update(batch, 1, 1.0)
            self.engine.optimizer.clear()
            times.append(time.perf_counter() - start)
            (more,) = self.world.any(len(times) < WARMUP_STEPS + 3 or sum(times[WARMUP_STEPS:]) < PROBE_SECONDS)
        self.engine.build()
        if not self.restore(self.run):
            self.counters = state.Counters()
        return statistics.median(times[WARMUP_STEPS:])

    def _step(self, number: int, batch: Batch, rows: int, steps: int) -> tuple[dict[str, Any], bool]:
        """One update on this rank's part of a batch of so many rows: its row of metrics, and whether the state is to be
        saved after it.
        """
        factor = learning_rate_factor(self.recipe.schedule, number, steps)
        start = time.perf_counter()
        norms_every = self.recipe.evals.norms_every_steps
        norms = bool(norms_every) and (number + 1) % norms_every == 0
        activations = self._activations(batch) if norms else {}
        flags = self.stop.requested, self.world.leads and self._save_due(number + 1)
        updated = self.engine.update(batch, self.counters.updates + 1, factor, flags, rows)
        seconds = time.perf_counter() - start
        # Alone, what was asked for meanwhile is heeded at once; ranks heed what all of them know.
        self.stopping, save = (self.stop.requested, flags[1]) if self.world.size == 1 else updated.flags
        counters, size = self.counters, rows * self.batching.positions
        counters.step = number + 1
        counters.tokens += size
        counters.flops += size * self.cost.flops_per_token.total
        counters.seconds += seconds
        self.rates.append(size / seconds)
        warm = len(self.rates) > WARMUP_STEPS
        flops_per_second = self.cost.flops_per_token.total * size / seconds
        low, high = machine.mfu_range(flops_per_second, self.peaks)[:2] if warm else (None, None)
        row: dict[str, Any] = {
            "step": counters.step,
            "tokens": counters.tokens,
            "flops": counters.flops,
            "loss": updated.loss,
            "z_loss": updated.z_loss,
            "lr": self.engine.optimizer.peaks["matrix"] * factor,
            "grad_norm": updated.gradient_norm,
            "update_norm": updated.update_norm,
            "tokens_per_second": self.rates[-1] if warm else None,
            "mfu_low": low,
            "mfu_high": high,
            "step_seconds": seconds,
            "memory_bytes": memory_bytes(self.device),
        }
        if updated.load_LE is not None:
            figures = [load_figures(load_E) for load_E in updated.load_LE.cpu()]
            row["experts"] = {key: statistics.mean(each[key] for each in figures) for key in figures[0]}
        if norms:
            by_name = {name: math.sqrt(square) for name, square in (updated.squares or {}).items()}
            gradients = self.engine.gradient_norms()
            row["norms"] = {"gradient": gradients, "update": by_name, "activation": activations}
        self.engine.optimizer.clear()
        self._check_finite(row, updated)
        if self.rank_log is not None:
            self.rank_log.append({"step": counters.step, "seconds": seconds})
        return row, save

    @torch.no_grad()
    def _activations(self, batch: Batch) -> dict[str, float]:
        """Root mean square of each block's output on the first rows of a batch."""
        part = BatchTensors.of(batch, self.device).rows(0, self.engine.micro_rows)
        return self.engine.model.activation_scales(part.inputs, **part.reading)

    def _check_finite(self, row: dict[str, Any], updated: Updated) -> None:
        if updated.squares is not None:
            self.counters.updates += 1
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
            eta = (self.batching.tokens(steps) - self.batching.tokens(row["step"])) / rate
            row = {**row, "tokens_per_second": rate}
        self.console.say(step_line(row, steps, eta))

    def _probe_peak(self) -> None:
        """What all ranks together can do at most, probed on all of them at once."""
        if self.world.tell(time.monotonic() - self.peak_probed > PEAK_SECONDS):
            peaks = machine.matmul_peak(self.machine.dtype, seconds=0.3, device=self.device.type)
            self.peaks += self.world.add([min(peaks), max(peaks)]) if self.world.size > 1 else peaks
            self.peak_probed = time.monotonic()

    def _save_due(self, step: int) -> bool:
        settings = self.recipe.checkpoint
        if settings.every_steps:
            return step % settings.every_steps == 0
        return settings.every_minutes > 0 and time.monotonic() - self.saved_at > settings.every_minutes * 60

    def save(self, *, wait: bool = False) -> None:
        """A checkpoint of the present step, unless it has one; on the disk when this returns only with `wait`."""
        step = self.counters.step
        if step in (0, self.saved):
            return self.saver.wait() if wait else None
        if (joules := self.meter.joules) is not None:
            self.counters.energy_joules = self.energy_before + joules
        self.saver.save(self.counters, self.engine.masters(), self.engine.optimizer.state(), wait=wait)
        self.saved, self.saved_at = step, time.monotonic()
        return None

    def _evaluated(self) -> bool:
        """Whether the present step has its held-out loss already."""
        rows = self.run.standing_rows("validation") if self.world.leads else ()
        return self.world.tell(any(row.get("step") == self.counters.step for row in rows))

    def _evaluate(self, tokens: int) -> None:
        start = time.perf_counter()
        step, position = self.counters.step, self.counters.tokens
        rows = self._held_out(tokens, "held-out")
        if len(rows) < len(self.held_out.sources):
            return
        for row in rows:
            self.run.writer("validation").append({"step": step, "tokens": position, **row})
            for sink in self.sinks:
                sink.send(step, {f"held_out/{row['source']}/{key}": row[key] for key in ("loss", "bits_per_byte")})
        write_samples(self.engine, self.prepared.tokenizer, self.run, step)
        self.run.writer("events").append({"kind": "evaluation", "step": step, "seconds": time.perf_counter() - start})
        self._probe_peak()

    def _held_out(self, tokens: int, called: str) -> list[dict[str, Any]]:
        """Held-out loss by source, said on the console."""
        rows = evaluate(self.engine, self.held_out, tokens, self.stop)
        self.stopping = self.stopping or len(rows) < len(self.held_out.sources)
        for row in rows:
            bpb = "n/a" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
            place = f"step {self.counters.step}  {called} {row['source']}"
            self.console.say(f"{place}  loss {row['loss']:.4f}  bits per byte {bpb}")
        return rows

    def _status(self, outcome: Any, steps: int, message: str = "") -> None:
        self.run.set_status(
            state=outcome, step=self.counters.step, tokens=self.counters.tokens, message=message,
            total_steps=steps, total_tokens=self.batching.tokens(steps),
        )  # fmt: skip
