"""The loop: a batch, a step, a line; now and then an evaluation, a checkpoint, a sample.

The device runs one step ahead of what is read from it, and while it computes, the next batch is made. SIGTERM ends the
loop after the step under way, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.roofline.chips import chip_of_device
from jaxllm.tokenizer import Tokenizer
from jaxllm.training.batch import TokenBatch
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.config import TrainConfig
from jaxllm.training.data.batches import Batches, locate
from jaxllm.training.journal import Journal
from jaxllm.training.loss import Parameters
from jaxllm.training.material import Material
from jaxllm.training.sampling import padded, sampler
from jaxllm.training.step import StepReport, TrainState, TrainStep

_EVALUATIONS = 10  # in a run, where nobody says how many


@dataclass(frozen=True, slots=True)
class Saved:
    """A state to be saved, after so many steps."""

    step: int
    state: TrainState


@dataclass
class Trainer:
    """One run. See `run`."""

    config: TrainConfig
    step: TrainStep
    frozen: Parameters
    material: Material
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    journal: Journal
    schedule: optax.Schedule
    steps: int
    on_step: Callable[[int, TrainState], None] | None = None
    _last: dict[str, Any] = field(default_factory=dict)
    _busy: float = 0.0  # seconds of steps, without evaluations and the first of each program
    _tokens: int = 0  # of those steps

    def run(self, state: TrainState, save: Callable[[Saved], None]) -> tuple[TrainState, dict[str, Any]]:
        """From a state to the end, or to SIGTERM.

        Returns:
            The last state and the report: losses, tokens, speeds; `ended` says whether the run is over.
        """
        first = int(state.step)
        report: dict[str, Any] = {}
        if not first:
            report |= self._test("before", state)
            self._evaluate(state, 0)
        with _sigterm() as stopped:
            state, done = self._steps(state, first, save, stopped)
        ended = done == self.steps
        save(Saved(done, state))
        if ended:
            self._evaluate(state, done, whole=True)
            report |= self._test("after", state)
            if self.config.sample_every != 0:
                self._sample(state, done)
        return state, {**self._report(done), **report, "ended": ended}

    def _steps(
        self, state: TrainState, first: int, save: Callable[[Saved], None], stopped: threading.Event
    ) -> tuple[TrainState, int]:
        compiled = self.step.compiled()
        before: tuple[int, StepReport, int] | None = None
        eval_every = self.config.eval_every or max(1, -(-self.steps // _EVALUATIONS))
        save_every = self.config.save_every or eval_every
        batches = self._batches(first)
        clock = time.perf_counter()
        for number in range(first, self.steps):
            batch, total, count = next(batches)
            state, report = compiled(state, batch, jnp.float32(total), self.frozen)
            if before is not None:
                clock = self._say(*before, clock, is_first=before[0] == first + 1)
            before = (number + 1, report, count)
            done = number + 1
            stop = self._agreed(stopped)
            if stop or done == self.steps or not (done % eval_every and done % save_every):
                clock, before = self._say(*before, clock, is_first=done == first + 1), None
                if done < self.steps and not done % eval_every:
                    self._evaluate(state, done)
                if done < self.steps and not done % save_every:
                    save(Saved(done, state))
            if self.config.sample_every and not done % self.config.sample_every and done < self.steps:
                self._sample(state, done)
            if self.on_step is not None:
                self.on_step(done, state)
            if before is None or self.on_step is not None:
                clock = time.perf_counter()
            if stop:
                self.journal.say(f"stopped by SIGTERM after step {done}; go on with --resume")
                return state, done
        return state, self.steps

    def _agreed(self, stopped: threading.Event) -> bool:
        """Several processes stop after the same step."""
        if jax.process_count() == 1:
            return stopped.is_set()
        from jax.experimental.multihost_utils import process_allgather

        return bool(np.any(process_allgather(np.array(stopped.is_set()))))

    def _batches(self, first: int) -> Iterator[tuple[TokenBatch, float, int]]:
        """From step `first` on: micro-batches stacked, the sum of their weights, and the tokens in them."""
        many = self.config.grad_accumulation
        epoch, index = locate(self.material.train, first * many)
        while True:
            some = []
            while len(some) < many:
                if index == self.material.train.num_batches(epoch):
                    epoch, index = epoch + 1, 0
                some.append(self.material.train.batch(epoch, index))
                index += 1
            stacked = jax.tree.map(lambda *parts: np.stack(parts), *some)
            total = float(stacked.weights.sum(dtype=np.float64))
            count = stacked.tokens.size if stacked.documents is None else int((stacked.documents >= 0).sum())
            yield self._placed(stacked, (None, "tokens")), max(total, 1.0), count

    def _placed(self, batch: TokenBatch, dims: tuple[str | None, ...]) -> TokenBatch:
        """On the mesh; of several processes each has its own part."""
        placement = self.step.model.placement
        if placement.mesh.size == 1:
            return batch
        sharding = placement.sharding(*dims)
        return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda i: a[i]), batch)

    def _say(self, number: int, report: StepReport, count: int, clock: float, *, is_first: bool) -> float:
        """Wait for a step and log it."""
        loss = float(report.loss)
        now = time.perf_counter()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {number} is {loss}; lower learning_rate, raise warmup_steps, or look at the data of "
                f"that step ({self._place(number)})"
            )
        seconds = now - clock
        if not is_first:
            self._busy, self._tokens = self._busy + seconds, self._tokens + count
        speed = count / seconds
        entry = {
            "step": number,
            "loss": loss,
            "learning_rate": float(np.asarray(self.schedule(number - 1))),
            "grad_norm": float(report.grad_norm),
            "tokens": count,
            "seconds": seconds,
            "tokens_per_s": speed,
            "mfu": self._mfu(speed),
        }
        if self.material.labels is not None:
            entry["accuracy"] = float(report.correct)
        self._last["train_loss"] = loss
        self.journal.step(entry)
        return now

    def _place(self, number: int) -> str:
        epoch, index = locate(self.material.train, (number - 1) * self.config.grad_accumulation)
        return f"pass {epoch + 1}, batch {index + 1} of {self.config.data}"

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Six operations for each parameter and token (Chowdhery et al. 2022), over what the chips could do."""
        mesh = self.step.model.placement.mesh
        chip = chip_of_device(mesh.devices.flat[0].device_kind)
        if chip is None:
            return None
        return 6 * self.step.model.model.cfg.num_active_parameters * tokens_per_s / (chip.flops * mesh.size)

    def _measure(self, state: TrainState, batches: Batches, most: int | None) -> tuple[float, float]:
        """Mean loss and accuracy; of `most` batches spread over all."""
        evaluate = self._evaluation
        everything = list(batches.held_out())
        if most is not None and len(everything) > most:
            everything = [everything[i] for i in np.linspace(0, len(everything) - 1, most).astype(int)]
        loss = correct = total = 0.0
        for batch in everything:
            sums = evaluate(state.parameters, self._placed(batch, ("tokens",)), self.frozen)
            loss, correct = loss + float(sums.loss), correct + float(sums.correct)
            total += float(batch.weights.sum(dtype=np.float64))
        return loss / total, correct / total

    @property
    def _evaluation(self) -> Callable:
        if "evaluation" not in self.__dict__:
            self.__dict__["evaluation"] = self.step.evaluation()
        return self.__dict__["evaluation"]

    def _evaluate(self, state: TrainState, step: int, *, whole: bool = False) -> None:
        if self.material.valid is None:
            return
        loss, accuracy = self._measure(state, self.material.valid, None if whole else self.config.eval_batches)
        self._last |= {"eval_loss": loss, "eval_accuracy": accuracy}
        if not step:
            self._last["eval_loss_before"] = loss
        self.journal.add({"step": step, "eval_loss": loss, "eval_accuracy": accuracy})
        self.journal.say(f"after {step} steps: held-out loss {loss:.4f}, accuracy {accuracy:.1%}")

    def _test(self, when: str, state: TrainState) -> dict[str, float]:
        if self.material.test is None:
            return {}
        loss, accuracy = self._measure(state, self.material.test, None)
        suffix = "_before" if when == "before" else ""
        return {f"test_loss{suffix}": loss, f"test_accuracy{suffix}": accuracy}

    def _sample(self, state: TrainState, step: int) -> None:
        if self.material.labels is not None:
            return
        if "sampler" not in self.__dict__:
            self.__dict__["sampler"] = sampler(
                self.step.model, self.config.spans if self.step.model.placement.mesh.size > 1 else 1
            )
        prompt = self._prompt()
        tokens, length = padded(prompt, self.material.span, self.config.sample_tokens)
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        drawn = self.__dict__["sampler"](
            {**self.frozen, **state.parameters}, tokens, length, self.config.sample_tokens, key
        )
        ids = np.asarray(drawn)[: length + self.config.sample_tokens].tolist()
        ends = [i for i in range(length, len(ids)) if ids[i] in self.tokenizer.eos_token_ids]
        text = self.tokenizer.decode(ids[: ends[0] if ends else None])
        self.journal.add({"step": step, "sample": text})
        self.journal.say(f"sample after {step} steps:\n{text}")

    def _prompt(self) -> list[int]:
        if self.config.task == "sft" and self.config.sample_prompt == "\n" and self.material.prompt is not None:
            return self.material.prompt.tolist()
        if self.config.task == "sft":
            message = [{"role": "user", "content": self.config.sample_prompt}]
            return self.tokenizer.chat_prompt(message, add_generation_prompt=True)["prompt_token_ids"]
        return self.tokenizer.encode(self.config.sample_prompt) or list(self.tokenizer.eos_token_ids[:1])

    def _report(self, done: int) -> dict[str, Any]:
        speed = self._tokens / self._busy if self._busy else None
        names = ("train_loss", "eval_loss", "eval_accuracy", "eval_loss_before")
        return {
            "steps": done,
            "tokens": sum(entry.get("tokens", 0) for entry in self.journal.entries),
            **{name: self._last.get(name) for name in names},
            "tokens_per_s": speed,
            "mfu": self._mfu(speed) if speed else None,
        }


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread nothing does."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
