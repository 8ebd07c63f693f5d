"""Bend one finger of a hand, and paint the same picture with the new hand.

    python examples/edited_hands.py out

The poses are SMPL-H's: an axis-angle rotation (radians) for each joint, and a flat hand is all zeros.
"""

import sys
from pathlib import Path

from handiffuser import HanDiffuser
from handiffuser.hands import save_hands
from PIL import Image

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
out.mkdir(parents=True, exist_ok=True)
with HanDiffuser.load("demo") as pipeline:
    (before,) = pipeline.generate("an open right hand", seed=3)

    hands = {name: array.copy() for name, array in before.hands.items()}
    fingers = hands["right_hand_pose"].reshape(5, 3, 3)  # index, middle, little, ring, thumb; three joints; axis-angle
    fingers[0, :, 2] = 1.4  # the index finger, about the axis that bends it
    save_hands(out / "bent.hands.npz", hands)  # keeps the camera, so the wrist and the other fingers stay

    (after,) = pipeline.generate("an open right hand", seed=3, hands=str(out / "bent.hands.npz"))
    for name, picture in (("before", before), ("after", after)):
        Image.fromarray(picture.image).save(out / f"{name}.png")
    moved = abs(after.hands["joints_2d"] - before.hands["joints_2d"]).max(-1)[1] * after.image.shape[1]
    print(f"The tip of the index finger moved by {moved[8]:.0f} pixels, the wrist by {moved[0]:.0f}.")
