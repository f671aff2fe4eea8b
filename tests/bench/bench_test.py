"""bench_test.py: how bench.py judges, on rows that are made up, and the goals of the real ones."""

import contextlib
import fnmatch
import io
import json
import pathlib
import sys
import tempfile
import unittest
import unittest.mock

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import bench

# The least ratio by row; the first pattern that fits counts.
BARS = {
    "train/*/zero3": 1.2,
    "train/*/tensor2": 1.2,
    "train/*": 1.0,
    "start/2 ranks*": 4.0,
    "start/CPU time of a rank, of 64": 1 / 1.5,
    "all_reduce/*/mapped/gloo": 8.0,
    "all_reduce/[1-9][0-9]* MiB/mapped/Open MPI": 2.0,
    "checkpoint/*/save/plain writer": 0.9,
    "checkpoint/*/load/plain pread": 0.8,
    "checkpoint/*/load/PyTorch DCP": 2.0,
    "checkpoint/*/stall/memcpy": 1 / 1.1,
    "checkpoint/*/ours without checksums": 1 / 1.05,
    "overlap/*": 0.45,
}


class Made:
    unit, peer_name = "1/s", "peer"

    def __init__(self, name, ours, goal, reason=None):
        self.name, self.values, self.goal, self.reason, self.calls = name, ours, goal, reason, []

    def why_not(self):
        return self.reason

    def prepare(self, folder):
        assert folder.is_dir()

    def ours(self):
        self.calls.append("ours")
        return self.values[self.calls.count("ours") - 1]

    def peer(self):
        self.calls.append("peer")
        return 2.0


def judged(rows, *words):
    """(exit code, what was printed, bench.json)"""
    with tempfile.TemporaryDirectory() as root, unittest.mock.patch.object(bench, "ROOT", pathlib.Path(root)), unittest.mock.patch.object(bench, "all_rows", lambda bin_dir: rows), \
            unittest.mock.patch.object(sys, "argv", ["bench.py", "--rounds=3", *words]), contextlib.redirect_stdout(io.StringIO()) as said:
        pathlib.Path(root, "build").mkdir()
        code = bench.main()
        return code, said.getvalue(), json.loads(pathlib.Path(root, "build/bench.json").read_text())


class Goals(unittest.TestCase):
    def test_the_median_of_the_pairs_is_what_counts(self):
        code, said, results = judged([Made("good", [2, 9, 1], 1.0), Made("bad", [1.9, 9, 1], 1.0)])
        self.assertEqual(code, 1)
        self.assertEqual([(result["name"], result["ratio"], result["met"]) for result in results], [("good", 1.0, True), ("bad", 0.95, False)])
        lines = said.splitlines()
        self.assertIn(" met ", lines[1])
        self.assertIn(" MISSED ", lines[2])
        self.assertEqual(lines[-1], "1 of 2 goals met, 0 rows skipped; missed: bad (0.95 of 1.00)")

    def test_all_met_is_success_and_what_was_skipped_is_said(self):
        code, said, results = judged([Made("good", [2, 2, 2], 1.0), Made("other", [], 1.0, reason="no room")])
        self.assertEqual((code, len(results), said.splitlines()[-1]), (0, 1, "1 of 1 goals met, 1 rows skipped"))
        self.assertIn("skipped: no room", said)

    def test_nothing_measured_is_no_success(self):
        self.assertEqual(judged([Made("good", [2, 2, 2], 1.0)], "--rows=god")[0], 1)

    def test_sides_take_turns_and_a_row_may_want_more_pairs(self):
        row = Made("row", [2] * 9, 1.0)
        judged([row])
        self.assertEqual(row.calls, ["ours", "peer", "peer", "ours", "ours", "peer"])
        row = Made("row", [2] * 9, 1.0)
        row.rounds = lambda asked: max(asked, 7)
        judged([row])
        self.assertEqual(row.calls.count("ours"), 7)

    def test_no_row_asks_for_less_than_its_bar_and_checkpoints_take_seven_pairs(self):
        rows = bench.all_rows(pathlib.Path("/bin_dir"))
        for pattern in BARS:
            self.assertTrue(fnmatch.filter([row.name for row in rows], pattern), pattern)
        for row in rows:
            bar = next((bar for pattern, bar in BARS.items() if fnmatch.fnmatch(row.name, pattern)), 0)
            self.assertGreaterEqual(row.goal, bar, row.name)
            if row.name.startswith("checkpoint/"):
                self.assertGreaterEqual(row.rounds(1), 7, row.name)
                self.assertEqual(row.rounds(99), 99, row.name)


unittest.main()
