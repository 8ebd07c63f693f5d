"""Simulates many GPUs from measured step times: waiting times of a fleet behind one queue, and a long batch job.

    python studies/simulate.py --step 1:0.018,8:0.06 --gpus 1,8,64 --utilisation 0.8
    python studies/simulate.py --step 1:0.036,2:0.072

`--step rows:seconds,...` are the seconds of one step of so many rows, as hd-bench measures them ("UNet a step");
between them it is linear. Three ways to serve are compared on the same requests at the same times:

    in-flight    a request takes a free slot at any step and leaves when it is done
    static       the waiting requests, up to the slots, are a batch; the next begins when its longest member is done
    one          each GPU runs one request after the other
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

import click
import numpy as np

Step = Callable[[int], float]
WAYS = ("in-flight", "static", "one")


def step_times(text: str) -> Step:
    """ "1:0.02,8:0.05" -> seconds of a step of any number of rows, linear between and beyond."""
    pairs = sorted((int(rows), float(seconds)) for rows, seconds in (part.split(":") for part in text.split(",")))
    rows, seconds = zip(*pairs, strict=True)
    if len(rows) == 1:
        return lambda n: seconds[0] * n / rows[0]

    def step(n: int) -> float:
        if n > rows[-1]:
            slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])
            return seconds[-1] + slope * (n - rows[-1])
        return float(np.interp(n, rows, seconds))

    return step


def arrivals(count: int, rate: float, bursty: bool, seed: int = 0) -> np.ndarray:
    """Seconds of `count` arrivals, `rate` a second on average. Bursty: ten seconds of a minute bring half of them."""
    random = np.random.default_rng(seed)
    unit = np.cumsum(random.exponential(1.0, count))  # a Poisson process in its own time
    if not bursty:
        return unit / rate
    minute, busy = 60 * rate, 30 * rate  # arrivals a minute, and in its first ten seconds
    whole, rest = np.divmod(unit, minute)
    inside = np.where(rest < busy, rest / (3 * rate), 10 + (rest - busy) / (0.6 * rate))
    return 60 * whole + inside


def serve(way: str, times: Sequence[float], steps: Sequence[int], gpus: int, slots: int, step: Step) -> np.ndarray:
    """Seconds from arrival to picture of each request, [N]; the oldest is served first."""
    done = np.zeros(len(times))
    waiting: deque[int] = deque()
    free = list(range(gpus))  # GPUs that do nothing
    running: list[list[list[int]]] = [[] for _ in range(gpus)]  # of each GPU: [request, steps left]
    events: list[tuple[float, int]] = []  # (when, GPU): the end of what it does
    most = 1 if way == "one" else slots
    next_arrival = 0

    def begin(gpu: int, now: float) -> None:
        jobs = running[gpu]
        if way == "in-flight" or not jobs:
            while waiting and len(jobs) < most:
                request = waiting.popleft()
                jobs.append([request, steps[request]])
        if not jobs:
            free.append(gpu)
            return
        if way == "in-flight":
            heapq.heappush(events, (now + step(len(jobs)), gpu))
        else:
            longest = max(left for _, left in jobs)
            heapq.heappush(events, (now + longest * step(len(jobs)), gpu))

    while next_arrival < len(times) or events:
        if next_arrival < len(times) and (not events or times[next_arrival] <= events[0][0]):
            now = times[next_arrival]
            waiting.append(next_arrival)
            next_arrival += 1
            if free:
                begin(free.pop(0), now)
            continue
        now, gpu = heapq.heappop(events)
        if way == "in-flight":
            for job in running[gpu]:
                job[1] -= 1
            for request, left in running[gpu]:
                if left == 0:
                    done[request] = now
            running[gpu] = [job for job in running[gpu] if job[1]]
        else:
            for request, _ in running[gpu]:
                done[request] = now
            running[gpu] = []
        begin(gpu, now)
    return done - np.asarray(times)


def capacity(gpus: int, slots: int, mean_steps: float, step: Step) -> float:
    """Pictures a second of in-flight batching with all slots full."""
    return gpus * slots / (mean_steps * step(slots))


def saturated(way: str, steps: Sequence[int], gpus: int, slots: int, step: Step) -> float:
    """Pictures a second where there is always one waiting. Arrivals beyond it make a queue that grows for ever."""
    done = np.sort(serve(way, [0.0] * len(steps), steps, gpus, slots, step))
    first, last = len(done) // 4, 3 * len(done) // 4  # neither the beginning nor the end, when some have nothing to do
    return float((last - first) / (done[last] - done[first]))


def batch_job(
    pictures: int, gpus: int, slots: int, steps: float, step: Step, bytes_each: float, mtbf_hours: float
) -> dict:
    """A long run of hd-run --ray: hours, pictures and bytes a second, files, and what failures cost."""
    rate = capacity(gpus, slots, steps, step)
    hours = pictures / rate / 3600
    failures = hours * gpus / mtbf_hours
    lost = 8 * slots / 2 * steps * step(slots) / slots + 60  # half a block of work, and a minute to start again
    return {
        "hours": hours,
        "pictures_per_second": rate,
        "megabytes_per_second": rate * bytes_each / 1e6,
        "files_per_second": 4 * rate,
        "terabytes": pictures * bytes_each / 1e12,
        "failures": failures,
        "gpu_seconds_lost": failures * lost,
        "share_lost": failures * lost / (hours * 3600 * gpus),
    }


@click.command()
@click.option("--step", "steps_text", default="1:0.018,8:0.06", show_default=True, help="rows:seconds,...")
@click.option("--slots", default=8, show_default=True)
@click.option("--gpus", default="1,2,4,8,16,32,64", show_default=True)
@click.option("--utilisation", default=0.8, show_default=True, help="Of the in-flight capacity.")
@click.option("--steps", "around", type=(int, int), default=(10, 40), show_default=True, help="Of a request.")
@click.option("--requests", default=1000, show_default=True, help="A GPU.")
@click.option("--kilobytes", default=120.0, show_default=True, help="Of a picture's four files.")
@click.option("--pictures", default=10_000_000, show_default=True, help="Of the batch job.")
def main(steps_text: str, slots: int, gpus: str, utilisation: float, around: tuple[int, int], requests: int,
         kilobytes: float, pictures: int) -> None:  # fmt: skip
    """Prints both tables in Markdown."""
    step = step_times(steps_text)
    mean = sum(around) / 2
    print("| GPUs | arrivals | " + " | ".join(f"{way} p50 / p95 / p99" for way in WAYS) + " |")
    print("|---|---|" + "---|" * len(WAYS))
    for count in map(int, gpus.split(",")):
        number = requests * count
        lengths = np.random.default_rng(1).integers(around[0], around[1], number, endpoint=True).tolist()
        most = capacity(count, slots, mean, step)
        for bursty in (False, True):
            times = arrivals(number, utilisation * most, bursty).tolist()
            cells = []
            for way in WAYS:
                if utilisation * most > saturated(way, lengths, count, slots, step):
                    cells.append("growing")  # as long as it goes on: no figure would mean anything
                    continue
                waits = serve(way, times, lengths, count, slots, step)
                cells.append(" / ".join(f"{np.quantile(waits, p):.1f}" for p in (0.5, 0.95, 0.99)) + " s")
            print(f"| {count} | {'bursty' if bursty else 'Poisson'} | " + " | ".join(cells) + " |")
    print()
    print("| GPUs | hours | pictures/s | MB/s | files/s | TB | failures | lost to them |")
    print("|---|---|---|---|---|---|---|---|")
    for count in map(int, gpus.split(",")):
        job = batch_job(pictures, count, slots, mean, step, kilobytes * 1e3, mtbf_hours=1000)
        print(
            f"| {count} | {job['hours']:,.0f} | {job['pictures_per_second']:.1f} | {job['megabytes_per_second']:.1f} | "
            f"{job['files_per_second']:.0f} | {job['terabytes']:.2f} | {job['failures']:.1f} | "
            f"{job['gpu_seconds_lost']:.0f} GPU seconds |"
        )


if __name__ == "__main__":
    main()
