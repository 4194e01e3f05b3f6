"""Fixtures: what stands still, with drawers and knobs that move. Joints and region sites are LIBERO's interface."""

from __future__ import annotations

from .shapes import (
    Body,
    Colour,
    Joint,
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

_DARK_WOOD: Colour = (0.24, 0.14, 0.08)
_DRAWER_WOOD: Colour = (0.34, 0.20, 0.11)
_STEEL: Colour = (0.62, 0.64, 0.68)
_SILVER: Colour = (0.45, 0.47, 0.50)
_IRON: Colour = (0.10, 0.10, 0.11)
_PINE: Colour = (0.80, 0.60, 0.34)
_MAHOGANY: Colour = (0.40, 0.13, 0.08)


def _drawer(level: str, centre: float, handle: float, region: float, wood: Colour, metal: Colour) -> Body:
    """A drawer that slides towards -y, with the heights of its front panel, its handle and LIBERO's region in it."""
    low, high = centre - 0.0325, centre + 0.0325
    parts = [
        box((-0.105, -0.078, low - 0.0005), (0.1115, -0.066, high + 0.0005), wood),
        box((-0.103, 0.087, low), (0.110, 0.093, high - 0.003), wood),
        box((-0.104, -0.066, low), (-0.0995, 0.087, high - 0.003), wood),
        box((0.1065, -0.066, low), (0.111, 0.087, high - 0.003), wood),
        box((-0.0995, -0.066, low), (0.1065, 0.087, low + 0.008), wood),
        box((-0.047, -0.109, handle - 0.008), (0.042, -0.094, handle + 0.008), metal),
        box((-0.041, -0.094, handle - 0.005), (-0.030, -0.078, handle + 0.005), metal),
        box((0.024, -0.094, handle - 0.005), (0.035, -0.078, handle + 0.005), metal),
    ]
    inside = Site(f"{level}_region", (0.00328, 0.01128, region), (0.02993, 0.07561, 0.10224), about("y", 90.0))
    joint = Joint(f"{level}_level", "slide", (0.0, 1.0, 0.0), (-0.16, 0.01), damping=50.0)
    return Body(f"cabinet_{level}", parts, [inside], joint, mass=3.0)


def _cabinet(name: str, wood: Colour, drawer_wood: Colour, metal: Colour) -> Thing:
    walls = [
        box((-0.117, -0.079, 0.005), (-0.107, 0.1115, 0.2205), wood),
        box((0.1145, -0.079, 0.005), (0.1245, 0.1115, 0.2205), wood),
        # Thick: a drawer touches it after 1.7 mm, else it would give way to a hand that reaches for its handle.
        box((-0.107, 0.0947, 0.005), (0.1145, 0.1115, 0.2205), wood),
        box((-0.107, -0.070, 0.005), (0.1145, 0.0947, 0.0102), wood),
        box((-0.107, -0.070, 0.0785), (0.1145, 0.0947, 0.0801), wood),
        box((-0.107, -0.070, 0.1485), (0.1145, 0.0947, 0.1501), wood),
        box((-0.1233, -0.079, 0.2203), (0.131, 0.110, 0.223), wood),
    ]
    top = Site("top_side", (0.00354, 0.01567, 0.22152), (0.12534, 0.09438, 0.00147))
    drawers = [
        _drawer("top", 0.1835, 0.1840, 0.18563, drawer_wood, metal),
        _drawer("middle", 0.1140, 0.1105, 0.11690, drawer_wood, metal),
        _drawer("bottom", 0.0450, 0.0412, 0.04701, drawer_wood, metal),
    ]
    base = Body("base", walls, [top], bodies=drawers)
    return Thing(f"articulated_objects/{name}.xml", Body("object", bodies=[base]), -0.045, 0.045, 0.045)


def _stove() -> Thing:
    """A hot plate at x = 0.15 and a knob at the origin; LIBERO lights the site `burner` when the knob is turned."""
    plate: list[Part] = [
        box((-0.095, -0.095, -0.02), (0.095, 0.095, 0.0255), _SILVER),
        *painted([cylinder(0.072, 0.0255, 0.0275, _IRON), cylinder(0.045, 0.0275, 0.0280, _SILVER)]),
        *painted([cylinder(0.036, 0.0280, 0.0285, _IRON)]),
    ]
    sites = [
        Site("cook_region", (0.0, 0.0, 0.0), (0.075, 0.075, 0.0025)),
        Site("burner", (0.0, 0.0, 0.0288), (0.0625, 0.0005), kind="cylinder", colour=(0.9, 0.05, 0.05)),
    ]
    knob = [
        *placed(drum(0.0455, 0.0005, 0.0128, _IRON), (0.0013, 0.0044, 0.0)),
        box((-0.011, -0.017, 0.0128), (0.0135, 0.052, 0.050), _IRON),
        box((-0.011, -0.032, 0.0128), (0.0135, -0.017, 0.043), _IRON),
        box((-0.011, -0.0405, 0.0128), (0.0135, -0.032, 0.034), _IRON),
        *painted([box((-0.003, 0.020, 0.050), (0.005, 0.051, 0.0505), (0.85, 0.85, 0.85))]),
    ]
    joint = Joint("button", "hinge", (0.0, 0.0, 1.0), (-0.005, 2.1), damping=1.0)
    burner = Body("burner", plate, sites, bodies=[Body("burner_plate")], position=(0.15, 0.0, 0.0))
    button = Body("button", knob, joint=joint, rotation=about("z", 90.0), mass=3.0)
    base = Body("base", bodies=[burner, button])
    return Thing("articulated_objects/flat_stove.xml", Body("object", bodies=[base]), -0.045, 0.045, 0.045)


def _wine_rack() -> Thing:
    """Two shelves that lean back by 31 degrees, each with a lip in front, on a post with a foot."""
    lean = about("x", 31.3)
    whole = box((-0.1345, -0.079, -0.0045), (0.1345, 0.079, 0.0045), _PINE)
    lip = box((-0.132, -0.0011, -0.0087), (0.132, 0.0011, 0.0087), _PINE)
    parts = [
        *placed([whole], (0.0, -0.006, 0.251), lean),
        *placed([whole], (0.0, -0.0427, 0.1273), lean),
        *placed([lip], (0.0, -0.0748, 0.2207), lean),
        *placed([lip], (0.0, -0.1091, 0.0974), lean),
        *placed(
            [box((-0.0076, -0.009, -0.1615), (0.0076, 0.009, 0.1615), _MAHOGANY)],
            (0.0, 0.009, 0.170),
            about("x", -15.8),
        ),
        box((-0.0665, -0.124, 0.002), (0.0665, 0.129, 0.011), _MAHOGANY),
        box((-0.090, -0.060, 0.011), (0.090, 0.060, 0.022), _MAHOGANY),
    ]
    region = Site("top_region", (0.0, -0.08003, 0.21745), (0.10087, 0.022, 0.00251), about("x", -62.5))
    return Thing("turbosquid_objects/wine_rack/wine_rack.xml", Body("object", parts, [region]), -0.06, 0.04, 0.025)


def _microwave() -> Thing:
    """An open-fronted box whose door hangs on the left; the control panel stands beside the door."""
    shell, panel, glass = (0.16, 0.16, 0.18), (0.30, 0.31, 0.34), (0.42, 0.48, 0.55)
    case = [
        box((-0.1725, -0.088, 0.0), (-0.1435, 0.111, 0.187), shell),
        box((0.0635, -0.088, 0.0), (0.1725, 0.111, 0.187), shell),
        box((-0.1435, 0.0805, 0.0), (0.0635, 0.1105, 0.187), shell),
        box((-0.1435, -0.088, 0.168), (0.0635, 0.081, 0.187), shell),
        box((-0.1435, -0.088, 0.0), (0.0635, 0.080, 0.024), shell),
        box((0.0875, -0.1105, 0.0), (0.1725, -0.088, 0.187), panel),
        *painted([box((0.105, -0.1110, 0.120), (0.155, -0.1100, 0.160), (0.15, 0.55, 0.35))]),
    ]
    door = [
        box((0.0, -0.025, -0.0925), (0.259, -0.001, 0.0925), panel),
        box((0.2275, -0.064, -0.075), (0.2475, -0.044, 0.075), _STEEL),
        box((0.2275, -0.045, 0.055), (0.2475, -0.025, 0.075), _STEEL),
        box((0.2275, -0.045, -0.075), (0.2475, -0.025, -0.055), _STEEL),
        *painted([box((0.030, -0.0255, -0.060), (0.200, -0.0005, 0.060), glass)]),
    ]
    sites = [
        Site("top_side", (0.0, 0.01, 0.20), (0.12, 0.0835, 0.005)),
        Site("heating_region", (0.0, 0.01, 0.096), (0.12, 0.0835, 0.08)),
    ]
    joint = Joint("microjoint", "hinge", (0.0, 0.0, 1.0), (-2.094, 0.0), damping=0.5)
    hanging = Body("microdoorroot", door, joint=joint, position=(-0.1725, -0.088, 0.096))
    body = Body("object", case, sites, bodies=[hanging])
    return Thing("articulated_objects/microwave.xml", body, -0.06, 0.06, 0.015, density=212.0)


FIXTURES = (
    _cabinet("wooden_cabinet", _DARK_WOOD, _DRAWER_WOOD, _STEEL),
    _cabinet("white_cabinet", (0.86, 0.87, 0.88), (0.95, 0.95, 0.96), _SILVER),
    _stove(),
    _wine_rack(),
    _microwave(),
)
