"""What a run costs: energy counters of CPU packages and GPUs, and the entry in report.json."""

import json
import math
import sys
import types

import pytest
import torch

from dsd_refine.report import cost
from dsd_refine.system import EnergyCounter, EnergyMeter, energy_counters

CPU = torch.device("cpu")


def zone(folder, name, joules, span=262_143.0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{round(span * 1e6)}\n")
    return folder


def counted(values, span=math.inf):
    """A counter that gives these values, one a reading."""
    left = iter(values)
    return EnergyCounter(lambda: next(left), span)


def test_every_cpu_package_is_counted_once(tmp_path):
    """Its cores, its memory, the whole board and the same package under another name are not added."""
    packages = [zone(tmp_path / f"intel-rapl:{n}", f"package-{n}", 100.0) for n in (0, 1)]
    zone(tmp_path / "intel-rapl:0:0", "core", 50.0)
    zone(tmp_path / "intel-rapl:2", "psys", 300.0)
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", 100.0)
    with EnergyMeter(energy_counters(CPU, tmp_path)) as meter:
        zone(packages[0], "package-0", 107.0)
        zone(packages[1], "package-1", 102.5)
        assert meter.joules() == pytest.approx(9.5)


def test_a_counter_that_begins_again_loses_nothing():
    with EnergyMeter([counted([90.0, 10.0, 30.0], span=100.0)]) as meter:
        assert meter.joules() == pytest.approx(20.0)
        assert meter.joules() == pytest.approx(40.0)


def test_what_is_not_known_is_no_number(tmp_path):
    def broken():
        raise OSError("gone")

    assert energy_counters(CPU, tmp_path / "none") == []
    (zone(tmp_path / "intel-rapl:0", "package-0", 1.0) / "energy_uj").unlink()
    assert energy_counters(CPU, tmp_path) == []  # as where the administrator alone may read it
    with EnergyMeter([]) as meter:
        assert meter.joules() is None
    with EnergyMeter([counted([50.0, 10.0])]) as meter:  # never wraps, and yet went back
        assert meter.joules() is None
    readings = iter([lambda: 1.0, broken])
    with EnergyMeter([EnergyCounter(lambda: next(readings)(), math.inf)]) as meter:
        assert meter.joules() is None


def test_a_gpu_is_found_by_its_own_number(monkeypatch):
    """Not by its place in CUDA_VISIBLE_DEVICES; millijoules become joules."""
    nvml = types.ModuleType("pynvml")
    left = iter([5_000, 5_000, 8_500])
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-abc": "this one"}[uuid]
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"this one": next(left)}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: types.SimpleNamespace(uuid="abc"))
    with EnergyMeter(energy_counters(torch.device("cuda", 0))) as meter:
        assert meter.joules() == pytest.approx(3.5)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counters(torch.device("cuda", 0)) == []


def test_a_run_says_what_it_cost(finished):
    report = json.loads((finished / "dsd/report.json").read_text())
    assert list(report["cost"]) == ["seconds", "samples", "energy_joules"]
    for name in ("seconds", "samples"):
        assert report["cost"][name] == pytest.approx(sum(phase[name] for phase in report["phases"]))
    rows = cost.cost_rows(report)
    assert [row["arm"] for row in rows] == [*(arm for arm in report["arms"] if arm != "baseline"), "in all"]
    assert rows[-1]["samples"] == sum(row["samples"] for row in rows[:-1]) == report["cost"]["samples"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min")]
)
def test_durations_read_well(seconds, shown):
    assert cost.duration(seconds) == shown


@pytest.mark.parametrize(("joules", "shown"), [(540.0, "540 J"), (36_000.0, "10.0 Wh"), (7.2e6, "2.00 kWh")])
def test_energies_read_well(joules, shown):
    assert cost.energy(joules) == shown
