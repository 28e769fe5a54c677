"""Retinal OCT phantoms: B-scans drawn with numpy whose pathology is known, to run the whole pipeline on.

A scan is drawn in three steps. An `Eye` (anatomy and device) and the pose of one scan give a `Retina`:
heights, thicknesses and grey levels per image column. Each finding bends those columns or drops inclusions
(cysts, exudates) into them. `_render` turns the columns into layers, shadows, choroid and speckle. Every draw
is a function of (seed, what it is for), so one finding more or less leaves the rest of the scan as it was.

No medical data went into this file: proportions and grey levels imitate macular B-scans as seen in their
central 256 x 256 crop. Findings are drawn at the large end of their natural size, so that they survive
reduction to 64 x 64 pixels.
"""

from dataclasses import dataclass
from functools import partial
from itertools import count as count_up
from itertools import islice

import numpy as np
from PIL import Image, ImageOps

from dataset.collection import Collection, Record

LABELS = ("NOR", "AMD", "WAMD", "DR", "CSC", "PED", "MEM", "FLD", "EXU", "CNV", "RVO")

# Leading diagnosis: its share of eyes, and how often each other finding accompanies it. The shares are skewed
# as in a clinic; companions are findings seen together (wet AMD lifts the RPE, diabetes leaks fluid and fat).
DIAGNOSES = {
    "NOR": (0.38, {}),
    "AMD": (0.16, {"PED": 0.20, "MEM": 0.12, "CNV": 0.06}),
    "DR": (0.13, {"EXU": 0.40, "FLD": 0.35, "MEM": 0.15}),
    "MEM": (0.08, {"FLD": 0.30}),
    "WAMD": (0.07, {"PED": 0.30, "FLD": 0.25, "CNV": 0.20, "EXU": 0.15}),
    "CSC": (0.05, {"PED": 0.30}),
    "RVO": (0.04, {"FLD": 0.40, "EXU": 0.30}),
    "FLD": (0.03, {"EXU": 0.20}),
    "PED": (0.03, {"AMD": 0.30}),
    "EXU": (0.02, {}),
    "CNV": (0.01, {"FLD": 0.30}),
}
SCANS_PER_PATIENT = (0.2, 0.3, 0.2, 0.3)  # share of patients with 1, 2, 3, 4 images
SAME_DIAGNOSIS = 0.5  # how often the second eye has the labels of the first

SIDE = 256  # pixels; every scan is drawn at this size and then reduced or enlarged

# Neurosensory retina from the vitreous down: name, thickness in pixels outside the fovea, share of it lost in
# the foveal pit, grey level above the background.
LAYERS = (
    ("NFL", 5.5, 0.90, 128),
    ("GCL+IPL", 18.0, 0.97, 82),
    ("INL", 8.5, 0.97, 46),
    ("OPL", 6.0, 0.95, 66),
    ("ONL", 13.0, -0.25, 28),
    ("ELM", 1.5, 0.0, 52),
    ("myoid", 3.0, -0.2, 34),
    ("EZ", 3.5, 0.0, 145),
    ("OS", 2.2, -0.3, 82),
)
INNER = 4  # the first four layers swell in oedema and vanish in the pit
ONL = INNER  # index of the layer that gives way where something lifts the retina
RPE_THICKNESS = 5.5
# Boundaries under LAYERS: tops of subretinal fluid, subretinal material, RPE, sub-RPE deposit, and choroid.
SURFACE, RPE, BRUCH = 0, -3, -1  # indices of three boundaries
FLUID_GREY, MATERIAL_GREY, RPE_GREY, CHOROID_GREY = 4, 112, 172, 78


