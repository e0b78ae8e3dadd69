"""A small program and its trace, written by hand in the form that XLA and the profiler write."""

# ruff: noqa: E501 (XLA's lines are long)

import gzip
import json

import pytest

from benchmarks import trace

HLO = """HloModule jit_train_step, is_scheduled=true

FileNames
1 "train/step.py"

FunctionNames
1 "make_train_step.<locals>.train_step"
2 "Block.__call__"
3 "RMSNorm.__call__"
4 "rotate"
5 "flash_attention"
6 "_chunk_loss"
7 "Linear.__call__"
8 "dot_general"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=1 function_name_id=3 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=1 function_name_id=4 line=1 end_line=1 column=1 end_column=2}
5 {file_name_id=1 function_name_id=5 line=1 end_line=1 column=1 end_column=2}
6 {file_name_id=1 function_name_id=6 line=1 end_line=1 column=1 end_column=2}
7 {file_name_id=1 function_name_id=7 line=1 end_line=1 column=1 end_column=2}
8 {file_name_id=1 function_name_id=8 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=3}
5 {file_location_id=5 parent_frame_id=3}
6 {file_location_id=6 parent_frame_id=2}
7 {file_location_id=7 parent_frame_id=3}
8 {file_location_id=8 parent_frame_id=8}

%fused_norm (p.1: bf16[8,16]) -> f8e4m3fn[8,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  %rsqrt.1 = f32[8,16]{1,0} rsqrt(%p.1), metadata={op_name="jit(train_step)/jvp(block)/rsqrt" stack_frame_id=3}
  ROOT %convert.1 = f8e4m3fn[8,16]{1,0} convert(%rsqrt.1), metadata={op_name="jit(train_step)/jvp(block)/fp8_dot/quantize_lhs/convert_element_type" stack_frame_id=8}
}

%fused_rope (p.2: bf16[8,16]) -> (bf16[8,16], bf16[8,16]) {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  %multiply.2 = bf16[8,16]{1,0} multiply(%p.2, %p.2), metadata={op_name="jit(train_step)/jvp(block)/mul" stack_frame_id=4}
  ROOT %tuple.2 = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) tuple(%multiply.2, %multiply.2)
}

ENTRY %main.9 (x.1: bf16[8,16], w.1: f8e4m3fn[16,16]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0} parameter(0), metadata={op_name="state.params['blocks'][0]['attention']['kernel']"}
  %w.1 = f8e4m3fn[16,16]{1,0} parameter(1)
  %loop_convert_fusion.3 = f8e4m3fn[8,16]{1,0} fusion(%x.1), kind=kLoop, calls=%fused_norm, metadata={op_name="jit(train_step)/jvp(block)/fp8_dot/quantize_lhs/convert_element_type" stack_frame_id=8}
  %custom-call.4 = (bf16[8,16]{1,0}, s8[4]{0}) custom-call(%loop_convert_fusion.3, %w.1), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(train_step)/jvp(block)/fp8_dot/fwd/dot_general" stack_frame_id=8}
  %custom-call.5 = (bf16[8,16]{1,0}, s8[4]{0}) custom-call(%x.1, %x.1), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/jvp(block)/fp8_dot/fwd/dot_general" stack_frame_id=8}
  %custom-call.6 = (bf16[8,16]{1,0}, s8[4]{0}) custom-call(%x.1, %x.1), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/jvp()/while/body/head/dot_general" stack_frame_id=6}
  %custom-call.7 = bf16[8,16]{1,0} custom-call(%x.1), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(train_step)/jvp(block)/dot_product_attention_fwd" stack_frame_id=5}
  %custom-call.8 = bf16[8,16]{1,0} custom-call(%x.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(train_step)/transpose(jvp(block))/pallas_call" stack_frame_id=5}
  %loop_multiply_fusion.9 = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) fusion(%x.1), kind=kLoop, calls=%fused_rope
  %copy.10 = bf16[8,16]{0,1} copy(%x.1)
  %subtract.11 = bf16[8,16]{1,0} subtract(%x.1, %x.1), metadata={op_name="jit(train_step)/optimizer/sub"}
  ROOT %rsqrt.12 = bf16[8,16]{1,0} rsqrt(%x.1), metadata={op_name="jit(train_step)/jvp(block)/rsqrt" stack_frame_id=3}
}
"""
GROUPS = {
    "loop_convert_fusion.3": "quantise/cast/transpose",
    "custom-call.4": "fp8 GEMM",
    "custom-call.5": "bf16 GEMM",  # asked for in 8 bits, compiled to 16: the target tells
    "custom-call.6": "head/loss",
    "custom-call.7": "attention fwd",
    "custom-call.8": "attention bwd",
    "loop_multiply_fusion.9": "rope",  # without an op_name of its own
    "copy.10": "copies",  # of a parameter called attention
    "subtract.11": "optimizer",
    "rsqrt.12": "norm",
}


