"""LLVM IR -> a function that XLA calls in the middle of a compiled program, on all of its threads.

A kernel is the text of `define void @part(ptr %buffers, i64 %part)`: the addresses of its operands and results in
order, and which of its parts to do; shapes are constants of the text. Around it this module puts what XLA's foreign
function interface asks for, and a loop in which XLA's own threads take one part after another, the calling thread
among them: it never waits for a thread that has not begun, so devices that share the threads cannot block each other.
Where later parts need what the first ones make, they wait for those, which somebody has begun by then.
Knows nothing of what a kernel computes. llvmlite compiles the text in milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jax

_BFLOAT16 = ("avx512f", "avx512bw", "avx512vl", "avx512bf16")
_LEAST = ("avx2", "fma", "f16c")
_SPINS = 200  # some microseconds; then whoever does the last part may have lost its core, and gets this one
_lock = threading.Lock()
_engines: dict[str, Any] = {}  # what keeps each registered kernel's code alive


@functools.cache
def unavailable(*, quantized: bool = False) -> str | None:
    """Why kernels cannot run here: llvmlite is not installed, or the processor lacks the instructions they use.

    Those of `quantized` matrices ask for less than those of bfloat16.
    """
    try:
        import llvmlite.binding as _  # noqa: F401
    except ImportError:
        return "llvmlite is not installed (pip install llvmlite)"
    if sys.platform != "linux":
        return "the kernels are written for Linux"
    missing = [name for name in (_LEAST if quantized else _BFLOAT16) if not has(name)]
    return f"the processor has no {missing[0]} instructions" if missing else None


def has(feature: str) -> bool:
    """Whether the processor has instructions, by LLVM's name of them."""
    return f"+{feature}" in host()[1].split(",")


def num_threads() -> int:
    """Threads that take parts."""
    return len(os.sched_getaffinity(0))


def register(kernel: str, num_parts: int, num_operands: int, *, num_results: int = 1, num_first: int = 0) -> str:
    """Compile a kernel, once, and return its name for `jax.ffi.ffi_call`: the same in every process.

    The first `num_first` parts are done before any other begins.
    """
    text = kernel + _handler(num_parts, num_operands, num_results, num_first)
    name = f"jaxllm_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    with _lock:
        if name not in _engines:
            _engines[name] = engine = _compile(text)
            address = engine.get_function_address("handler")
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.CFUNCTYPE(None)(address)), platform="cpu")
    return name


@functools.cache
def host() -> tuple[str, str]:
    """LLVM's name of this processor, and its features."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _compile(text: str) -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    module.verify()
    cpu, features = host()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


@functools.cache
def _interface() -> tuple[int, int, int]:
    """XLA's version numbers of the interface, and the byte offset of its function that schedules a task."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    major, minor = (int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0]) for part in ("MAJOR", "MINOR"))
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\((XLA_FFI_\w+)\);", header)
    return major, minor, 48 + 8 * functions.index("XLA_FFI_ThreadPool_Schedule")