@dataclass(frozen=True)
class Eye:
    """What all scans of one eye share: anatomy in pixels, device in grey levels."""

    thickness: float  # factor on every layer
    pit_width: float
    pit_depth: float
    curvature: float  # how far the RPE rises towards the image border
    height: float  # of Bruch's membrane at the fovea, from the top
    nasal: float  # how much thicker the NFL is on the nasal side (right in a right eye)
    reflectivity: np.ndarray  # factor per layer
    penetration: float  # of light into the choroid
    averaged: bool  # does the device average many B-scans? Then dark background, little speckle
    background: float
    gain: float
    speckle: float  # standard deviation / mean
    vessels: np.ndarray  # columns relative to the fovea

    @classmethod
    def draw(cls, rng):
        averaged = bool(rng.random() < 0.3)
        return cls(
            thickness=rng.uniform(0.86, 1.1),
            pit_width=rng.uniform(28, 44),
            pit_depth=rng.uniform(0.8, 1.0),
            curvature=rng.uniform(-4, 16),
            height=rng.uniform(150, 196),
            nasal=rng.uniform(0.2, 0.9),
            reflectivity=rng.uniform(0.86, 1.14, len(LAYERS)),
            penetration=rng.uniform(14, 38) if averaged else rng.uniform(9, 18),
            averaged=averaged,
            background=rng.uniform(1, 18) if averaged else rng.uniform(22, 38),
            gain=rng.uniform(0.88, 1.15),
            speckle=rng.uniform(0.04, 0.09) if averaged else rng.uniform(0.10, 0.16),
            vessels=rng.uniform(-150, 150, rng.integers(3, 7)),
        )


@dataclass(frozen=True)
class Inclusion:
    """A lump of foreign matter: x and radii in pixels, depth from 0 (inner surface) to 1 (RPE)."""

    x: float
    depth: float
    rx: float
    ry: float
    grey: float
    shadow: float = 0.0  # share of the light it withholds from everything below
    fuzzy: bool = False


class Retina:
    """The columns of one scan, bent by the findings. Arrays are (SIDE,), heights in pixels."""

    def __init__(self, eye, x, bruch, wobble, severity):
        self.eye = eye
        self.x = x  # column relative to the fovea
        self.bruch = bruch  # y of Bruch's membrane
        self.wobble = wobble  # (len(LAYERS), SIDE) factor on the thickness of each layer
        self.severity = severity  # factor on the size of every finding in this scan
        self.pit = 1.0  # what is left of the foveal pit
        self.folds = np.zeros(SIDE)  # displacement of the inner surface
        self.membrane = np.zeros(SIDE)  # grey level of an epiretinal membrane
        self.inner_swelling = np.zeros(SIDE)
        self.outer_swelling = np.zeros(SIDE)
        self.inner_gain = np.ones(SIDE)
        self.fluid = np.zeros(SIDE)  # under the retina, over the RPE
        self.material = np.zeros(SIDE)  # under the fluid, hyperreflective
        self.damage = np.zeros(SIDE)  # share of the EZ and RPE reflectivity that is lost
        self.elevation = np.zeros(SIDE)  # of the RPE over Bruch's membrane
        self.elevation_grey = np.zeros(SIDE)  # what fills the space under it
        self.inclusions = []

    def elevate_rpe(self, profile, grey):
        """Lift the RPE by `profile` (SIDE,) over matter of level `grey`; the higher elevation counts."""
        self.elevation_grey = np.where(profile > self.elevation, grey, self.elevation_grey)
        self.elevation = np.maximum(self.elevation, profile)

    def include(self, *args, **kwargs):
        """Add one Inclusion."""
        self.inclusions.append(Inclusion(*args, **kwargs))


def _bell(x, centre, width):
    return np.exp(-0.5 * ((x - centre) / width) ** 2)


def _dome(x, centre, half_width):
    """A blister: 1 at `centre`, 0 beyond `half_width`, with a short foot instead of a corner."""
    square = ((x - centre) / half_width) ** 2
    return np.where(square < 0.81, 1 - square, 0.19 * np.exp(-(np.sqrt(square) - 0.9) * 9.5))


def _amd(retina, rng):
    """Drusen: bumps of the RPE over grey deposits."""
    place = rng.uniform(-105, -80)
    while place < 100:
        half_width = rng.choice([7, 10, 15]) * rng.uniform(0.9, 1.2)
        bump = np.exp(-np.abs((retina.x - place) / half_width) ** 2.8)
        retina.elevate_rpe(retina.severity * (4 + 0.75 * half_width) * rng.uniform(0.85, 1.15) * bump, 64)
        place += 12 + rng.uniform(0.9, 3.2) * half_width


