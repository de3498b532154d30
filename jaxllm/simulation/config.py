"""What is simulated: the workload, the hardware, and what counts as good. Plain fields; each is a flag.

Knows nothing of engines.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from jaxllm.config.fields import check_types
from jaxllm.config.slo import parse_slo


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What comes, on what it runs, and what is asked of it.

    Attributes:
        chip (NAME): a name from the table of chips, or a profile that `jaxllm bench calibrate` wrote (a .json file).
        replicas (N): engines side by side, each on a mesh of its own; of a pool of models the instances.
        models: a pool of models on these instances: NAME=PATH pairs, or one .toml file as `jaxllm serve` takes it;
            requests ask for one of them at random.
        host_link (LINK): between host memory and each device, for a pool's weights and for KV pages that were moved
            there (host_kv_bytes): pcie4, pcie5 or GB/s.
        disk_gb_per_s (X): of the disk that KV pages go to after host memory (disk_kv_bytes).
        acceptance_rate (SHARE): the chance of each drafted token to be right, with speculative_config.
        prefill_mesh (AXES): with decode_mesh: engines that only prefill, and hand over to others that decode.
        decode_mesh (AXES): see prefill_mesh.
        prefill_replicas (N): engines that prefill.
        decode_replicas (N): engines that decode.
        transfer (LINK): what carries pages from prefill to decode: nvlink, ici, pcie4, pcie5, hdr, ndr, dcn or GB/s.
        trace (FILE): lengths, and times unless request_rate is set, from a .csv or .jsonl.
        request_rate (R): requests per second, or inf; default: the trace's own times, else inf.
        arrivals: how gaps between requests are drawn at a request_rate.
        burstiness (X): shape of gamma arrivals; 1 is poisson, below it burstier.
        burst_size (N): requests of one burst.
        num_prompts (N): requests; default: all of the trace, else 1000; of each run of a sweep or search at least so
            many, and as arrive in 30 s and in ten times the limit of ttft: fewer would not show whether a rate holds.
        input_len (TOKENS): of a prompt, without a trace.
        output_len (TOKENS): of an answer, without a trace.
        length_spread (X): log-normal spread of both lengths; 0: all alike.
        time_scale (X): stretches the trace's own times.
        scale_lengths: shrink the trace's lengths by one factor so that the longest just fits.
        skip_longer: leave out what of the trace does not fit; otherwise it is refused.
        stream: every token is sent as it comes, so that the engine looks up between any two.
        slo (LIMITS): for example ttft:2s,tpot:50ms, of ttft, tpot, itl (a request's longest gap) and e2e.
        attainment (SHARE): of requests that must meet the SLO, for --sweep and --search.
        policy: chunked is the engine's own; the others came before it and are here to be compared with.
        price (X): of one device for an hour, in any currency.
        compute_efficiency (SHARE): of the chip's peak FLOP/s that products reach.
        memory_efficiency (SHARE): of the chip's bandwidth that is reached.
        collective_us (X): latency of one collective, in microseconds.
        host_ms (X): host time of one iteration, hidden where the device takes longer.
        sweep (RANGE): request-rate=A..B finds the highest rate at which the SLO holds; request-rate=A,B,C tries these.
        search: rank meshes, replicas and splits into prefill and decode for num_devices.
        num_devices (N): of a search.
    """

    chip: str = "h100"
    replicas: int = 1
    models: tuple[str, ...] = ()
    host_link: str = "pcie5"
    disk_gb_per_s: float = 3.0
    acceptance_rate: float | None = None
    prefill_mesh: str | None = None
    decode_mesh: str | None = None
    prefill_replicas: int = 1
    decode_replicas: int = 1
    transfer: str = "ndr"
    trace: str | None = None
    request_rate: float | None = None
    arrivals: Literal["poisson", "gamma", "uniform", "bursts"] = "poisson"
    burstiness: float = 1.0
    burst_size: int = 8
    num_prompts: int | None = None
    input_len: int = 1024
    output_len: int = 128
    length_spread: float = 0.0
    time_scale: float = 1.0
    scale_lengths: bool = False
    skip_longer: bool = False
    stream: bool = True
    slo: str | None = None
    attainment: float = 0.9
    policy: Literal["chunked", "static", "prefill-first", "unchunked", "contiguous"] = "chunked"
    price: float | None = None
    compute_efficiency: float = 0.76
    memory_efficiency: float = 0.78
    collective_us: float = 10.0
    host_ms: float = 1.0
    sweep: str | None = None
    search: bool = False
    num_devices: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        counts = "replicas prefill_replicas decode_replicas burst_size num_prompts input_len output_len num_devices"
        for name in counts.split():
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")
        for name in ("request_rate", "burstiness", "time_scale", "disk_gb_per_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value}; it must be above 0")
        for name in ("attainment", "compute_efficiency", "memory_efficiency", "acceptance_rate"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value}; it must be above 0 and at most 1")
        for name in ("length_spread", "price", "collective_us", "host_ms"):
            if (value := getattr(self, name)) is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}; it must be a number of at least 0")
        if (self.prefill_mesh is None) != (self.decode_mesh is None):
            raise ValueError("prefill_mesh and decode_mesh belong together; set both or neither")
        if self.models and (self.prefill_mesh is not None or self.search or self.policy != "chunked"):
            raise ValueError("a pool of models has neither prefill_mesh, search nor policy; leave them or models out")
        if self.search and self.num_devices is None:
            raise ValueError("a search needs the number of devices; set num_devices")
        self._check_workload()
        parse_slo(self.slo)

    def _check_workload(self) -> None:
        if self.trace is None and (self.scale_lengths or self.skip_longer or self.time_scale != 1.0):
            raise ValueError("scale_lengths, skip_longer and time_scale are for a trace; set trace or leave them out")
        if self.trace is not None and self.length_spread:
            raise ValueError("length_spread is for lengths without a trace; leave one of them out")
        if self.request_rate is None and self.trace is None and self.arrivals != "poisson" and not self.sweep:
            raise ValueError(f"arrivals={self.arrivals!r} needs a rate; set request_rate")

    def with_rate(self, rate: float) -> SimulationConfig:
        """The same at another rate of requests."""
        return dataclasses.replace(self, request_rate=rate, sweep=None)

    @property
    def limits(self) -> dict[str, float]:
        """The SLO in seconds, by metric."""
        return parse_slo(self.slo)


def parse_sweep(text: str) -> tuple[list[float], bool]:
    """Rates of `request-rate=1..20` (ends of a range: True) or `request-rate=1,2,4` (these alone: False)."""
    name, _, values = text.partition("=")
    is_range = ".." in values
    try:
        rates = [float(part) for part in (values.split("..") if is_range else values.split(","))]
    except ValueError:
        rates = []
    ok = rates and all(0 < rate < math.inf for rate in rates) and rates == sorted(set(rates))
    if name.strip().replace("_", "-") != "request-rate" or not ok or (is_range and len(rates) != 2):
        raise ValueError(f"sweep {text!r} is not understood; write request-rate=1..20 or request-rate=1,2,4, ascending")
    return rates, is_range
