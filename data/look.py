"""One page that shows how well a dataset's annotations fit, and how diverse it is.

    look("photos", Path("page.html"), body)

The page has a contact sheet of random samples: captions, and skeletons over the pictures. Its histograms count hands in
a picture, their size in pixels, the bend of their fingers, and the tone of their skin as its individual typology angle.
It is one file that loads nothing else.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DatasetError
from ..files import written
from ..models.smplh import SMPLH
from ..schema import MisfitError
from ..skeleton import draw_skeleton
from .dataset import Index, permutation
from .hands import joints_in_picture
from .samples import Bad, Sample, person, picture

SHOWN = 60  # samples on the sheet
COUNTED = 2000  # samples in the histograms
THUMBNAIL = 320  # pixels of the longer side
BATCH = 32

# Names of skin tones by their individual typology angle in degrees (Chardon et al. 1991, Del Bino and Bernerd 2013).
TONES = ((55, "very light"), (41, "light"), (28, "intermediate"), (10, "tan"), (-30, "brown"), (-90, "dark"))
# Joints inside a hand, most likely to show its skin: knuckles and the middle joints of the fingers.
ON_SKIN = (1, 2, 5, 6, 9, 10, 13, 14, 17, 18)


@dataclass
class Facts:
    """What the page counts: one entry a picture, or a hand."""

    hands: list[int] = field(default_factory=list)  # a picture
    pixels: list[float] = field(default_factory=list)  # a hand's longer side
    bends: list[float] = field(default_factory=list)  # degrees, of each of a hand's 15 joints
    tones: list[float] = field(default_factory=list)  # ITA in degrees, a hand
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)


def look(
    folder: str | Path,
    output: str | Path,
    body: SMPLH,
    *,
    shown: int = SHOWN,
    counted: int = COUNTED,
    seed: int = 0,
    body_name: str = "the demo's body",
    on_progress: Callable[[int, int], None] | None = None,
) -> Facts:
    """Writes the page and returns its counts. shown, counted: numbers of random samples (of `seed`)."""
    index = Index.open(folder)
    rows = permutation(len(index), seed, 0)[: max(shown, counted)].tolist()
    facts = Facts()
    figures: list[str] = []
    for start in range(0, len(rows), BATCH):
        samples = []
        for row in rows[start : start + BATCH]:
            sample = index.sample(row)
            if isinstance(sample, Bad):
                facts.bad.append(sample)
            else:
                samples.append(sample)
        figures += gather(samples, facts, body, shown - len(figures))
        if on_progress is not None:
            on_progress(min(start + BATCH, len(rows)), len(rows))
    text = page(Path(folder).resolve().name, len(index), facts, figures, body_name)
    output = Path(output)
    try:
        with written(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DatasetError(f"{output} cannot be written: {error.strerror or error}. Name another --output.") from error
    return facts


def gather(samples: Sequence[Sample], facts: Facts, body: SMPLH, wanted: int) -> list[str]:
    """Counts some samples, and draws the first `wanted` of them: HTML figures."""
    images: list[np.ndarray | None] = []
    people, aspects, owners = [], [], []
    for number, sample in enumerate(samples):
        try:
            images.append(picture(sample) if sample.image is not None else None)
        except MisfitError as error:
            images.append(None)
            facts.bad.append(Bad(sample.key, "", str(error)))
        image = images[-1]
        for i in range(sample.people):
            people.append(person(sample.hands or {}, i))
            aspects.append(1.0 if image is None else image.shape[1] / image.shape[0])
            owners.append(number)
        for name, word in (sample.meta.get("labels") or {}).items():
            facts.labels.setdefault(name, Counter())[word] += 1
    joints, seen = joints_in_picture(people, aspects, body) if people else (np.zeros((0, 2, 21, 2)), np.zeros((0, 2)))
    figures: list[str] = []
    for number, sample in enumerate(samples):
        image, mine = images[number], [i for i, owner in enumerate(owners) if owner == number]
        facts.hands.append(int(sum(seen[i].sum() for i in mine)))
        for i in mine:
            for side, name in enumerate(("left", "right")):
                if not seen[i, side]:
                    continue
                bends = people[i][f"{name}_hand_pose"].reshape(15, 3)
                facts.bends += np.rad2deg(np.linalg.norm(bends, axis=-1)).tolist()
                if image is not None:
                    height, width = image.shape[:2]
                    points = joints[i, side] * (width, height)
                    facts.pixels.append(float(np.ptp(points, axis=0).max()))
                    tone = skin_tone(image, points)
                    facts.tones += [] if tone is None else [tone]
        if len(figures) < wanted:
            figures.append(_figure(sample, image, [(joints[i], seen[i]) for i in mine]))
    return figures


def skin_tone(image: np.ndarray, points: np.ndarray) -> float | None:
    """ITA = arctan((L* - 50) / b*) in degrees, of the median colour at a hand's inner joints; None off the picture.

    image: uint8 [H, W, 3]; points: [21, 2] in pixels. From -90 (dark) to 90 (light). A hand in shadow reads darker.
    """
    height, width = image.shape[:2]
    x, y = np.floor(points[list(ON_SKIN)]).astype(int).T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if inside.sum() < 3:
        return None
    lightness, _, b = np.median(srgb_to_lab(image[y[inside], x[inside]]), axis=0)
    return float(np.rad2deg(np.arctan2(lightness - 50, abs(b) + 1e-6)))


def srgb_to_lab(colours: np.ndarray) -> np.ndarray:
    """uint8 sRGB [N, 3] -> CIE L*a*b* [N, 3], D65 (IEC 61966-2-1; CIE 15)."""
    c = colours / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = linear @ to_xyz.T / (to_xyz.sum(1))
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


def tone_name(angle: float) -> str:
    """ "tan" for 10 to 28 degrees, and so on."""
    return next(name for least, name in TONES if angle > least or least == -90)


# --- the page ---


def page(name: str, count: int, facts: Facts, figures: Sequence[str], body_name: str) -> str:
    """The whole HTML."""
    hands = Counter(min(n, 3) for n in facts.hands)
    tones = Counter(tone_name(angle) for angle in facts.tones)
    charts = [
        bars("hands in a picture", [("none", hands[0]), ("one", hands[1]), ("two", hands[2]), ("more", hands[3])]),
        histogram("a hand's longer side, pixels", facts.pixels, ""),
        histogram("how far a finger's joint is turned, degrees", facts.bends, "°"),
        bars("skin tone (ITA at the joints)", [(tone, tones[tone]) for _, tone in TONES]),
        histogram("individual typology angle, degrees", facts.tones, "°"),
        *(bars(f"label: {label}", words.most_common(24)) for label, words in sorted(facts.labels.items())),
    ]
    wrong = "".join(f"<li>{html.escape(str(bad))}</li>" for bad in facts.bad[:50])
    more = f"<li>and {len(facts.bad) - 50} more: hd-data check names them</li>" if len(facts.bad) > 50 else ""
    title = html.escape(name)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2rem; }}
section {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 1.5rem 2rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)); gap: 1.5rem; }}
h2 {{ font-size: 1rem; margin: 0 0 .3rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; display: block; border-radius: 4px; background: #8883; }}
figcaption {{ overflow-wrap: anywhere; margin-top: .4rem; }}
.small {{ opacity: .7; font-size: 12px; }}
.bar {{ display: grid; grid-template-columns: 9rem 1fr 4rem; gap: .5rem; align-items: center; font-size: 12px; }}
.bar i {{ background: #48c; height: .8rem; display: block; min-width: 1px; }}
.bar b {{ font-weight: normal; text-align: right; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
</style>
<h1>{title}: {count} samples</h1>
<p>Counted: {len(facts.hands)} random ones. Skeletons show the joints of {html.escape(body_name)}, which training
uses. {"Unreadable samples:" if wrong else ""}</p>
<ul>{wrong}{more}</ul>
<section>
{"".join(charts)}
</section>
<h1>{len(figures)} of them</h1>
<main>
{"".join(figures)}
</main>
</html>
"""