def _wamd(retina, rng):
    """Wet AMD: hyperreflective material under the retina, fluid beside it, an irregular RPE."""
    place, s, side = rng.uniform(-25, 25), retina.severity, rng.choice([-1, 1])
    retina.material += s * rng.uniform(18, 25) * _dome(retina.x, place, rng.uniform(44, 60))
    retina.fluid += s * rng.uniform(20, 28) * _dome(retina.x, place + side * 46, rng.uniform(40, 52))
    ripple = sum(np.sin(retina.x * rng.uniform(0.1, 0.35) + rng.uniform(0, 6)) for _ in range(3))
    retina.elevate_rpe(np.maximum(s * (4 + 2.2 * ripple), 0) * _bell(retina.x, place, 50), 70)
    retina.damage = np.maximum(retina.damage, 0.4 * _bell(retina.x, place, 30))
    retina.pit *= 0.6


def _dr(retina, rng):
    """Diabetic retinopathy: swollen inner layers with many small cysts and hyperreflective foci."""
    s = retina.severity
    retina.inner_swelling += s * rng.uniform(12, 20) * _bell(retina.x, rng.uniform(-30, 30), 95)
    retina.pit *= 0.45
    place = -115
    while place < 115:  # two rows of cysts, in the inner and in the outer plexiform region
        rx, ry = s * rng.uniform(4.5, 9.5), s * rng.uniform(4, 8.5)
        retina.include(place, rng.choice([0.38, 0.6]) + rng.normal(0, 0.05), rx, ry, rng.uniform(2, 14))
        place += rng.uniform(9, 21)
    for _ in range(rng.integers(12, 18)):
        r = rng.uniform(1.8, 3.4)
        retina.include(rng.uniform(-110, 110), rng.uniform(0.2, 0.8), r, r, 190, shadow=0.15)


def _csc(retina, rng):
    """Central serous chorioretinopathy: one large dome of clear fluid lifts the fovea off a smooth RPE."""
    place, half_width = rng.uniform(-14, 14), rng.uniform(72, 98)
    retina.fluid += retina.severity * rng.uniform(34, 44) * _dome(retina.x, place, half_width)
    retina.pit *= 0.85


def _ped(retina, rng):
    """Pigment epithelial detachment: a smooth RPE dome over rather dark fluid."""
    place, height = rng.choice([-1, 1]) * rng.uniform(15, 55), retina.severity * rng.uniform(36, 46)
    retina.elevate_rpe(height * _dome(retina.x, place, rng.uniform(50, 68)), 22)


def _mem(retina, rng):
    """Epiretinal membrane: a bright line on the inner surface, which it wrinkles; the pit is pulled flat."""
    phase = 2 * np.pi * retina.x / rng.uniform(26, 38) + 2.2 * np.sin(retina.x / rng.uniform(24, 40))
    reach = 0.3 + 0.7 * _bell(retina.x, rng.uniform(-50, 50), 60)
    retina.folds += retina.severity * rng.uniform(4, 6) * np.sin(phase + rng.uniform(0, 6)) * reach
    retina.membrane = np.maximum(retina.membrane, 215 * np.minimum(1, 0.4 + reach))
    retina.inner_swelling += rng.uniform(6, 11) * _bell(retina.x, 0, 60)
    retina.pit *= 0.12


def _fld(retina, rng):
    """Intraretinal fluid: a few large cystoid pockets, parted by thin septa, in a swollen centre."""
    s, place = retina.severity, rng.uniform(-16, 16)
    retina.outer_swelling += s * rng.uniform(26, 34) * _bell(retina.x, place, 46)
    retina.inner_swelling += s * 6 * _bell(retina.x, place, 60)
    retina.pit *= 0.3
    edges = [place - 25 * s, place + 25 * s]  # the next pockets begin where the middle one ends
    retina.include(place, 0.55, 25 * s, rng.uniform(18, 23) * s, FLUID_GREY)
    for side, scale in ((0, 0.8), (1, 0.75), (0, 0.5), (1, 0.45))[: rng.integers(2, 5)]:
        sign, rx = 2 * side - 1, s * scale * rng.uniform(18, 24)
        depth = 0.58 + rng.uniform(-0.08, 0.06)
        retina.include(edges[side] + sign * (rx + 1), depth, rx, s * scale * rng.uniform(15, 22), FLUID_GREY)
        edges[side] += sign * 2 * (rx + 1)


