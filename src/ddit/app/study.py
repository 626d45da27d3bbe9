"""A blind study: pairs of pictures, plain and dynamic, and the votes on them. Standard library only, no torch.

A study is a folder. ``study.db`` (SQLite) holds prompts, votes and a secret. ``pictures/`` holds the pairs under names
that only the secret tells apart; the secret also decides each voter's order and sides, so nothing of that is stored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import secrets
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ddit.util.tables import table

DATABASE, PICTURES = "study.db", "pictures"
ANSWERS = ("left", "right", "equal", "bad")
"""What a voter may say of a pair; ``bad`` is both."""
CHOICES = {"equal": "equally good", "dynamic": "prefer dynamic", "plain": "prefer plain", "bad": "both bad"}
"""What an answer says of the methods, in words."""
PAPER = {"equal": 0.61, "dynamic": 0.17, "plain": 0.22}
"""Shares in the paper's own study (arXiv 2602.16968), whose voters had no fourth answer."""

_APPLICATION = 0x64646974
"""SQLite's ``application_id`` of our files: "ddit" in ASCII."""
_VERSION = 1
_TABLES = (
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
    "CREATE TABLE study (secret TEXT NOT NULL, about TEXT NOT NULL)",
    "CREATE TABLE pairs (pair TEXT PRIMARY KEY, prompt TEXT NOT NULL, seed INTEGER NOT NULL, work REAL)",
    "CREATE TABLE votes (voter TEXT NOT NULL, pair TEXT NOT NULL REFERENCES pairs, answer TEXT NOT NULL,"
    " on_left TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (voter, pair))",
)
"""``work`` is set before the pair's last picture is written, so that a drawn pair has one."""
_WAIT = 30.0
"""Seconds to wait for another voter's transaction."""


@dataclass(frozen=True)
class Pair:
    """A prompt and seed, drawn twice."""

    pair: str
    """Its name, which tells nothing."""
    prompt: str
    seed: int
    plain: Path
    dynamic: Path

    @property
    def is_drawn(self) -> bool:
        """Whether both pictures are there."""
        return self.plain.is_file() and self.dynamic.is_file()


