"""The engine's programs, compiled for a TPU slice, and what the compiler says of each.

A deployment and a number of pages -> `CompiledProgram`s. Run as a module it is the other end of `compiling_elsewhere`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig
from jaxllm.deployment.deployment import Deployment, open_deployment
from jaxllm.deployment.program_text import CompiledProgram, Found, find_collectives
from jaxllm.deployment.topology import no_program_cache, parse_overflow

if TYPE_CHECKING:
    from jaxllm.runner.programs import Key
    from jaxllm.runner.shapes import RunnerShapes
    from jaxllm.weights.abstract import AbstractModel

_LAYERS_WORTH_A_PROCESS = 16  # below, starting one takes longer than compiling


class Overflow(Exception):
    """A program that the compiler could not fit into the device."""


@contextlib.contextmanager
def compiling_elsewhere(deployment: Deployment, num_pages: int, key: Key) -> Iterator[Callable[[], CompiledProgram]]:
    """Compile one program in another process; call what is given to wait for it. The process ends with the block."""
    task = {"config": dataclasses.asdict(deployment.config), "topology": deployment.topology.name}
    command = [sys.executable, "-m", "jaxllm.deployment.compiled"]
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(task | {"num_pages": num_pages, "key": key}).encode())
        process.stdin.close()

        def result() -> CompiledProgram:
            code = process.wait()
            out.seek(0)
            answer = json.loads(out.read() or "{}")
            if "overflow" in answer:
                raise Overflow(answer["overflow"])
            if code or not answer:
                raise ValueError(f"the process that compiled {key[0]} ended with code {code}; its message is above")
            return CompiledProgram(**answer | {"collectives": [Found(**found) for found in answer["collectives"]]})

        try:
            yield result
        finally:
            process.kill()


def _compile_for_parent() -> None:
    """The other end of `compiling_elsewhere`: a task on standard input, a `CompiledProgram` as JSON on the output."""
    task = json.load(sys.stdin)
    deployment = open_deployment(EngineConfig(**task["config"]), task["topology"])
    shapes = dataclasses.replace(deployment.shapes, num_pages=task["num_pages"])
    name, bucket = task["key"]
    try:
        answer = dataclasses.asdict(compile_program(deployment.model, shapes, (name, bucket)))
    except Overflow as overflow:
        answer = {"overflow": str(overflow)}
    print(json.dumps(answer))


def compile_programs(deployment: Deployment, num_pages: int) -> dict[str, CompiledProgram]:
    """The largest prefill, decode and sampling programs of the engine.

    libtpu does not survive two compilations at a time in one process: of a large model, prefill is compiled in
    another one meanwhile.
    """
    shapes = dataclasses.replace(deployment.shapes, num_pages=num_pages)
    loop = "decode_greedy" if shapes.max_decode_steps else "ragged"
    if shapes.speculates(shapes.row_buckets[-1]):
        loop = "speculate_greedy"
    keys = {
        "prefill": _largest("ragged", shapes),
        "decode": _largest(loop, shapes),
        "sampler": _largest("sample", shapes),
    }
    if loop == "ragged":
        keys["decode"] = ("ragged", shapes.token_buckets[0])
    if deployment.model.cfg.num_layers < _LAYERS_WORTH_A_PROCESS:
        return {name: compile_program(deployment.model, shapes, key) for name, key in keys.items()}
    with compiling_elsewhere(deployment, num_pages, keys.pop("prefill")) as prefill:
        programs = {name: compile_program(deployment.model, shapes, key) for name, key in keys.items()}
        return {"prefill": prefill(), **programs}


def _largest(name: str, shapes: RunnerShapes) -> Key:
    from jaxllm.runner.programs import PROGRAMS

    return name, max(PROGRAMS[name].buckets(shapes))


def compile_program(model: AbstractModel, shapes: RunnerShapes, key: Key) -> CompiledProgram:
    """Compile one program of the engine and ask the compiler about it.

    Raises:
        Overflow: it needs more memory than there is.
        ValueError: its page table is more than a kernel can look into.
    """
    import jax

    from jaxllm.runner.programs import lower
    from jaxllm.runner.shapes import make_memory

    try:
        with no_program_cache():
            compiled = lower(model, shapes, key).compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory space smem" in str(error):
            raise ValueError(_too_many_pages(shapes)) from None
        if (found := parse_overflow(str(error))) is None:
            raise
        raise Overflow(f"the {key[0]} program, which needs {found[0] / 1e9:.2f} of {found[1] / 1e9:.2f} GB") from None
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None and text is not None, "every compiler of a device says both"
    return CompiledProgram(
        temporaries=stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
        arguments=stats.argument_size_in_bytes,
        donated=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        collectives=find_collectives(text),
        page_layouts=_count_layouts(text, jax.tree.leaves(make_memory(model, shapes).abstract())[0]),
    )


def _too_many_pages(shapes: RunnerShapes) -> str:
    rows, pages, longest = shapes.max_num_seqs, shapes.pages_per_row, shapes.max_model_len
    return (
        f"the page table of {rows} requests of {pages} pages ({4 * rows * pages / (1 << 20):.2f} MiB) does not fit the "
        f"scalar memory of the attention kernel; use a smaller max_model_len (--max-model-len, {longest} here) or "
        f"max_num_seqs, or a larger page_size ({shapes.page_size} here)"
    )


def _count_layouts(text: str, page: Any) -> int:
    """In how many layouts an array of the shape of one layer's pages occurs; more than one means that it is copied."""
    shape = ",".join(map(str, page.sharding.shard_shape(page.shape)))
    name = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}.get(str(page.dtype), "")
    start, layouts = f"{name}[{shape}]{{", set()
    position = text.find(start)
    while position >= 0:
        end = text.find(":", position)
        layouts.add(text[position + len(start) : end])
        position = text.find(start, end)
    return len(layouts)


if __name__ == "__main__":
    _compile_for_parent()
