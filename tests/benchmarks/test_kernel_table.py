from benchmarks.kernel_table import merged, report
from benchmarks.trace import KernelTime


def kernel(name, group="norm", op_name="jit(train_step)/jvp(block)/rsqrt", time_ms=1.0, count=1):
    return KernelTime(name, name, group, op_name, count, time_ms, ())


def test_the_same_kernel_of_all_layers_is_one_row():
    kernels = [
        kernel("loop_rsqrt_fusion", time_ms=1.0),
        kernel("loop_rsqrt_fusion_12", time_ms=2.0),
        kernel("loop_rsqrt_fusion_3", op_name="jit(train_step)/jvp()/rsqrt", time_ms=0.5),
    ]
    assert [(k.name, k.count, k.time_ms) for k in merged(kernels)] == [
        ("loop_rsqrt_fusion", 2, 3.0),
        ("loop_rsqrt_fusion", 1, 0.5),
    ]


def test_report_has_the_groups_their_sum_and_only_the_largest_kernels():
    kernels = [kernel("a", time_ms=3.0, count=2), kernel("b", group="rope", time_ms=1.0)]
    text = report(kernels, largest=1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["norm", "3.000", "75.0%", "2"] in rows
    assert ["rope", "1.000", "25.0%", "1"] in rows
    assert ["all kernels", "4.000", "100.0%", "3"] in rows
    assert ["norm", "3.000", "2", "a", "jvp(block)/rsqrt", ""] in rows
    assert not any(row[3:4] == ["b"] for row in rows)
