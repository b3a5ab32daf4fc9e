"""What the benchmark writes, and reading it back.

| file | content |
|---|---|
| `<workload>.jsonl` | one line a trial, with every evaluation |
| `environment.json` | one entry a session: versions, threads, processor, command line |

Lines are added when all that raced together are finished, and files are replaced atomically. What has a line is not run
again, so a benchmark that was stopped, or is given another contestant, goes on where it is; to repeat something, delete
its lines.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from natgrad.experiments.bench.trial import Outcome
from natgrad.experiments.runfolder import environment, write_atomically, write_json
from natgrad.experiments.settings import SettingsError

ENVIRONMENT = "environment.json"


@dataclass(frozen=True)
class Key:
    """Which trial: unique in a folder.

    Attributes:
        stage: ``"tune"``, ``"defaults"`` or ``"tuned"``: the two tracks of runs have their names.
        workload: Its name.
        contestant: Its name.
        index: Number of the trial in ``"tune"``, the seed in runs.
    """

    stage: str
    workload: str
    contestant: str
    index: int


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Attributes:
        key: Which.
        limit: Training seconds that it had.
        session: Index of its entry in the environment's file.
        outcome: What became of it.
    """

    key: Key
    limit: float
    session: int
    outcome: Outcome

    def line(self) -> str:
        """As it is written."""
        value = {**vars(self.key), "limit": self.limit, "session": self.session, **self.outcome.to_json()}
        return json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def parse(cls, line: str) -> "Record":
        """The inverse of `line`."""
        value: dict[str, Any] = json.loads(line)
        key = Key(value.pop("stage"), value.pop("workload"), value["contestant"], value.pop("index"))
        return cls(key, value.pop("limit"), value.pop("session"), Outcome(**value))


class Folder:
    """The records in a folder.

    Attributes:
        path: The folder.
        records: All of them, by key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Key, Record] = {}
        self._session: int | None = None
        for file in sorted(path.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                record = Record.parse(line)
                self.records[record.key] = record

    def add(self, limit: float, finished: Sequence[tuple[Key, Outcome]]) -> None:
        """Write down what became of trials that raced together."""
        session = self._open_session()
        for key, outcome in finished:
            self.records[key] = Record(key, limit, session, outcome)
        for workload in {key.workload for key, _ in finished}:
            text = "".join(record.line() for record in self.records.values() if record.key.workload == workload)
            write_atomically(self.path / f"{workload}.jsonl", partial(Path.write_text, data=text))

    def holds(self, key: Key, settings: dict[str, Any]) -> bool:
        """Whether this trial was made, with these settings."""
        record = self.records.get(key)
        return record is not None and record.outcome.settings == settings

    def check_limit(self, stage: str, workload: str, limit: float) -> None:
        """Raise a ``SettingsError`` where earlier trials of this stage and workload had another time limit."""
        for record in self.records.values():
            if (record.key.stage, record.key.workload) == (stage, workload) and record.limit != limit:
                raise SettingsError(
                    f"{self.path} holds trials of {workload} that had {record.limit:g} seconds, and these would have "
                    f"{limit:g}: give the same --scale, or another --out"
                )

    def _open_session(self) -> int:
        """The index of this session's entry in the environment's file, which is added at the first call."""
        if self._session is None:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / ENVIRONMENT
            sessions = json.loads(file.read_text()) if file.exists() else []
            self._session = len(sessions)
            write_json(file, [*sessions, environment(None)])
        return self._session
