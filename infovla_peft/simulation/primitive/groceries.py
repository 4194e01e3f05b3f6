"""Groceries: cans, cartons, bottles and packets, and the basket they go into. Sizes are LIBERO's, rounded."""

from __future__ import annotations

from .shapes import (
    Body,
    Colour,
    Part,
    Site,
    Thing,
    about,
    box,
    cylinder,
    drum,
    painted,
    placed,
)

_WHITE: Colour = (0.94, 0.94, 0.92)


def _grocery(
    name: str, parts: list[Part], mass: float, bottom: float = -0.06, top: float = 0.04, radius: float = 0.025
) -> Thing:
    return Thing(f"stable_hope_objects/{name}/{name}.xml", Body("object", parts), bottom, top, radius, mass)


def _packet(size: tuple[float, float, float], colour: Colour, band: Colour) -> list[Part]:
    """A flat packet with a band of another colour across its middle."""
    x, y, z = size
    return [
        box((-x, -y, -z), (x, y, z), colour),
        *painted([box((-x * 0.45, -y - 0.0003, -z - 0.0003), (x * 0.45, y + 0.0003, z + 0.0003), band)]),
    ]


def _butter() -> list[Part]:
    return _packet((0.0381, 0.0198, 0.0087), (0.95, 0.78, 0.10), (0.98, 0.94, 0.70))


def _cream_cheese() -> list[Part]:
    return _packet((0.0406, 0.0213, 0.0089), (0.16, 0.33, 0.75), (0.88, 0.92, 0.97))


def _upright(parts: list[Part]) -> list[Part]:
    """The parts, built around z, for a thing whose own y axis points up (LIBERO's cans, cartons and most bottles)."""
    return placed(parts, rotation=about("x", -90.0))


def _can(label: Colour, band: Colour) -> list[Part]:
    tin = (0.72, 0.73, 0.75)
    return placed(
        _upright(
            [
                *drum(0.0310, -0.0382, 0.0372, tin),
                *painted([cylinder(0.0314, -0.0330, 0.0320, label), cylinder(0.0317, -0.0080, 0.0060, band)]),
            ]
        ),
        (0.0, 0.0, -0.0035),
    )


def _gable_carton(colour: Colour, roof: Colour, panel: Colour) -> list[Part]:
    slope = Part("box", (0.0263, 0.0022, 0.0138), roof)
    face = box((-0.0165, -0.0268, -0.0450), (0.0165, 0.0268, 0.0150), panel)
    return [
        box((-0.0262, -0.0698, -0.0262), (0.0262, 0.0398, 0.0262), colour),
        *placed([slope], (0.0, 0.0478, 0.0134), about("x", 42.0)),
        *placed([slope], (0.0, 0.0478, -0.0134), about("x", -42.0)),
        box((-0.0264, 0.0555, -0.0035), (0.0264, 0.0614, 0.0035), roof),
        *painted(_upright([face])),
    ]


def _ketchup() -> list[Part]:
    red = (0.80, 0.05, 0.04)
    bottle = [
        box((-0.0280, -0.0172, -0.0724), (0.0280, 0.0172, -0.0060), red),
        box((-0.0238, -0.0180, -0.0060), (0.0238, 0.0180, 0.0150), red),
        box((-0.0186, -0.0180, 0.0150), (0.0186, 0.0180, 0.0362), red),
        *drum(0.0162, 0.0362, 0.0732, _WHITE, sides=8),
        *painted([box((-0.0180, -0.0176, -0.0600), (0.0180, 0.0176, -0.0180), _WHITE)]),
    ]
    return placed(_upright(bottle), (0.0004, 0.0, 0.0008))


