"""Whenever a run is killed, the same command ends with the same numbers, bit for bit.

`python -m pytest -m campaign tests/train/test_kill_campaign.py` kills 50 times with each signal and
writes what happened to `benchmarks/results/`; here is a slice of it.
"""

import collections
import dataclasses
import json
import signal
from pathlib import Path

import jax
import pytest
from kill_campaign import PHASES, Campaign, differences

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIGNALS = [signal.SIGKILL, signal.SIGTERM]


def run_campaign(count: int, number: signal.Signals, finished_run, folder: Path) -> Campaign:
    campaign = Campaign(folder, finished_run.text, finished_run.xla_cache, number, seed=count)
    campaign.execute(count)
    for run, directory in enumerate(campaign.finished):
        arguments = campaign.arguments(run)
        assert differences(directory, arguments, finished_run.directory) == []
    return campaign


def test_a_slice_of_the_campaign(finished_run, tmp_path):
    campaign = run_campaign(4, signal.SIGKILL, finished_run, tmp_path)
    assert [kill.phase for kill in campaign.kills] == list(PHASES)


@pytest.mark.campaign
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_fifty_kills(number, finished_run, tmp_path):
    campaign = run_campaign(50, number, finished_run, tmp_path)
    by_phase = collections.Counter(kill.phase for kill in campaign.kills)
    result = {
        "signal": number.name,
        "jax": jax.__version__,
        "kills": len(campaign.kills),
        "starts": campaign.starts,
        "runs_finished": len(campaign.finished),
        "kills_by_phase": dict(by_phase),
        "runs_that_differ_from_the_undisturbed_one": 0,
        "each": [dataclasses.asdict(kill) for kill in campaign.kills],
    }
    name = f"faults_{number.name.lower()}_cpu.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    assert min(by_phase.values()) >= 12
