"""Kills, ends and freezes the members of a chain at random moments, starts them again, and times their recovery.

Recovery of a disturbance: seconds from the signal until the process is ready again (or runs on) and, where clicks go
through it (streams, trainer, broker), every click that was acknowledged before the signal has been learnt.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from streams.service import EXIT_DEPENDENCY
from tests.e2e.chaos.chain import Chain, Member
from tests.e2e.chaos.verifier import Ledger
from tests.e2e.chaos.writer import Writer

WEIGHTS = {"streams": 2.0, "trainer": 3.0, "retriever": 2.0, "index": 2.5, "broker": 4.0}
SIGNALS = {"SIGKILL": 0.55, "SIGTERM": 0.2, "SIGSTOP": 0.25}
SESSION_SECONDS = 7.0
"""After so long a dead worker has been given up; a little more than the session timeout."""
END_SECONDS = 20.0
"""Longest time for the end after SIGTERM; ten seconds are promised, of a machine that is not overloaded."""


@dataclass
class Disturbance:
    """One signal and what came of it."""

    member: Member
    signal: str
    at: float
    written: list[int]
    """Clicks acknowledged before it, by partition."""
    recovered: float | None = None


@dataclass
class Killer:
    """To be run from the main thread, which is the parent of all processes."""

    chain: Chain
    writer: Writer
    ledger: Ledger
    seed: int
    mean_seconds: float
    extra: list[Member] = field(default_factory=list)
    """Members that are not the chain's: brokers."""
    only_groups_at_rest: bool = False
    """Whether workers are disturbed only while their group is at rest. The embedded broker never gives up a group's
    leader that dies between the two steps of a rebalance, and the group stands still for good; Apache Kafka does."""
    disturbances: list[Disturbance] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    """Members that ended by themselves, or not as they should."""
    num_kills: int = 0
    """Signals that came to a running process."""

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._absent: set[str] = {self.chain.workers[-1].name}
        self._ending: dict[str, float] = {}
        self._looked = 0.0
        self._group_changed_at = time.monotonic()
        self._ready_before: dict[str, int] = {}

    def run(self, done: Callable[[int, float], bool]) -> None:
        """Until `done` (kills, seconds) says so; then until everything runs again."""
        started = time.monotonic()
        next_at = started + self._pause()
        while not done(self.num_kills, time.monotonic() - started):
            self._tick()
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + self._pause()
                self._disturb()
        self._calm()

    def recoveries(self) -> list[float]:
        """Seconds, of all disturbances that were recovered from."""
        return [found.recovered for found in self.disturbances if found.recovered is not None]

    def watch_recovery(self, seconds: float) -> bool:
        """Waits until everything has recovered, at most so long."""
        deadline = time.monotonic() + seconds
        while any(found.recovered is None for found in self.disturbances) and time.monotonic() < deadline:
            self._tick()
        return all(found.recovered is not None for found in self.disturbances)

    def _pause(self) -> float:
        return float(self._rng.exponential(self.mean_seconds))

    def _targets(self) -> list[Member]:
        running = [member for member in self.chain.members if member.is_running]
        if not self._may_disturb_workers():
            running = [member for member in running if member not in self.chain.workers]
        if not self._is_any_away(self.extra):  # of several brokers one at a time: that is what they promise to bear
            running += self.extra
        return [member for member in running if not member.told_to_end and member.name not in self._frozen()]

    def _frozen(self) -> set[str]:
        return {found.member.name for found in self.disturbances if found.signal == "SIGSTOP" and found.recovered == -1}

    def _may_disturb_workers(self) -> bool:
        """Whether the group is at rest, or need not be: each worker has partitions again since the last change."""
        if not self.only_groups_at_rest:
            return True
        if time.monotonic() < self._group_changed_at + SESSION_SECONDS:
            return False
        running = [worker for worker in self.chain.workers if worker.is_running]
        return all(worker.num_ready > self._ready_before.get(worker.name, 0) for worker in running)

    def _note_change(self, member: Member) -> None:
        if member in self.chain.workers:
            self._group_changed_at = time.monotonic()
            self._ready_before = {worker.name: worker.num_ready for worker in self.chain.workers if worker.is_running}

    def _is_any_away(self, members: list[Member]) -> bool:
        return any(not member.is_ready for member in members) or any(
            found.member in members and found.recovered in (None, -1.0) for found in self.disturbances
        )

    def _disturb(self) -> None:
        if self._rng.random() < 0.1 and self._may_disturb_workers():
            self._come_or_go()
            return
        targets = self._targets()
        if not targets:
            return
        weights = np.array([WEIGHTS[member.kind] for member in targets])
        member = targets[self._rng.choice(len(targets), p=weights / weights.sum())]
        name = str(self._rng.choice(list(SIGNALS), p=list(SIGNALS.values())))
        found = Disturbance(member, name, time.monotonic(), self.writer.written())
        was_ready = member.is_ready
        member.send(getattr(signal, name))
        self.num_kills += 1
        self.disturbances.append(found)
        if name == "SIGSTOP":
            found.recovered = -1.0
            # Sometimes longer than the session timeout: then the others take over, and it comes back too late.
            seconds = float(self._rng.choice([self._rng.uniform(0.2, 3.0), 9.0], p=[0.85, 0.15]))
            self._later(seconds, lambda: self._thaw(found, seconds))
        else:
            self._note_change(member)
            if name == "SIGTERM" and was_ready:
                self._ending[member.name] = time.monotonic() + END_SECONDS
            self._later(float(self._rng.uniform(0.0, 1.0)), lambda: self._start_again(member))

    def _come_or_go(self) -> None:
        """The spare worker joins, or a worker leaves for a while."""
        spare = self.chain.workers[-1]
        if spare.name in self._absent:
            self._absent.discard(spare.name)
            self._start(spare)
        elif spare.is_running:
            self._absent.add(spare.name)
            spare.send(signal.SIGTERM)
            self._note_change(spare)

    def _thaw(self, found: Disturbance, seconds: float) -> None:
        found.member.send(signal.SIGCONT)
        found.recovered = None
        if seconds > SESSION_SECONDS / 2:  # it was given up, or may have been
            self._note_change(found.member)

    def _start_again(self, member: Member) -> None:
        if member.is_running:  # it is still on its way out
            self._later(0.1, lambda: self._start_again(member))
            return
        self._look_after(member, time.monotonic())  # how it ended is not to be forgotten
        if member.name not in self._absent:
            self._start(member)

    def _start(self, member: Member) -> None:
        member.start()
        self._note_change(member)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, what))

    def _tick(self) -> None:
        time.sleep(0.02)
        now = time.monotonic()
        due = [what for at, what in self._due if at <= now]
        self._due = [(at, what) for at, what in self._due if at > now]
        for what in due:
            what()
        for member in [*self.chain.members, *self.extra]:
            self._look_after(member, now)
        if now >= self._looked + 0.2:
            self._looked = now
            self.ledger.read()
            learnt = self.ledger.ends(len(self.writer.acknowledged))
            for found in self.disturbances:
                if found.recovered is None and self._is_recovered(found, learnt):
                    found.recovered = time.monotonic() - found.at

    def _look_after(self, member: Member, now: float) -> None:
        if member.process is None:
            return
        code = member.process.exit_code
        if code is None:
            if now > self._ending.get(member.name, now):
                del self._ending[member.name]
                self.surprises.append(f"{member.name} has not ended {END_SECONDS:g} s after SIGTERM")
                member.send(signal.SIGKILL)
            return
        if member.name in self._ending:
            del self._ending[member.name]
            if code not in member.end_codes:
                self.surprises.append(f"{member.name} ended with {code} after SIGTERM: {member.process.tail()[-1500:]}")
        if not member.told_to_end:
            # What misses its broker while that is down may say so; a supervisor starts it again.
            if code != EXIT_DEPENDENCY or not self._broker_is_down():
                self.surprises.append(f"{member.name} ended by itself with {code}: {member.process.tail()[-3000:]}")
            member.told_to_end = True
            self._later(0.5, lambda: self._start_again(member))

    def _broker_is_down(self) -> bool:
        return any(found.member.kind == "broker" and found.recovered is None for found in self.disturbances)

    def _is_recovered(self, found: Disturbance, learnt: list[int]) -> bool:
        member = found.member
        if member.name in self._absent:
            return True
        if found.signal != "SIGSTOP" and not member.is_ready:
            return False
        if member.kind == "retriever":
            return self.chain.retriever_answers()
        if member.kind == "index":
            return True
        # The last one before the signal may be no click: two in a row never are.
        return all(end >= written - 1 for end, written in zip(learnt, found.written, strict=True))

    def _calm(self) -> None:
        """Nothing is disturbed any more; what is under way comes to its end."""
        while self._due or any(
            not member.is_running and member.name not in self._absent for member in [*self.chain.members, *self.extra]
        ):
            self._tick()
