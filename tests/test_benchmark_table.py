"""benchmarks/table.py: a benchmark's table as Markdown and as JSON."""

import json
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import table  # noqa: E402
from table import describe_machine, save_table  # noqa: E402

LINES = ["today, a CPU", "", "| | steps | FID |", "|---|---|---|", "| real | | 63.3 |", "| **ours** | 16 | 75.9 [76] |"]


def test_json_holds_the_cells_by_their_column_and_markdown_the_lines(tmp_path):
    save_table(LINES, [tmp_path / "new" / "t.json", tmp_path / "t.md"])
    assert json.loads((tmp_path / "new" / "t.json").read_text()) == {
        "measured": "today, a CPU",
        "rows": [{"": "real", "steps": "", "FID": "63.3"}, {"": "ours", "steps": "16", "FID": "75.9 [76]"}],
    }
    assert (tmp_path / "t.md").read_text() == "\n".join(LINES) + "\n"


def test_the_machine_is_told_with_its_threads():
    assert ", 7 threads, torch " in describe_machine(torch.device("cpu"), 7)


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one name"):
        save_table([*LINES[:2], "| | steps | steps |", "|---|---|---|"], [tmp_path / "t.json"])
    assert not (tmp_path / "t.json").exists()


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_a_process_of_its_own_does_not_count_what_its_parent_holds(tmp_path):
    script = tmp_path / "peak.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(pathlib.Path(table.__file__).parent)!r})\n"
        "import table, torch\n"
        "print(json.dumps(table.peak_memory(torch.device('cpu'))))\n"
    )
    ballast = b"\1" * 2_000_000_000  # every page of it is resident
    assert table.in_own_process(script) < len(ballast) * 0.75