def _handler(num_parts: int, num_operands: int, num_results: int, num_first: int) -> str:
    """What XLA calls. Offsets are those of the structures in xla/ffi/api/c_api.h.

    A job is `{next part, parts done, holders, addresses}` on the heap: a helper may wake when all is done. Until the
    first parts are done no other is, so their number among those done says that they are.
    """
    major, minor, schedule = _interface()
    num_helpers = max(min(num_threads(), num_parts) - 1, 0)
    count = num_operands + num_results
    copies = "".join(
        f"""
  %list{i} = load ptr, ptr {"%arguments" if i < num_operands else "%results"}
  %slot{i} = getelementptr ptr, ptr %list{i}, i64 {i if i < num_operands else i - num_operands}
  %buffer{i} = load ptr, ptr %slot{i}
  %field{i} = getelementptr i8, ptr %buffer{i}, i64 24
  %data{i} = load ptr, ptr %field{i}
  %target{i} = getelementptr i8, ptr %job, i64 {24 + 8 * i}
  store ptr %data{i}, ptr %target{i}"""
        for i in range(count)
    )
    helpers = "\n  call ptr %schedule(ptr %request)" * num_helpers
    return f"""
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare void @llvm.x86.sse2.pause()

define internal void @until(ptr %done, i64 %count) {{
entry:
  br label %look
look:
  %turns = phi i64 [0, %entry], [%turns.next, %spin], [%turns.next, %give_way]
  %turns.next = add i64 %turns, 1
  %finished = load atomic i64, ptr %done acquire, align 8
  %enough = icmp sge i64 %finished, %count
  br i1 %enough, label %exit, label %spin
spin:
  call void @llvm.x86.sse2.pause()
  %long = icmp sgt i64 %turns, {_SPINS}
  br i1 %long, label %give_way, label %look
give_way:
  call i32 @sched_yield()
  br label %look
exit:
  ret void
}}

define internal void @work(ptr %job) {{
entry:
  %buffers = getelementptr i8, ptr %job, i64 24
  %done = getelementptr i8, ptr %job, i64 8
  br label %next
next:
  %part = atomicrmw add ptr %job, i64 1 acq_rel
  %mine = icmp slt i64 %part, {num_parts}
  br i1 %mine, label %taken, label %exit
taken:
  %is_first = icmp slt i64 %part, {num_first}
  br i1 %is_first, label %run, label %later
later:
  call void @until(ptr %done, i64 {num_first})
  br label %run
run:
  call void @part(ptr %buffers, i64 %part)
  atomicrmw add ptr %done, i64 1 release
  br label %next
exit:
  ret void
}}

define internal void @leave(ptr %job) {{
  %holders = getelementptr i8, ptr %job, i64 16
  %before = atomicrmw sub ptr %holders, i64 1 acq_rel
  %last = icmp eq i64 %before, 1
  br i1 %last, label %drop, label %exit
drop:
  call void @free(ptr %job)
  br label %exit
exit:
  ret void
}}

define internal void @help(ptr %job) {{
  call void @work(ptr %job)
  call void @leave(ptr %job)
  ret void
}}

define ptr @handler(ptr %frame) {{
entry:
  %extension_field = getelementptr i8, ptr %frame, i64 8
  %extension = load ptr, ptr %extension_field
  %asked = icmp ne ptr %extension, null
  br i1 %asked, label %describe, label %execute
describe:
  %metadata_field = getelementptr i8, ptr %extension, i64 24
  %metadata = load ptr, ptr %metadata_field
  %major = getelementptr i8, ptr %metadata, i64 24
  store i32 {major}, ptr %major
  %minor = getelementptr i8, ptr %metadata, i64 28
  store i32 {minor}, ptr %minor
  %traits = getelementptr i8, ptr %metadata, i64 32
  store i32 0, ptr %traits
  ret ptr null
execute:
  %job = call ptr @malloc(i64 {24 + 8 * count})
  store i64 0, ptr %job
  %done = getelementptr i8, ptr %job, i64 8
  store i64 0, ptr %done
  %holders = getelementptr i8, ptr %job, i64 16
  store i64 {num_helpers + 1}, ptr %holders
  %arguments = getelementptr i8, ptr %frame, i64 72
  %results = getelementptr i8, ptr %frame, i64 112{copies}
  %request = alloca [5 x ptr]
  %request_size = getelementptr i8, ptr %request, i64 0
  store i64 40, ptr %request_size
  %request_extension = getelementptr i8, ptr %request, i64 8
  store ptr null, ptr %request_extension
  %context_field = getelementptr i8, ptr %frame, i64 24
  %context = load ptr, ptr %context_field
  %request_context = getelementptr i8, ptr %request, i64 16
  store ptr %context, ptr %request_context
  %request_task = getelementptr i8, ptr %request, i64 24
  store ptr @help, ptr %request_task
  %request_data = getelementptr i8, ptr %request, i64 32
  store ptr %job, ptr %request_data
  %api_field = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api_field
  %schedule_field = getelementptr i8, ptr %api, i64 {schedule}
  %schedule = load ptr, ptr %schedule_field{helpers}
  call void @work(ptr %job)
  call void @until(ptr %done, i64 {num_parts})
  call void @leave(ptr %job)
  ret ptr null
}}
"""
