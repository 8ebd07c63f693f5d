"""Words for things in hands, for what two people do together, and for wide sleeves."""

from __future__ import annotations

# Things that are held, and what two people do together: as hands alone, and as {a} and {b}, in either order but for
# an arm around shoulders. {people} is "people", "men" or "women".
THING_WORDS = {
    "cup": ("cup", "mug", "coffee cup", "cup of coffee"),
    "ball": ("ball", "small ball"),
    "phone": ("phone", "smartphone", "mobile phone", "cell phone"),
    "pen": ("pen",),
    "stick": ("stick", "wooden stick"),
    "book": ("book",),
}
HANDS_TOGETHER: dict[str, tuple[str, ...]] = {
    "handshake": ("handshake", "a handshake", "two people shaking hands", "people shaking hands", "shaking hands",
                  "two hands shaking", "two hands in a handshake"),
    "high_five": ("high five", "a high five", "two people giving a high five", "two hands giving a high five",
                  "two hands doing a high five", "two palms meeting in a high five"),
    "holding_hands": ("holding hands", "two people holding hands", "people holding hands", "hand in hand",
                      "two hands holding each other"),
    "passing": ("two hands passing {thing}", "two people passing {thing}", "passing {thing}", "handing over {thing}",
                "a hand handing over {thing}", "a hand giving {thing} to another hand"),
    "arm_around": ("a hand on a shoulder", "a hand on someone's shoulder", "a hand lying on a shoulder",
                   "an arm around shoulders", "a hand on another person's shoulder"),
}  # fmt: skip
TOGETHER: dict[str, tuple[str, ...]] = {
    "handshake": ("{a} and {b} shaking hands", "{a} shaking hands with {b}", "two {people} shaking hands",
                  "two {people} in a handshake", "a handshake between {a} and {b}"),
    "high_five": ("{a} and {b} giving each other a high five", "{a} giving {b} a high five", "two {people} high-fiving",
                  "two {people} giving each other a high five", "two {people} doing a high five"),
    "holding_hands": ("{a} and {b} holding hands", "{a} holding hands with {b}", "two {people} holding hands",
                      "two {people} hand in hand"),
    "passing": ("{a} handing {b} {thing}", "{a} passing {thing} to {b}", "{a} giving {thing} to {b}",
                "two {people} passing {thing}", "two {people} holding {thing} together"),
    "arm_around": ("{a} with an arm around {b}", "{a} with {own} arm around {b}", "{a} putting {own} arm around {b}",
                   "{a} with {own} arm around the shoulders of {b}", "two {people} , one with an arm around the other",
                   "{a} with {own} hand on the shoulder of {b}"),
}  # fmt: skip
CUFF_WORDS = {  # of human_clothes.CUFFS, before "sleeves" and "-sleeved"
    "loose": ("loose", "wide"),
    "bell": ("bell", "wide", "flared", "flowing"),
    "kimono": ("kimono", "wide", "hanging", "very wide"),
}
