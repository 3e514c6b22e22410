"""What the small vision-language model learns from: drawn pictures, and questions about what is in them.

A picture holds a few small shapes, each somewhere on a textured background, so that most patches show nothing that is
asked for. Questions ask for a colour, a shape, a count, a place, or whether something is there; each has the same
number of words, and its answer is one word. A seed decides everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SIZE, PATCH = 96, 8
"""Pixels along a side of a picture, and of a patch of it."""

PATCHES = (SIZE // PATCH) ** 2

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
PLACES = ("upper-left", "upper-right", "lower-left", "lower-right")
COUNTS = ("none", "one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "place", "presence")

SPECIAL = ("<pad>", "<bos>", "<image>")
PAD, BOS, IMAGE = range(3)
PLURALS = ("circles", "squares", "triangles", "crosses")
_PLAIN = (
    "which",
    "how",
    "many",
    "is",
    "are",
    "there",
    "has",
    "a",
    "the",
    "things",
    "something",
    "corner",
    "colour",
    "shape",
)
VOCABULARY = (*SPECIAL, *SHAPES, *COLOURS, *PLACES, *COUNTS, "yes", "no", *PLURALS, *_PLAIN)
IDS = {word: place for place, word in enumerate(VOCABULARY)}

WORDS = 5
"""Length of every question."""

FIRST_IMAGE = 1
"""Place of the first image token: only <bos> stands before it."""

LENGTH = FIRST_IMAGE + PATCHES + WORDS

MOST_OBJECTS = 5
_RGB = np.array(
    [
        (0.85, 0.1, 0.1),
        (0.1, 0.65, 0.15),
        (0.15, 0.25, 0.9),
        (0.9, 0.8, 0.1),
        (0.6, 0.15, 0.7),
        (0.95, 0.95, 0.95),
    ],
    np.float32,
)
_WINDOW = 20  # pixels along a side of the square an object is drawn in
_NEAREST = 17.0  # pixels between the centres of two objects, at least
_MIDLINE = 5.0  # pixels between a centre and the lines that part left from right: no place is in doubt


@dataclass(frozen=True)
class Scenes:
    """What is in n pictures, for up to m objects each.

    shapes, colours: places in SHAPES and COLOURS, int64 [n, m], -1 where a picture has fewer objects. centres: float32
    [n, m, 2], y and x in pixels.
    """

    shapes: np.ndarray
    colours: np.ndarray
    centres: np.ndarray

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def there(self) -> np.ndarray:
        """bool [n, m]: which of the objects exist."""
        return self.shapes >= 0

    @property
    def places(self) -> np.ndarray:
        """Places in PLACES, int64 [n, m]."""
        lower, right = np.moveaxis(self.centres > SIZE / 2, -1, 0)
        return 2 * lower.astype(np.int64) + right


@dataclass(frozen=True)
class Questions:
    """m prompts of <bos>, the image tokens and the words of a question, without padding.

    input_ids, attention_mask: int64 [m, LENGTH]. answers: ids, int64 [m]. kinds: places in KINDS, int64 [m]. picture:
    which picture is asked about, int64 [m].
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    answers: np.ndarray
    kinds: np.ndarray
    picture: np.ndarray

    @property
    def words(self) -> np.ndarray:
        """Ids of the questions alone, int64 [m, WORDS]."""
        return self.input_ids[:, -WORDS:]


def decode(ids: np.ndarray) -> str:
    """The words of ids [n]; a run of image tokens is written once."""
    words: list[str] = []
    for place in np.asarray(ids).ravel():
        if not (place == IMAGE and words and words[-1] == SPECIAL[IMAGE]):
            words.append(VOCABULARY[int(place)])
    return " ".join(words)


def pictures(seed: int | list[int], count: int, most: int = MOST_OBJECTS) -> tuple[np.ndarray, Scenes]:
    """float32 [count, 3, SIZE, SIZE] in about -1 to 1, and what is in them: one to `most` objects."""
    random = np.random.default_rng(seed)
    scenes = _scenes(random, count, most)
    canvas = _backgrounds(random, count)
    _draw(random, canvas, scenes)
    canvas += random.standard_normal(canvas.shape, np.float32) * np.float32(0.03)
    return 2 * canvas - 1, scenes


