"""Prometheus metrics under the names dashboards know, and the figures of the built-in page."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable
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


class Metrics:
    """Counters and histograms fed by requests, gauges read from the engine when asked."""

    def __init__(self, llm: AsyncLLM, model_name: str, namespace: str = "jaxllm"):
        self.registry = CollectorRegistry()
        name = f"{namespace}:{{}}".format

        def counter(what: str, text: str) -> Counter:
            return Counter(name(what), text, ["model_name"], registry=self.registry).labels(model_name)

        def histogram(what: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name(what), text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens accepted.")
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self._itl = histogram("inter_token_latency_seconds", "Time between tokens of a request.", _ITL)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _E2E)
        self._prompt_lengths = histogram("request_prompt_tokens", "Prompt tokens of a request.", _LENGTHS)
        self._output_lengths = histogram("request_generation_tokens", "Tokens generated for a completion.", _LENGTHS)
        labels = ["model_name", "finished_reason"]
        self._success = Counter(name("request_success"), "Requests by how they ended.", labels, registry=self.registry)
        for reason in ("stop", "length", "abort"):
            self._success.labels(model_name, reason)
        self._model_name = model_name
        self._recent: dict[str, deque[float]] = {what: deque(maxlen=_WINDOW) for what in ("ttft", "itl")}
        self._engine_figures = _EngineFigures(llm, name, model_name)
        self.registry.register(self._engine_figures)

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

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def snapshot(self) -> dict[str, Any]:
        """What the page draws; rates are the reader's business, from two totals."""
        figures: dict[str, Any] = {
            figure.name + figure.labelled: figure.value for figure in self._engine_figures.read()
        }
        figures["generation_tokens_total"] = figures["generation_tokens"]
        figures["prompt_tokens_total"] = _value(self.prompt_tokens)
        for what, samples in self._recent.items():
            ordered = sorted(samples)
            figures[f"{what}_p50"] = statistics.median(ordered) if ordered else None
            figures[f"{what}_p99"] = ordered[int(0.99 * (len(ordered) - 1))] if ordered else None
        return figures | {"time": time.time()}


def _value(counter: Counter) -> float:
    return next(sample.value for sample in next(iter(counter.collect())).samples if sample.name.endswith("_total"))


class _EngineFigures:
    """A Prometheus collector that looks at the engine. Plain integers: reading them needs no lock."""

    def __init__(self, llm: AsyncLLM, name: Any, model_name: str):
        self._llm, self._name, self._model_name = llm, name, model_name

    def read(self) -> Iterable[Figure]:
        """The engine's figures, with what its thread adds: whom it has not looked at yet also waits."""
        thread = self._llm.thread
        for figure in figures(self._llm.engine):
            waits = figure.name == "num_requests_waiting"
            yield figure._replace(value=thread.num_queued) if waits else figure
        if self._llm.admission is not None:
            yield from self._llm.admission.figures()
        yield Figure("engine_failures", "counter", "Iterations that raised.", thread.num_failures)

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for what, kind, text, value, labels in self.read():
            family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
            if what not in families:
                names = [label for label, _ in labels]
                families[what] = family(self._name(what), text, labels=["model_name", *names])
            families[what].add_metric([self._model_name, *(value for _, value in labels)], value)
        yield from families.values()
