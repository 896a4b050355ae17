"""Predicted seconds of a step: what a rank computes and exchanges, and how pipeline stages overlap.

Note [A step]
    c   computing of one micro-batch on a rank, forward and backward
    x   its collectives
    M   micro-batches, pp stages

    critical path   (M + pp - 1) (c share(busy in one stage) + x)         the slowest stage sets the pace
    work            M (c share(all ranks) + x with all ranks busy)        differs only where ranks share cores
    step            the longer of the two, + gradient reduction, optimizer, once

    In decode M = 1, launches count (decode_launches.py), and a token passes the stages one after another.
    Nothing is assumed to overlap with computing: Megatron's overlap flags can only make it faster. A step's
    parts are sums of the lines that explain them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from helix_megatron.plan import compute, decode_launches, traffic
from helix_megatron.plan.hardware import Cluster, overhead_key
from helix_megatron.plan.layout import Problem
from helix_megatron.plan.terms import Term
from helix_megatron.plan.traffic import STEP, Collective

SHARE = "ranks sharing a device"
PARTS = ("compute", "exchange", "experts", "all-reduce", "pipeline", "gradients", "optimizer")


@dataclass(frozen=True)
class Line:
    """One line of the explanation: seconds of the whole step, and the formula that gives them."""

    part: str
    name: str
    seconds: float
    formula: str

    def times(self, factors: Mapping[str, float]) -> Line:
        """As often: name of a factor to its number, put before the formula; factors of 1 are not shown."""
        shown = "".join(
            f"{n:,.0f} {name} x " if n == round(n) else f"{n:.6g} {name} x "
            for name, n in factors.items()
            if n != 1
        )
        return replace(self, seconds=self.seconds * prod(factors.values()), formula=shown + self.formula)


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step."""

    lines: tuple[Line, ...]
    """Of the slowest stage."""
    stage: int

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        sums = dict.fromkeys(PARTS, 0.0)
        for line in self.lines:
            sums[line.part] += line.seconds
        return sums

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def predict(problem: Problem, cluster: Cluster) -> Prediction:
    """Seconds of a step of `problem` on `cluster`."""
    stages = [_Stage(problem, cluster, stage) for stage in sorted({0, problem.layout.pp - 1})]
    return max(stages, key=lambda stage: stage.pace).prediction()