def _scenes(random: np.random.Generator, count: int, most: int) -> Scenes:
    slots = (count, most)
    there = np.arange(most) < random.integers(min(2, most), most + 1, count)[:, None]
    shapes, colours = random.integers(0, len(SHAPES), slots), random.integers(0, len(COLOURS), slots)
    # Drawn one by one, objects would seldom be alike, and large counts would be rare.
    for kinds in (shapes, colours):
        alike = (random.random(slots) < 0.8) & (random.random((count, 1)) < 0.35)
        kinds[:] = np.where(alike, kinds[:, :1], kinds)
    for kinds in (shapes, colours):  # five alike have no word
        kinds[:, 4:][(kinds[:, :1] == kinds[:, 1:4]).all(1)[:, None] & (kinds[:, 4:] == kinds[:, :1])] += 1
    shapes, colours = shapes % len(SHAPES), colours % len(COLOURS)
    return Scenes(np.where(there, shapes, -1), np.where(there, colours, -1), _centres(random, count, most))


def _centres(random: np.random.Generator, count: int, most: int) -> np.ndarray:
    """Draws until no two objects of a picture are near each other."""
    centres = np.empty((count, most, 2), np.float32)
    open_ = np.arange(count)
    while len(open_):
        drawn = random.uniform(0, 1, (len(open_), most, 2)).astype(np.float32)
        room = SIZE / 2 - _MIDLINE - 8
        half = random.integers(0, 2, drawn.shape)
        drawn = 8 + drawn * room + half * (SIZE / 2 + _MIDLINE - 8)
        centres[open_] = drawn
        apart = np.square(drawn[:, :, None] - drawn[:, None]).sum(-1) + np.eye(most) * SIZE**2
        open_ = open_[apart.min((1, 2)) < _NEAREST**2]
    return centres


def _backgrounds(random: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count, 3, SIZE, SIZE] in 0 to 1: dull colours that change slowly, with stripes and grain."""
    coarse = 8
    knots = random.standard_normal((count, 4, coarse, coarse), np.float32)
    at = np.linspace(0, coarse - 1, SIZE)
    ramp = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(coarse))).astype(np.float32)
    smooth = ramp @ knots @ ramp.T
    base = random.uniform(0.3, 0.6, (count, 1, 1, 1)).astype(np.float32)
    tint = smooth[:, :3] * np.float32(0.035) + smooth[:, 3:] * np.float32(0.06)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    angle, step = random.uniform(0, np.pi, count), random.uniform(0.2, 0.9, count)
    across = (np.cos(angle) * step)[:, None, None] * y + (np.sin(angle) * step)[:, None, None] * x
    stripes = np.sin(across.astype(np.float32))[:, None] * random.uniform(0, 0.05, (count, 1, 1, 1)).astype(
        np.float32
    )
    grain = random.standard_normal((count, 1, SIZE // 2, SIZE // 2), np.float32) * np.float32(0.025)
    return base + tint + stripes + grain.repeat(2, 2).repeat(2, 3)


def _draw(random: np.random.Generator, canvas: np.ndarray, scenes: Scenes) -> None:
    """Puts the objects into canvas [n, 3, SIZE, SIZE], each turned a little and of its own size and shade."""
    picture, slot = np.nonzero(scenes.there)
    n = len(picture)
    centre = scenes.centres[picture, slot]
    corner = np.clip(np.round(centre).astype(np.int64) - _WINDOW // 2, 0, SIZE - _WINDOW)
    rows = corner[:, 0, None] + np.arange(_WINDOW)
    columns = corner[:, 1, None] + np.arange(_WINDOW)
    y = (rows + 0.5 - centre[:, :1])[:, :, None]
    x = (columns + 0.5 - centre[:, 1:])[:, None, :]
    turn = random.uniform(-0.3, 0.3, (n, 1, 1))
    y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
    radius = random.uniform(4.5, 6.0, (n, 1, 1))
    cover = _cover(scenes.shapes[picture, slot], y, x, radius).astype(np.float32)[:, None]
    shade = _RGB[scenes.colours[picture, slot]] * random.uniform(0.85, 1.05, (n, 1)).astype(np.float32)
    index = (
        picture[:, None, None, None],
        np.arange(3)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    )
    for last in range(scenes.shapes.shape[1]):  # windows of one picture may overlap
        at = slot == last
        part = (index[0][at], index[1], index[2][at], index[3][at])
        canvas[part] += cover[at] * (shade[at][:, :, None, None] - canvas[part])


def _cover(shapes: np.ndarray, y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How much of each pixel lies in the shape, 0 to 1, [n, w, w]; y and x from its centre."""
    side, thin = 0.88 * radius, 0.36 * radius
    ay, ax = np.abs(y), np.abs(x)
    bar = np.maximum(np.minimum(ay, ax) - thin, np.maximum(ay, ax) - 1.05 * radius)
    slope = np.maximum(0.866 * ax - 0.5 * y, y) - 0.62 * radius
    outside = np.choose(
        shapes[:, None, None], [np.hypot(y, x) - radius, np.maximum(ay, ax) - side, slope, bar]
    )
    return np.clip(0.5 - outside, 0, 1)