@pytest.fixture(scope="module")
def program():
    return trace.Program.parse(HLO)


@pytest.mark.parametrize(("instruction", "group"), GROUPS.items())
def test_group(program, instruction, group):
    assert program.group(instruction) == group


def test_every_group_is_a_known_one():
    assert set(GROUPS.values()) <= set(trace.GROUPS)


def test_functions_are_listed_from_the_innermost_outwards(program):
    chain = ("dot_general", "Linear.__call__", "Block.__call__")
    assert program.instructions["custom-call.4"].functions[:3] == chain


def test_a_fusion_tells_what_is_in_it(program):
    assert program.fused("loop_convert_fusion.3") == ("quantise/cast/transpose", "norm")


def test_a_copy_takes_the_name_of_what_it_copies(program):
    name = program.described("copy.10").op_name
    assert name == "state.params['blocks'][0]['attention']['kernel']"


def event(name, start, duration, hlo_op=None, pid=1, tid=7):
    args = {"hlo_op": hlo_op, "hlo_module": "jit_train_step"} if hlo_op else {}
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": duration, "name": name} | (
        {"args": args} if args else {}
    )


def metadata(kind, name, pid, tid=0):
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


@pytest.fixture
def trace_file(tmp_path):
    """Two steps: a GEMM of 3000 us and 1000 us, a fusion of 500 us twice, a memcpy of 100 us."""
    events = [
        metadata("process_name", "/device:GPU:0 (NVIDIA H200)", 1),
        metadata("process_name", "/host:CPU", 2),
        metadata("thread_name", "Stream #13(Compute)", 1, 7),
        metadata("thread_name", "XLA Ops", 1, 8),
        metadata("thread_name", "python", 2, 9),
        event("nvjet_qqtst_128x256", 0, 3000, "custom-call.4"),
        event("loop_multiply_fusion_9", 2900, 500),  # overlaps the GEMM by 100 us; no hlo_op
        event("nvjet_qqtst_128x256", 5000, 1000, "custom-call.4"),
        event("loop_multiply_fusion_9", 6000, 500),
        event("MemcpyD2D", 6500, 100),
        event("custom-call.4", 0, 3000, "custom-call.4", tid=8),  # the same again, as an HLO op
        event("PjitFunction", 0, 9000, pid=2, tid=9),
    ]
    path = tmp_path / "host.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"displayTimeUnit": "ns", "metadata": {}, "traceEvents": events}, file)
    return path


def test_kernel_times_of_a_trace(program, trace_file):
    events = list(trace.kernel_events(trace.read_trace(trace_file)))
    kernels = trace.kernel_times(events, program, steps=2)
    assert [(k.name, k.group, k.count, k.time_ms) for k in kernels] == [
        ("nvjet_qqtst_128x256", "fp8 GEMM", 1, pytest.approx(2.0)),
        ("loop_multiply_fusion_9", "rope", 1, pytest.approx(0.5)),
        ("MemcpyD2D", "copies", 0, pytest.approx(0.05)),
    ]
    assert kernels[0].op_name == "jit(train_step)/jvp(block)/fp8_dot/fwd/dot_general"
    groups = trace.group_times(kernels)
    assert sum(groups.values()) == pytest.approx(2.55)
    assert groups["fp8 GEMM"] == pytest.approx(2.0)
    busy, span = trace.busy_and_span_ms(events)
    assert (busy, span) == (pytest.approx(5.0), pytest.approx(6.6))


def test_loops_on_a_cpu_do_not_count_what_runs_in_them_twice():
    text = HLO.replace(
        "ENTRY %main.9", "%body (q: bf16[]) -> bf16[] {\n}\n\nENTRY %main.9"
    ).replace("  %copy.10 =", "  %while.1 = bf16[8,16]{1,0} while(%x.1), body=%body\n  %copy.10 =")
    events = [
        metadata("process_name", "/host:CPU", 2),
        event("while.1", 0, 500, "while.1", pid=2),
        event("rsqrt.12", 0, 400, "rsqrt.12", pid=2),
    ]
    on_cpu = list(trace.kernel_events(events))
    kernels = trace.kernel_times(on_cpu, trace.Program.parse(text), steps=1)
    assert [(k.name, k.group, k.time_ms) for k in kernels] == [("rsqrt.12", "norm", 0.4)]


def test_a_trace_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no kernel"):
        list(trace.kernel_events([event("PjitFunction", 0, 1)]))