class _Stage:
    """Costs of one pipeline stage."""

    def __init__(self, problem: Problem, cluster: Cluster, stage: int):
        self.problem, self.cluster, self.stage = problem, cluster, stage
        self.train = problem.workload.kind == "train"
        self.computing = self._computing()
        self.collectives = traffic.collectives(problem, stage)
        self.one = self._micro_batch(problem.layout.tp * problem.layout.dp)
        self.pace = _seconds(self.one)

    def _computing(self) -> list[Line]:
        """One micro-batch on a device of its own."""
        problem, layout, work = self.problem, self.problem.layout, self.problem.workload
        lines = []
        if decode_launches.has_launches(problem) and (added := decode_launches.added_kernels(problem)):
            each = decode_launches.KERNEL
            formula = f"({added} small kernels x {each * 1e6:.6g} us)"
            line = Line("compute", "kernels of the exchange", added * each, formula)
            lines.append(line.times({"layers": problem.attention_layers}))
        for operation in compute.operations(problem, self.stage):
            rate = self.cluster.rate(operation.kind, work.dtype)
            passes = 1 + operation.backward + layout.recompute if self.train else 1.0
            flops, moved = operation.flops, operation.bytes
            launches = "" if operation.launches == 1 else f"{operation.launches:.6g} launches x "
            busy = "" if operation.busy == 1 else f" x {operation.busy:.6g} busy"
            formula = (
                f"({launches}{rate.launch * 1e6:.6g} us + max of "
                f"{flops} = {flops.value:.6g} FLOP at {rate.flops:.6g}/s{busy}, "
                f"{moved} = {moved.value:.6g} B at {rate.bandwidth:.6g} B/s)"
            )
            line = Line("compute", operation.name, operation.seconds(rate), formula)
            lines.append(line.times({"calls": operation.calls, "passes": passes}))
        accumulated = compute.accumulation_bytes(problem, self.stage)
        if self.train and accumulated.value:
            lines.append(self._moved("compute", accumulated, compute.PASS))
        key = overhead_key(work.kind, layout.sliced, layout.comm_type, layout.placement, layout.kv_cache)
        overhead = self.cluster.layer_overhead
        per_layer = overhead.get(key, overhead.get(f"{work.kind} megatron", 0.0))
        if self.train and layout.recompute:
            per_layer *= 4 / 3
        if per_layer:
            line = Line("compute", "software of a layer", per_layer, f"({per_layer * 1e6:.6g} us); {key}")
            lines.append(line.times({"layers": problem.layers}))
        return lines

    def _moved(self, part: str, term: Term, kind: str) -> Line:
        """A pass over memory, on a device of its own."""
        rate = self.cluster.rate(kind, self.problem.workload.dtype)
        formula = f"({term} = {term.value:.6g} B at {rate.bandwidth:.6g} B/s)"
        return Line(part, term.name, term.value / rate.bandwidth, formula)

    def _call(self, item: Collective, busy: int) -> Line:
        """One call of a collective."""
        tp, dp, last = self.problem.layout.tp, self.problem.layout.dp, self.problem.layout.pp - 1
        ep, etp = self.problem.layout.ep, self.problem.layout.etp
        strides = {"dp": tp, "pp": tp * dp, "embd": tp * dp * last, "ep": etp, "edp": etp * ep}
        stride = strides.get(item.group, 1)
        message = item.group == "pp" and not self.cluster.lines  # it passes between two ranks
        size = 2 if message else item.size
        algorithm = self.cluster.algorithm(item.kind, size, stride, item.bytes, busy)
        part = "gradients" if item.phase == STEP and item.part != "optimizer" else item.part
        how = algorithm.formula(item.bytes)
        formula = f"({how}); {item.kind} over {item.size} ({item.group}) of {item.term}"
        return Line(part, item.name, algorithm.seconds(item.bytes), formula)

    def _micro_batch(self, busy: int) -> list[Line]:
        """One micro-batch while `busy` ranks are at work."""
        share = {SHARE: self.cluster.slowdown(busy)}
        lines = [line.times(share) for line in self.computing] + [
            self._call(item, busy).times({"calls": item.calls / self.problem.micro_batches})
            for item in self.collectives
            if item.phase != STEP
        ]
        return [*lines, *self._host(_seconds(lines))]

    def _host(self, device: float) -> list[Line]:
        """How much longer the host takes for an eager decode step than the device."""
        if not decode_launches.has_launches(self.problem) or decode_launches.is_replayed(self.problem):
            return []
        launches = decode_launches.all_launches(self.problem)
        waited = launches * decode_launches.HOST - device
        if waited <= 0:
            return []
        each = decode_launches.HOST * 1e6
        formula = f"({waited * 1e6:.6g} us); {launches} launches of {each:g} us, but for the lines above"
        return [Line("compute", "waiting for the host", waited, formula)]

    def prediction(self) -> Prediction:
        layout, batches = self.problem.layout, self.problem.micro_batches
        one, fill = self.one, layout.pp - 1
        crowded = self._micro_batch(layout.world)
        if (batches + fill) * self.pace < batches * _seconds(crowded):
            one, fill = crowded, 0
        lines = [line.times({"micro-batches": batches}) for line in one]
        if fill:
            but = " but for their first factor" if batches > 1 else ""
            formula = f"({self.pace * 1e6:.6g} us); one micro-batch: the lines above{but}"
            fills = Line("pipeline", "filling and draining", self.pace, formula)
            lines.append(fills.times({"other stages": fill}))
        return Prediction((*lines, *self._step_end()), self.stage)

    def _step_end(self) -> list[Line]:
        """Once in a step, with all ranks at work."""
        world = self.problem.layout.world
        share = {SHARE: self.cluster.slowdown(world)}
        software = self.cluster.step_overhead.get(self.problem.workload.kind, 0.0)
        lines = []
        if software:
            part = "optimizer" if self.train else "compute"
            line = Line(part, "software of a step", software, f"({software * 1e6:.6g} us)")
            lines.append(line.times(share))
        if self.train:
            once = [item for item in self.collectives if item.phase == STEP]
            lines += [self._call(item, world).times({"calls": item.calls}) for item in once]
            passes, update = compute.optimizer_bytes(self.problem, self.stage)
            for term, kind in ((passes, compute.PASS), (update, compute.UPDATE)):
                lines.append(self._moved("optimizer", term, kind).times(share))
        return lines


def _seconds(lines: list[Line]) -> float:
    return sum(line.seconds for line in lines)