def _salad_dressing() -> list[Part]:
    glass, cap, label = (0.72, 0.84, 0.60), (0.03, 0.36, 0.14), (0.95, 0.93, 0.80)
    bottle = [
        box((-0.0264, -0.0173, -0.0630), (0.0264, 0.0173, -0.0104), glass),
        box((-0.0180, -0.0173, -0.0727), (0.0180, 0.0173, -0.0630), glass),
        box((-0.0200, -0.0173, -0.0104), (0.0200, 0.0173, 0.0070), glass),
        box((-0.0130, -0.0150, 0.0070), (0.0130, 0.0150, 0.0358), glass),
        *drum(0.0165, 0.0358, 0.0728, cap, sides=8),
        *painted([box((-0.0190, -0.0178, -0.0540), (0.0190, 0.0178, -0.0220), label)]),
    ]
    return _upright(bottle)


def _bbq_sauce() -> list[Part]:
    brown, label, cap = (0.22, 0.08, 0.03), (0.95, 0.62, 0.10), (0.55, 0.30, 0.06)
    return [
        box((-0.0235, -0.0145, -0.0546), (0.0235, 0.0145, -0.0010), brown),
        box((-0.0181, -0.0143, -0.0010), (0.0181, 0.0143, 0.0262), brown),
        *drum(0.0135, 0.0262, 0.0525, cap, sides=8),
        *painted([box((-0.0238, -0.0149, -0.0400), (0.0238, 0.0149, -0.0150), label)]),
    ]


def _basket() -> Body:
    straw, rim = (0.76, 0.62, 0.40), (0.55, 0.40, 0.22)
    wall = Part("box", (0.0067, 0.0724, 0.0640), straw)
    edge = Part("box", (0.0071, 0.0745, 0.0060), rim, (0.0, 0.0, 0.0590), solid=False)
    long = placed([wall, edge], (0.0740, 0.0, 0.0766), about("y", 3.5))
    short = placed([wall, edge], (0.0688, 0.0, 0.0818), about("y", 2.6))
    floor = box((-0.0745, -0.0724, 0.0042), (0.0745, 0.0724, 0.0216), (0.62, 0.48, 0.30))
    sides = [part for k in range(4) for part in placed((long, short)[k % 2], rotation=about("z", 90.0 * k))]
    inside = Site("contain_region", (0.0, 0.0, 0.07185), (0.06108, 0.06108, 0.06949), about("z", 180.0))
    return Body("object", [floor, *sides], [inside])


GROCERIES = (
    _grocery("alphabet_soup", _can((0.10, 0.20, 0.60), (0.90, 0.88, 0.80)), 0.0259, bottom=-0.04),
    _grocery("tomato_sauce", _can((0.80, 0.10, 0.07), (0.12, 0.48, 0.18)), 0.0266),
    _grocery("milk", _gable_carton(_WHITE, (0.80, 0.14, 0.14), (0.80, 0.14, 0.14)), 0.0317, radius=0.03),
    _grocery("orange_juice", _gable_carton((0.96, 0.72, 0.08), (0.20, 0.55, 0.15), (0.96, 0.45, 0.05)), 0.0317),
    _grocery("ketchup", _ketchup(), 0.0232),
    _grocery("salad_dressing", _salad_dressing(), 0.0218),
    _grocery("bbq_sauce", _bbq_sauce(), 0.0122, top=0.06, radius=0.015),
    _grocery("butter", _butter(), 0.0053, bottom=-0.02, top=0.02, radius=0.02),
    _grocery("cream_cheese", _cream_cheese(), 0.0062, bottom=-0.025, top=0.025, radius=0.03),
    _grocery("chocolate_pudding", _packet((0.0401, 0.0232, 0.0137), (0.30, 0.12, 0.07), (0.80, 0.45, 0.50)), 0.0102),
    _grocery("cookies", _packet((0.0310, 0.0413, 0.0094), (0.72, 0.12, 0.35), (0.95, 0.80, 0.45)), 0.0096),
    Thing("stable_scanned_objects/basket/basket.xml", _basket(), -0.06, 0.04, 0.025, 0.1361),
)
