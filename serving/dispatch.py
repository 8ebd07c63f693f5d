"""Between the front and the loops: tickets wait in one queue, workers take them, each ticket gets exactly one answer.

    dispatcher = Dispatcher(options, places=64)
    dispatcher.start()                                   # in the event loop's thread, like everything here
    tickets = dispatcher.submit("alice", requests)       # raises BusyError
    message = await tickets[0].inbox.get()               # hands, previews, and at the end a picture or a failure

Everything here happens in the event loop's thread, which never waits: each worker has a thread that writes to its pipe
and one that reads from it. A worker that ends is started again, and its tickets go back to the head of the queue: a
request gives the same picture wherever it runs. The first answer counts, later ones are dropped.

A worker may also hang: a call into a GPU that never comes back, a process that was stopped. The dispatcher ends a
worker that has tickets and sends nothing for `stuck_seconds`, or for ten times its slowest step if that is longer. A
loop in this process cannot be ended alone: the server says so and stops.
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

from msgspec import MsgspecError

from ..errors import HanDiffuserError
from ..runtime.requests import Request
from . import messages
from .metrics import Metrics
from .queue import FairQueue
from .worker import Options, work, work_alone

REQUESTS_AHEAD = 2  # that a worker holds beyond its slots, so that a free slot does not wait for the front
MAX_TRIES = 4  # workers that may end while they have a request, before the request fails
MAX_PAUSE_SECONDS = 30.0  # before a worker that keeps ending is started again
MAX_DEATHS = 3  # in a row, after which requests no longer wait for a worker to come back
MAX_HANDS_REQUESTS = 64  # for hands alone, at once
RATE_DECAY = 0.98  # what earlier measurements count for, at each picture
LOOK_SECONDS = 1.0  # between two looks at workers that may hang
STUCK_SECONDS = 60  # without a message
STUCK_STEPS = 10.0  # times the slowest step; and times as long until a worker has shown how slow it is
CROWDED = "The queue is full, and a client with fewer pictures in it came. Try again later."


class BusyError(HanDiffuserError):
    """The server takes no request now: try again in `seconds`."""

    def __init__(self, sentence: str, seconds: float, loading: bool = False) -> None:
        super().__init__(sentence)
        self.seconds, self.loading = seconds, loading


@dataclass(eq=False)
class Ticket:
    """A request on its way, and its answers: hands and previews, if asked for, then a picture or a failure."""

    request: Request
    owner: str
    cost: int  # steps
    preview_steps: Sequence[int] = ()
    hands_first: bool = False
    hands_only: bool = False  # the answer is its hands
    mesh: bool = False  # with the body's vertices
    tries: int = 0  # workers that ended while they had it
    done: bool = False
    came: float = field(default_factory=time.monotonic)
    began: float = 0.0  # when a worker took it
    inbox: asyncio.Queue[messages.Answer] = field(default_factory=asyncio.Queue)

    @property
    def id(self) -> str:
        return str(self.request.id)

    def ends_with(self, message: messages.Answer) -> bool:
        made = messages.HandsMade if self.hands_only else messages.PictureMade
        return isinstance(message, (made, messages.Failed))

    async def result(self, hear: Callable[[messages.Answer], None] = lambda message: None) -> messages.Answer:
        """The last answer. hear: called with each answer as it comes."""
        while True:
            message = await self.inbox.get()
            hear(message)
            if self.ends_with(message):
                return message


class Worker:
    """One loop as the front sees it: a thread of this process, or a process of its own.

    hear(worker, round, message): called in the reading thread; the message None says that the loop has ended.
    """

    def __init__(self, number: int, options: Options, own_process: bool, hear: Callable[..., None]) -> None:
        self.number, self.options, self.own_process, self.hear = number, options, own_process, hear
        self.slots = 0  # 0 until it is ready
        self.tickets: dict[str, Ticket] = {}
        self.pid: int | None = None
        self.deaths = 0  # since its last picture
        self.silent = 0.0  # seconds without a message while it has tickets
        self.slowest = 0.0  # seconds of the longest silence that came to an end
        self.proven = False  # it has run every graph once, so that no request waits for engines to be prepared
        self.thread: threading.Thread | None = None
        self.round = 0  # number of starts: messages from earlier ones are dropped

    def start(self) -> None:
        self.round += 1
        self.slots, self.silent, self.proven = 0, 0.0, False
        ours, theirs = multiprocessing.Pipe()
        self.outbox: queue.SimpleQueue[messages.ToWorker | None] = queue.SimpleQueue()
        self.process: Any = None
        if self.own_process:
            self.process = multiprocessing.get_context("spawn").Process(
                target=work_alone, args=(theirs, self.options), name=f"hd-serve-{self.number}", daemon=True
            )
            self.process.start()
            theirs.close()  # so that this process sees the end of the pipe
        else:
            self.thread = threading.Thread(target=work, args=(theirs, self.options), name="hd-serve-loop", daemon=True)
            self.thread.start()
        hear = partial(self.hear, self, self.round)
        threading.Thread(target=_write, args=(ours, self.outbox), daemon=True).start()
        threading.Thread(target=_read, args=(ours, self.outbox, hear), daemon=True).start()

    def send(self, message: messages.ToWorker) -> None:
        self.outbox.put(message)

    @property
    def room(self) -> int:
        return self.slots + REQUESTS_AHEAD - len(self.tickets) if self.slots else 0


def _write(pipe: Connection, outbox: queue.SimpleQueue[messages.ToWorker | None]) -> None:
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            messages.send(pipe, message)


def _read(pipe: Connection, outbox: queue.SimpleQueue[Any], hear: Callable[[messages.ToFront | None], None]) -> None:
    with contextlib.suppress(EOFError, OSError, MsgspecError):
        while True:
            hear(messages.for_front(pipe))
    hear(None)
    outbox.put(None)
    pipe.close()


class Dispatcher:
    """One queue and the workers behind it, one for each of `options`."""

    def __init__(
        self,
        options: Sequence[Options],
        own_processes: bool,
        places: int = 64,
        metrics: Metrics | None = None,
        say: Callable[[str], None] = lambda sentence: None,
        stuck_seconds: float = STUCK_SECONDS,
    ) -> None:
        """places: pictures that may wait. say: takes sentences for the person that runs the server."""
        self.stuck_seconds = stuck_seconds
        self.queue: FairQueue[Ticket] = FairQueue(places)
        self.workers = [Worker(i, each, own_processes, self._hear) for i, each in enumerate(options)]
        self.metrics, self.say = metrics or Metrics(), say
        self.on_ready: Callable[[messages.Takes], None] = lambda takes: None
        self.draining = self.stopped = False
        self.fatal: str | None = None  # why this server cannot serve at all
        self.changed = asyncio.Event()  # set when a worker becomes ready, and when the server cannot serve
        self.refused: set[int] = set()  # workers that cannot load their engines
        self._served = deque([(0.0, 0.0)], maxlen=1)  # steps, and the busy seconds they took; older ones count less
        self._busy_since: float | None = None

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        for worker in self.workers:
            worker.start()
        self.loop.call_later(LOOK_SECONDS, self._look, time.monotonic())

    @property
    def ready(self) -> bool:
        return any(worker.slots for worker in self.workers) and not self.draining

    @property
    def under_way(self) -> list[Ticket]:
        """Tickets that workers have."""
        return [ticket for worker in self.workers for ticket in worker.tickets.values()]

    @property
    def running(self) -> int:
        """Pictures that workers have."""
        return sum(not ticket.hands_only for ticket in self.under_way)

    @property
    def idle(self) -> bool:
        """Without a ticket, waiting or under way."""
        return not len(self.queue) and not self.under_way

    @property
    def rate(self) -> float:
        """Steps a second of all workers together, as measured; 0 before the first measurement."""
        steps, seconds = self._served[0]
        return steps / seconds if seconds > 0 else 0.0

    def wait_for_room(self) -> float:
        """Seconds until the whole queue of now is likely to be served."""
        return max(1.0, self.queue.cost / self.rate) if self.rate else 5.0

    def submit(
        self, owner: str, requests: Iterable[Request], preview_steps: Sequence[int] = (), hands_first: bool = False
    ) -> list[Ticket]:
        """Puts prepared requests into the queue: all of them or none. Raises BusyError.

        When the queue is full, the owner with the most places loses its newest tickets to an owner with fewer places.
        """
        requests = list(requests)
        self._check(waits=True)
        if len(requests) > self.queue.room:
            for ticket in self.queue.make_room(owner, len(requests)):
                self._end(ticket, messages.Failed(ticket.id, CROWDED, 429))
        if len(requests) > self.queue.room:
            raise BusyError(
                f"The queue is full: {len(self.queue)} pictures wait. Try again later.", self.wait_for_room()
            )
        tickets = [Ticket(request, owner, request.steps or 1, preview_steps, hands_first) for request in requests]
        for ticket in tickets:
            self.queue.put(owner, ticket.cost, ticket)
        self._pump()
        return tickets

    def submit_hands(self, owner: str, request: Request, mesh: bool = False) -> Ticket:
        """Gives a request for hands alone to a worker at once: it takes a fraction of a step. mesh: with the body's
        vertices. Raises BusyError."""
        self._check(waits=False)
        others = sum(ticket.hands_only for ticket in self.under_way)
        if others >= MAX_HANDS_REQUESTS:
            raise BusyError(f"{others} requests for hands are under way. Try again later.", 1.0)
        ticket = Ticket(request, owner, 0, hands_only=True, mesh=mesh)
        self._give(min((w for w in self.workers if w.slots), key=lambda w: len(w.tickets)), ticket)
        return ticket

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """The client no longer waits for these: those that run leave at the next step."""
        for ticket in tickets:
            if ticket.done:
                continue
            ticket.done = True
            if not self.queue.remove(ticket):
                for worker in self.workers:
                    if ticket.id in worker.tickets:
                        worker.send(messages.Cancel(ticket.id))
        self._pump()

    def fail_all(self, sentence: str) -> int:
        """Ends every ticket that is not done. Returns their number."""
        left = [ticket for ticket in [*self.queue, *self.under_way] if not ticket.done]
        for ticket in left:
            self.queue.remove(ticket)
            self._end(ticket, messages.Failed(ticket.id, sentence, 503))
        return len(left)

    async def drain(self, grace_seconds: float) -> int:
        """Takes no new requests and finishes the others within `grace_seconds`. Returns the number that failed."""
        self.draining = True
        end = time.monotonic() + grace_seconds
        while not self.idle and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.fail_all("The server is stopping, and had no time left for this picture. Send it again.")

    def stop(self) -> None:
        """Ends the workers; processes at once."""
        self.draining = self.stopped = True
        for worker in self.workers:
            worker.send(messages.Stop())
            if worker.process is not None:
                worker.process.terminate()
                worker.process.kill()

    def left(self, seconds: float) -> bool:
        """After `stop`: whether a loop in this process still works after so many seconds, perhaps in native code."""
        threads = [worker.thread for worker in self.workers if worker.thread is not None]
        for thread in threads:
            thread.join(seconds)
        return any(thread.is_alive() for thread in threads)

    def _check(self, waits: bool) -> None:
        """Raises BusyError. waits: the request may wait in the queue for a worker that is being started again."""
        if self.draining:
            raise BusyError("The server is stopping and takes no more requests.", 30.0, loading=True)
        back_soon = waits and any(worker.pid is not None and worker.deaths <= MAX_DEATHS for worker in self.workers)
        if not back_soon and not any(worker.slots for worker in self.workers):
            raise BusyError("The server is loading its engines. Try again in a few seconds.", 5.0, loading=True)

    def _pump(self) -> None:
        """Gives waiting tickets to workers that have room, the emptiest first."""
        while len(self.queue):
            worker = max(self.workers, key=lambda worker: worker.room)
            if worker.room <= 0 or (ticket := self.queue.pop()) is None:
                return
            self._give(worker, ticket)

    def _give(self, worker: Worker, ticket: Ticket) -> None:
        if self._busy_since is None:
            self._busy_since = time.monotonic()
        if not ticket.began and not ticket.hands_only:
            self.metrics.waited(time.monotonic() - ticket.came)
        ticket.began = time.monotonic()
        worker.tickets[ticket.id] = ticket
        if ticket.hands_only:
            worker.send(messages.MakeHands(ticket.request, ticket.mesh))
        else:
            worker.send(messages.Run(ticket.request, frozenset(ticket.preview_steps), ticket.hands_first))

    def _hear(self, worker: Worker, round: int, message: messages.ToFront | None) -> None:
        """From a worker's own thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(self._take, worker, round, message)

    def _take(self, worker: Worker, round: int, message: messages.ToFront | None) -> None:
        """A worker's message, or None when the worker has ended."""
        if round != worker.round:
            return
        worker.slowest, worker.silent = max(worker.slowest, worker.silent), 0.0
        match message:
            case None:
                self._gone(worker)
            case messages.Ready():
                self._ready(worker, message)
            case messages.Refused(sentence) | messages.Broken(sentence):
                self.refused.add(worker.number)
                self.say(f"worker {worker.number}: {sentence}")
                at_first = isinstance(message, messages.Refused) and worker.round == 1
                if at_first and len(self.refused) == len(self.workers):
                    self.fatal = sentence
                    self.changed.set()
            case messages.Measured():
                self.metrics.measured(worker.number, message)
            case _:
                self._answered(worker, message)
        self._pump()
        if self.idle:
            self._busy_since = None

    def _answered(self, worker: Worker, message: messages.Answer) -> None:
        ticket = worker.tickets.get(message.id)
        if ticket is None:
            return
        if not ticket.ends_with(message):
            if not ticket.done:
                ticket.inbox.put_nowait(message)
            return
        del worker.tickets[ticket.id]
        if isinstance(message, messages.PictureMade):
            worker.deaths, worker.proven = 0, True
            self._measure(ticket.cost)
            self.metrics.took("picture", time.monotonic() - ticket.began)
        elif isinstance(message, messages.HandsMade):
            self.metrics.took("hands", time.monotonic() - ticket.began)
        if not ticket.done:
            self._end(ticket, message)

    def _end(self, ticket: Ticket, message: messages.Answer) -> None:
        ticket.done = True
        ticket.inbox.put_nowait(message)

    def _ready(self, worker: Worker, facts: messages.Ready) -> None:
        worker.slots, worker.pid = facts.slots, facts.pid
        self.refused.discard(worker.number)
        if facts.slowest is not None:
            worker.slowest, worker.proven = max(worker.slowest, facts.slowest), True
        if facts.rate and not self.rate:
            self._served.append((facts.rate * len(self.workers), 1.0))
        self.on_ready(facts.takes)
        for sentence in facts.warnings if worker.round == 1 and worker.number == 0 else ():
            self.say(sentence)
        self.changed.set()

    def _look(self, before: float) -> None:
        """Looks for workers that hang.

        Time in which this process did not run, or the machine was suspended, does not count: the dispatcher has not
        heard yet what workers said meanwhile.
        """
        now = time.monotonic()
        passed = min(now - before, 2 * LOOK_SECONDS)
        for worker in self.workers:
            worker.silent = worker.silent + passed if worker.tickets else 0.0
            limit = max(self.stuck_seconds, STUCK_STEPS * worker.slowest) * (1 if worker.proven else STUCK_STEPS)
            if worker.silent > limit and not self.stopped and self.fatal is None:
                self._end_stuck(worker)
        if not self.stopped:
            self.loop.call_later(LOOK_SECONDS, self._look, now)

    def _end_stuck(self, worker: Worker) -> None:
        said = f"worker {worker.number} has requests, and has not reported a step for {worker.silent:.0f} seconds"
        if worker.process is None:
            self.fatal = f"The server stops: {said}. It is in the server's own process; start the server again."
            self.fail_all("The server stops, because its model hangs. Send the request again.")
            self.changed.set()
            return
        self.say(f"{said}; it is killed.")
        worker.process.kill()
        worker.round += 1  # its last messages are dropped, and its end too: a process may take long to die
        self._gone(worker)
        self._pump()

    def _gone(self, worker: Worker) -> None:
        """A worker has ended: another worker, or its next start, does its tickets."""
        worker.slots = 0
        if self.stopped:
            return
        left, worker.tickets = list(worker.tickets.values()), {}
        for ticket in reversed(left):
            if ticket.done:
                continue
            ticket.tries += 1
            if ticket.tries >= MAX_TRIES:
                sentence = f"{MAX_TRIES} workers ended while they made this picture."
                self._end(ticket, messages.Failed(ticket.id, sentence))
            elif ticket.hands_only and (others := [other for other in self.workers if other.slots]):
                self._give(min(others, key=lambda other: len(other.tickets)), ticket)
            elif ticket.hands_only:
                self._end(ticket, messages.Failed(ticket.id, "The worker ended. Send the request again.", 503))
            else:
                self.queue.put_back(ticket.owner, ticket.cost, ticket)
        if self.fatal is None:
            worker.deaths += 1
            pause = 0.0 if worker.deaths == 1 else min(2.0 ** (worker.deaths - 2), MAX_PAUSE_SECONDS)
            self.say(f"worker {worker.number} ended; {len(left)} requests go to another. It starts again.")
            self.metrics.restarts.inc()
            self.loop.call_later(pause, self._again, worker)

    def _again(self, worker: Worker) -> None:
        if not self.stopped:
            worker.start()

    def _measure(self, steps: int) -> None:
        """Adds steps that were done, and the seconds since the last ones or since the queue was empty."""
        now = time.monotonic()
        if self._busy_since is not None:
            done, seconds = self._served[0]
            self._served.append((done * RATE_DECAY + steps, seconds * RATE_DECAY + now - self._busy_since))
            self._busy_since = now
