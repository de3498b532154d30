"""Prometheus metrics under the names dashboards know, and the figures of the built-in page."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxllm.entrypoints.async_llm import AsyncLLM
from jaxllm.telemetry.figures import Figure, figures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_E2E = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_LENGTHS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
_WINDOW = 512  # samples behind the percentiles of the page


class Families:
    """The metrics of a server, with a label for each of its models."""

    def __init__(self, namespace: str = "jaxllm"):
        self.registry = CollectorRegistry()
        self.name = f"{namespace}:{{}}".format
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted.")
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self.itl = self._histogram("inter_token_latency_seconds", "Time between tokens of a request.", _ITL)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _E2E)
        self.prompt_lengths = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _LENGTHS)
        text = "Tokens generated for a completion."
        self.output_lengths = self._histogram("request_generation_tokens", text, _LENGTHS)
        self.success = self._counter("request_success", "Requests by how they ended.", "finished_reason")
        self._models: dict[str, Metrics] = {}
        self._collector = _EngineFigures(self.name)
        self.registry.register(self._collector)

    def _counter(self, what: str, text: str, *labels: str) -> Counter:
        return Counter(self.name(what), text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, what: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(self.name(what), text, ["model_name"], buckets=buckets, registry=self.registry)

    def of(self, llm: AsyncLLM, model_name: str) -> Metrics:
        """The metrics of one model: counters go on where a model that comes again left off."""
        self._collector.llms[model_name] = llm
        if model_name not in self._models:
            self._models[model_name] = Metrics(self, model_name)
        return self._models[model_name]

    def add(self, more: Callable[[], Iterable[Labelled]]) -> None:
        """Figures that are read whenever somebody asks."""
        self._collector.more.append(more)

    def read(self, model_name: str) -> Iterable[Figure]:
        """The figures of one model's engine."""
        return self._collector.read(self._collector.llms[model_name])

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class Metrics:
    """Counters and histograms of one model, fed by requests; gauges are read from its engine when asked."""

    def __init__(self, families: Families, model_name: str):
        self.families = families
        self.prompt_tokens = families.prompt_tokens.labels(model_name)
        self._ttft, self._itl = families.ttft.labels(model_name), families.itl.labels(model_name)
        self._e2e = families.e2e.labels(model_name)
        self._prompt_lengths = families.prompt_lengths.labels(model_name)
        self._output_lengths = families.output_lengths.labels(model_name)
        self._success = families.success
        for reason in ("stop", "length", "abort"):
            self._success.labels(model_name, reason)
        self._model_name = model_name
        self._recent: dict[str, deque[float]] = {what: deque(maxlen=_WINDOW) for what in ("ttft", "itl")}

    def asked(self, num_tokens: int) -> None:
        """A prompt came."""
        self.prompt_tokens.inc(num_tokens)
        self._prompt_lengths.observe(num_tokens)

    def answered(self, num_tokens: int) -> None:
        """A completion ended with so many tokens."""
        self._output_lengths.observe(num_tokens)

    def first_token(self, seconds: float) -> None:
        """A completion's first token came."""
        self._ttft.observe(seconds)
        self._recent["ttft"].append(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        """`count` tokens came, `seconds` apart."""
        for _ in range(count):
            self._itl.observe(seconds)
        self._recent["itl"].append(seconds)

    def latency(self, seconds: float) -> None:
        """A completion ended."""
        self._e2e.observe(seconds)

    def finished(self, reason: str, count: int = 1) -> None:
        """Completions ended for `reason`."""
        self._success.labels(self._model_name, reason).inc(count)

    def snapshot(self) -> dict[str, Any]:
        """What the page draws; rates are the reader's business, from two totals."""
        known = self.families.read(self._model_name)
        figures: dict[str, Any] = {figure.name + figure.labelled: figure.value for figure in known}
        figures["generation_tokens_total"] = figures["generation_tokens"]
        figures["prompt_tokens_total"] = _value(self.prompt_tokens)
        for what, samples in self._recent.items():
            ordered = sorted(samples)
            figures[f"{what}_p50"] = statistics.median(ordered) if ordered else None
            figures[f"{what}_p99"] = ordered[int(0.99 * (len(ordered) - 1))] if ordered else None
        return figures | {"time": time.time()}


def _value(counter: Counter) -> float:
    return next(sample.value for sample in next(iter(counter.collect())).samples if sample.name.endswith("_total"))


Labelled = tuple[str, Figure]  # a model's name, or "" where none is meant


class _EngineFigures:
    """A Prometheus collector that looks at the engines. Plain integers: reading them needs no lock."""

    def __init__(self, name: Callable[[str], str]):
        self.llms: dict[str, AsyncLLM] = {}
        self.more: list[Callable[[], Iterable[Labelled]]] = []
        self._name = name

    def read(self, llm: AsyncLLM) -> Iterable[Figure]:
        """An engine's figures, with what its thread adds: whom it has not looked at yet also waits."""
        thread = llm.thread
        for figure in figures(llm.engine):
            waits = figure.name == "num_requests_waiting"
            yield figure._replace(value=thread.num_queued) if waits else figure
        if llm.admission is not None:
            yield from llm.admission.figures()
        yield Figure("engine_failures", "counter", "Iterations that raised.", thread.num_failures)

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client: each figure once, with every model's value."""
        found: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        engines = [(name, figure) for name, llm in list(self.llms.items()) for figure in self.read(llm)]
        for model, (what, kind, text, value, labels) in [*engines, *(pair for more in self.more for pair in more())]:
            family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
            named = [*([("model_name", model)] if model else []), *labels]
            if what not in found:
                found[what] = family(self._name(what), text, labels=[label for label, _ in named])
            found[what].add_metric([one for _, one in named], value)
        yield from found.values()
