import json

import pytest

from benchmarks.common import markdown_table, summarise, time_steps, write_json


class Device:
    """A device that runs queued steps one after the other, each for 10 s; launching takes 1 s."""

    def __init__(self):
        self.now = 0.0
        self.free_at = 0.0
        self.in_flight = []
        self.most_in_flight = 0

    def launch(self):
        self.now += 1
        self.free_at = max(self.free_at, self.now) + 10
        self.in_flight.append(self.free_at)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return self.free_at

    def wait(self, end):
        self.in_flight.remove(end)
        self.now = max(self.now, end)


def test_step_time_is_the_devices_own_while_the_host_queues_ahead():
    device = Device()
    times = time_steps(device.launch, device.wait, warmup=2, steps=4, clock=lambda: device.now)
    assert times.step_times_s == [10, 10, 10, 10]
    assert times.launch_times_s == [1, 1, 1, 1]
    assert device.most_in_flight == 2
    assert device.in_flight == []  # nothing still runs when the next thing is measured


def test_step_time_of_a_device_that_blocks_the_host():
    now = 0.0

    def launch():
        nonlocal now
        now += 3

    times = time_steps(launch, lambda _: None, warmup=1, steps=2, clock=lambda: now)
    assert times.step_times_s == [3, 3]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (1, 0)])
def test_refuses_no_steps(warmup, steps):
    with pytest.raises(ValueError, match="must be at least 1"):
        time_steps(lambda: None, lambda _: None, warmup=warmup, steps=steps)


def test_summary_of_eleven_times():
    summary = summarise([x / 1000 for x in (11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
    expected = {"median_ms": 6, "min_ms": 1, "p10_ms": 2, "p90_ms": 10, "max_ms": 11}
    assert summary == pytest.approx(expected)


def test_json_is_written_whole_into_a_new_folder(tmp_path):
    path = tmp_path / "results" / "x.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_table_puts_numbers_to_the_right():
    assert markdown_table(["name", "ms"], [["a", "1.5"], ["bcdef", "12.5"]]) == (
        "| name  |   ms |\n|-------|-----:|\n| a     |  1.5 |\n| bcdef | 12.5 |"
    )
