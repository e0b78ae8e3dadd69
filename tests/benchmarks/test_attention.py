"""The attention benchmark: operation counts, what it runs, and workers that hang."""

import json
import subprocess
import sys

import pytest

from benchmarks import attention
from benchmarks.attention import SHAPES, Shape


def test_flops_by_hand():
    # Two heads, 4 queries, head dim 8: full 16 pairs, causal 8 by convention.
    shape = Shape(name="x", b=1, t=4, n=2, k=1, h=8, is_causal=False)
    assert shape.flops("forward") == 4 * 8 * 2 * 16
    assert shape.flops("backward") == 10 * 8 * 2 * 16
    assert Shape(name="x", b=1, t=4, n=2, k=1, h=8).flops("forward") == 4 * 8 * 2 * 8
    # Each query sees itself and 2 before it; the first 2 miss 2 + 1, less half of each diagonal.
    assert Shape(name="x", b=1, t=100, n=1, k=1, left=2).pairs() == 200 - 2


def test_every_shape_is_timed_with_its_shipped_config():
    listed = list(attention.tasks(["forward"], max_configs=2, fast=False))
    shipped = [t for t in listed if t["kind"] == "time" and t["candidate"] is None]
    assert {s["name"] for t in shipped for s in t["shapes"]} == {s.name for s in SHAPES}
    assert listed[0]["kind"] == "check"
    assert attention._TUNED_ON and set(attention._TUNED_ON) <= {s.name for s in SHAPES}


@pytest.mark.parametrize(
    ("code", "timeout_s", "ended"),
    [
        ('print(\'{"kind": "x"}\', flush=True); import time; time.sleep(60)', 2, "stopped after"),
        ('print(\'{"kind": "x"}\'); raise SystemExit(3)', 20, "exit code 3"),
        ("print('noise'); print('{\"kind\": \"x\"}')", 20, "ok"),
    ],
)
def test_a_worker_keeps_its_rows_however_it_ends(code, timeout_s, ended, monkeypatch):
    start = subprocess.Popen

    def popen(command, **options):
        assert json.loads(command[-1])["kind"] == "check"
        return start([sys.executable, "-c", code], **options)

    monkeypatch.setattr(attention.subprocess, "Popen", popen)
    part = attention.run_worker({"kind": "check", "timeout_s": timeout_s, "shapes": []})
    assert part["ended"].startswith(ended)
    assert part["rows"] == [{"kind": "x"}]


def test_report_shows_times_and_failures():
    parts = [
        {
            "task": {"kind": "time"},
            "ended": "stopped after 2 s",
            "rows": [
                {
                    "kind": "time",
                    "direction": "forward",
                    "shape": "s",
                    "contender": "ours",
                    "median_ms": 1.0,
                    "tflops": 700.4,
                    "speedup": 1.25,
                },
                {"kind": "fail", "shape": "s", "contender": "c", "error": "too big"},
            ],
        }
    ]
    text = attention.report(parts)
    assert "700" in text and "1.250" in text
    assert "s c: too big" in text and "stopped after 2 s" in text
