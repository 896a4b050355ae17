"""Predicted seconds of a step: what a rank computes and exchanges, and how pipeline stages overlap.

Note [A step]
    c   computing of one micro-batch on a rank, forward and backward
    x   its collectives
    M   micro-batches, pp stages

    critical path   (M + pp - 1) (c share(busy in one stage) + x)         the slowest stage sets the pace
    work            M (c share(all ranks) + x with all ranks busy)        differs only where ranks share cores
    step            the longer of the two, + gradient reduction, optimizer, once

    In decode M = 1: a token passes the stages one after another. Nothing is assumed to overlap with
    computing: Megatron's overlap flags can only make it faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.plan import compute, traffic
from helix_megatron.plan.hardware import Cluster, overhead_key
from helix_megatron.plan.layout import Problem
from helix_megatron.plan.terms import Term
from helix_megatron.plan.traffic import STEP, Collective

PARTS = ("compute", "exchange", "all-reduce", "pipeline", "gradients", "optimizer")


@dataclass(frozen=True)
class Line:
    """One line of the explanation: seconds in a step, and what they are."""

    part: str
    name: str
    seconds: float
    formula: str


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step, by part."""

    parts: dict[str, float]
    lines: tuple[Line, ...]
    """Of the slowest stage, for one micro-batch unless the part is of the whole step."""
    stage: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def predict(problem: Problem, cluster: Cluster) -> Prediction:
    """Seconds of a step of `problem` on `cluster`."""
    last = problem.layout.pp - 1
    stages = {stage: _Stage(problem, cluster, stage) for stage in {0, last}}
    slowest = max(stages, key=lambda stage: stages[stage].pace)
    return stages[slowest].prediction()


class _Stage:
    """Costs of one pipeline stage."""

    def __init__(self, problem: Problem, cluster: Cluster, stage: int):
        self.problem, self.cluster, self.stage = problem, cluster, stage
        layout = problem.layout
        self.busy = layout.tp * layout.dp
        self.train = problem.workload.kind == "train"
        self.computing = self._computing()
        found = traffic.collectives(problem, stage)
        self.collectives = [item for item in found if item.phase != STEP]
        self.once = [item for item in found if item.phase == STEP]
        self.pace = sum(line.seconds for line in self.computing) * cluster.share(self.busy)
        self.pace += sum(self._exchange(self.busy).values())

    def _computing(self) -> list[Line]:
        """One micro-batch on a device of its own."""
        problem, work = self.problem, self.problem.workload
        lines = []
        for operation in compute.operations(problem, self.stage):
            rate = self.cluster.rate(operation.kind, work.dtype)
            passes = 1.0
            if self.train:
                passes += operation.backward + (1 if problem.layout.recompute else 0)
            one = rate.seconds(operation.flops.value, operation.bytes.value)
            formula = (
                f"{operation.calls} calls x {passes:g} passes x ({rate.launch * 1e6:.3g} us + max of "
                f"{operation.flops} = {operation.flops.value:.3g} FLOP at {rate.flops:.3g}/s, "
                f"{operation.bytes} = {operation.bytes.value:.3g} B at {rate.bandwidth:.3g} B/s)"
            )
            lines.append(Line("compute", operation.name, operation.calls * passes * one, formula))
        if self.train:
            accumulated = compute.accumulation_bytes(problem, self.stage)
            if accumulated.value:
                lines.append(self._moved("compute", accumulated, compute.PASS))
        layout = problem.layout
        key = overhead_key(work.kind, layout.sliced, layout.comm_type, layout.placement, layout.kv_cache)
        overhead = self.cluster.layer_overhead
        per_layer = overhead.get(key, overhead.get(f"{work.kind} megatron", 0.0))
        if self.train and layout.recompute:
            per_layer *= 4 / 3
        if per_layer:
            formula = f"{problem.layers} layers x {per_layer * 1e6:.4g} us ({key})"
            lines.append(Line("compute", "software of a layer", problem.layers * per_layer, formula))
        return lines

    def _moved(self, part: str, term: Term, kind: str) -> Line:
        """A pass over memory, on a device of its own."""
        rate = self.cluster.rate(kind, self.problem.workload.dtype)
        formula = f"{term} = {term.value:.3g} B at {rate.bandwidth:.3g} B/s"
        return Line(part, term.name, term.value / rate.bandwidth, formula)

    def _seconds(self, item: Collective, busy: int) -> float:
        layout = self.problem.layout
        stride = {"dp": layout.tp, "pp": layout.tp * layout.dp, "embd": layout.tp * layout.dp}.get(
            item.group, 1
        )
        if item.group == "embd":
            stride *= layout.pp - 1
        size = 2 if item.group == "pp" else item.size  # a message passes between two ranks
        if item.group == "pp" and self.cluster.lines:
            size = item.size
        return self.cluster.collective(item.kind, size, stride, item.bytes, busy)

    def _exchange(self, busy: int) -> dict[str, float]:
        """Seconds of the collectives of one micro-batch, by part."""
        sums = dict.fromkeys(("exchange", "all-reduce", "pipeline"), 0.0)
        for item in self.collectives:
            sums[item.what] += item.calls / self.problem.micro_batches * self._seconds(item, busy)
        return sums

    def prediction(self) -> Prediction:
        problem, cluster = self.problem, self.cluster
        layout, batches = problem.layout, problem.micro_batches
        alone = sum(line.seconds for line in self.computing)
        critical, work = self._exchange(self.busy), self._exchange(layout.world)
        path = (batches + layout.pp - 1) * (alone * cluster.share(self.busy) + sum(critical.values()))
        crowded = batches * (alone * cluster.share(layout.world) + sum(work.values()))
        if path >= crowded:
            compute_time, exchange = alone * cluster.share(self.busy), critical
        else:
            compute_time, exchange = alone * cluster.share(layout.world), work
        parts = dict.fromkeys(PARTS, 0.0)
        parts["compute"] = batches * compute_time
        for what, seconds in exchange.items():
            parts[what] = batches * seconds
        if path >= crowded:
            parts["pipeline"] += (layout.pp - 1) * (compute_time + sum(exchange.values()))
        once = cluster.step_overhead.get(problem.workload.kind, 0.0) * cluster.share(layout.world)
        parts["optimizer" if self.train else "compute"] += once
        lines = [*self.computing, *self._collective_lines()]
        if self.train:
            for item in self.once:
                seconds = item.calls * self._seconds(item, layout.world)
                parts["gradients" if item.what != "optimizer" else "optimizer"] += seconds
            passes, update = compute.optimizer_bytes(problem, self.stage)
            for term, kind in ((passes, compute.PASS), (update, compute.UPDATE)):
                lines.append(self._moved("optimizer", term, kind))
                parts["optimizer"] += lines[-1].seconds * cluster.share(layout.world)
        return Prediction(parts, tuple(lines), self.stage)

    def _collective_lines(self) -> list[Line]:
        lines = []
        for item in (*self.collectives, *self.once):
            share = 1 if item.phase == STEP else self.problem.micro_batches
            one = self._seconds(item, self.busy)
            formula = (
                f"{item.calls // share} x {item.kind} over {item.size} ({item.group}), each "
                f"{item.term} = {item.bytes:.4g} B in {one * 1e6:.4g} us"
            )
            part = "gradients" if item.phase == STEP and item.what != "optimizer" else item.what
            lines.append(Line(part, item.name, item.calls / share * one, formula))
        return lines
