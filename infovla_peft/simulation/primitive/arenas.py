"""Arenas: floor, walls, table, lights. The cameras come from LIBERO's problem classes."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement

from infovla_peft.simulation.primitive.shapes import Colour, Part, about, box
from infovla_peft.simulation.primitive.writer import add_geom, numbers, picture, render

_WALL: Colour = (0.60, 0.61, 0.63)
_TABLE: Colour = (0.90, 0.82, 0.70)
_FLOOR: tuple[Colour, Colour] = ((0.82, 0.80, 0.77), (0.76, 0.74, 0.71))
_FLOOR_MATERIAL = "floorplane"
_WALL_MATERIAL = "walls_mat"


def _assets(root: Element) -> None:
    """Textures made by MuJoCo. LIBERO renames the files of `texplane` and `tex-wall`; a builtin texture reads none."""
    asset = SubElement(root, "asset")
    sky = {"type": "skybox", "builtin": "gradient", "rgb1": "0.9 0.9 1", "rgb2": "0.2 0.3 0.4"}
    SubElement(asset, "texture", {**sky, "width": "32", "height": "192"})
    checker = {
        "name": "texplane",
        "type": "2d",
        "builtin": "checker",
        "file": "none.png",
        "width": "64",
        "height": "64",
    }
    SubElement(asset, "texture", {**checker, "rgb1": numbers(*_FLOOR[0]), "rgb2": numbers(*_FLOOR[1])})
    flat = {"name": "tex-wall", "type": "2d", "builtin": "flat", "file": "none.png", "width": "2", "height": "2"}
    SubElement(asset, "texture", {**flat, "rgb1": numbers(*_WALL), "rgb2": numbers(*_WALL)})
    floor = {"name": _FLOOR_MATERIAL, "texture": "texplane", "texrepeat": "3 3", "texuniform": "true"}
    SubElement(asset, "material", {**floor, "specular": "0", "shininess": "0", "reflectance": "0"})
    # Walls face away from the lights: without emission the room is dark.
    SubElement(asset, "material", {"name": _WALL_MATERIAL, "rgba": numbers(*_WALL, 1.0), "emission": "0.6"})


def _walls(world: Element) -> None:
    def wall(x: float, y: float, half_width: float, degrees: float) -> Part:
        return Part("box", (half_width, 0.01, 1.5), _WALL, (x, y, 1.5), about("z", degrees))

    walls = {
        "wall_rear": wall(-2.0, 0.0, 1.5, 90.0),
        "wall_leftcorner": wall(-1.25, 2.25, 1.06, 45.0),
        "wall_rightcorner": wall(-1.25, -2.25, 1.06, -45.0),
        "wall_left": wall(1.25, 3.0, 1.75, 0.0),
        "wall_right": wall(1.25, -3.0, 1.75, 0.0),
        "wall_front": wall(3.0, 0.0, 3.0, 90.0),
    }
    for name, part in walls.items():
        add_geom(world, part, {**picture(part), "name": f"{name}_visual", "material": _WALL_MATERIAL})


def _lights(world: Element) -> None:
    for name, position in (("light1", "1 1 4"), ("light2", "-3 -3 4")):
        light = {"name": name, "pos": position, "dir": "0 -0.15 -1", "directional": "false", "castshadow": "false"}
        SubElement(world, "light", {**light, "diffuse": "0.8 0.8 0.8", "specular": "0.3 0.3 0.3"})


def _table(world: Element) -> None:
    """LIBERO sets size and place of the board and of the four legs."""
    table = SubElement(world, "body", {"name": "table", "pos": "0 0 0.4"})
    board = box((-0.4, -0.4, -0.4), (0.4, 0.4, 0.4), _TABLE)
    add_geom(table, board, {"name": "table_collision", "group": "0", "friction": "1 0.005 0.0001"})
    add_geom(table, board, {**picture(board), "name": "table_visual"})
    SubElement(table, "site", {"name": "table_top", "pos": "0 0 0.4", "size": "0.001", "rgba": "0 0 0 0"})
    leg = Part("cylinder", (0.05, 0.1), _TABLE)
    for k in range(1, 5):
        add_geom(table, leg, {**picture(leg), "name": f"table_leg{k}_visual"})


def _camera(world: Element) -> None:
    for name, position, rotation in (
        ("frontview", "1 0 1.45", "0.56 0.43 0.43 0.56"),
        ("birdview", "-0.2 0 3", "0.7071 0 0 0.7071"),
        ("agentview", "0.5 0 1.35", "0.653 0.271 0.271 0.653"),
        ("sideview", "-0.0565 1.2761 1.488", "0.0099 0.0069 0.5912 0.8064"),
    ):
        SubElement(world, "camera", {"name": name, "mode": "fixed", "pos": position, "quat": rotation})


def tabletop_arena() -> str:
    """A table in the middle of a room (LIBERO-Goal, LIBERO-Spatial)."""
    root = Element("mujoco", {"model": "table_arena"})
    _assets(root)
    world = SubElement(root, "worldbody")
    floor = {"name": "floor", "type": "plane", "size": "3 3 0.125", "condim": "3", "group": "1"}
    SubElement(world, "geom", {**floor, "pos": "0 0 0", "material": _FLOOR_MATERIAL})
    _walls(world)
    _table(world)
    _lights(world)
    _camera(world)
    return render(root)


def floor_arena() -> str:
    """A room with nothing in it: objects stand on the floor (LIBERO-Object)."""
    root = Element("mujoco", {"model": "floor_arena"})
    _assets(root)
    world = SubElement(root, "worldbody")
    body = SubElement(world, "body", {"name": "floor", "pos": "0 0 0"})
    floor = {"name": "floor", "type": "plane", "size": "3 3 0.125", "condim": "3", "group": "1"}
    SubElement(body, "geom", {**floor, "pos": "0 0 0", "material": _FLOOR_MATERIAL})
    _walls(world)
    _lights(world)
    _camera(world)
    return render(root)


ARENAS = {
    "scenes/libero_tabletop_base_style.xml": tabletop_arena,
    "scenes/libero_floor_base_style.xml": floor_arena,
}
