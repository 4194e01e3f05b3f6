"""Kitchenware and the desk's things: bowl, plate, mugs, pots, bottle, book, caddy. Sizes are LIBERO's, rounded."""

from __future__ import annotations

from collections.abc import Sequence

from .shapes import (
    Body,
    Colour,
    Part,
    Site,
    Thing,
    about,
    box,
    compose,
    cylinder,
    drum,
    hidden,
    painted,
    placed,
    prism,
    ring,
)

_BLACK: Colour = (0.07, 0.07, 0.08)
_WHITE: Colour = (0.94, 0.94, 0.92)
_CREAM: Colour = (0.93, 0.88, 0.74)
_ALUMINIUM: Colour = (0.72, 0.73, 0.75)


def _ware(
    name: str, parts: list[Part], mass: float, folder: str = "turbosquid_objects", sites: Sequence[Site] = ()
) -> Thing:
    return Thing(f"{folder}/{name}/{name}.xml", Body("object", parts, sites), -0.06, 0.04, 0.025, mass)


def _bowl() -> list[Part]:
    """Two rings of tilted boxes on a disc; the lower ring is drawn as one disc, since nobody sees under the bowl."""
    lower = hidden(ring((0.023, 0.0045), (0.0425, 0.0160), 0.003, _BLACK))
    upper = ring((0.0425, 0.0155), (0.0515, 0.0515), 0.003, (0.12, 0.12, 0.13))
    return [
        *prism(0.024, 0.0016, 0.0068, _BLACK),
        cylinder(0.0360, 0.0016, 0.0100, _BLACK),
        cylinder(0.0425, 0.0100, 0.0155, (0.26, 0.26, 0.28)),
        # Edges, not faces, towards the axes: between parallel faces a bowl invites a grip across it, which slips.
        *placed([*lower, *upper], rotation=about("z", 360.0 / 32)),
    ]


def _plate() -> list[Part]:
    """A disc in a sloping rim; a wider drawn disc makes the rim a coloured band."""
    return [
        *prism(0.032, -0.0025, 0.0045, _WHITE),
        cylinder(0.050, 0.0020, 0.0098, _WHITE),
        *ring((0.030, 0.0010), (0.0665, 0.0137), 0.0045, (0.88, 0.42, 0.42), segments=12),
    ]


def _ramekin() -> list[Part]:
    glaze, rim = (0.86, 0.88, 0.90), (0.45, 0.25, 0.12)
    return [
        *drum(0.034, 0.0009, 0.0073, glaze),
        *ring((0.0351, 0.0010), (0.0413, 0.0422), 0.0050, glaze, segments=12),
        *painted(ring((0.0406, 0.0370), (0.0415, 0.0429), 0.0058, rim, segments=12)),
    ]


def _wine_bottle() -> list[Part]:
    glass, foil = (0.05, 0.13, 0.07), (0.50, 0.06, 0.10)
    return [
        *drum(0.0205, 0.0011, 0.0690, glass),
        *drum(0.0150, 0.0690, 0.0810, glass, sides=8),
        *drum(0.0105, 0.0810, 0.0950, glass, sides=8),
        *drum(0.0073, 0.0950, 0.1580, foil, sides=8),
        cylinder(0.0209, 0.0170, 0.0520, _CREAM),
    ]


def _porcelain_mug() -> list[Part]:
    cup = [
        *drum(0.0240, 0.0024, 0.0128, _WHITE, sides=8),
        *ring((0.0260, 0.0065), (0.0410, 0.0420), 0.0030, _WHITE, segments=12),
        *ring((0.0410, 0.0420), (0.0410, 0.1085), 0.0048, _WHITE, segments=12),
    ]
    bar = Part("box", (0.0198, 0.0080, 0.0038), _WHITE)
    return [
        *placed(cup, (0.0159, -0.0008, 0.0)),
        box((-0.0633, -0.0080, 0.0363), (-0.0558, 0.0080, 0.0758), _WHITE),
        *placed([bar], (-0.0416, 0.0, 0.0286), about("y", 28.7)),
        *placed([bar], (-0.0463, 0.0, 0.0834), about("y", -34.7)),
    ]


def _red_mug() -> list[Part]:
    red = (0.75, 0.05, 0.06)
    cup = [
        *drum(0.0250, 0.0027, 0.0078, red, sides=8),
        *ring((0.0255, -0.0014), (0.0408, 0.1304), 0.0070, red, segments=10),
    ]
    handle = [
        *placed([Part("box", (0.0029, 0.0076, 0.0342), red)], (0.0368, 0.0, 0.0504), about("y", 42.6)),
        *placed([Part("box", (0.0027, 0.0069, 0.0192), red)], (0.0547, 0.0, 0.0944), about("y", -5.9)),
        *placed([Part("box", (0.0182, 0.0069, 0.0027), red)], (0.0346, 0.0, 0.1116), about("y", -8.2)),
    ]
    return [*placed(cup, (-0.0154, -0.0017, 0.0)), *placed(handle, (0.0, 0.0011, 0.0))]


def _yellow_mug() -> list[Part]:
    yellow = (0.93, 0.75, 0.10)
    cup = [
        *drum(0.0270, 0.0002, 0.0052, _WHITE, sides=8),
        *ring((0.0255, 0.0023), (0.0367, 0.0180), 0.0070, _WHITE),
        *ring((0.0367, 0.0160), (0.0481, 0.1026), 0.0080, _WHITE),
    ]
    return [
        *placed(cup, (-0.0183, 0.0, 0.0)),
        box((0.0599, -0.0088, 0.0267), (0.0683, 0.0088, 0.0852), yellow),
        *placed([Part("box", (0.0249, 0.0088, 0.0041), yellow)], (0.0402, 0.0, 0.0263), about("y", -11.8)),
        *placed([Part("box", (0.0217, 0.0088, 0.0041), yellow)], (0.0464, 0.0, 0.0796), about("y", -6.3)),
    ]