def patch_labels(scenes: Scenes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape, colour and place of the object in each patch, int64 [n, PATCHES]: one more than the place in SHAPES,
    COLOURS or PLACES, 0 where no object reaches far into the patch."""
    middle = (np.arange(SIZE // PATCH) + 0.5) * PATCH
    away = np.abs(scenes.centres[:, :, :, None] - middle)  # [n, m, 2, side]
    near = np.maximum(away[:, :, 0, :, None], away[:, :, 1, None, :]).reshape(*scenes.shapes.shape, PATCHES)
    near = np.where(scenes.there[..., None], near, SIZE)
    nearest, reached = near.argmin(1), near.min(1) < PATCH / 2 + 3
    shapes, colours, places = (
        np.where(reached, np.take_along_axis(found, nearest, 1) + 1, 0)
        for found in (scenes.shapes, scenes.colours, scenes.places)
    )
    return shapes, colours, places


def summaries(scenes: Scenes) -> np.ndarray:
    """What a caption would tell, float32 [n, 64], 0 or 1: which shape is there in which colour (24), and which shape
    (16) and which colour (24) is where."""
    n = len(scenes)
    told = np.zeros((n + 1, 64), np.float32)
    picture = np.where(scenes.there, np.arange(n)[:, None], n)  # what does not exist goes to a row of its own
    shape, colour, place = scenes.shapes, scenes.colours, scenes.places
    told[picture, shape * len(COLOURS) + colour] = 1
    told[picture, 24 + shape * len(PLACES) + place] = 1
    told[picture, 40 + colour * len(PLACES) + place] = 1
    return told[:n]


def questions(scenes: Scenes, seed: int | list[int], per_picture: int) -> Questions:
    """`per_picture` questions about each picture, picture by picture. Their kinds are about equally frequent, and so
    are the answers of a kind, as far as the pictures allow."""
    random = np.random.default_rng(seed)
    words, answers, kinds = [], [], []
    for shapes, colours, places, there in zip(scenes.shapes, scenes.colours, scenes.places, scenes.there):
        objects = list(zip(shapes[there].tolist(), colours[there].tolist(), places[there].tolist()))
        options = list(_askable(objects))
        by_kind = [[option for option in options if option[0] == kind] for kind in range(len(KINDS))]
        by_kind = [found for found in by_kind if found]
        order = np.concatenate([random.permutation(len(by_kind)) for _ in range(per_picture)])[:per_picture]
        for which in order:
            by_answer: dict[str, list[tuple[int, str, str]]] = {}
            for option in by_kind[which]:
                by_answer.setdefault(option[2], []).append(option)
            same = list(by_answer.values())[random.integers(len(by_answer))]
            kind, text, answer = same[random.integers(len(same))]
            words.append([IDS[word] for word in text.split()])
            answers.append(IDS[answer])
            kinds.append(kind)
    m = len(words)
    ids = np.full((m, LENGTH), IMAGE, np.int64)
    ids[:, 0] = BOS
    ids[:, -WORDS:] = words
    picture = np.repeat(np.arange(len(scenes)), per_picture)
    return Questions(ids, np.ones_like(ids), np.array(answers), np.array(kinds), picture)


def _askable(objects: list[tuple[int, int, int]]) -> Iterator[tuple[int, str, str]]:
    """Kind, words and answer of everything that has one answer; objects: shape, colour and place."""
    for shape, name in enumerate(SHAPES):
        alike = [found for found in objects if found[0] == shape]
        yield 2, f"how many things are {PLURALS[shape]}", COUNTS[len(alike)]
        if len(alike) == 1:
            yield 0, f"which colour has the {name}", COLOURS[alike[0][1]]
            yield 3, f"which corner has the {name}", PLACES[alike[0][2]]
    for colour, name in enumerate(COLOURS):
        alike = [found for found in objects if found[1] == colour]
        yield 2, f"how many things are {name}", COUNTS[len(alike)]
        if len(alike) == 1:
            yield 1, f"which shape has colour {name}", SHAPES[alike[0][0]]
            yield 3, f"which corner has something {name}", PLACES[alike[0][2]]
    pairs = {found[:2] for found in objects}
    shapes, colours = {shape for shape, _ in pairs}, {colour for _, colour in pairs}
    mixed = {(shape, colour) for shape in shapes for colour in colours} - pairs
    # What is not there is made of what is, where it can be: a colour or a shape alone does not tell.
    absent = mixed or {(shape, colour) for shape in shapes for colour in range(len(COLOURS))} - pairs
    for shape, colour in sorted(pairs | absent):
        text = f"is there a {COLOURS[colour]} {SHAPES[shape]}"
        yield 4, text, "yes" if (shape, colour) in pairs else "no"
