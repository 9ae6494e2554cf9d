"""`python -m training.compare`: runs are found where people keep them, and compared in a table and a picture."""

import json
from pathlib import Path

import pytest

from training.compare import main, name_curves
from training.plots import canvas
from training.record import METRICS

HEAD = ["run", "steps", "tokens", "seconds", "best", "valid", "at", "step", "last", "valid"]


def write_run(folder: Path, *, floor: float = 2.0, looks: bool = True, num_steps: int = 40) -> Path:
    """The record of a run whose valid loss is best at step 30 and then rises again."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, num_steps + 1):
        place = {"step": step, "tokens": step * 1000, "seconds": step * 100.0}
        lines.append({"kind": "train", **place, "num_steps": 1, "bits_per_byte": floor + 6 / step})
        if looks and step % 10 == 0:
            lines.append({"kind": "valid", **place, "bits_per_byte": floor + abs(step - 30) / 100})
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "compare.png"


def cells(said: str) -> dict[str, list[str]]:
    """The rows of the table by name."""
    return {row.split()[0]: row.split()[1:] for row in said.splitlines() if not row.startswith("wrote")}


def test_the_table_tells_what_each_run_came_to(tmp_path, out, capsys):
    runs = [write_run(tmp_path / "small.run", floor=2.0), write_run(tmp_path / "large.run", floor=1.5)]
    assert main([*map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == HEAD
    assert cells(said)["small"] == ["40", "40,000", "4,000", "2.0000", "30", "2.1000"]
    assert cells(said)["large"] == ["40", "40,000", "4,000", "1.5000", "30", "1.6000"]
    assert said.splitlines()[-1] == f"wrote {out}"
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", ["mine.run", "mine", "mine.run/metrics.jsonl"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_is_found_by_its_folder_by_its_bundle_and_by_its_file(given, is_finished, tmp_path, out, capsys):
    write_run(tmp_path / "mine.run")
    if is_finished:
        (tmp_path / "mine").mkdir()
    assert main([str(tmp_path / given), "--out", str(out)]) == 0
    assert "mine" in cells(capsys.readouterr().out)


def test_runs_of_one_name_are_told_by_their_paths(tmp_path, out, capsys):
    runs = [str(write_run(tmp_path / place / "mine.run")) for place in ("a", "b")]
    assert main([*runs, "--out", str(out)]) == 0
    assert set(runs) < set(cells(capsys.readouterr().out))


@pytest.mark.parametrize("x", ["tokens", "seconds", "steps"])
def test_the_horizontal_axis_can_be_chosen(x, tmp_path, out):
    slow, quick = write_run(tmp_path / "slow.run"), write_run(tmp_path / "quick.run", num_steps=12)
    assert main([str(slow), str(quick), "--out", str(out), "--x", x]) == 0
    drawn = {out.read_bytes()}
    for other in {"tokens", "seconds", "steps"} - {x}:
        main([str(slow), str(quick), "--out", str(out), "--x", other])
        drawn.add(out.read_bytes())
    assert len(drawn) == 3


def test_a_run_that_has_not_looked_at_the_valid_split_yet_has_dashes(tmp_path, out, capsys):
    assert main([str(write_run(tmp_path / "young.run", looks=False, num_steps=3)), "--out", str(out)]) == 0
    assert cells(capsys.readouterr().out)["young"][-3:] == ["-", "-", "-"]


def test_odd_names_and_more_runs_than_colours_are_drawn(tmp_path, out):
    names = ["_hidden", "cost$^$", r"a\b{c}^_", "x" * 90, *map(str, range(20))]
    runs = [str(write_run(tmp_path / f"{name}.run")) for name in names]
    assert main([*runs, "--out", str(out)]) == 0
    assert out.exists()


def test_every_run_is_named_as_it_is_called_however_odd():
    _, axes = canvas("", height=3)
    names = ["_hidden", "cost$^$", "x" * 90]
    for _ in names:
        axes.plot([0, 1], [0, 1])
        axes.plot([0, 1], [0, 1])
    name_curves(axes, names)
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["_hidden", "cost$^$", "..." + "x" * 37]
    assert not any(text.get_parse_math() for text in texts)


def test_what_is_no_run_is_one_clear_line_that_names_the_path(tmp_path, out, capsys):
    good = str(write_run(tmp_path / "good.run"))
    (tmp_path / "empty.run").mkdir()
    (tmp_path / "empty.run" / METRICS).touch()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "garbled.jsonl").write_text("nonsense\n")
    cases = {
        "nowhere": f"there is neither {tmp_path}/nowhere/metrics.jsonl nor {tmp_path}/nowhere.run/metrics.jsonl",
        "bundle": "bundle is not a run",
        "empty.run": "empty.run/metrics.jsonl tells of no step yet",
        "garbled.jsonl": "garbled.jsonl, line 1: 'nonsense' is not a line",
    }
    for name, words in cases.items():
        assert main([good, str(tmp_path / name), "--out", str(out)]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert words in said.err
        assert said.err.count("\n") == 1
    assert not out.exists()


def test_a_picture_that_cannot_be_written_is_named(tmp_path, capsys):
    run = str(write_run(tmp_path / "mine.run"))
    assert main([run, "--out", str(tmp_path / "no" / "folder.png")]) == 1
    assert "no/folder.png cannot be written: No such file" in capsys.readouterr().err