@dataclass(frozen=True)
class Study:
    """Pairs and votes in a folder; any number of processes and threads may share it."""

    folder: Path
    secret: str
    about: dict[str, Any]
    """What was drawn: the model, how it was called and sped up, and ``suffix``, the ending of the files."""

    @classmethod
    def prepare(cls, folder: Path, about: dict[str, Any], prompts: Sequence[str], seed: int) -> Study:
        """Make a study, or add to one; what is there stays.

        Raises:
            ValueError: For a folder with another database, or a study of other settings.
        """
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        with _database(folder, "rwc") as database:
            if _is_empty(database):
                database.execute("PRAGMA journal_mode = WAL")  # not possible inside a transaction
            database.execute("BEGIN IMMEDIATE")
            if _is_empty(database):
                for line in _TABLES:
                    database.execute(line)
                database.execute("INSERT INTO study VALUES (?, ?)", (secrets.token_hex(16), json.dumps(about)))
            study = cls._read(folder, database)
            asked = json.loads(json.dumps(about))
            differ = sorted(name for name in asked.keys() | study.about if asked.get(name) != study.about.get(name))
            if differ:
                raise ValueError(
                    f"{folder} is a study of other settings ({', '.join(differ)} differ); name another with --out"
                )
            rows = [(study.digest("pair", text, str(seed)), text, seed) for text in prompts]
            database.executemany("INSERT OR IGNORE INTO pairs (pair, prompt, seed) VALUES (?, ?, ?)", rows)
        return study

    @classmethod
    def check(cls, folder: Path) -> None:
        """Refuse a folder whose database is no study; one without a database will do."""
        if (folder / DATABASE).exists():
            with _database(folder) as database:
                if not _is_empty(database):
                    cls._read(folder, database)

    @classmethod
    def open(cls, folder: Path) -> Study:
        """A study that is there.

        Raises:
            ValueError: When there is none, or its database is foreign, broken or can't be read.
        """
        if not (folder / DATABASE).is_file():
            raise ValueError(
                f"{folder} holds no study; make one with 'ddit study prepare --prompts FILE --out {folder}'"
            )
        with _database(folder) as database:
            return cls._read(folder, database)

    @classmethod
    def _read(cls, folder: Path, database: sqlite3.Connection) -> Study:
        found = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if found != [_APPLICATION, _VERSION]:
            raise ValueError(f"{folder / DATABASE} is not a study of this ddit; name another folder")
        secret, about = database.execute("SELECT secret, about FROM study").fetchone()
        return cls(folder, secret, json.loads(about))

    def digest(self, *words: str) -> str:
        """A name that only the secret leads to: 16 hex digits."""
        return hashlib.sha256(json.dumps([self.secret, *words]).encode()).hexdigest()[:16]

    def pairs(self) -> list[Pair]:
        """All pairs, drawn or not, as they were asked for."""
        with _database(self.folder) as database:
            rows = database.execute("SELECT pair, prompt, seed FROM pairs ORDER BY rowid").fetchall()
        return [Pair(*row, *(self._picture(row[0], kind) for kind in ("plain", "dynamic"))) for row in rows]

    def _picture(self, pair: str, kind: str) -> Path:
        return self.folder / PICTURES / (self.digest("picture", pair, kind) + self.about["suffix"])

    def note_work(self, pair: str, work: float) -> None:
        """Keep what the dynamic picture of a pair cost, as a fraction of the plain run's operations."""
        with _database(self.folder) as database:
            database.execute("UPDATE pairs SET work = ? WHERE pair = ?", (work, pair))

    def order(self, voter: str) -> list[Pair]:
        """The drawn pairs in a random order of the voter's own."""
        drawn = [pair for pair in self.pairs() if pair.is_drawn]
        return sorted(drawn, key=lambda pair: self.digest("order", voter, pair.pair))

    def on_left(self, voter: str, pair: str) -> str:
        """What a voter sees on the left: ``plain`` or ``dynamic``, at random but always the same."""
        return ("plain", "dynamic")[int(self.digest("side", voter, pair), 16) % 2]

    def turn(self, voter: str, order: Sequence[Pair], before: str | None = None) -> Pair | None:
        """The pair to show to a voter: the first in their ``order`` that has no vote; ``None`` when all have one.

        Args:
            before: Name of a pair; then the one before that, or without such a pair the last.
        """
        if before is not None:
            earlier = list(itertools.takewhile(lambda pair: pair.pair != before, order))
            return earlier[-1] if earlier else next(iter(order), None)
        with _database(self.folder) as database:
            voted = {pair for (pair,) in database.execute("SELECT pair FROM votes WHERE voter = ?", (voter,))}
        return next((pair for pair in order if pair.pair not in voted), None)

    def vote(self, voter: str, pair: str, answer: str) -> None:
        """Keep an answer of `ANSWERS` at once; a second one on the same pair replaces the first.

        Raises:
            ValueError: For a voter without a name, another answer, or a pair that is not of this study.
        """
        if not voter:
            raise ValueError("the vote has no voter; reload the page")
        if answer not in ANSWERS:
            raise ValueError(f"the answer is {answer!r}; it must be one of {', '.join(ANSWERS)}")
        row = (voter, pair, answer, self.on_left(voter, pair), datetime.now(timezone.utc).isoformat(timespec="seconds"))
        with _database(self.folder) as database:
            if not database.execute("SELECT 1 FROM pairs WHERE pair = ? AND work NOT NULL", (pair,)).fetchone():
                raise ValueError(f"no pair {pair!r} is drawn in this study; reload the page to see one of its own")
            database.execute("INSERT OR REPLACE INTO votes VALUES (?, ?, ?, ?, ?)", row)

    def votes(self) -> list[dict[str, Any]]:
        """All votes, each with its pair, and with the choice (`CHOICES`) that its answer stands for."""
        with _database(self.folder) as database:
            database.row_factory = sqlite3.Row
            rows = database.execute("SELECT * FROM votes JOIN pairs USING (pair) ORDER BY at, voter, pair").fetchall()
        return [{**row, "choice": _choice(row["answer"], row["on_left"])} for row in map(dict, rows)]

    def results(self) -> dict[str, Any]:
        """JSON-ready: shares of the choices with 95 % intervals, and what the dynamic pictures cost.

        Raises:
            ValueError: When there is no vote yet.
        """
        votes = self.votes()
        if not votes:
            raise ValueError(f"{self.folder} has no vote yet; let people vote with 'ddit app --study {self.folder}'")
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for vote in votes:
            counts[vote["pair"]][vote["choice"]] += 1
        of, answers = [count.total() for count in counts.values()], {}
        for choice in CHOICES:
            hits = [count[choice] for count in counts.values()]
            answers[choice] = {
                "votes": sum(hits),
                "share": sum(hits) / len(votes),
                "interval": interval(hits, of),
                "paper": PAPER.get(choice),
            }
        work = {vote["pair"]: vote["work"] for vote in votes}
        return {
            "about": self.about,
            "pairs": len(counts),
            "voters": len({vote["voter"] for vote in votes}),
            "votes": len(votes),
            "work": sum(work.values()) / len(work),
            "answers": answers,
        }


