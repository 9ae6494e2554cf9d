"""The record of a run: the content of its lines, their number, and the lines that remain after a kill."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.loop import Report
from training.record import EVENTS, METRICS, Record, RecordError, read_metrics

NATS_PER_BIT = 2.0
VALID_NATS_PER_BIT = 4.0


def report(step: int, *, loss: float = 4.0, norm: float = 1.0) -> Report:
    """The report of step `step` of a run with 100 tokens and half a second a step."""
    return Report(step, step * 100, loss, norm, 0.01, step * 0.5)


def open_record(folder: Path, *, resume_step: int = 0) -> Record:
    return Record(folder, resume_step=resume_step, nats_per_bit=NATS_PER_BIT, valid_nats_per_bit=VALID_NATS_PER_BIT)


def write_steps(folder: Path, first: int, last: int, *, resume_step: int = 0, loss: float = 4.0) -> None:
    with open_record(folder, resume_step=resume_step) as record:
        for step in range(first, last + 1):
            record.step(report(step, loss=loss))


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / EVENTS), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_step_is_told_with_its_place_and_its_figures(tmp_path):
    write_steps(tmp_path, 1, 3)
    assert read_metrics(tmp_path)[1] == {
        "kind": "train",
        "step": 2,
        "tokens": 200,
        "seconds": 1.0,
        "num_steps": 1,
        "nats_per_token": 4.0,
        "bits_per_byte": 2.0,
        "gradient_norm": 1.0,
        "gradient_norm_max": 1.0,
        "learning_rate": 0.01,
        "tokens_per_second": 200.0,
    }


def test_a_look_and_the_spans_are_told_too(tmp_path):
    with open_record(tmp_path) as record:
        record.look(report(7), valid=3.0)
        record.spans(report(7), [[32.04, 512.0], [33.0, 40.0]])
    valid, spans = read_metrics(tmp_path)
    assert (valid["kind"], valid["step"], valid["tokens"]) == ("valid", 7, 700)
    assert (valid["nats_per_token"], valid["bits_per_byte"]) == (3.0, 0.75)
    assert (spans["kind"], spans["spans"]) == ("spans", [[32.0, 512.0], [33.0, 40.0]])


def test_tensorboard_shows_the_same_figures(tmp_path):
    with open_record(tmp_path) as record:
        for step in (1, 2):
            record.step(report(step, loss=2.0 * step))
        record.look(report(2), valid=3.0)
        record.spans(report(2), [[30.0, 50.0], [100.0, 100.0]])
    expected = {
        "train/nats_per_token": {1: 2.0, 2: 4.0},
        "train/bits_per_byte": {1: 1.0, 2: 2.0},
        "valid/nats_per_token": {2: 3.0},
        "valid/bits_per_byte": {2: 0.75},
        "lr": {1: 0.01, 2: 0.01},
        "gradient_norm": {1: 1.0, 2: 1.0},
        "tokens_per_second": {1: 200.0, 2: 200.0},
        "spans/mean": {2: 70.0},
        "spans/longest": {2: 100.0},
        "spans/layer_00_mean": {2: 40.0},
    }
    for tag, values in expected.items():
        assert scalars(tmp_path, tag) == pytest.approx(values), tag


def test_every_early_step_has_its_line_and_half_a_million_steps_make_a_small_file(tmp_path, monkeypatch):
    with open_record(tmp_path) as record:
        monkeypatch.setattr(record, "_scalar", lambda *_: None)  # TensorBoard's writer would take most of the time
        for step in range(1, 500_001):
            record.step(report(step))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines[:1000]] == list(range(1, 1001))
    assert lines[-1]["step"] == 500_000
    assert len(lines) < 8000
    assert (tmp_path / METRICS).stat().st_size < 3e6
    assert sum(line["num_steps"] for line in lines) == 500_000


def test_a_late_line_is_the_mean_of_its_steps_and_keeps_the_worst_gradient(tmp_path):
    with open_record(tmp_path, resume_step=4000) as record:
        for step, loss, norm in ((4001, 3.0, 1.0), (4002, 5.0, 9.0), (4003, 4.0, 2.0), (4004, 4.0, 0.0)):
            record.step(report(step, loss=loss, norm=norm))
        assert [line["step"] for line in read_metrics(tmp_path)] == [4004]  # 0.1 % more than 4000
    (line,) = read_metrics(tmp_path)
    assert (line["num_steps"], line["nats_per_token"]) == (4, 4.0)
    assert (line["gradient_norm"], line["gradient_norm_max"]) == (3.0, 9.0)


def test_steps_that_are_held_back_are_written_when_the_record_closes(tmp_path):
    write_steps(tmp_path, 4001, 4002, resume_step=4000)
    (line,) = read_metrics(tmp_path)
    assert (line["step"], line["num_steps"]) == (4002, 2)


def test_a_line_is_on_disk_as_soon_as_it_is_due(tmp_path):
    with open_record(tmp_path) as record:
        record.step(report(1))
        assert len(read_metrics(tmp_path)) == 1


def test_a_resumed_run_has_no_line_twice_and_none_of_the_steps_that_were_lost(tmp_path):
    with open_record(tmp_path) as record:
        for step in range(1, 11):
            record.step(report(step, loss=4.0))
        record.look(report(10), valid=8.0)
        record.look(report(5), valid=6.0)
    write_steps(tmp_path, 7, 9, resume_step=6, loss=2.0)
    lines = read_metrics(tmp_path)
    train = {line["step"]: line["nats_per_token"] for line in lines if line["kind"] == "train"}
    assert train == dict.fromkeys(range(1, 7), 4.0) | dict.fromkeys(range(7, 10), 2.0)
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [5]
    assert len(lines) == 10
    assert scalars(tmp_path, "train/nats_per_token") == train
    assert scalars(tmp_path, "valid/nats_per_token") == {5: 6.0}


def test_the_rate_after_a_resumption_counts_steps_and_not_the_pause(tmp_path):
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, 6, 6, resume_step=5)
    assert read_metrics(tmp_path)[-1]["tokens_per_second"] == 200.0


def test_a_run_that_begins_anew_forgets_the_old_record(tmp_path):
    write_steps(tmp_path, 1, 5, loss=4.0)
    write_steps(tmp_path, 1, 2, loss=2.0)
    assert [(line["step"], line["nats_per_token"]) for line in read_metrics(tmp_path)] == [(1, 2.0), (2, 2.0)]
    assert scalars(tmp_path, "train/nats_per_token") == {1: 2.0, 2: 2.0}
    assert len(list((tmp_path / EVENTS).iterdir())) == 1


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"\0" * 40, b'\xff{"kind\n', b"[1]\n", b"{}\n"])
def test_what_a_dying_machine_left_at_the_end_is_dropped_when_the_run_goes_on(torn, tmp_path):
    write_steps(tmp_path, 1, 2)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(torn)
    write_steps(tmp_path, 3, 3, resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_line_that_is_just_being_written_does_not_disturb_a_reader(tmp_path):
    write_steps(tmp_path, 1, 2)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_kill_while_old_lines_are_dropped_leaves_the_old_file(tmp_path, monkeypatch):
    write_steps(tmp_path, 1, 5)
    before = (tmp_path / METRICS).read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_record(tmp_path, resume_step=2)
    assert (tmp_path / METRICS).read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecordError, match=re.escape(f"{tmp_path / METRICS} cannot be read: No such file")):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "garbled", ["not JSON", "[1, 2]", '{"kind": "train"}', '{"kind": 1, "step": 3, "loss": 1}', ""]
)
def test_a_garbled_line_is_named_with_its_number(garbled, tmp_path):
    write_steps(tmp_path, 1, 1)
    with (tmp_path / METRICS).open("a") as file:
        file.write(garbled + "\n" + json.dumps({}) + "\n")
    with pytest.raises(RecordError, match=r"metrics\.jsonl, line 2: .* is not a line of a training record"):
        read_metrics(tmp_path / METRICS)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RecordError, match=r"taken.metrics\.jsonl or what lies beside it cannot be written"):
        open_record(tmp_path / "taken")


def test_a_disk_that_fills_up_is_one_clear_error_and_the_run_can_go_on_later(tmp_path):
    write_steps(tmp_path, 1, 2)
    record = open_record(tmp_path, resume_step=2)
    record._file.close()
    record._file = Path("/dev/full").open("w")  # noqa: SIM115 - closed by the record
    for write in (lambda: record.step(report(3)), lambda: record.look(report(3), valid=1.0), record.close):
        with pytest.raises(RecordError, match=r"metrics\.jsonl or .* cannot be written: No space left"):
            write()
    write_steps(tmp_path, 3, 3, resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_a_process_that_writes_nothing_does_not_import_tensorboard():
    code = "import sys, training.record; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