def bars(title: str, values: Sequence[tuple[str, int]]) -> str:
    """A chart of counts, a row each."""
    total, most = sum(n for _, n in values), max((n for _, n in values), default=0)
    rows = "".join(
        f'<div class="bar"><b title="{html.escape(name)}">{html.escape(name)}</b>'
        f'<span><i style="width:{100 * n / max(most, 1):.1f}%"></i></span><span>{n / max(total, 1):.1%}</span></div>'
        for name, n in values
    )
    return f"<div><h2>{html.escape(title)}</h2>{rows}</div>\n"


def histogram(title: str, values: Sequence[float], unit: str) -> str:
    """A chart of up to 12 round classes, from the 0.5th to the 99.5th percentile."""
    if not values:
        return f'<div><h2>{html.escape(title)}</h2><p class="small">nothing to count</p></div>\n'
    data = np.asarray(values)
    low, high = np.percentile(data, [0.5, 99.5])
    step = next(s for s in (n * 10.0**e for e in range(-3, 7) for n in (1, 2, 5)) if (high - low) / s <= 11)
    first = np.floor(low / step)
    numbers = np.clip(np.floor(data / step) - first, 0, np.floor(high / step) - first).astype(int)
    counts = np.bincount(numbers)
    rows = [(f"{(first + i) * step:g} to {(first + i + 1) * step:g}{unit}", int(n)) for i, n in enumerate(counts)]
    median = f"median {np.median(data):.3g}{unit}"
    return bars(f"{title} ({median})", rows)


def _figure(sample: Sample, image: np.ndarray | None, people: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    size = "no picture" if image is None else f"{image.shape[1]} x {image.shape[0]}"
    canvas = np.full((256, 256, 3), 128, np.uint8) if image is None else image
    source = Image.fromarray(canvas)
    source.thumbnail((THUMBNAIL, THUMBNAIL))
    drawn = np.asarray(source)
    for joints, seen in people:
        drawn = draw_skeleton(drawn, joints, seen.astype(float))
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = "<br>".join(html.escape(prompt[:300]) for prompt in sample.prompts[:4])
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{html.escape(sample.prompts[0][:300])}" loading="lazy">'
        f'<figcaption>{words}<div class="small">{html.escape(sample.key)} · {size}</div></figcaption></figure>\n'
    )