@contextmanager
def _database(folder: Path, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    """A connection for one transaction, which a kill leaves whole or undone; errors are told as `ValueError`."""
    path = (folder / DATABASE).resolve()
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=_WAIT)) as database, database:
            yield database
    except sqlite3.Error as error:
        raise ValueError(
            f"{path} can't be used as a study ({error}); name a folder that 'ddit study prepare' wrote and that can be "
            "written to"
        ) from error


def _is_empty(database: sqlite3.Connection) -> bool:
    return database.execute("SELECT 1 FROM sqlite_master").fetchone() is None


def _choice(answer: str, on_left: str) -> str:
    """What an answer says of the methods, a key of `CHOICES`."""
    on_right = "plain" if on_left == "dynamic" else "dynamic"
    return {"left": on_left, "right": on_right}.get(answer, answer)


def interval(hits: Sequence[int], votes: Sequence[int], *, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (1927) of a share, 95 % by default.

    Votes on one pair are not independent, so its N is Kish's effective number: as many single votes as would scatter as
    much from pair to pair. With one vote per pair that is their number; where nothing scatters, the pairs' number.

    Args:
        hits, votes: Of each pair.
    """
    total = sum(votes)
    share = sum(hits) / total
    spread = sum((hit - share * count) ** 2 for hit, count in zip(hits, votes, strict=True)) / total**2
    n = min(share * (1 - share) / spread, total) if spread else len(votes)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def markdown(results: dict[str, Any]) -> str:
    """`Study.results` as a table."""
    rows = []
    for choice, row in results["answers"].items():
        low, high = row["interval"]
        paper = "not asked" if row["paper"] is None else f"{row['paper']:.0%}"
        rows.append((CHOICES[choice], row["votes"], f"{row['share']:.0%}", f"{low:.0%} to {high:.0%}", paper))
    return (
        f"{results['pairs']} pairs, {results['voters']} voters, {results['votes']} votes; the dynamic pictures took "
        f"{results['work']:.0%} of the plain ones' work.\n\n"
        + table(("answer", "votes", "share", "95 % interval", "paper"), rows)
    )


def as_csv(votes: Sequence[dict[str, Any]]) -> str:
    """A line per vote of `Study.votes`, under their names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(votes[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(votes)
    return text.getvalue()
