"""Arenas: floor, walls, table, scenery, lights. LIBERO's classes place the cameras and size the plain table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from .shapes import Body, Colour, Part, about, box, cylinder, painted, placed
from .writer import add_body, add_geom, numbers, picture, render

_FLOOR_MATERIAL, _WALL_MATERIAL = "floorplane", "walls_mat"


@dataclass(frozen=True)
class Arena:
    """A room.

    Attributes:
        file: path inside the asset folder.
        wall: colour of the walls.
        floor: two colours of the floor's tiles.
        table: colour of a plain table, which LIBERO's arena class resizes; None for none.
        furniture: a table with a shape of its own, under the body name that LIBERO looks for.
        scenery: parts that are only seen.
        floor_body: LIBERO's rooms without a plain table keep the floor in a body of its own.
    """

    file: str
    wall: Colour
    floor: tuple[Colour, Colour]
    table: Colour | None = None
    furniture: Body | None = None
    scenery: Sequence[Part] = ()
    floor_body: bool = False


def _assets(root: Element, arena: Arena) -> None:
    """Textures made by MuJoCo. LIBERO renames the files of `texplane` and `tex-wall`; a builtin texture reads none."""
    asset = SubElement(root, "asset")
    sky = {"type": "skybox", "builtin": "gradient", "rgb1": "0.9 0.9 1", "rgb2": "0.2 0.3 0.4"}
    SubElement(asset, "texture", {**sky, "width": "32", "height": "192"})
    for name, builtin, pixels, colours in (
        ("texplane", "checker", "64", arena.floor),
        ("tex-wall", "flat", "2", (arena.wall, arena.wall)),
    ):
        texture = {"name": name, "type": "2d", "builtin": builtin, "file": "none.png", "width": pixels}
        rgb = {"rgb1": numbers(*colours[0]), "rgb2": numbers(*colours[1])}
        SubElement(asset, "texture", {**texture, "height": pixels, **rgb})
    floor = {"name": _FLOOR_MATERIAL, "texture": "texplane", "texrepeat": "3 3", "texuniform": "true"}
    SubElement(asset, "material", {**floor, "specular": "0", "shininess": "0", "reflectance": "0"})
    # Walls face away from the lights: without emission the room is dark.
    SubElement(asset, "material", {"name": _WALL_MATERIAL, "rgba": numbers(*arena.wall, 1.0), "emission": "0.4"})


def _add_floor(world: Element, arena: Arena) -> None:
    parent = SubElement(world, "body", {"name": "floor", "pos": "0 0 0"}) if arena.floor_body else world
    floor = {"name": "floor", "type": "plane", "size": "3 3 0.125", "condim": "3", "group": "1"}
    SubElement(parent, "geom", {**floor, "pos": "0 0 0", "material": _FLOOR_MATERIAL})


def _add_walls(world: Element, arena: Arena) -> None:
    def wall(x: float, y: float, half_width: float, degrees: float) -> Part:
        return Part("box", (half_width, 0.01, 1.5), arena.wall, (x, y, 1.5), about("z", degrees))

    walls = {
        "wall_rear": wall(-2.0, 0.0, 3.0, 90.0),
        "wall_left": wall(0.5, 3.0, 2.5, 0.0),
        "wall_right": wall(0.5, -3.0, 2.5, 0.0),
        "wall_front": wall(3.0, 0.0, 3.0, 90.0),
    }
    for name, part in walls.items():
        add_geom(world, part, {**picture(part), "name": f"{name}_visual", "material": _WALL_MATERIAL})


def _add_table(world: Element, colour: Colour) -> None:
    """LIBERO sets size and place of the board and of the four legs."""
    table = SubElement(world, "body", {"name": "table", "pos": "0 0 0.4"})
    board = box((-0.4, -0.4, -0.4), (0.4, 0.4, 0.4), colour)
    add_geom(table, board, {"name": "table_collision", "group": "0", "friction": "1 0.005 0.0001"})
    add_geom(table, board, {**picture(board), "name": "table_visual"})
    SubElement(table, "site", {"name": "table_top", "pos": "0 0 0.4", "size": "0.001", "rgba": "0 0 0 0"})
    leg = Part("cylinder", (0.05, 0.1), colour)
    for k in range(1, 5):
        add_geom(table, leg, {**picture(leg), "name": f"table_leg{k}_visual"})


def _add_lights(world: Element) -> None:
    for name, position in (("light1", "1 1 4"), ("light2", "-3 -3 4")):
        light = {"name": name, "pos": position, "dir": "0 -0.15 -1", "directional": "false", "castshadow": "false"}
        SubElement(
            world, "light", {**light, "ambient": "0.15 0.15 0.15", "diffuse": "0.8 0.8 0.8", "specular": "0.3 0.3 0.3"}
        )


def _add_cameras(world: Element) -> None:
    for name, position, rotation in (
        ("frontview", "1 0 1.45", "0.56 0.43 0.43 0.56"),
        ("birdview", "-0.2 0 3", "0.7071 0 0 0.7071"),
        ("agentview", "0.5 0 1.35", "0.653 0.271 0.271 0.653"),
        ("sideview", "-0.0565 1.2761 1.488", "0.0099 0.0069 0.5912 0.8064"),
    ):
        SubElement(world, "camera", {"name": name, "mode": "fixed", "pos": position, "quat": rotation})


def arena_xml(arena: Arena) -> str:
    """The XML text of an arena."""
    root = Element("mujoco", {"model": arena.file.rsplit("/", 1)[-1].removesuffix(".xml")})
    _assets(root, arena)
    world = SubElement(root, "worldbody")
    _add_floor(world, arena)
    _add_walls(world, arena)
    if arena.table is not None:
        _add_table(world, arena.table)
    if arena.furniture is not None:
        add_body(world, arena.furniture, density=100.0)
    for part in arena.scenery:
        add_geom(world, part, picture(part))
    _add_lights(world)
    _add_cameras(world)
    return render(root)


_GREY: Colour = (0.60, 0.61, 0.63)
_TILES: tuple[Colour, Colour] = ((0.82, 0.80, 0.77), (0.76, 0.74, 0.71))
_PLANKS: tuple[Colour, Colour] = ((0.62, 0.47, 0.33), (0.56, 0.42, 0.29))
_PALE_WOOD: Colour = (0.90, 0.82, 0.70)
_WALNUT: Colour = (0.36, 0.24, 0.17)
_OAK: Colour = (0.66, 0.45, 0.24)


def _kitchen_scenery() -> list[Part]:
    counter, stone, tiles = (0.27, 0.29, 0.22), (0.12, 0.12, 0.13), (0.75, 0.70, 0.58)
    return [
        box((-1.95, -2.9, 0.0), (-1.40, 2.9, 0.87), counter),
        box((-1.95, -2.9, 0.87), (-1.36, 2.9, 0.91), stone),
        box((-1.985, -2.9, 0.91), (-1.975, 2.9, 1.40), tiles),
    ]


def _low_table() -> Body:
    parts = [
        box((-0.824, -0.620, 0.4131), (0.339, 0.724, 0.4368), _WALNUT),
        box((-0.667, -0.821, 0.4131), (0.167, -0.620, 0.4368), _WALNUT),
        box((-0.667, 0.724, 0.4131), (0.167, 0.903, 0.4368), _WALNUT),
        box((-0.660, -0.185, 0.0), (0.160, 0.685, 0.4131), _WALNUT),
    ]
    return Body("living_room_table", parts)


def _desk() -> Body:
    corners = ((-0.50, -0.69), (-0.50, 0.71), (0.50, -0.69), (0.50, 0.71))
    legs = [box((x - 0.02, y - 0.05, 0.0), (x + 0.02, y + 0.05, 0.8135), _OAK) for x, y in corners]
    return Body("study_table", [box((-0.689, -1.393, 0.8135), (0.689, 1.393, 0.8851), _OAK), *legs])


def _study_scenery() -> list[Part]:
    green, pot, shelf = (0.18, 0.42, 0.16), (0.45, 0.28, 0.18), (0.86, 0.86, 0.84)
    plant = [cylinder(0.16, 0.0, 0.30, pot), cylinder(0.03, 0.30, 0.9, pot)]
    leaves = Part("ellipsoid", (0.22, 0.22, 0.30), green, (0.0, 0.0, 1.05), solid=False)
    return [
        *placed([*plant, leaves], (-1.75, 0.55, 0.0)),
        *painted([box((-1.95, -1.40, 0.0), (-1.60, -0.60, 1.6), shelf)]),
    ]


ARENAS = (
    Arena("scenes/libero_tabletop_base_style.xml", _GREY, _TILES, table=_PALE_WOOD),
    Arena("scenes/libero_floor_base_style.xml", _GREY, _TILES, floor_body=True),
    Arena(
        "scenes/libero_kitchen_tabletop_base_style.xml",
        (0.72, 0.66, 0.50),
        _TILES,
        table=_PALE_WOOD,
        scenery=_kitchen_scenery(),
    ),
    Arena(
        "scenes/libero_living_room_tabletop_base_style.xml",
        (0.55, 0.40, 0.33),
        _PLANKS,
        furniture=_low_table(),
        floor_body=True,
    ),
    Arena("scenes/libero_study_base_style.xml", _GREY, _TILES, furniture=_desk(), scenery=_study_scenery()),
)
"""The room of each problem class that the four ten-task suites use."""