def _exu(retina, rng):
    """Hard exudates: clusters of very bright lipid in the outer plexiform layer, with shadows behind."""
    side = rng.choice([-1, 1])
    for centre in (side * rng.uniform(35, 60), -side * rng.uniform(30, 90), side * rng.uniform(80, 105)):
        for _ in range(rng.integers(6, 11)):
            r = retina.severity * rng.uniform(2.5, 6.5)
            x, depth = centre + rng.normal(0, 9), 0.6 + rng.normal(0, 0.07)
            retina.include(x, depth, r * rng.uniform(1, 1.5), r, rng.uniform(190, 240), shadow=0.35)


def _cnv(retina, rng):
    """Choroidal neovascularisation: a bright fuzzy mass that breaks through the RPE into the retina."""
    s, place = retina.severity, rng.uniform(-40, 40)
    retina.damage = np.maximum(retina.damage, 0.9 * _bell(retina.x, place, 20))
    retina.outer_swelling += s * 18 * _bell(retina.x, place, 32)
    for offset in np.linspace(-26, 26, 9):
        size = s * (1 - 0.45 * abs(offset) / 26)  # a spindle, thickest in the middle
        depth = 0.98 - rng.uniform(0.02, 0.25) * size
        retina.include(place + offset, depth, s * rng.uniform(11, 16), size * rng.uniform(16, 21),
                       rng.uniform(125, 190), shadow=0.12, fuzzy=True)


def _rvo(retina, rng):
    """Vein occlusion: half of the retina swollen, its inner layers bright with shadow below, cysts."""
    s, side = retina.severity, rng.choice([-1, 1])
    half = 1 / (1 + np.exp(-(side * retina.x - 12) / 12))
    retina.inner_swelling += s * rng.uniform(30, 40) * half
    retina.inner_gain *= 1 + 0.5 * half
    retina.pit *= 0.6
    place = 32
    while place < 118:
        size = s * rng.uniform(0.6, 1.25)
        retina.include(side * place, rng.uniform(0.46, 0.68), 10 * size, 8.5 * size, rng.uniform(2, 12))
        place += rng.uniform(14, 26)
    for _ in range(4):  # flame haemorrhages in the nerve fibre layer
        x, rx = side * rng.uniform(25, 115), rng.uniform(10, 18)
        retina.include(x, 0.1, rx, rng.uniform(4, 6), 170, shadow=0.45, fuzzy=True)


# NOR adds nothing: it is the absence of all others.
FINDINGS = {
    "AMD": _amd, "WAMD": _wamd, "DR": _dr, "CSC": _csc, "PED": _ped, "MEM": _mem, "FLD": _fld, "EXU": _exu,
    "CNV": _cnv, "RVO": _rvo,
}


def draw_scan(labels, seed, scan=0, size=SIDE):
    """Draw scan number `scan` of the eye `seed` (an int or a tuple of ints >= 0): uint8 (size, size).

    `labels` holds names of LABELS. Scans of one eye share its anatomy and findings; they differ in position,
    tilt, magnification, speckle and a little in the extent of the findings. Nasal is right: a right eye.
    """
    unknown = sorted(set(labels) - set(LABELS))
    if unknown or ("NOR" in labels and len(set(labels)) > 1):
        raise ValueError(f"labels {sorted(labels)}: expected NOR alone or some of {' '.join(LABELS[1:])}")
    if size < 32:
        raise ValueError(f"size {size}: expected at least 32 pixels")
    seed = seed if isinstance(seed, tuple) else (seed,)
    retina = _healthy_retina(Eye.draw(_rng("eye", *seed)), _rng("pose", *seed, scan))
    for name, finding in FINDINGS.items():
        if name in labels:
            finding(retina, _rng(name, *seed))
    grey = _render(retina, _rng("texture", *seed, scan))
    image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    return np.asarray(image if size == SIDE else image.resize((size, size), Image.Resampling.LANCZOS))


