"""Models on disk: equal when read, whole or not there, and no file makes ``load`` fail in other words than its own."""

from __future__ import annotations

import errno
import json
import pickle
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from linear_oracle import LinearOracle

from latbench.errors import LatbenchError, SchemaMismatchError, TableError, UsageError
from latbench.oracle import store
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import Factor
from latbench.oracle.lut import LutOracle
from latbench.provenance import Provenance, canonical_json
from latbench.spaces.mobilenet_v1 import MobileNetV1Space

SPACE = MobileNetV1Space(resolution=32, levels=2, num_classes=10)
PROVENANCE = Provenance("cpu", "Xeon", "onnxruntime", space=SPACE.name, settings=SPACE.settings(), parents=("ab", "cd"))
NOTES = {"command": "latbench fit", "validation": {"mape": 0.01}, "networks": ["a", "b"]}


def model(seed=0, **more):
    rng = np.random.default_rng(seed)
    factors = [Factor("stem", (), np.array(0.5))]
    factors += [Factor(f"site{d}", (d,), rng.uniform(0.1, 1, 2), np.array([1, 5], np.int8)) for d in range(14)]
    return LutOracle(SPACE, tuple(factors), PROVENANCE, **more)


@pytest.fixture
def path(tmp_path):
    store.save(tmp_path / "m.npz", model(calibration=Conformal((0.01, 0.02, 0.05))), NOTES)
    return tmp_path / "m.npz"


def test_what_is_read_is_what_was_saved(path):
    saved, stored = model(calibration=Conformal((0.01, 0.02, 0.05))), store.load(path)
    archs = np.array(np.meshgrid(*[[0, 1]] * 14)).reshape(14, -1).T
    np.testing.assert_array_equal(stored.oracle.latencies(archs), saved.latencies(archs))
    np.testing.assert_array_equal(stored.oracle.interval(archs, 0.6), saved.interval(archs, 0.6))
    assert (
        stored.oracle.sources((0, 1) * 7)
        == saved.sources((0, 1) * 7)
        == {"fitted": 1, "measured": 7, "interpolated": 7}
    )
    assert (stored.oracle.name, stored.oracle.space, stored.oracle.provenance) == ("lut", SPACE, PROVENANCE)
    assert stored.notes == NOTES


@pytest.mark.usefixtures("linear")
def test_a_third_partys_model_is_found_by_its_name(tmp_path):
    store.save(tmp_path / "m.npz", LinearOracle(SPACE, model().factors, PROVENANCE))
    stored = store.load(tmp_path / "m.npz")
    assert isinstance(stored.oracle, LinearOracle)
    assert stored.notes == {}


def test_a_model_whose_package_is_gone_is_named(tmp_path):
    store.save(tmp_path / "m.npz", LinearOracle(SPACE, model().factors, PROVENANCE))
    with pytest.raises(UsageError, match="unknown oracle 'linear'"):
        store.load(tmp_path / "m.npz")


def test_files_hold_numbers_and_json_only(path):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, data in members.items():
        assert data.startswith(b"\x93NUMPY"), name
        assert b"|O" not in data[:128]
    assert json.loads(np.load(path)["latbench"].tobytes())["schema"] == store.SCHEMA_VERSION

    class Wordy(LutOracle):
        def state(self):
            return {"names": np.array(["a"])}, {}

    with pytest.raises(TypeError, match="numbers only"):
        store.save(path, Wordy(SPACE, (), PROVENANCE))


def test_a_full_disk_leaves_the_old_model(path, monkeypatch):
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"PK\x03\x04 a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(TableError, match=r"cannot write .*: No space left on device; the file that was there"):
        store.save(path, model(1))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_where_nothing_can_be_written_nothing_is(tmp_path):
    for where in (tmp_path / "no" / "m.npz", tmp_path):
        with pytest.raises(TableError, match="cannot write"):
            store.save(where, model())
    assert list(tmp_path.iterdir()) == []


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("exploited"),))


FOREIGN = {
    "empty": b"",
    "text": b"hello\nworld\n",
    "magic alone": b"PK\x03\x04",
    "no archive": b"PK\x03\x04" + bytes(range(256)),
    "table": b"PAR1 PAR1",
    "pickle": pickle.dumps(Exploit()),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=list(FOREIGN))
def test_what_is_no_model_is_one_line(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.npz"
    path.write_bytes(data)
    with pytest.raises(SchemaMismatchError) as caught:
        store.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["m.npz"]  # nothing was unpickled


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(TableError, match="No such file"):
        store.load(tmp_path / "m.npz")


def rewritten(path, change=lambda head: None, drop=()):
    """The file with its JSON changed and arrays left out."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name not in drop}
    head = json.loads(arrays.pop("latbench").tobytes())
    change(head)
    np.savez_compressed(path, latbench=np.frombuffer(canonical_json(head).encode(), np.uint8), **arrays)


CHANGES = {
    "newer schema": (
        lambda head: head.update(schema=99),
        r"schema 99, this latbench reads 1; fit it again, or install",
    ),
    "no schema": (lambda head: head.pop("schema"), "no fitted model of latbench"),
    "no oracle": (lambda head: head.pop("oracle"), "is damaged"),
    "no provenance": (lambda head: head.pop("provenance"), "is damaged"),
    "no notes": (lambda head: head.pop("notes"), "is damaged"),
    "unknown provenance": (lambda head: head["provenance"].update(colour="red"), "is damaged"),
    "unknown oracle": (lambda head: head.update(oracle="crystal"), "unknown oracle 'crystal'"),
    "unknown space": (lambda head: head["provenance"].update(space="outer"), "unknown search space 'outer'"),
    "no space": (lambda head: head["provenance"].update(space=""), "names no search space"),
    "unknown setting": (lambda head: head["provenance"]["settings"].update(depth=1), "no setting 'depth'"),
    "another space's shapes": (lambda head: head["provenance"]["settings"].update(levels=3), "wants shape"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=list(CHANGES))
def test_what_does_not_fit_together_is_one_line(path, change, words):
    rewritten(path, change)
    with pytest.raises(LatbenchError, match=words):
        store.load(path)


def test_an_array_that_is_missing_is_one_line(path):
    rewritten(path, drop=("factor3/values",))
    with pytest.raises(SchemaMismatchError, match="is damaged"):
        store.load(path)


def test_an_archive_of_other_arrays_is_no_model(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.ones(3))
    with pytest.raises(SchemaMismatchError, match="no fitted model of latbench"):
        store.load(tmp_path / "m.npz")


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for n in range(0, len(data) - 1, max(1, len(data) // 100)):
        path.write_bytes(data[:n])
        with pytest.raises(SchemaMismatchError):
            store.load(path)


def test_flipped_bits_are_noticed(path):
    data, rng, refusals = path.read_bytes(), random.Random(0), []
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            stored = store.load(path)
        except LatbenchError as error:
            refusals.append(str(error))
        else:  # a date, say
            assert stored.oracle.latency((0,) * 14) == model().latency((0,) * 14)
            assert stored.notes == NOTES
    assert len(refusals) > 200
    assert not [text for text in refusals if "\n" in text or str(path) not in text]


def test_models_of_other_settings_differ(path):
    other = replace(SPACE, batch=2)
    store.save(path, LutOracle(other, model().factors, replace(PROVENANCE, settings=other.settings())))
    assert store.load(path).oracle.space == other != SPACE
