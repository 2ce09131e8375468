from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ktrain.base.events import FileSink, make, parse_lines


def steps(path: Path) -> list[int]:
    return [event.fields["step"] for event in parse_lines(path.read_bytes().splitlines())]


def test_file_sink_after_a_killed_writer_loses_the_torn_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = FileSink(path)
    first.emit(make("step", 1, step=1))
    first.close()
    with open(path, "ab") as torn:
        torn.write(b'{"time":1.0,"attempt":1,"ki')
    second = FileSink(path)
    second.emit(make("step", 2, step=2))
    second.close()
    second.close()
    assert steps(path) == [1, 2]


def test_file_sink_full_disk_keeps_lines_and_raises_nothing() -> None:
    sink = FileSink(Path("/dev/full"), limit=3)  # every write gives ENOSPC
    for step in range(5):
        sink.emit(make("step", 1, step=step))
    assert sink.num_lost == 2
    sink.close()


def test_parse_lines_foreign_json_is_left_out() -> None:
    good = json.dumps(make("notice", 3, message="m").to_json())
    odd = ["[]", "7", '{"kind":"notice"}', '{"kind":["notice"],"time":1,"attempt":1}', '{"kind":"of tomorrow"}', "{"]
    assert [event.attempt for event in parse_lines([*odd, good])] == [3]


def test_event_unknown_kind_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        make("something")


def test_file_sink_lines_of_two_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sinks = [FileSink(path), FileSink(path)]
    for step in range(20):
        sinks[step % 2].emit(make("step", 1, step=step, pad="x" * 500))
    for sink in sinks:
        sink.close()
    assert steps(path) == list(range(20))
    assert os.stat(path).st_size == sum(len(line) + 1 for line in path.read_bytes().splitlines())
