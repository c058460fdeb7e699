"""Keeps what a run has found of each sample, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...records.files import write_json
from ...records.provenance import mismatch

_NOTE = "run.json"
_ROWS = "rows-{rank:05d}.jsonl"


class Journal:
    """Rows of one sample each, in a folder: `run.json` says of what, `rows-<process>.jsonl` are appended to.

    Args:
        out: The folder.
        overwrite: Begin anew, whatever is there.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out = out
        self.overwrite = overwrite

    def resume(self, description: dict[str, Any], ids: set[str], processes: int) -> set[str]:
        """Ids that need not be run again; to be asked on the first process, before the run.

        Args:
            description: What the rows depend on, as far as it is known by then.
            ids: Ids of the run's samples.
            processes: Number of processes.

        Raises:
            ValueError: The folder has rows of another run.
        """
        if not self._goes_on(description):
            return set()
        done = set(self.rows()) & ids
        # A process without a sample stops Lightning, or calls nothing that could score: some are run again.
        again = max(processes - len(ids - done), 0)
        return done - set(sorted(done)[:again])

    def begin(self, description: dict[str, Any]) -> bool:
        """Prepare the folder, on the first process.

        Args:
            description: What the rows depend on, now that all is known.

        Returns:
            Whether the run begins anew, so that results of an earlier one are to go.
        """
        anew = not self._goes_on(description)
        if anew:
            for path in self.out.glob("rows-*.jsonl"):
                path.unlink()
        write_json(self.out / _NOTE, description)
        for path in self.out.glob("rows-*.jsonl"):
            if not path.read_bytes().endswith(b"\n"):
                # Cut off in the middle of a line, which the next must not continue.
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")
        return anew

    def description(self) -> dict[str, Any]:
        """What the rows are of."""
        content: dict[str, Any] = json.loads((self.out / _NOTE).read_text(encoding="utf-8"))
        return content

    def write(self, rank: int, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, each with a `sample_id`, on the process `rank`."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        with (self.out / _ROWS.format(rank=rank)).open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def rows(self) -> dict[str, dict[str, Any]]:
        """Id → row, of all processes so far, in the order of ids."""
        found = {}
        for path in sorted(self.out.glob("rows-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # cut off in the middle of being written: it is run again
                found[row["sample_id"]] = row
        return dict(sorted(found.items()))

    def _goes_on(self, description: dict[str, Any]) -> bool:
        """Whether the folder has a run to go on with.

        Raises:
            ValueError: It has one of another kind.
        """
        noted, begun = self.out / _NOTE, any(self.out.glob("rows-*.jsonl"))
        if begun and not noted.is_file() and not self.overwrite:
            raise ValueError(
                f"{self.out}: holds rows, but not {_NOTE}, which says of what; set `overwrite`, or move them"
            )
        if self.overwrite or not begun:
            return False
        # What a limit has left out is still to be run, and changes nothing of what has been.
        given = {key: value for key, value in json.loads(json.dumps(description)).items() if key != "limits"}
        if odd := mismatch(self.description(), given):
            raise ValueError(
                f"{self.out}: holds another run ({odd}); choose another folder (--out), or set `overwrite` to begin "
                "anew"
            )
        return True