def _rng(purpose, *numbers):
    # The length goes first because numpy pads seeds with zeros: [1] and [1, 0] would be the same stream.
    return np.random.default_rng([len(numbers), *purpose.encode(), *numbers])


def _healthy_retina(eye, rng):
    """The retina of `eye` in the pose of one scan, without findings."""
    column = np.arange(SIDE)
    x = (column - SIDE / 2 - rng.normal(0, 12)) * rng.uniform(0.93, 1.07)
    tilt = np.clip(rng.normal(0, 0.06), -0.16, 0.16)
    bruch = eye.height + rng.normal(0, 5) + tilt * x - eye.curvature * (x / (SIDE / 2)) ** 2
    knots = np.arange(0, SIDE + 16, 16)
    bends = [np.interp(column, knots, rng.standard_normal(len(knots))) for _ in LAYERS]
    wobble = 1 + 0.1 * np.array([_spread(bend, 8) for bend in bends])
    return Retina(eye, x, bruch, wobble, severity=rng.uniform(0.9, 1.1))


def _boundaries(retina):
    """Retina -> y of every boundary from the inner surface to Bruch's membrane: (len(LAYERS) + 5, SIDE)."""
    eye, x = retina.eye, retina.x
    pit = retina.pit * eye.pit_depth * np.exp(-np.abs(x / eye.pit_width) ** 1.8)
    layers = retina.wobble * [eye.thickness * size * (1 - lost * pit) for _, size, lost, _ in LAYERS]
    layers[0] *= 1 + eye.nasal * np.clip(x / 128, -0.6, 1)
    layers[:INNER] *= 1 + retina.inner_swelling / np.maximum(layers[:INNER].sum(0), 8)
    # What lifts the retina from below shows less on its surface: the ONL over it is pressed thin.
    lift = retina.elevation + retina.fluid + retina.material
    give = np.maximum(_spread(lift, 16) - lift, 4 - layers[ONL])
    layers[ONL] += retina.outer_swelling + give
    below = [retina.fluid, retina.material, np.full(SIDE, RPE_THICKNESS), retina.elevation]
    heights = np.cumsum(np.vstack([np.zeros(SIDE), *below[::-1], layers[::-1]]), axis=0)[::-1]
    y = retina.bruch - heights
    y[:2] += retina.folds * [[1], [0.7]]
    return y + max(0, 14 - y[SURFACE].min())  # the retina stays in the picture


def _spread(profile, width):
    """Blur a profile (SIDE,) with a bell of `width` pixels."""
    bell = _bell(np.arange(-3 * width, 3 * width + 1), 0, width)
    return np.convolve(np.pad(profile, 3 * width, "edge"), bell / bell.sum(), "valid")