def _moka_pot() -> list[Part]:
    return [
        *drum(0.0335, -0.0661, 0.0670, _ALUMINIUM, sides=8),
        cylinder(0.0365, -0.0080, 0.0020, (0.50, 0.51, 0.53)),
        box((-0.0176, -0.0417, 0.0181), (0.0176, -0.0301, 0.0671), _ALUMINIUM),
        box((-0.0080, -0.0563, 0.0324), (0.0080, -0.0417, 0.0599), _ALUMINIUM),
        box((-0.0102, 0.0330, 0.0387), (0.0102, 0.0488, 0.0662), _BLACK),
        box((-0.0066, 0.0488, 0.0533), (0.0066, 0.0724, 0.0672), _BLACK),
        *placed([Part("box", (0.0066, 0.0141, 0.0070), _BLACK)], (0.0, 0.0755, 0.0539), about("x", -40.8)),
        *placed([Part("box", (0.0066, 0.0071, 0.0275), _BLACK)], (0.0, 0.0725, 0.0282), about("x", -26.9)),
        *placed([Part("box", (0.0066, 0.0071, 0.0101), _BLACK)], (0.0, 0.0576, 0.0023), about("x", -44.6)),
        box((-0.0052, -0.0073, 0.0670), (0.0052, 0.0046, 0.0857), _BLACK),
    ]


def _frying_pan() -> list[Part]:
    iron, steel = (0.13, 0.14, 0.15), (0.30, 0.31, 0.33)
    pan = [
        *drum(0.0770, 0.0010, 0.0123, iron),
        *ring((0.0785, 0.0040), (0.1000, 0.0405), 0.0072, steel),
    ]
    return [
        *placed(pan, (0.0072, 0.0, 0.0)),
        box((0.1000, -0.0100, 0.0090), (0.1400, 0.0120, 0.0380), _BLACK),
        *placed([Part("box", (0.0665, 0.0127, 0.0062), _BLACK)], (0.1926, 0.0, 0.0441), about("y", -7.4)),
    ]


def _book() -> list[Part]:
    pages = box((-0.0115, -0.0640, 0.0060), (0.0106, 0.0434, 0.1370), _CREAM)
    return [box((-0.0148, -0.0673, 0.0022), (0.0139, 0.0430, 0.1366), _BLACK), *painted([pages])]


def _caddy() -> list[Part]:
    """A box with a tall cell at either end and, between them, a low one in front and a higher one behind."""
    wood, dark = (0.40, 0.16, 0.12), (0.30, 0.11, 0.08)
    slope = Part("box", (0.0706, 0.0036, 0.0209), wood)
    sides = [
        part
        for y in (0.0706, 0.2084)
        for part in (
            box((-0.0706, y - 0.0036, 0.0119), (0.0706, y + 0.0036, 0.0785), wood),
            box((0.0046, y - 0.0036, 0.0785), (0.0644, y + 0.0036, 0.1116), wood),
            box((0.0433, y - 0.0036, 0.1116), (0.0665, y + 0.0036, 0.1500), wood),
            *placed([slope], (0.0, y, 0.0945), about("y", -34.9)),
        )
    ]
    return [
        box((-0.0755, -0.2169, 0.0014), (0.0755, 0.2169, 0.0138), dark),
        box((-0.0706, -0.0742, 0.0138), (0.0706, -0.0618, 0.1674), wood),
        box((-0.0706, -0.2156, 0.0138), (0.0706, -0.2032, 0.1674), wood),
        box((0.0628, -0.2098, 0.0138), (0.0708, 0.2098, 0.1683), wood),
        box((-0.0056, -0.0668, 0.0118), (0.0025, 0.0668, 0.0987), wood),
        box((-0.0709, -0.2098, 0.0138), (-0.0628, 0.2098, 0.0741), wood),
        box((-0.0709, -0.2164, 0.0741), (-0.0628, -0.0631, 0.1673), wood),
        *sides,
    ]


_CADDY_CELLS = (
    Site("right_contain_region", (0.00631, -0.14339, 0.06558), (0.06196, 0.06216, 0.06046), about("y", 180.0)),
    Site("left_contain_region", (0.00631, 0.14551, 0.06558), (0.06196, 0.06216, 0.06046), about("y", 180.0)),
    Site("back_contain_region", (0.03364, -0.00064, 0.08558), (0.02775, 0.06216, 0.06046), about("y", 180.0)),
    Site(
        "front_contain_region",
        (-0.03102, -0.00064, 0.04054),
        (0.02775, 0.03595, 0.06216),
        compose(about("y", 180.0), about("x", 90.0)),
    ),
)

_SCANNED = "stable_scanned_objects"

KITCHENWARE = (
    _ware("akita_black_bowl", _bowl(), 0.0056, _SCANNED),
    _ware("plate", _plate(), 0.0115, _SCANNED),
    _ware("glazed_rim_porcelain_ramekin", _ramekin(), 0.0097, _SCANNED),
    _ware("chefmate_8_frypan", _frying_pan(), 0.0503, _SCANNED),
    _ware("wine_bottle", _wine_bottle(), 0.0154),
    _ware("porcelain_mug", _porcelain_mug(), 0.0165),
    _ware("red_coffee_mug", _red_mug(), 0.0294),
    _ware("white_yellow_mug", _yellow_mug(), 0.0309),
    _ware("moka_pot", _moka_pot(), 0.0682),
    _ware("black_book", _book(), 0.0426),
    _ware("desk_caddy", _caddy(), 0.2780, sites=_CADDY_CELLS),
)
