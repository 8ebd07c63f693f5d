"""Between the front and the loops: tickets wait in one queue, workers take them, and none is lost or answered twice.

    dispatcher = Dispatcher(options, places=64)
    dispatcher.start()                                   # in the event loop's thread, as all the rest
    tickets = dispatcher.submit("alice", requests)       # raises BusyError
    event = await tickets[0].inbox.get()                 # hands, previews, and at the end a picture or a failure

Everything here happens in the event loop's thread, which never waits: each worker has a thread that writes to its pipe
and one that reads from it. A worker that ends is started again, and what it had goes back to the head of the queue: a
request gives the same picture wherever it runs. Its answer counts once, whoever brings it.

A worker may also hang and not end: a call into a GPU that never comes back, a process that was stopped. One that has
requests and says nothing for `stuck_after` seconds, or for ten times its slowest step where that is more, is ended, and
then is one that has ended. A loop in this process cannot be ended alone: the server says so and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from ..errors import HanDiffuserError
from ..runtime.requests import Request
from .queue import FairQueue
from .worker import Options, work, work_alone

AHEAD = 2  # requests that a worker holds beyond its slots, so that a free slot does not wait for the front
TRIES = 4  # workers that may die over a request
LONGEST_PAUSE = 30.0  # seconds before a worker that keeps dying is started again
HOPE = 3  # deaths in a row after which nobody waits for a worker to come back
HANDS_AT_ONCE = 64  # requests for hands alone that may be under way
CROWDED = "The queue is full, and others, who have fewer pictures in it, came. Try again later."
FORGET = 0.98  # of what was measured, at each picture
LOOK = 1.0  # seconds between two looks at workers that may hang
STUCK_AFTER = 60  # seconds without a word
SLOW = 10.0  # times the slowest step, and times as long until a worker has shown how slow it is


class BusyError(HanDiffuserError):
    """Turned away: try again in `seconds`."""

    def __init__(self, sentence: str, seconds: float, loading: bool = False) -> None:
        super().__init__(sentence)
        self.seconds, self.loading = seconds, loading


@dataclass(frozen=True)
class Event:
    """kind: "hands", "preview", "picture", "failure"; the last two are the last. value: what the worker sent; of a
    failure its sentence and, unless it is 500, its HTTP status."""

    kind: str
    value: tuple[Any, ...]


@dataclass(eq=False)
class Ticket:
    """A request on its way. follow: steps after which a preview is wanted; whole: its hands, before its picture."""

    request: Request
    owner: str
    cost: int  # steps
    follow: Sequence[int] = ()
    whole: bool = False
    alone: bool = False  # its hands, and no picture
    tries: int = 0
    done: bool = False
    came: float = field(default_factory=time.monotonic)
    began: float = 0.0  # when a worker took it
    inbox: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    @property
    def id(self) -> str:
        return str(self.request.id)

    async def result(self) -> Event:
        """Its last event; what comes before is passed over."""
        while True:
            event = await self.inbox.get()
            if event.kind in ("picture", "failure") or (self.alone and event.kind == "hands"):
                return event


class Worker:
    """One loop as the front sees it: a thread of this process, or a process of its own."""

    def __init__(self, number: int, options: Options, own_process: bool, hear: Callable[..., None]) -> None:
        self.number, self.options, self.own_process, self.hear = number, options, own_process, hear
        self.slots = 0  # 0: it is not ready
        self.has: dict[str, Ticket] = {}
        self.pid: int | None = None
        self.deaths = 0  # since its last picture
        self.silent = 0.0  # seconds that it has had requests and said nothing
        self.slowest = 0.0  # the longest silence that came to an end
        self.proven = False  # has run everything once: nothing is made ready in the middle of a request any more
        self.thread: threading.Thread | None = None
        self.round = 0  # how often it was started: what an earlier one says is not heard

    def start(self) -> None:
        self.round += 1
        self.slots, self.silent, self.proven = 0, 0.0, False
        ours, theirs = multiprocessing.Pipe()
        self.outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.process: Any = None
        if self.own_process:
            self.process = multiprocessing.get_context("spawn").Process(
                target=work_alone, args=(theirs, self.options), name=f"hd-serve-{self.number}", daemon=True
            )
            self.process.start()
            theirs.close()  # so that its end is seen here
        else:
            self.thread = threading.Thread(target=work, args=(theirs, self.options), name="hd-serve-loop", daemon=True)
            self.thread.start()
        hear = partial(self.hear, self, self.round)
        threading.Thread(target=_write, args=(ours, self.outbox), daemon=True).start()
        threading.Thread(target=_read, args=(ours, self.outbox, hear), daemon=True).start()

    def send(self, *message: Any) -> None:
        self.outbox.put(message)

    @property
    def room(self) -> int:
        return self.slots + AHEAD - len(self.has) if self.slots else 0


def _write(pipe: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            pipe.send(message)


def _read(pipe: Connection, outbox: queue.SimpleQueue[Any], hear: Callable[[tuple[Any, ...]], None]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            hear(pipe.recv())
    hear(("gone",))
    outbox.put(None)
    pipe.close()


class Dispatcher:
    """`workers` loops behind one queue. gpus: of CUDA_VISIBLE_DEVICES, one a worker, or none.

    observe(kind, value): is told what happens, for metrics; kinds are those of `metrics.Metrics.observe`.
    """

    def __init__(
        self,
        options: Sequence[Options],
        own_processes: bool,
        places: int = 64,
        observe: Callable[[str, Any], None] = lambda kind, value: None,
        say: Callable[[str], None] = lambda sentence: None,
        stuck_after: float = STUCK_AFTER,
    ) -> None:
        self.stuck_after = stuck_after
        self.queue: FairQueue[Ticket] = FairQueue(places)
        self.workers = [Worker(i, each, own_processes, self._hear) for i, each in enumerate(options)]
        self.observe, self.say = observe, say
        self.draining = self.stopped = False
        self.fatal: str | None = None  # why this server cannot serve at all
        self.changed = asyncio.Event()  # set when a worker becomes ready, or none ever will
        self.gpu_memory: dict[int, tuple[int, int]] = {}
        self.refused: dict[int, str] = {}
        self._served = deque([(0.0, 0.0)], maxlen=1)  # steps, and busy seconds they took; older ones count less
        self._busy_since: float | None = None

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        for worker in self.workers:
            worker.start()
        self.loop.call_later(LOOK, self._look, time.monotonic())

    @property
    def ready(self) -> bool:
        return any(worker.slots for worker in self.workers) and not self.draining

    @property
    def running(self) -> int:
        """Pictures that workers have."""
        return sum(not ticket.alone for worker in self.workers for ticket in worker.has.values())

    @property
    def rate(self) -> float:
        """Steps a second, all workers together, as measured; 0 before any."""
        steps, seconds = self._served[0]
        return steps / seconds if seconds > 0 else 0.0

    def wait_for_room(self) -> float:
        """Seconds until all who wait now are likely to be served."""
        return max(1.0, self.queue.cost / self.rate) if self.rate else 5.0

    def submit(
        self, owner: str, requests: Iterable[Request], follow: Sequence[int] = (), whole: bool = False
    ) -> list[Ticket]:
        """Puts prepared requests into the queue: all of them or none. Raises BusyError.

        Where the queue is full of somebody else's, who then has more than this owner, his youngest are turned away.
        """
        requests = list(requests)
        self._check(waits=True)
        if len(requests) > self.queue.room:
            for ticket in self.queue.make_room(owner, len(requests)):
                self._end(ticket, Event("failure", (CROWDED, 429)))
        if len(requests) > self.queue.room:
            raise BusyError(
                f"The queue is full: {len(self.queue)} pictures wait. Try again later.", self.wait_for_room()
            )
        tickets = [Ticket(request, owner, request.steps or 1, follow, whole) for request in requests]
        for ticket in tickets:
            self.queue.put(owner, ticket.cost, ticket)
        self._pump()
        return tickets

    def submit_hands(self, owner: str, request: Request) -> Ticket:
        """Hands alone go to a worker at once: they take a fraction of a step. Raises BusyError."""
        self._check(waits=False)
        alone = sum(ticket.alone for worker in self.workers for ticket in worker.has.values())
        if alone >= HANDS_AT_ONCE:
            raise BusyError(f"{alone} requests for hands are under way. Try again later.", 1.0)
        ticket = Ticket(request, owner, 0, alone=True)
        self._give(min((w for w in self.workers if w.slots), key=lambda w: len(w.has)), ticket)
        return ticket

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Nobody waits for these any more: those that run leave at the next step."""
        for ticket in tickets:
            if ticket.done:
                continue
            ticket.done = True
            if not self.queue.remove(ticket):
                for worker in self.workers:
                    if ticket.id in worker.has:
                        worker.send("cancel", ticket.id)
        self._pump()

    def fail_all(self, sentence: str) -> int:
        """Ends everything that is not done; how many that were."""
        left = [*self.queue, *(ticket for worker in self.workers for ticket in worker.has.values())]
        left = [ticket for ticket in left if not ticket.done]
        for ticket in left:
            self.queue.remove(ticket)
            self._end(ticket, Event("failure", (sentence, 503)))
        return len(left)

    async def drain(self, grace: float) -> int:
        """Takes nothing new and finishes what there is, for at most `grace` seconds; how many came to nothing."""
        self.draining = True
        end = time.monotonic() + grace
        while (len(self.queue) or any(worker.has for worker in self.workers)) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.fail_all("The server is stopping, and had no time left for this picture. Send it again.")

    def stop(self) -> None:
        """Ends the workers; the processes at once."""
        self.draining = self.stopped = True
        for worker in self.workers:
            worker.send("stop")
            if worker.process is not None:
                worker.process.terminate()
                worker.process.kill()

    def left(self, seconds: float) -> bool:
        """After `stop`: whether a loop in this process is still at work after so long, in native code perhaps."""
        threads = [worker.thread for worker in self.workers if worker.thread is not None]
        for thread in threads:
            thread.join(seconds)
        return any(thread.is_alive() for thread in threads)

    def _check(self, waits: bool) -> None:
        """Raises BusyError. waits: whether it may wait in the queue for a worker that is being started again."""
        if self.draining:
            raise BusyError("The server is stopping and takes no more requests.", 30.0, loading=True)
        back_soon = waits and any(worker.pid is not None and worker.deaths <= HOPE for worker in self.workers)
        if not back_soon and not any(worker.slots for worker in self.workers):
            raise BusyError("The server is loading its engines. Try again in a few seconds.", 5.0, loading=True)

    def _pump(self) -> None:
        """Gives waiting tickets to workers that have room, the emptiest first."""
        while len(self.queue):
            worker = max(self.workers, key=lambda worker: worker.room)
            if worker.room <= 0:
                return
            ticket = self.queue.pop()
            if ticket is None:
                return
            self._give(worker, ticket)

    def _give(self, worker: Worker, ticket: Ticket) -> None:
        if self._busy_since is None:
            self._busy_since = time.monotonic()
        if not ticket.began and not ticket.alone:
            self.observe("queue_time", time.monotonic() - ticket.came)
        ticket.began = time.monotonic()
        worker.has[ticket.id] = ticket
        if ticket.alone:
            worker.send("hands", ticket.request)
        else:
            worker.send("run", ticket.request, tuple(ticket.follow), ticket.whole)

    def _hear(self, worker: Worker, round: int, message: tuple[Any, ...]) -> None:
        """From a worker's own thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(self._take, worker, round, message)

    def _take(self, worker: Worker, round: int, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if round != worker.round:
            return
        worker.slowest, worker.silent = max(worker.slowest, worker.silent), 0.0
        if kind == "ready":
            self._ready(worker, rest[0])
        elif kind in ("refused", "broken"):
            self.refused[worker.number] = rest[0]
            self.say(f"worker {worker.number}: {rest[0]}")
            if kind == "refused" and worker.round == 1 and len(self.refused) == len(self.workers):
                self.fatal = rest[0]
                self.changed.set()
        elif kind == "gone":
            self._gone(worker)
        elif kind == "steps":
            self.observe("batches", rest[0])
            self.observe("stages", (worker.number, rest[1], rest[2]))
            if rest[3]:
                self.gpu_memory[worker.number] = rest[3]
        elif (ticket := worker.has.get(rest[0])) is not None:
            if kind in ("begun", "preview"):
                if not ticket.done:
                    ticket.inbox.put_nowait(Event("hands" if kind == "begun" else kind, tuple(rest[1:])))
                return
            del worker.has[ticket.id]
            if kind == "picture":
                worker.deaths, worker.proven = 0, True
                self._measure(ticket.cost)
                self.observe("picture_time", time.monotonic() - ticket.began)
            elif kind == "hands":
                self.observe("hands_time", time.monotonic() - ticket.began)
            if not ticket.done:
                self._end(ticket, Event(kind, tuple(rest[1:])))
        self._pump()
        if not len(self.queue) and not any(worker.has for worker in self.workers):
            self._busy_since = None

    def _end(self, ticket: Ticket, event: Event) -> None:
        ticket.done = True
        ticket.inbox.put_nowait(event)

    def _ready(self, worker: Worker, facts: dict[str, Any]) -> None:
        worker.slots, worker.pid = facts["slots"], facts["pid"]
        self.refused.pop(worker.number, None)
        if "slowest" in facts:
            worker.slowest, worker.proven = max(worker.slowest, facts["slowest"]), True
        if facts.get("rate") and not self.rate:
            self._served.append((facts["rate"] * len(self.workers), 1.0))
        for sentence in facts["warnings"] if worker.round == 1 and worker.number == 0 else ():
            self.say(sentence)
        self.changed.set()

    def _look(self, before: float) -> None:
        """Looks for workers that hang. Time in which this process did not run, or the machine was suspended, does not
        count: what workers said meanwhile has not been heard yet."""
        now = time.monotonic()
        passed = min(now - before, 2 * LOOK)
        for worker in self.workers:
            worker.silent = worker.silent + passed if worker.has else 0.0
            patience = max(self.stuck_after, SLOW * worker.slowest) * (1 if worker.proven else SLOW)
            if worker.silent > patience and not self.stopped and self.fatal is None:
                self._end_stuck(worker)
        if not self.stopped:
            self.loop.call_later(LOOK, self._look, now)

    def _end_stuck(self, worker: Worker) -> None:
        said = f"worker {worker.number} has requests, and has not reported a step for {worker.silent:.0f} seconds"
        if worker.process is None:
            self.fatal = f"The server stops: {said}. It is in the server's own process; start the server again."
            self.fail_all("The server stops, because its model hangs. Send the request again.")
            self.changed.set()
            return
        self.say(f"{said}; it is killed.")
        worker.process.kill()
        worker.round += 1  # what it still says is not heard, nor that it is gone: a process may be slow to die
        self._gone(worker)
        self._pump()

    def _gone(self, worker: Worker) -> None:
        """A worker has ended: what it had is done by another, or by the next one."""
        worker.slots = 0
        if self.stopped:
            return
        left, worker.has = list(worker.has.values()), {}
        for ticket in reversed(left):
            if ticket.done:
                continue
            ticket.tries += 1
            if ticket.tries >= TRIES:
                self._end(ticket, Event("failure", (f"{TRIES} workers ended while they made this picture.",)))
            elif ticket.alone and (others := [other for other in self.workers if other.slots]):
                self._give(min(others, key=lambda other: len(other.has)), ticket)
            elif ticket.alone:
                self._end(ticket, Event("failure", ("The worker ended. Send the request again.", 503)))
            else:
                self.queue.put_back(ticket.owner, ticket.cost, ticket)
        if self.fatal is None:
            worker.deaths += 1
            pause = 0.0 if worker.deaths == 1 else min(2.0 ** (worker.deaths - 2), LONGEST_PAUSE)
            self.say(f"worker {worker.number} ended; {len(left)} requests go to another. It starts again.")
            self.observe("restart", worker.number)
            self.loop.call_later(pause, self._again, worker)

    def _again(self, worker: Worker) -> None:
        if not self.stopped:
            worker.start()

    def _measure(self, steps: int) -> None:
        """Steps done, and the seconds since the last ones or since there was something to do."""
        now = time.monotonic()
        if self._busy_since is not None:
            done, seconds = self._served[0]
            self._served.append((done * FORGET + steps, seconds * FORGET + now - self._busy_since))
            self._busy_since = now