def _render(retina, rng):
    """Retina -> grey levels (SIDE, SIDE), float32."""
    eye = retina.eye
    boundaries = _boundaries(retina).astype(np.float32)
    signal = _layers(retina, boundaries)
    signal *= 1 + 0.09 * _noise(SIDE // 2, SIDE // 8, rng)  # fibres run sideways
    signal += _choroid(eye, boundaries[BRUCH], rng)
    light = _vessels(retina, boundaries, rng)
    reflex = [Inclusion(0, 0.03, 2, 1.5, 190)] if rng.random() < 0.4 and retina.pit == 1 else []
    for inclusion in retina.inclusions + reflex:  # an intact pit may mirror the beam
        _include(signal, light, retina, boundaries, inclusion)
    signal = _smooth(signal * light)
    fall_off = np.linspace(1, rng.uniform(0.75, 1), SIDE)[:: rng.choice([-1, 1])]  # beams are seldom centred
    haze = rng.uniform(0, 8) * np.abs(_noise(8, SIDE, rng)) * np.exp(-_rows() / rng.uniform(6, 30))
    empty = eye.background + haze * (not eye.averaged)
    grey = empty + eye.gain * rng.uniform(0.95, 1.05) * fall_off * signal
    return grey * _speckle(eye.speckle * (1.5 - 0.5 * np.clip(signal / 60, 0, 1)), rng)


def _rows():
    return np.arange(SIDE, dtype=np.float32)[:, None]


def _layers(retina, boundaries):
    """Grey level above the background of everything over Bruch's membrane: (SIDE, SIDE)."""
    levels = [factor * grey for factor, (*_, grey) in zip(retina.eye.reflectivity, LAYERS, strict=True)]
    levels[:INNER] = [grey * retina.inner_gain for grey in levels[:INNER]]
    levels[ONL] = levels[ONL] * (1 + retina.outer_swelling / 35)  # oedema scatters
    dimmed = (1 - retina.damage) * (1 - 0.4 * np.clip(retina.fluid / 8, 0, 1))  # photoreceptors off the RPE
    levels[-2:] = [grey * dimmed for grey in levels[-2:]]  # EZ and outer segments
    levels += [FLUID_GREY, MATERIAL_GREY, RPE_GREY * (1 - 0.85 * retina.damage), retina.elevation_grey, 0]
    signal, above = np.zeros((SIDE, SIDE), np.float32), 0
    for k, (boundary, below) in enumerate(zip(boundaries, levels, strict=True)):
        width = 4.0 if 1 <= k <= INNER else 1.6  # nerve cell layers blend, the membranes are sharp
        step = np.asarray(below - above, np.float32)
        signal += step * np.clip((_rows() - boundary) / width + 0.5, 0, 1)
        above = below
    if retina.membrane.any():  # it spans the folds from crest to crest
        crest = np.minimum(boundaries[SURFACE], _spread(boundaries[SURFACE], 10)) - 0.5
        line = np.exp(-0.5 * ((_rows() - crest.astype(np.float32)) / 1.7) ** 2)
        signal = np.maximum(signal, retina.membrane.astype(np.float32) * line)
    return signal


def _choroid(eye, bruch, rng):
    """Grey level under Bruch's membrane: it fades with depth and is mottled by vessels; (SIDE, SIDE)."""
    depth = _rows() - bruch
    lobes = _noise(9, 12, rng) if eye.averaged else _noise(22, 32, rng)  # averaging shows the large vessels
    reach = eye.penetration * np.clip(1 + 0.3 * lobes, 0.4, 1.8)  # its lower limit is ragged
    fade = np.exp(-((np.maximum(depth, 0) / reach) ** 1.6))
    grain = 1 + 0.15 * _noise(40, 50, rng)
    return CHOROID_GREY * np.clip(depth / 2, 0, 1) * fade * grain


def _vessels(retina, boundaries, rng):
    """Shadows of retinal vessels: the share of light that arrives, (SIDE, SIDE)."""
    light = np.ones((SIDE, SIDE), np.float32)
    for place in retina.eye.vessels:
        if abs(place) > 45:  # the fovea has none
            shade = 0.3 * _bell(retina.x, place + rng.normal(0, 2), 2.4).astype(np.float32)
            light -= shade * np.clip((_rows() - boundaries[1]) / 6, 0, 1)
    return np.maximum(light, 0.3)


def _include(signal, light, retina, boundaries, inclusion):
    """Paint one inclusion into `signal` and its shadow into `light`, both (SIDE, SIDE), in place."""
    if not retina.x[0] < inclusion.x < retina.x[-1]:
        return
    column = round(np.interp(inclusion.x, retina.x, np.arange(SIDE)))
    top, bottom = boundaries[SURFACE, column], boundaries[RPE, column]
    row = round(top + inclusion.depth * (bottom - top))
    rx, ry = inclusion.rx, inclusion.ry
    reach = 1.8 if inclusion.fuzzy else 1.4
    rows = slice(max(0, row - int(reach * ry)), row + int(reach * ry) + 1)
    columns = slice(max(0, column - int(reach * rx)), column + int(reach * rx) + 1)
    window = signal[rows, columns]  # a view
    height, width = window.shape
    y = np.arange(rows.start, rows.start + height)[:, None]
    x = np.arange(columns.start, columns.start + width)
    angle = np.arctan2((y - row) / ry, (x - column) / rx)
    # Nature draws no ellipses. The outline follows from the place, so that all scans of an eye show the same.
    outline = 1 + 0.13 * np.sin(2 * angle + inclusion.x) + 0.09 * np.sin(3 * angle + 40 * inclusion.depth)
    radius = np.hypot((x - column) / rx, (y - row) / ry) / outline
    edge = np.exp(-(radius**2.5)) if inclusion.fuzzy else np.clip((1 - radius) * min(rx, ry) / 3 + 0.5, 0, 1)
    window += edge * (y > boundaries[SURFACE, columns]) * (inclusion.grey - window)  # none in the vitreous
    if inclusion.shadow:
        across = _bell(np.arange(SIDE), column, 0.7 * rx)
        down = np.clip((np.arange(SIDE) - row) / ry - 1, 0, 1)
        light *= (1 - inclusion.shadow * np.outer(down, across)).astype(np.float32)


def _noise(rows, columns, rng):
    """Smooth noise of unit variance from a grid of rows x columns cells: (SIDE, SIDE), float32."""
    coarse = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    fine = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return fine / fine.std()


def _smooth(image):
    """The point spread of the device: weights 1 2 1 along both axes."""
    image = np.pad(image, 1, "edge")
    image = 0.5 * image[1:-1] + 0.25 * (image[2:] + image[:-2])
    return 0.5 * image[:, 1:-1] + 0.25 * (image[:, 2:] + image[:, :-2])


def _speckle(strength, rng):
    """Log-normal speckle of mean 1 and standard deviation `strength` (SIDE, SIDE), correlated over two pixels."""
    grain = _smooth(rng.standard_normal((SIDE, SIDE), np.float32))
    grain = grain / grain.std() + 0.3 * _noise(SIDE, SIDE // 3, rng)  # a little wider than high
    return np.exp(strength * grain - 0.5 * strength**2)


def read(count, image_size=SIDE, seed=0):
    """`count` phantoms -> Collection. Image i depends on `seed` and i alone, not on `count`.

    Patients have 1 to 4 images of one or two eyes; all images of an eye have its labels.
    """
    return Collection(LABELS, islice(_endless_patients(seed, image_size), count), count)


def _endless_patients(seed, size):
    for patient in count_up():
        rng = _rng("patient", seed, patient)
        scans = rng.choice(4, p=SCANS_PER_PATIENT) + 1
        first_eye = rng.integers(2)
        right = scans if rng.random() < 0.5 else (scans + rng.integers(2)) // 2
        per_eye = (right, scans - right)[:: 1 if first_eye == 0 else -1]
        labels = draw_labels(rng)
        both = (labels, labels if rng.random() < SAME_DIAGNOSIS else draw_labels(rng))
        for eye, name in enumerate(("OD", "OS")):
            vector = tuple(int(label in both[eye]) for label in LABELS)
            for scan in range(per_eye[eye]):
                yield Record(f"p{patient:04d}_{name}_{scan + 1}", vector, patient=f"p{patient:04d}", eye=name,
                             draw=partial(_draw, both[eye], (seed, patient, eye), scan, size, mirrored=name == "OS"))


def _draw(labels, seed, scan, size, mirrored):
    """A scan as PIL image, mode L; left eyes are drawn as right ones and mirrored."""
    image = Image.fromarray(draw_scan(labels, seed, scan, size))
    return ImageOps.mirror(image) if mirrored else image


def draw_labels(rng):
    """The labels of one eye, drawn from DIAGNOSES: a set of names."""
    names = list(DIAGNOSES)
    shares = np.array([DIAGNOSES[name][0] for name in names])
    leading = names[rng.choice(len(names), p=shares / shares.sum())]
    return {leading} | {name for name, chance in DIAGNOSES[leading][1].items() if rng.random() < chance}
